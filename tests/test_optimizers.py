import json
import re

import pytest
import torch
from safetensors.torch import load_file

from conftest import log, rand
from support import optimizers
from support.optimizers import lerp_rounded
from support.weights import WEIGHTS


def test_the_rounded_average_is_right_on_average_and_never_off_by_more_than_one_place():
    target, source = rand(200).bfloat16(), rand(200, seed=1)
    exact = torch.lerp(target.float(), source, 0.05)
    found = torch.stack([lerped(target, source, 0.05, seed) for seed in range(2000)])
    place = torch.maximum(exact.abs(), target.float().abs()) * 2**-7  # of bfloat16, at most
    assert ((found - exact).abs() <= place).all()
    assert ((found.mean(0) - exact).abs() <= 0.1 * place).all()
    assert len(found.unique(dim=0)) > 1900 and torch.equal(lerped(target, source, 0.05, 3),
                                                           lerped(target, source, 0.05, 3))


def lerped(target, source, weight, seed):
    new = target.clone()
    lerp_rounded([new], [source], weight, seed)
    assert new.dtype == torch.bfloat16
    return new.float()


def test_the_average_reaches_where_plain_rounding_stands_still():
    """A student that is 1% away: a step of 5% of that is a sixth of bfloat16's smallest."""
    start = torch.full((1000,), 1.0, dtype=torch.bfloat16)
    source, plain, ours = torch.full((1000,), 1.01), start.clone(), start.clone()
    for step in range(100):
        plain.lerp_(source.bfloat16(), 0.05)
        lerp_rounded([ours], [source], 0.05, step)
    assert torch.equal(plain, start)
    assert ours.float().mean().item() == pytest.approx(1.01, abs=5e-4)


def test_zero_and_negative_numbers_are_rounded_too():
    target = torch.tensor([0.0, -1.0, 1e-30, -3e4], dtype=torch.bfloat16)
    same = lerped(target, target.float(), 0.5, 0)
    assert torch.equal(same, target.float())
    moved = torch.stack([lerped(target, torch.tensor([0.0, -1.01, 0.0, 0.0]), 0.1, seed)
                         for seed in range(500)]).mean(0)
    assert moved.tolist() == pytest.approx([0, -1.001, 9e-31, -2.7e4], rel=2e-3)


def target_of(out):
    return load_file(out / "unet_target" / WEIGHTS)


def test_a_target_in_bf16_follows_the_one_in_float32_and_resumes_bit_for_bit(
        fit, tmp_path, model_folder):
    same = dict(steps=6, reward=f"pocket={model_folder}", checkpoint_every=3)
    assert fit(tmp_path / "fp32", **same) == 0
    assert fit(tmp_path / "bf16", target_dtype="bf16", keep=3, **same) == 0
    exact, rounded = target_of(tmp_path / "fp32"), target_of(tmp_path / "bf16")
    assert {tensor.dtype for tensor in rounded.values()} == {torch.bfloat16}
    for name, tensor in exact.items():
        off = (rounded[name].float() - tensor).abs()
        assert (off <= 2**-6 * tensor.abs() + 2e-3).all(), name
    lines = (log(tmp_path / name, "lcd", "reward") for name in ("fp32", "bf16"))
    for a, b in zip(*lines, strict=True):
        assert b == pytest.approx(a, rel=0.1, abs=0.02)
    before = (tmp_path / "bf16/unet_target" / WEIGHTS).read_bytes()
    (tmp_path / "bf16/checkpoints/step-000006").rename(tmp_path / "moved-away")
    assert fit(tmp_path / "bf16", target_dtype="bf16", keep=3, **same) == 0
    assert (tmp_path / "bf16/unet_target" / WEIGHTS).read_bytes() == before
    assert json.loads((tmp_path / "bf16/config.json").read_text())["target_dtype"] == "bf16"


def test_8_bit_adam_trains_as_adam_does_and_resumes_bit_for_bit(fit, tmp_path, model_folder):
    same = dict(steps=6, reward=f"pocket={model_folder}", checkpoint_every=3, keep=3)
    for name in ("adamw", "adamw8bit"):
        assert fit(tmp_path / name, optimizer=name, **same) == 0
    state = torch.load(tmp_path / "adamw8bit/checkpoints/step-000006/optimizer.pt")["state"]
    kept = [value["__bnb_optimizer_quant_state__"] for value in state.values()]
    assert torch.uint8 in {value["state1"].dtype for value in kept}
    start = load_file(model_folder / "unet" / WEIGHTS)
    exact, ours = (target_of(tmp_path / name) for name in ("adamw", "adamw8bit"))
    way, error = (sum((a[key] - b[key]).square().sum() for key in start).sqrt()
                  for a, b in ((exact, start), (ours, exact)))
    assert 0 < error < 0.1 * way
    before = (tmp_path / "adamw8bit/unet_target" / WEIGHTS).read_bytes()
    (tmp_path / "adamw8bit/checkpoints/step-000006").rename(tmp_path / "moved-away")
    assert fit(tmp_path / "adamw8bit", optimizer="adamw8bit", **same) == 0
    assert (tmp_path / "adamw8bit/unet_target" / WEIGHTS).read_bytes() == before


@pytest.mark.parametrize("version", [None, "0.49.2"])
def test_8_bit_adam_without_its_package_says_what_to_install(version, monkeypatch, fit, tmp_path,
                                                             capsys):
    def found(name):
        if version is None:
            raise optimizers.importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(optimizers.importlib.metadata, "version", found)
    assert fit(tmp_path / "run", optimizer="adamw8bit") == 2
    assert re.search(r"0.50 or newer, found (none|0.49.2): pip install 'rg-lcd\[8bit\]'",
                     capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_a_state_of_8_bit_moments_that_does_not_fit_is_refused(fit, tmp_path, capsys):
    same = dict(optimizer="adamw8bit", steps=2, checkpoint_every=1, keep=2)
    assert fit(tmp_path, **same) == 0
    (tmp_path / "checkpoints/step-000002").rename(tmp_path / "moved-away")
    file = tmp_path / "checkpoints/step-000001/optimizer.pt"
    state = torch.load(file)
    state["state"][0]["__bnb_optimizer_quant_state__"]["state1"] = torch.zeros(3)
    torch.save(state, file)
    (file.parent / "checksums.json").unlink()
    assert fit(tmp_path, **same) == 2
    assert "state1 of parameter 0 is (3,), expected" in capsys.readouterr().err
