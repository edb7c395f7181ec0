import json
import re
import sys

import pytest
import torch

from conftest import ROOT, call
from data import Shards
from support.weights import InputError

sys.path.insert(0, str(ROOT / "pocket"))
import experiment


def test_measures_of_several_rounds_are_the_means_over_rounds():
    measures = experiment.Measures(
        experiment.Config(limit=6), lambda images, prompts: images.mean(dim=(1, 2, 3)),
        torch.device("cpu"), torch.float32)
    rounds = [measures.round_trip, measures.round_trip.flip(0)]
    one, other = map(measures, rounds)
    both = measures(torch.cat(rounds))
    for key in ("expert", "judge", "distance"):
        assert both[key] == pytest.approx((one[key] + other[key]) / 2, rel=1e-4)


def test_lrm_is_compared_with_direct_reward_at_equal_reward():
    row = lambda expert, judge: [{"expert": expert, "judge": judge}]
    results = {
        "plain": row(0.4, 0.5),
        "direct 1x": row(0.5, 0.6),
        "direct 4x": row(0.7, 0.4),
        "direct 16x": row(0.45, 0.1),  # ruined
        "LRM 1x": row(0.6, 0.7),
        "LRM 4x": row(0.8, 0.7),
        "LRM 16x": row(0.45, 0.5),
    }

    def gain(name):
        return experiment.at_equal_reward(results, name, "judge")

    assert gain("LRM 1x") == pytest.approx([0.2])  # direct at 0.6: 0.5
    assert gain("LRM 4x") == []  # direct never reached it
    assert gain("LRM 16x") == pytest.approx([-0.05])  # 0.55, between plain and 1x
    others = dict.fromkeys(("distance", "high frequency", "roughness"), 0.0)
    whole = {name: [r | others for r in rows] for name, rows in results.items()}
    lines = experiment.report({}, whole).splitlines()
    assert "| LRM 1x | +0.200 | +0.000 | +0.000 | +0.000 | 1 |" in lines
    assert "| LRM 4x |  |  |  |  | 0 |" in lines
    assert "| LRM 1x | 0.600 | 0.700 | 0.000 | 0.000 | 0.000 |  |" in lines


def test_black_box_expert_has_no_direct_runs():
    def names(differentiable):
        return list(experiment.settings(experiment.Config(), "LRM", differentiable))

    proxied = ["LRM 0.25x", "LRM 1x", "LRM 4x", "LRM 16x", "LRM 16x, never fitted"]
    direct = ["direct 0.25x", "direct 1x", "direct 4x", "direct 16x"]
    assert names(True) == ["plain", *direct, *proxied]
    assert names(False) == ["plain", *proxied]


def test_warped_pictures_keep_their_captions_labels_and_are_made_once(tmp_path, monkeypatch):
    images, calls = torch.full((3, 3, 64, 64), 255, dtype=torch.uint8), []
    for i, colour in enumerate(([250, 0, 0], [0, 250, 0], [0, 0, 250])):
        images[i, :, 8:56, 8:56] = torch.tensor(colour, dtype=torch.uint8)[:, None, None]

    def read_split(pocket, name):
        assert pocket == experiment.POCKET and name == "train"
        return images, ["red, a, b", "green, c", "blue"]

    def python(script, *options):
        calls.append(options)
        (tmp_path / "encoded").mkdir()
        (tmp_path / "encoded/warped.tar").touch()

    monkeypatch.setattr(experiment, "read_split", read_split)
    monkeypatch.setattr(experiment, "python", python)
    for _ in range(2):
        assert experiment.warped_latents(tmp_path, 4) == tmp_path / "encoded"
    assert len(calls) == 1
    pairs = list(Shards(str(tmp_path / "warped.tar"), 64))
    assert len(pairs) == 12 and len({picture.numpy().tobytes() for picture, _ in pairs}) == 12
    for picture, caption in pairs:
        colour = ("red", "green", "blue")[picture[:, 24:40, 24:40].mean(dim=(1, 2)).argmax()]
        assert caption.removeprefix("a ").split(", ")[0] == colour


