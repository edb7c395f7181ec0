import json
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from conftest import log, rand
from support import optimizers
from support.optimizers import lerp_rounded
from support.weights import WEIGHTS, InputError


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


@pytest.fixture
def on_cuda():
    return [{"params": [SimpleNamespace(is_cuda=True)]}]


def test_8_bit_adam_is_bitsandbytes_own(monkeypatch, on_cuda):
    """A stand-in for the package, which takes CUDA."""
    seen = []
    stand_in = SimpleNamespace(AdamW8bit=lambda groups, **options: seen.append((groups, options)))
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(optim=stand_in))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", stand_in)
    optimizers.KINDS["adamw8bit"](on_cuda, lr=1e-6, betas=(0.9, 0.999), weight_decay=0.0)
    assert seen == [(on_cuda, {"lr": 1e-6, "betas": (0.9, 0.999), "weight_decay": 0.0})]


def test_8_bit_adam_without_its_package_says_what_to_install(monkeypatch, on_cuda):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(InputError, match=r"pip install 'rg-lcd\[8bit\]'"):
        optimizers.adamw8bit(on_cuda, lr=1.0)
