import importlib.util
import json
import re
import shutil
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import support
from conftest import CAPTIONS, ROOT, call, launch, random_png
from support import results
from support.rows import parse_row
from support.scoring import Measured, Scorers
from unet import UNet, UNetConfig


@pytest.mark.parametrize("fields, kind", [
    ({}, "teacher"), ({"time_cond_proj_dim": 256, "lcm_grid": 10}, "student"),
    ({"lcm_grid": 10}, "student"), ({"time_cond_proj_dim": 256}, "student")])
def test_a_row_is_a_students_with_and_without_a_guidance_embedding(fields, kind):
    row = parse_row("unet_target@2", {}, lambda path: UNetConfig(**fields))
    assert row.kind == kind and row.calls() == {"teacher": 4, "student": 2}[kind]


# ---------------------------------------------------------------------------------------- scoring

def scorer(count):
    """-> Scorers by the pocket's reward and judge, the real pictures of the first so many."""
    args = evaluate.Config(limit=count)
    task = evaluate.load_task(args, 64)
    rewards = {key: evaluate.load_scorer(spec, "cpu")
               for key, spec in evaluate.specs_of(args, task).items()}
    features = rewards["judge"].image_features
    found = Scorers(task, rewards, features, lambda images: images, torch.device("cpu"))
    found.look_at_real(16)
    return found, task.real(range(count))


def measure(scorers, *rounds):
    """Rounds of one picture a prompt -> Measured, its summary's means."""
    read = lambda k, numbers: ([rounds[k][i] for i in numbers], None, [None] * len(numbers))
    found = Measured(read, len(rounds), scorers, 5)
    return found, {key: one["mean"] for key, one in found.summary(scorers).items()}


def test_judge_and_reward_prefer_the_right_picture_and_share_no_weights():
    scorers, real = scorer(32)
    (_, right), (_, wrong) = measure(scorers, real), measure(scorers, real[::-1])
    for key in ("reward", "judge"):
        assert right[key] > wrong[key] + 0.2
    assert right["top1"] > 0.6 and wrong["top1"] < 0.2
    # the same pictures in another order
    assert right["frechet"] == pytest.approx(0, abs=1e-5) and right["recall"] == 1
    weights = [
        {p.sum().item() for p in model.parameters() if p.ndim > 1}
        for model in scorers.rewards.values()]
    assert not weights[0] & weights[1]


def test_several_pictures_of_a_prompt_are_averaged():
    scorers, real = scorer(8)
    (one, right), (other, wrong) = measure(scorers, real), measure(scorers, real[::-1])
    both, means = measure(scorers, real, real[::-1])
    for key in ("reward", "judge", "top1", "frechet", "recall"):
        assert means[key] == pytest.approx((right[key] + wrong[key]) / 2, abs=1e-5)
    judged = np.concatenate([one.scores["judge"], other.scores["judge"]], axis=1)
    assert both.scores["judge"] == pytest.approx(judged, abs=1e-5)
    assert means["diversity"] > 0 and "diversity" not in right
    assert both.features.shape[:2] == (2, 8)


def test_the_noise_measures_are_of_pictures_beside_the_real_one_of_their_prompt():
    scorers, real = scorer(6)
    noisy = [Image.fromarray(np.array(one) ^ 3) for one in real]
    (_, clean), (_, rough) = measure(scorers, real), measure(scorers, noisy)
    assert clean["high_frequency"] == pytest.approx(1, abs=1e-5) and clean["roughness"] == 0
    assert measure(scorers, [one.resize((32, 32)) for one in real])[0].scores[
        "roughness"].shape == (6, 1)
    assert "roughness" not in measure(scorers, [one.resize((32, 32)) for one in real])[1]
    assert rough["high_frequency"] != clean["high_frequency"]


def test_pictures_of_several_sizes_are_scored_one_as_the_others():
    scorers, real = scorer(4)
    mixed = [real[0], real[1].resize((96, 80)), real[2].resize((96, 80)), real[3]]
    together, _ = scorers(mixed, range(4))
    for i, picture in enumerate(mixed):
        alone, _ = scorers([picture], [i])
        assert together["judge"][i] == pytest.approx(alone["judge"][0], abs=1e-5)


