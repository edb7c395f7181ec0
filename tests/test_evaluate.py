import json

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from conftest import ROOT, call, rand
from data import Shards
from evaluate import Scorer, difference, frechet_distance
from unet import UNet


def test_pocket_holds_out_256_pictures_whose_captions_are_not_in_training():
    train = Shards(ROOT / "pocket/data/train-000.tar", 64)
    held_out = Shards(ROOT / "pocket/data/heldout-000.tar", 64)
    captions = lambda shards: {shards.caption(i) for i in range(len(shards))}
    assert (len(train), len(held_out), len(captions(held_out))) == (3117, 256, 256)
    assert not captions(train) & captions(held_out)


def scorer(images, prompts):
    real = torch.stack(images) / 2 + 0.5
    return Scorer(list(prompts), real, "pocket", evaluate.Config.judge, torch.device("cpu"))


def test_judge_and_reward_prefer_the_right_picture_and_share_no_weights():
    shards = Shards(ROOT / "pocket/data/heldout-000.tar", 64)
    images, prompts = zip(*(shards[i] for i in range(32)))
    score = scorer(images, prompts)
    right, wrong = (score("", torch.stack(x) / 2 + 0.5) for x in (images, images[::-1]))
    for key in ("reward", "judge"):
        assert right[key] > wrong[key] + 0.2
    assert right["top1"] > 0.6 and wrong["top1"] < 0.2
    assert right["frechet"] == pytest.approx(0, abs=1e-5)  # the same pictures in another order
    weights = [
        {p.sum().item() for p in model.parameters() if p.ndim > 1}
        for model in (score.reward, score.judge)]
    assert not weights[0] & weights[1]


def test_several_pictures_of_a_prompt_are_averaged():
    shards = Shards(ROOT / "pocket/data/heldout-000.tar", 64)
    images, prompts = zip(*(shards[i] for i in range(8)))
    score = scorer(images, prompts)
    images = torch.stack(images) / 2 + 0.5
    right, wrong = score("", images), score("", images.flip(0))
    both = score("", torch.cat([images, images.flip(0)]))
    for key in ("reward", "judge", "top1", "frechet"):
        assert both[key] == pytest.approx((right[key] + wrong[key]) / 2, abs=1e-5)
    means = [(a + b) / 2 for a, b in zip(right["scores"], wrong["scores"])]
    assert both["scores"] == pytest.approx(means, abs=1e-5)


def test_frechet_distance_of_gaussians_is_the_closed_form():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(50, 6, generator=generator, dtype=torch.float64) for _ in range(2))

    def white(x):  # mean 0, covariance 1
        return (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T

    shift, first, second = torch.arange(6.0), torch.linspace(1, 2, 6), torch.linspace(3, 0.5, 6)
    expected = (shift.square() + (first - second).square()).sum().item()
    x, y = white(a) * first, white(b) * second + shift
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-6)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))[0]
    assert frechet_distance(x @ turn, y @ turn) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_holds_where_the_covariances_do_not_commute():
    a = rand(40, 8, seed=1).double()
    b = rand(60, 8, seed=2).double() @ rand(8, 8, seed=3).double() + 1
    A, B = a.T.cov(), b.T.cov()
    # of the product itself, which is not symmetric
    root = torch.linalg.eigvals(A @ B).real.sqrt().sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + A.trace() + B.trace() - 2 * root
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-8)


def test_difference_is_the_mean_and_standard_error_of_pairs():
    a, b = rand(10, seed=1), rand(10, seed=2)
    mean, se = difference({"scores": a.tolist()}, {"scores": b.tolist()})
    assert mean == pytest.approx((a - b).mean().item(), rel=1e-5)
    assert se == pytest.approx((a - b).std().item() / 10**0.5, rel=1e-5)


def test_shipped_student_draws_held_out_prompts_in_two_steps(tmp_path, capsys):
    code = call(evaluate.main, "--teacher-steps", 0, "--limit", 24, "--out", tmp_path,
                "--device", "cpu", "--precision", "fp32")
    assert code == 0
    (row,) = json.loads((tmp_path / "results.json").read_text())
    assert row["calls"] == 2 and len(row["scores"]) == 24 and row["judge"] > 0.5
    assert "| judge |" in capsys.readouterr().out and (tmp_path / "grid.png").is_file()


def test_teacher_and_student_each_draw_as_many_pictures_a_prompt_as_asked(tmp_path, monkeypatch):
    drawn = []

    def draw_all(model, unet, prompts, steps, w, solver, batch, n=1, size=None):
        drawn.append((solver, n))
        return torch.rand(n * len(prompts), 3, 64, 64), 1.0

    monkeypatch.setattr(evaluate, "draw_all", draw_all)
    code = call(evaluate.main, "--limit", 2, "--n", 3, "--teacher-n", 2, "--out", tmp_path,
                "--device", "cpu")
    assert code == 0
    assert drawn == [("ddim", 2), ("lcm", 3)]


