import json

import pytest
import torch

import evaluate
from conftest import ROOT, call, rand
from data import Shards
from evaluate import Scorer, difference


def test_pocket_holds_out_256_pictures_whose_captions_are_not_in_training():
    train = Shards(ROOT / "pocket/data/train-000.tar", 64)
    held_out = Shards(ROOT / "pocket/data/heldout-000.tar", 64)
    captions = lambda shards: {shards.caption(i) for i in range(len(shards))}
    assert (len(train), len(held_out), len(captions(held_out))) == (3117, 256, 256)
    assert not captions(train) & captions(held_out)


def test_judge_and_reward_prefer_the_right_picture_and_share_no_weights():
    shards = Shards(ROOT / "pocket/data/heldout-000.tar", 64)
    images, prompts = zip(*(shards[i] for i in range(32)))
    score = Scorer(list(prompts), torch.device("cpu"))
    right, wrong = (score("", torch.stack(x) / 2 + 0.5) for x in (images, images[::-1]))
    for key in ("reward", "judge"):
        assert right[key] > wrong[key] + 0.2
    assert right["top1"] > 0.6 and wrong["top1"] < 0.2
    weights = [
        {p.sum().item() for p in model.parameters() if p.ndim > 1}
        for model in score.models.values()]
    assert not weights[0] & weights[1]


def test_several_pictures_of_a_prompt_are_averaged():
    shards = Shards(ROOT / "pocket/data/heldout-000.tar", 64)
    images, prompts = zip(*(shards[i] for i in range(8)))
    score, images = Scorer(list(prompts), torch.device("cpu")), torch.stack(images) / 2 + 0.5
    right, wrong = score("", images), score("", images.flip(0))
    both = score("", torch.cat([images, images.flip(0)]))
    for key in ("reward", "judge", "top1"):
        assert both[key] == pytest.approx((right[key] + wrong[key]) / 2, abs=1e-5)
    means = [(a + b) / 2 for a, b in zip(right["scores"], wrong["scores"])]
    assert both["scores"] == pytest.approx(means, abs=1e-5)


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

    def draw_all(model, unet, prompts, steps, w, solver, batch, n=1):
        drawn.append((solver, n))
        return torch.rand(n * len(prompts), 3, 64, 64), 1.0

    monkeypatch.setattr(evaluate, "draw_all", draw_all)
    code = call(evaluate.main, "--limit", 2, "--n", 3, "--teacher-n", 2, "--out", tmp_path,
                "--device", "cpu")
    assert code == 0
    assert drawn == [("ddim", 2), ("lcm", 3)]


def test_a_teacher_is_refused_as_student(capsys, tmp_path):
    code = call(evaluate.main, "--teacher-steps", 0, "--limit", 2, "--unet", ROOT / "pocket/unet",
                "--out", tmp_path, "--device", "cpu")
    assert code == 2
    assert "expected a student" in capsys.readouterr().err