# ------------------------------------------------------------------------------------- the pocket

def read(out):
    return json.loads((out / "results.json").read_text())


def rows_of(out, capsys, *argv):
    """A comparison on the pocket without the slow teacher -> its rows, the words on the screen."""
    fixed = ["--n", 1, "--teacher-steps", 0, "--device", "cpu", "--precision", "fp32"]
    assert call(evaluate.main, *fixed, "--out", out, *argv) == 0
    return read(out)["rows"], capsys.readouterr().out


def test_shipped_student_draws_held_out_prompts_in_two_steps(tmp_path, capsys):
    ((row,), said) = rows_of(tmp_path, capsys, "--limit", 24)
    assert row["calls"] == 2 and row["summary"]["judge"]["mean"] > 0.5
    assert np.array(row["scores"]["judge"]).shape == (24, 1) and row["seconds_per_image"] > 0
    assert "| judge " in said and (tmp_path / "grid.png").is_file()
    columns = read(tmp_path)["columns"]
    assert columns["reward"]["trained"] and not columns["judge"]["trained"]
    assert list(columns)[0] == "frechet" and not columns["frechet"]["per_picture"]


def test_the_reward_that_is_asked_for_is_in_the_table_and_a_judge_as_reward_is_told(
        tmp_path, capsys):
    judge, mean = f"pocket={ROOT / 'pocket/judge'}", lambda row, key: row["summary"][key]["mean"]
    ((row,), said) = rows_of(tmp_path, capsys, "--limit", 8, "--reward", judge)
    assert mean(row, "reward") == pytest.approx(mean(row, "judge"), abs=1e-5)
    assert f"reward {judge}" in said and "its scores say nothing" in said
    (_, said) = rows_of(tmp_path, capsys, "--limit", 8, "--reward", f"jpeg*0.1+{judge}*2")
    assert "its scores say nothing" in said
    ((row,), said) = rows_of(tmp_path, capsys, "--limit", 8, "--reward", "jpeg")
    assert mean(row, "reward") < 0 < mean(row, "judge") and "say nothing" not in said


def recorded_row(count):
    """A row as build.py records it, of so many prompts."""
    scores = {key: [[0.5] * 4] * count for key in ("reward", "judge")}
    summary = {key: results.entry(0.5, 0.4, 0.6, "prompts") for key in scores}
    return {"name": "teacher, 50-step DDIM", "kind": "teacher", "steps": 50, "calls": 100,
            "seconds_per_image": 0.4, "n": 4, "seeds": [0, 1, 2, 3], "summary": summary,
            "win": None, "votes": None, "scores": scores, "pictures": None}


def test_recorded_rows_stand_only_beside_what_was_made_the_same_way(tmp_path, monkeypatch):
    row = recorded_row(256)
    old = {"name": row["name"], "calls": 100, "seconds_per_image": None, "reward": 0.7,
           "reward_se": 0.01, "judge": 0.6, "judge_se": 0.02, "top1": 0.6, "scores": [0.6] * 256}
    monkeypatch.setattr(evaluate, "RESULTS", tmp_path / "results.json")

    def rows(prompts=("x",) * 256, side=64, **changes):
        return evaluate.recorded(evaluate.Config(**changes), prompts, side)

    assert rows() == {}
    for kept in (row, old):  # as build.py writes now, and as it did before
        record = {"plain": kept | {"name": "student"}, "shipped": [kept]}
        (tmp_path / "results.json").write_text(json.dumps(record))
        both = rows()
        assert set(both) == {"teacher", "plain"}
        for found in both.values():
            assert "(recorded" in found["name"] and len(found["scores"]["judge"]) == 256
            assert found["summary"]["reward"]["mean"] > 0 and found["kind"] == "recorded"
        assert set(rows(guidance=2.0)) == set(rows(["x"] * 10)) == set(rows(side=32)) == set()
        assert set(rows(model="other")) == set(rows(data="other")) == set()
        assert set(rows(steps=4)) == set(rows(n=1)) == {"teacher"}
        assert set(rows(teacher_steps=20)) == {"plain"} == set(rows(teacher_steps=20, n=4))
        other = rows(reward="jpeg")  # by which the recorded pictures were not scored
        assert all("reward" not in found["summary"] for found in other.values())


