import json

import pytest
import torch
from safetensors.torch import load_file

from conftest import CAPTIONS, ROOT, launch, lines_of, rand
from pipeline import Pipeline
from reward import load_reward
from support import runs
from support.watch import over_optimised
from support.weights import WEIGHTS
from unet import UNet


@pytest.fixture
def watching(model_folder, tmp_path):
    """Options of train.py that look at every second step."""
    (tmp_path / "prompts.txt").write_text("\n".join(CAPTIONS[:5]))
    return {"judge_every": 2, "judge": model_folder / "reward", "reward": "pocket", "log_every": 3,
            "judge_prompts": tmp_path / "prompts.txt"}


def weights(out, name):
    return load_file(out / name / WEIGHTS)


def same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def looks(out):
    return {line["step"]: line["held_out"] for line in lines_of(out) if "held_out" in line}


def test_looking_leaves_the_run_as_it_was_bit_for_bit(fit, watching, tmp_path):
    assert fit(tmp_path / "plain", reward="pocket") == 0
    assert fit(tmp_path / "watched", **watching) == 0
    for name in ("unet", "unet_target"):
        same(weights(tmp_path / "plain", name), weights(tmp_path / "watched", name))
    found = looks(tmp_path / "watched")
    assert list(found) == [2, 4]
    assert all(one.keys() == {"reward", "judge"} for one in found.values())
    assert not looks(tmp_path / "plain")


def test_what_is_scored_are_the_averages_pictures_of_the_held_out_prompts(
        fit, watching, model_folder, tmp_path):
    assert fit(tmp_path, **watching) == 0
    model = Pipeline.from_pretrained(model_folder, torch.device("cpu"), torch.float32)
    found = looks(tmp_path)[4]
    scores = {}
    for name in ("unet_target", "unet"):
        images = model.draw(UNet.from_pretrained(tmp_path / name), CAPTIONS[:5], range(5), 2, 3.0)
        judge = load_reward(f"pocket={model_folder / 'reward'}")
        scores[name] = judge(images, CAPTIONS[:5]).mean().item()
    assert found["judge"] == pytest.approx(scores["unet_target"], abs=1e-6)
    assert found["judge"] != pytest.approx(scores["unet"], abs=1e-6)


def test_a_resumed_run_looks_as_an_uninterrupted_one(fit, watching, tmp_path):
    more = watching | {"lr_schedule": "constant"}
    assert fit(tmp_path / "whole", steps=6, **more) == 0
    assert fit(tmp_path / "parts", steps=4, **more) == 0
    kept = json.loads((tmp_path / "parts/held_out.json").read_text())
    assert list(kept["looks"]) == ["2", "4"] and kept["prompts"] == CAPTIONS[:5]
    assert fit(tmp_path / "parts", steps=6, **more | {"judge_every": 3}) == 0  # may change
    whole, parts = looks(tmp_path / "whole"), looks(tmp_path / "parts")
    assert list(whole) == [2, 4, 6] == list(parts)
    assert whole == parts
    for name in ("unet", "unet_target"):
        same(weights(tmp_path / "whole", name), weights(tmp_path / "parts", name))
    both = [json.loads((tmp_path / name / "held_out.json").read_text())
            for name in ("whole", "parts")]
    assert both[0] == both[1]


@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_look_once(sharded, options, watching, tmp_path):
    argv = options(tmp_path / "run", **watching, **({"shard": True} if sharded else {}))
    output = launch(argv, world=2).succeed()
    assert list(looks(tmp_path / "run")) == [2, 4] and "Traceback" not in output
    for scores in looks(tmp_path / "run").values():
        assert scores.keys() == {"reward", "judge"}


def test_tensorboard_gets_what_the_log_gets(fit, watching, tmp_path, monkeypatch):
    written = []

    class Writer:
        def __init__(self, *args, **more):
            pass

        def add_scalar(self, name, value, step):
            written.append((name, step))

        def close(self):
            pass

    monkeypatch.setattr(runs, "SummaryWriter", Writer)
    assert fit(tmp_path / "run", **watching) == 0
    assert {("held_out/reward", 4), ("held_out/judge", 2)} <= set(written)


def test_a_warning_is_given_when_the_reward_rises_and_the_judge_falls_beyond_its_noise():
    noise = (0.01 * rand(40)).tolist()
    flat = [0.5] * 40

    def look(reward, judge, spread=noise):
        return {"reward": [reward] * 40, "judge": [judge + n for n in spread]}

    looks = {10: look(0.2, 0.5, flat), 20: look(0.4, 0.6, flat), 30: look(0.5, 0.59, flat)}
    warning = over_optimised(looks, look(0.6, 1.0))
    assert "since step 20" in warning and "risen by 0.2" in warning and "fallen by 0.1" in warning
    assert over_optimised(looks, look(0.3, 1.0)) is None  # the reward has fallen too
    assert over_optimised(looks, look(0.6, 1.2)) is None  # the judge has risen
    wide = (0.5 + 0.5 * rand(40, seed=3)).tolist()
    assert over_optimised(looks, look(0.6, 0.58, wide)) is None  # within its noise
    assert over_optimised({}, look(0.6, 0.1)) is None
    assert over_optimised(looks, {"judge": [0.0] * 40}) is None  # a run without reward


def test_the_warning_is_a_line_of_the_run(fit, watching, tmp_path, capsys, monkeypatch):
    from support import watch
    fallen = iter([0.0, -1.0])

    def score(self, name, reward, images, model):
        step = next(fallen) if name == "judge" else len(self.looks)
        return [step + 0.1 * i for i in range(5)]

    monkeypatch.setattr(watch.Watch, "score", score)
    assert fit(tmp_path / "run", **watching) == 0
    said = capsys.readouterr()
    lines = [line for line in (said.out + said.err).splitlines() if "the reward has risen" in line]
    assert len(lines) == 1 and lines[0].startswith("step 4: ")


def test_shards_give_the_prompts_and_without_reward_the_judge_looks_alone(
        fit, watching, shard, tmp_path):
    more = watching | {"reward": "none", "judge_prompts": shard}
    assert fit(tmp_path / "run", **more) == 0
    assert all(one.keys() == {"judge"} for one in looks(tmp_path / "run").values())
    assert json.loads((tmp_path / "run/held_out.json").read_text())["prompts"] == CAPTIONS


@pytest.mark.parametrize("change, words", [
    ({"judge": "/no/where"}, "/no/where"),
    ({"judge_prompts": "/no/where.txt"}, "/no/where.txt"),
    ({"judge_prompts": "/no/where.tar"}, "--judge-prompts"),
    ({"judge_every": -1}, "--judge-every -1"),
    ({"judge": ""}, "--judge-every needs"),
])
def test_a_judge_that_is_not_there_is_one_line(change, words, fit, watching, tmp_path, capsys):
    assert fit(tmp_path / "run", **watching | change) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_the_pockets_judge_and_held_out_prompts_are_the_defaults():
    import train
    assert train.Config().judge == str(ROOT / "pocket/judge")
    assert "heldout" in train.Config().judge_prompts and train.Config().judge_every == 0
    for preset in ("sd21", "sd15"):
        assert train.PRESETS[preset]["judge"] is None