def test_of_the_lrm_that_is_never_fitted_nothing_trains():
    runs = experiment.settings(experiment.Config(rm_lr=0.5), "LRM", True)
    value = lambda name, option: runs[name][runs[name].index(option) + 1]
    assert value("LRM 16x, never fitted", "--rm-image-layers") == 0
    assert value("LRM 16x, never fitted", "--rm-text-layers") == 0
    assert value("LRM 16x", "--rm-image-layers") >= 4 and value("LRM 4x", "--rm-lr") == 0.5
    assert value("direct 4x", "--reward-scale") == value("LRM 4x", "--reward-scale") == 2.0
    assert "--latent-rm" not in runs["direct 4x"]


@pytest.mark.parametrize("scales", ["1..2", "1,,4", "much", "1,4,"])
def test_scales_that_are_no_numbers_are_one_line_and_exit_code_2(scales, tmp_path, capsys):
    assert call(experiment.main, "--scales", scales, "--out", tmp_path) == 2
    message = capsys.readouterr().err
    assert f"--scales {scales}" in message and message.count("\n") == 1


@pytest.mark.parametrize("options, word", [
    (("--rm-lr", 0), "--rm-lr 0"),
    (("--rm-tau", -1), "--rm-tau -1"),
    (("--rm-batch", 0), "--rm-batch 0"),
    (("--expert", "none"), "--expert none"),
    (("--judge", "jpeg"), "--judge jpeg"),
    (("--judge", "pocket=/no/where"), "/no/where"),
])
def test_what_no_run_could_use_is_refused_before_the_first_one_and_leaves_no_record(
        options, word, tmp_path, capsys):
    assert call(experiment.main, "--device", "cpu", "--limit", 2, "--out", tmp_path, *options) == 2
    message = capsys.readouterr().err
    assert word in message and message.count("\n") == 1 and not (tmp_path / "config.json").exists()


def test_record_refuses_other_runs_and_lets_the_measures_and_the_choice_of_runs_change(tmp_path):
    experiment.record(experiment.Config(), tmp_path)
    free = experiment.Config(judge="another", n=1, limit=8, seeds=5, scales="1", device="cuda:1",
                             out="elsewhere")
    experiment.record(free, tmp_path)
    for change, word in (
        ({"rm_lr": 1.0}, "rm_lr 0.0001 (now 1.0);"),
        ({"steps": 1, "expert": "jpeg"}, "expert pocket (now jpeg), steps 150 (now 1);"),
        ({"precision": "bf16"}, "precision auto (now bf16);"),
    ):
        with pytest.raises(InputError, match=re.escape(word)):
            experiment.record(experiment.Config(**change), tmp_path)


def test_scales_are_taken_from_small_to_large():
    runs = experiment.settings(experiment.Config(scales="16,1,.5"), "LRM", False)
    assert list(runs) == ["plain", "LRM .5x", "LRM 1x", "LRM 16x", "LRM 16x, never fitted"]


def test_follows_is_the_agreement_in_the_second_half_of_the_log(tmp_path):
    lines = [{"step": i, "rm_accuracy": share} for i, share in enumerate((0.1, 0.2, 0.5, 0.7))]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert experiment.follows(tmp_path) == {"follows": pytest.approx(0.6)}
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n')
    assert experiment.follows(tmp_path) == {}


@pytest.mark.slow
def test_experiment_runs_reports_and_resumes(tmp_path, capsys):
    options = [
        "--expert", "jpeg", "--seeds", 1, "--steps", 2, "--batch-size", 2, "--rm-steps", 2,
        "--copies", 1, "--limit", 12, "--n", 1, "--device", "cpu", "--out", tmp_path]
    times = lambda: {p: p.stat().st_mtime for p in tmp_path.rglob("*.safetensors")}
    assert call(experiment.main, *options) == 0
    first, written = capsys.readouterr().out, times()
    assert "| LRM 16x, never fitted |" in first and "| real pictures |" in first
    assert (tmp_path / "grid.png").is_file()
    assert call(experiment.main, *options) == 0
    assert capsys.readouterr().out == first and times() == written
    assert call(experiment.main, *options, "--steps", 3) == 2
    assert "steps 2 (now 3)" in capsys.readouterr().err