def test_the_teachers_row_comes_from_the_record_unless_it_is_asked_to_draw(tmp_path, monkeypatch):
    def draw(self, unet, prompts, seeds, steps, w, solver="lcm", size=None, **more):
        drawn.append((solver, len(prompts)))
        return torch.rand(len(prompts), 3, 64, 64)

    record = {"plain": recorded_row(20) | {"name": "student"}, "shipped": [recorded_row(20)]}
    (tmp_path / "results.json").write_text(json.dumps(record))
    monkeypatch.setattr(evaluate, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(evaluate, "LIMIT", 20)
    monkeypatch.setattr(evaluate.Pipeline, "draw", draw)
    for teacher_n, expected in ((0, [("lcm", 20), ("ddim", 2)]), (1, [("ddim", 20), ("lcm", 20)])):
        drawn = []
        out = tmp_path / str(teacher_n)
        code = call(evaluate.main, "--n", 1, "--teacher-n", teacher_n, "--show", "3,19", "--out",
                    out, "--device", "cpu")
        assert code == 0 and drawn == expected
        names = [row["name"] for row in read(out)["rows"]]
        assert ("teacher, 50-step DDIM (recorded)" in names) == (teacher_n == 0)
        student = read(out)["rows"][-1]
        assert student["win"]["against"] == names[0] and student["win"]["n"] == 20
        assert len(list(out.glob("pictures/*/*/*.png"))) == 22 + 18 * teacher_n


def test_the_grid_shows_the_prompts_that_were_asked_for_under_their_names(tmp_path, monkeypatch):
    def draw(self, unet, prompts, seeds, *more):
        shades = torch.tensor(list(seeds)) / 10  # picture i has shade i / 10
        return shades.view(-1, 1, 1, 1).expand(-1, 3, 64, 64)

    monkeypatch.setattr(evaluate.Pipeline, "draw", draw)
    code = call(evaluate.main, "--limit", 8, "--n", 1, "--teacher-steps", 0, "--show", "3,1",
                "--out", tmp_path, "--device", "cpu")
    sheet = torch.from_numpy(np.array(Image.open(tmp_path / "grid.png"))).float() / 255
    assert code == 0
    student = sheet[-128:, -256:]  # the last row: two pictures, twice as large
    for column, shade in ((0, 0.3), (1, 0.1)):
        part = student[:, 128 * column:128 * (column + 1)]
        assert (part - shade).abs().max() < 0.01
    assert sheet[:-256, -256:].min() < 0.5 and sheet[-256:, :-256].min() < 0.5  # the words


# ------------------------------------------------------------------------------- tiny random models

@pytest.fixture
def options(model_folder, shard):
    """options(out, "--n", 2, ...) -> the arguments of evaluate.py for tiny random models."""
    def make(out, *more, **changes):
        values = dict(model=model_folder, unet=model_folder / "student", data=shard, limit=8, n=2,
                      judge=model_folder / "reward", reward="jpeg", teacher_steps=3, batch=3,
                      device="cpu", precision="fp32", show="0,2", out=out) | changes
        if "--rows" in more:
            values["teacher_steps"] = None
        return [word for key, value in values.items() if value is not None
                for word in (f"--{key.replace('_', '-')}", value)] + list(more)
    return make


@pytest.fixture
def judged(options, capsys):
    """judged(out, ...): evaluate.py in this process -> results.json, what it printed."""
    def run(out, *more, **changes):
        assert call(evaluate.main, *options(out, *more, **changes)) == 0, capsys.readouterr().err
        return read(out), capsys.readouterr().out
    return run


def table(said):
    """The lines of the table and those under it, without the times."""
    lines = [line for line in said.splitlines() if line.startswith(("| ", "wins:", "judge,", "±"))]
    return [re.sub(r"\| [\d.]* *\|$", "", line) for line in lines]


@pytest.fixture
def counted(monkeypatch):
    """Counts the pictures that are drawn, and their seeds."""
    drawn, draw = [], evaluate.Pipeline.draw

    def counting(self, unet, prompts, seeds, *more, **options):
        drawn.extend(seeds)
        return draw(self, unet, prompts, seeds, *more, **options)

    monkeypatch.setattr(evaluate.Pipeline, "draw", counting)
    return drawn


def test_the_same_command_twice_gives_the_same_table_and_draws_nothing_twice(
        judged, counted, tmp_path):
    first, said = judged(tmp_path, "--real")
    assert sorted(counted) == sorted([*range(8)] + [*range(16)])  # a teacher's of one round
    second, again = judged(tmp_path, "--real")
    assert len(counted) == 24 and said == again
    assert first | {"date": 0, "command": 0} == second | {"date": 0, "command": 0}


def test_killed_half_way_and_repeated_gives_the_same_and_draws_nothing_twice(
        judged, options, counted, tmp_path, monkeypatch):
    whole, said = judged(tmp_path / "whole")
    counted.clear()
    draw = evaluate.Pipeline.draw

    def dying(*arguments, **more):
        if len(counted) >= 12:
            raise KeyboardInterrupt
        return draw(*arguments, **more)

    monkeypatch.setattr(evaluate.Pipeline, "draw", dying)
    assert call(evaluate.main, *options(tmp_path / "killed")) == 130
    monkeypatch.setattr(evaluate.Pipeline, "draw", draw)
    assert 0 < len(counted) < 24
    found, again = judged(tmp_path / "killed")
    assert len(counted) == 24 and table(said) == table(again)
    scores = lambda results: [row["scores"] for row in results["rows"]]
    assert scores(whole) == scores(found)
    pictures = lambda out: {file.name: file for file in out.glob("pictures/*/*/*.png")}
    for name, file in pictures(tmp_path / "whole").items():
        other = pictures(tmp_path / "killed")[name]
        assert np.array_equal(np.array(Image.open(file)), np.array(Image.open(other)))


def test_two_processes_share_the_pictures_and_give_the_same_table(judged, options, tmp_path):
    one, said = judged(tmp_path / "one")
    output = launch(options(tmp_path / "two"), world=2, name="evaluate").succeed()
    assert table(output.replace("\r", "\n")) == table(said)  # after the progress bars
    two = read(tmp_path / "two")
    for row, other in zip(one["rows"], two["rows"]):
        assert row["scores"] == other["scores"] and row["summary"] == other["summary"]
    names = lambda out: sorted(file.name for file in out.glob("pictures/*/*/*.png"))
    assert names(tmp_path / "one") == names(tmp_path / "two")


def test_pictures_are_shared_by_evaluations_and_not_by_other_settings(
        judged, counted, tmp_path, model_copy):
    shared = {"pictures": tmp_path / "pictures", "teacher_steps": 0}
    judged(tmp_path / "a", **shared)
    judged(tmp_path / "b", **shared, reward="pocket", show="1")
    shutil.copytree(model_copy / "student", tmp_path / "copy")
    judged(tmp_path / "c", **shared | {"unet": tmp_path / "copy"})  # the same weights elsewhere
    assert len(counted) == 16
    judged(tmp_path / "d", **shared, guidance=4.0)
    judged(tmp_path / "e", **shared, steps=3)
    assert len(counted) == 48
    student = UNet.from_pretrained(tmp_path / "copy")
    with torch.no_grad():
        student.conv_out.bias += 0.01
    student.save_pretrained(tmp_path / "copy")
    judged(tmp_path / "f", **shared | {"unet": tmp_path / "copy"})
    assert len(counted) == 64


def test_identical_models_win_half_of_the_time_inside_the_interval(
        judged, tmp_path, model_copy):
    rows = ["student@2", f"same={model_copy / 'student'}@2", f"other={model_copy / 'student'}@4"]
    found, said = judged(tmp_path, "--rows", *rows)
    same, other = found["rows"][1]["win"], found["rows"][2]["win"]
    assert same["rate"] == 0.5 and same["low"] < 0.5 < same["high"] and same["n"] == 16
    assert other["rate"] != 0.5 and "50.0%" in said
    found, _ = judged(tmp_path, "--rows", *rows, "--against", "same")
    assert {row["win"]["against"] for row in found["rows"] if row["win"]} == {"same"}
    found, _ = judged(tmp_path, "--rows", *rows, "--against", "student@2")
    assert found["rows"][0]["win"] is None


def test_a_win_is_of_pictures_of_the_same_seed_and_of_means_where_there_are_no_seeds():
    def row(scores, seeds):
        return {"name": "x", "scores": {"judge": scores}, "seeds": seeds}

    one, other = row([[1.0, 5.0], [1.0, 5.0]], [0, 1]), row([[4.0, 0.0], [4.0, 0.0]], [1, 0])
    assert results.win(one, other, "judge")["rate"] == 1.0  # 1 beside 0, 5 beside 4
    two_seeds = row([[1.0, 5.0, -1.0, 3.0]] * 2, [0, 1, 0, 1])  # of two networks
    assert results.win(two_seeds, other, "judge") == results.win(
        row([[1.0, 5.0, -1.0, 3.0]] * 2, [0, 1, 2, 3]),
        row([[0.0, 4.0, 0.0, 4.0]] * 2, [0, 1, 2, 3]), "judge")
    assert results.win(two_seeds, two_seeds, "judge")["rate"] == 0.5
    real = row([[2.5], [3.5]], None)
    found = results.win(one, real, "judge")  # whose means are 3
    assert found["rate"] == 0.5 and found["n"] == 2
    assert results.win(one, row([[1.0]], [7]), "reward") is None


def test_rows_of_every_kind_stand_in_one_table(judged, tmp_path, model_folder):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    for i in range(8):
        for seed in range(2):
            (folder / f"{i:05d}_{seed}.png").write_bytes(random_png(8 * seed + i, (32, 32)))
    found, said = judged(tmp_path / "out", "--rows", "teacher@3", "student@1", f"folder:{folder}",
                         f"mine=folder:{folder}", "real", "round-trip",
                         "--rewards", f"pocket={model_folder / 'reward'}")
    rows = {row["kind"]: row for row in found["rows"]}
    assert [row["kind"] for row in found["rows"]] == [
        "teacher", "student", "folder", "folder", "real", "round-trip"]
    assert rows["teacher"]["calls"] == 6 and rows["student"]["calls"] == 1
    assert rows["folder"]["calls"] is None and rows["folder"]["seconds_per_image"] is None
    assert rows["folder"]["seeds"] == [0, 1] and rows["real"]["n"] == 1
    assert rows["real"]["summary"]["frechet"]["mean"] == pytest.approx(0, abs=1e-6)
    for row in found["rows"]:
        assert len(row["pictures"]) == 8 and len(row["pictures"][0]) == row["n"]
        assert all((tmp_path / "out" / file).is_file() for line in row["pictures"] for file in line)
        # the same reward under another name; where its weights lie may change the last bit
        one, other = (dict(row["summary"][name]) for name in ("pocket", "judge"))
        assert one.pop("of") == other.pop("of") and one == pytest.approx(other, rel=1e-5)
    assert found["rows"][3]["name"] == "mine"
    assert (tmp_path / "out/grid.png").is_file() and "mine" in said


def test_training_seeds_are_one_row_whose_spread_is_over_them(judged, tmp_path, model_copy):
    for seed in range(2):
        student = UNet.from_pretrained(model_copy / "student")
        with torch.no_grad():
            student.conv_out.bias += 0.2 * seed
        student.save_pretrained(tmp_path / f"s{seed}")
    paths = [str(tmp_path / f"s{seed}") for seed in range(2)]
    found, said = judged(tmp_path / "out", "--rows", f"all={'+'.join(paths)}@2",
                         f"a={paths[0]}@2", f"b={paths[1]}@2")
    both, a, b = found["rows"]
    for key in ("judge", "reward", "frechet", "diversity"):
        means = [row["summary"][key]["mean"] for row in (a, b)]
        one = both["summary"][key]
        assert one["mean"] == pytest.approx(np.mean(means)) and one["of"] == "training seeds"
        assert one["high"] - one["mean"] == pytest.approx(np.std(means, ddof=1), abs=1e-9)
    assert both["n"] == 4 and both["seeds"] == [0, 1, 0, 1]
    assert a["summary"]["judge"]["of"] == "prompts"
    assert "standard deviation over" in said and "training seeds" in said
    # its pictures stand beside those of the same seed
    assert a["win"]["n"] == 16 and both["win"] is None


def test_one_prompt_has_no_interval_and_says_so(judged, tmp_path):
    found, said = judged(tmp_path, limit=1, n=1, show="0")
    assert "(n = 1)" in said and "nan" not in said.lower()
    assert found["rows"][-1]["summary"]["judge"]["low"] is None


def test_a_student_of_another_size_is_compared_at_its_own(tmp_path, monkeypatch):
    sizes = []

    def draw(self, unet, prompts, seeds, steps, w, solver="lcm", size=None, **more):
        sizes.append(size and tuple(size))
        side = unet.config.sample_size * 4
        return torch.rand(len(prompts), 3, *(size or (side, side)))

    student = UNet.from_pretrained(ROOT / "pocket/student", sample_size=8)
    student.save_pretrained(tmp_path / "unet")
    monkeypatch.setattr(evaluate.Pipeline, "draw", draw)
    code = call(evaluate.main, "--limit", 8, "--n", 1, "--unet", tmp_path / "unet", "--out",
                tmp_path, "--device", "cpu")
    assert code == 0 and sizes == [(32, 32), None]  # the teacher's, the student's own


def test_prompts_alone_are_compared_by_rewards_and_with_a_folder_of_real_pictures_by_distance(
        judged, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(CAPTIONS))
    more = {"data": None, "prompts": tmp_path / "prompts.txt", "limit": None}
    found, _ = judged(tmp_path / "a", **more)
    assert found["prompts"] == CAPTIONS and "frechet" not in found["columns"]
    (tmp_path / "real").mkdir()
    for i in range(6):  # of several sizes
        (tmp_path / f"real/{i}.png").write_bytes(random_png(i, (32 + 8 * (i % 2), 40)))
    found, _ = judged(tmp_path / "b", **more, reference=tmp_path / "real")
    assert found["rows"][-1]["summary"]["frechet"]["mean"] > 0
    assert "high_frequency" not in found["columns"]


def test_votes_add_peoples_win_rate_to_both_rows(judged, tmp_path):
    found, _ = judged(tmp_path, "--rows", "teacher@3", "student@2")
    a, b = (row["name"] for row in found["rows"])
    votes = [(0, "a", "left"), (1, "b", "left"), (2, "a", "right"), (3, "b", "right"),
             (4, "a", "left"), (5, "a", "tie")]
    (tmp_path / "votes.json").write_text(json.dumps({"version": 1, "a": a, "b": b, "votes": [
        {"prompt": prompt, "picture": 0, "left": left, "choice": choice}
        for prompt, left, choice in votes]}))
    found, said = judged(tmp_path, "--rows", "teacher@3", "student@2", "--votes",
                         tmp_path / "votes.json")
    first, second = (row["votes"] for row in found["rows"])
    assert first["rate"] == pytest.approx(3.5 / 6) and second["rate"] == pytest.approx(2.5 / 6)
    assert first["n"] == 6 and first["against"] == b and second["against"] == a
    assert first["low"] == pytest.approx(1 - second["high"])
    assert "wins by people" in said


def test_votes_on_other_rows_are_refused_before_anything_is_drawn(
        options, counted, tmp_path, capsys):
    votes = {"version": 1, "a": "somebody", "b": "else", "votes": []}
    for broken, words in ((votes, "'somebody'"), (votes | {"votes": [{"left": "c"}]}, "votes"),
                          (votes | {"votes": [{"prompt": 0, "left": "c", "choice": "tie"}]},
                           "expected left a or b")):
        (tmp_path / "votes.json").write_text(json.dumps(broken))
        assert call(evaluate.main, *options(tmp_path, votes=tmp_path / "votes.json")) == 2
        assert words in capsys.readouterr().err.splitlines()[-1]
    assert not counted


def test_compare_says_what_moved_beyond_noise(judged, tmp_path, capsys):
    judged(tmp_path / "a")
    judged(tmp_path / "b", guidance=3.0)
    changed = read(tmp_path / "b")
    student = changed["rows"][-1]
    for line in student["scores"]["judge"]:
        line[:] = [one + 0.5 for one in line]
    student["summary"]["judge"]["mean"] += 0.5
    student["name"] = "another name"
    (tmp_path / "b/results.json").write_text(json.dumps(changed))
    files = [tmp_path / name / "results.json" for name in "ab"]
    assert call(evaluate.main, "--compare", *files) == 0
    lines = capsys.readouterr().out.splitlines()
    (moved,) = [line for line in lines if line.endswith("better |") or line.endswith("worse |")]
    assert "another name" in moved and "+0.5000" in moved and "judge" in moved
    assert any("teacher" in line and line.endswith("| no |") for line in lines)
    # the difference's own interval is narrow, since the prompts are the same
    assert "+0.5000 to +0.5000" in moved


def test_what_has_no_scores_of_pictures_moves_beyond_the_spread_of_both():
    def row(mean, deviation, of="sets of seeds", scores=()):
        entry = results.entry(mean, mean - deviation, mean + deviation, of)
        return {"summary": {"frechet": entry}, "scores": {"frechet": scores} if scores else {}}

    frechet, words = results.column("frechet"), {}
    for now in (0.7, 0.9, 1.3):
        change, interval, words[now] = results.moved(
            row(1.0, 0.1), row(now, 0.05), "frechet", frechet)
        assert float(change) == pytest.approx(now - 1)
    assert words == {0.7: "better", 0.9: "no", 1.3: "worse"}  # +-1.96 sqrt(0.1^2 + 0.05^2) = 0.219
    assert "(unpaired)" in interval
    # training seeds are not paired by prompts, whatever the pictures say
    seeds = [row(mean, 0.1, "training seeds", [[mean]] * 9) for mean in (1.0, 0.9)]
    assert results.moved(*seeds, "frechet", frechet)[2] == "no"
    alone = {"summary": {"frechet": results.entry(1.0)}, "scores": {}}
    assert results.moved(alone, row(0.5, 0.1), "frechet", frechet)[2] == "not known"


def test_results_before_version_2_are_still_read(tmp_path):
    old = [{"name": "real pictures", "calls": None, "seconds_per_image": None, "reward": 0.6,
            "reward_se": 0.02, "judge": 0.5, "judge_se": 0.03, "top1": 0.6, "frechet": 0.1,
            "scores": [0.4, 0.6]}]
    (tmp_path / "results.json").write_text(json.dumps(old))
    found = results.read(tmp_path / "results.json")
    (row,) = found["rows"]
    assert row["summary"]["judge"]["high"] == pytest.approx(0.5 + 1.96 * 0.03, abs=1e-4)
    assert "| real pictures |" in results.table(found) and "frechet" in found["columns"]
    assert len(results.compared(tmp_path / "results.json", tmp_path / "results.json")) > 2


def test_the_report_is_written_of_the_results_and_is_told_where_it_cannot_be(
        judged, tmp_path, monkeypatch):
    written = []

    def write(document, folder):
        written.append((document, folder))
        if len(written) > 1:
            raise evaluate.InputError("needs a package")

    stub = types.SimpleNamespace(write=write)
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name, *more: name == "support.report" or real(name, *more))
    monkeypatch.setattr(support, "report", stub, raising=False)
    monkeypatch.setitem(sys.modules, "support.report", stub)
    found, _ = judged(tmp_path, teacher_steps=0)
    assert written == [(found, tmp_path)]
    _, said = judged(tmp_path, teacher_steps=0)
    assert "no report: needs a package" in said