def rows_of(out, capsys, *argv):
    """A comparison without the slow teacher -> its rows, the words on the screen."""
    fixed = ["--n", 1, "--teacher-steps", 0, "--device", "cpu", "--precision", "fp32"]
    assert call(evaluate.main, *fixed, "--out", out, *argv) == 0
    return json.loads((out / "results.json").read_text()), capsys.readouterr().out


def test_the_reward_that_is_asked_for_is_in_the_table_and_a_judge_as_reward_is_told(
        tmp_path, capsys):
    judge = f"pocket={ROOT / 'pocket/judge'}"
    ((row,), said) = rows_of(tmp_path, capsys, "--limit", 8, "--reward", judge)
    assert row["reward"] == pytest.approx(row["judge"], abs=1e-5)
    assert f"reward {judge}" in said and "its scores say nothing" in said
    (_, said) = rows_of(tmp_path, capsys, "--limit", 8, "--reward", f"jpeg*0.1+{judge}*2")
    assert "its scores say nothing" in said
    ((row,), said) = rows_of(tmp_path, capsys, "--limit", 8, "--reward", "jpeg")
    assert row["reward"] < 0 < row["judge"] and "say nothing" not in said


def test_recorded_rows_stand_only_beside_what_was_made_the_same_way():
    prompts = ["x"] * 256
    def rows(prompts=prompts, side=64, **changes):
        return evaluate.recorded(evaluate.Config(**changes), prompts, side)

    both = rows()
    assert set(both) == {"teacher", "plain"}
    for row in both.values():
        assert "(recorded" in row["name"] and len(row["scores"]) == 256 and row["reward"] > 0
    assert set(rows(guidance=2.0)) == set(rows(prompts[:10])) == set(rows(side=32)) == set()
    assert set(rows(model="other")) == set(rows(data="other")) == set()
    assert set(rows(steps=4)) == {"teacher"}
    assert set(rows(teacher_steps=20)) == {"plain"} and set(rows(n=1)) == {"teacher"}
    other = rows(reward="jpeg")  # by which the recorded pictures were not scored
    assert [row["reward"] for row in other.values()] == [None, None]
    assert evaluate.table([other["plain"]], "jpeg").splitlines()[-1].count("|") == 8


def test_the_teachers_row_comes_from_the_record_unless_it_is_asked_to_draw(
        tmp_path, monkeypatch):
    def draw_all(model, unet, prompts, steps, w, solver, *more):
        drawn.append(solver)
        return torch.rand(len(prompts), 3, 64, 64), 1.0

    def draw(self, unet, prompts, *more):
        shown.extend(prompts)
        return torch.rand(len(prompts), 3, 64, 64)

    monkeypatch.setattr(evaluate, "draw_all", draw_all)
    monkeypatch.setattr(evaluate.Pipeline, "draw", draw)
    for teacher_n, expected in ((0, ["lcm"]), (1, ["ddim", "lcm"])):
        drawn, shown = [], []
        code = call(evaluate.main, "--n", 1, "--teacher-n", teacher_n, "--show", "3,250", "--out",
                    tmp_path, "--device", "cpu")
        names = [row["name"] for row in json.loads((tmp_path / "results.json").read_text())]
        assert code == 0 and drawn == expected and len(shown) == (0 if teacher_n else 2)
        assert ("teacher, 50-step DDIM (recorded)" in names) == (teacher_n == 0)


def test_the_grid_shows_the_prompts_that_were_asked_for_under_their_names(tmp_path, monkeypatch):
    def draw_all(model, unet, prompts, steps, w, solver, batch, n=1, size=None):
        shades = torch.arange(len(prompts)) / 10  # picture i has shade i / 10
        return shades.view(-1, 1, 1, 1).expand(-1, 3, *size_of(size)), 1.0

    size_of = lambda size: size or (64, 64)
    monkeypatch.setattr(evaluate, "draw_all", draw_all)
    code = call(evaluate.main, "--limit", 8, "--n", 1, "--teacher-steps", 0, "--show", "3,1",
                "--out", tmp_path, "--device", "cpu")
    sheet = torch.from_numpy(np.array(Image.open(tmp_path / "grid.png"))).float() / 255
    assert code == 0
    student = sheet[-128:, -256:]  # the last row: two pictures, twice as large
    for column, shade in ((0, 0.3), (1, 0.1)):
        part = student[:, 128 * column:128 * (column + 1)]
        assert (part - shade).abs().max() < 0.01
    assert sheet[:-256, -256:].min() < 0.5 and sheet[-256:, :-256].min() < 0.5  # the words


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


@pytest.mark.parametrize("numbers", ["1,x", "", "0,8", "-1"])
def test_prompts_to_show_that_are_not_there_are_refused(numbers, tmp_path, capsys):
    code = call(evaluate.main, "--limit", 8, f"--show={numbers}", "--out", tmp_path,
                "--device", "cpu")
    assert code == 2 and "--show" in capsys.readouterr().err


def test_a_teacher_is_refused_as_student(capsys, tmp_path):
    code = call(evaluate.main, "--teacher-steps", 0, "--limit", 2, "--unet", ROOT / "pocket/unet",
                "--out", tmp_path, "--device", "cpu")
    assert code == 2
    assert "expected a student" in capsys.readouterr().err