# ----------------------------------------------------------------------------------------- refusals

@pytest.mark.parametrize("numbers", ["1,x", "", "0,8", "-1"])
def test_prompts_to_show_that_are_not_there_are_refused(numbers, options, tmp_path, capsys):
    assert call(evaluate.main, *options(tmp_path, f"--show={numbers}", show=None)) == 2
    assert "--show" in capsys.readouterr().err


@pytest.mark.parametrize("more, words", [
    (["--rows", "/no/where@2"], "/no/where: no such folder"),
    (["--rows", "student"], "expected teacher@STEPS"),
    (["--rows", "student@0"], "expected teacher@STEPS"),
    (["--rows", "student@51"], "51 LCM steps"),
    (["--rows", "teacher@1000"], "DDIM steps"),
    (["--rows", "student@2", "student@2"], "two are called"),
    (["--rows", "student@2", "--against", "nobody"], "'nobody'"),
    (["--rows", "student@2", "--real", "--steps", "4"], "--steps, --real with --rows"),
    (["--reference", "/no/where"], "--reference is for --prompts"),
    (["--judge", "/no/where"], "/no/where"),
    (["--rewards", "hpsv2.1=/no/file"], "/no/file: no such file"),
    (["--rewards", "hpsv3"], "hpsv3"),
    (["--rewards", "clipscore=/no/file"], "/no/file"),
    (["--features", "inception=/no/file"], "/no/file"),
    (["--features", "jpeg"], "--features jpeg"),
    (["--protocol", "hpsv2"], "needs --prompts"),
    (["--protocol", "coco2014-30k-256", "--prompts", "a.txt"], "give one"),
    (["--compare", "/no/file", "/no/file"], "/no/file"),
    (["--compare", "/no/file"], "two results.json"),
    (["--votes", "/no/file"], "/no/file"),
    (["--limit", "0"], "--limit 0"),
    (["--n", "0"], "--n 0"),
])
def test_what_cannot_be_is_one_line(more, words, options, tmp_path, capsys):
    assert call(evaluate.main, *options(tmp_path, *more)) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: ") and words in message


@pytest.mark.parametrize("names, words", [
    ([f"{i}.png" for i in range(7)], "7 pictures, of which 7"),
    ([f"{i}.png" for i in (*range(7), 8)], "expected one of each"),
    (["a.png"], "without a number"),
    (["0.png", "00.png"], "two pictures"),
    ([], "no pictures there"),
])
def test_folders_with_fewer_pictures_than_prompts_are_refused(
        names, words, options, tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    for name in names:
        (tmp_path / "folder" / name).write_bytes(random_png(0))
    rows = ["--rows", f"folder:{tmp_path / 'folder'}"]
    assert call(evaluate.main, *options(tmp_path / "out", *rows)) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert words in message


def test_a_teacher_is_refused_as_student(options, model_folder, capsys, tmp_path):
    argv = options(tmp_path, unet=model_folder / "unet", teacher_steps=0)
    assert call(evaluate.main, *argv) == 2
    assert "expected a student" in capsys.readouterr().err


def test_a_student_whose_pictures_are_no_numbers_is_refused(
        options, model_copy, tmp_path, capsys, monkeypatch):
    draw = lambda self, unet, prompts, *more, **options: torch.full((len(prompts), 3, 32, 32),
                                                                    float("nan"))
    monkeypatch.setattr(evaluate.Pipeline, "draw", draw)
    assert call(evaluate.main, *options(tmp_path, teacher_steps=0)) == 2
    assert "drew NaN" in capsys.readouterr().err
    assert not list(tmp_path.glob("pictures/*/*/*.png"))


def test_a_score_that_is_no_number_is_refused(options, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "load_scorer", lambda spec, device: (
        lambda images, prompts: torch.full((len(prompts),), float("nan"))))
    assert call(evaluate.main, *options(tmp_path, teacher_steps=0)) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: reward: gave NaN")


def test_a_broken_picture_of_the_store_is_named(judged, options, tmp_path, capsys):
    judged(tmp_path, teacher_steps=0)
    file = next(tmp_path.glob("pictures/*/*/*.png"))
    for broken in (b"no picture", random_png(0)):  # the second without what we write beside it
        file.write_bytes(broken)
        if "real" in file.parts:
            continue
        assert call(evaluate.main, *options(tmp_path, teacher_steps=0)) == 2
        assert str(file) in capsys.readouterr().err
