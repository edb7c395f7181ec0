import copy
import json
import re
import signal
import time

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import train
from conftest import (
    UNET,
    agree,
    agree_by_name,
    call,
    launch,
    log,
    rand,
    randomize,
    same_weights,
)
from lora import LAYERS, W_PROJECTION, LoRA, Update, layers_of, sharing
from pipeline import merged
from support.kernels import compile_blocks
from support.lora_files import NAME
from unet import ResnetBlock, Transformer, UNet, UNetConfig

CONVOLUTIONS = {"use_linear_projection": False}  # SD1.5


def frozen_unet(**config):
    return randomize(UNet(UNetConfig(**UNET | config))).eval().requires_grad_(False)


@pytest.fixture(params=[{}, CONVOLUTIONS], ids=["linear", "convolutions"])
def unet(request):
    return frozen_unet(**request.param)


def inputs(rows=2):
    return rand(rows, 4, 8, 8, seed=1), torch.tensor([999, 299])[:rows], rand(rows, 6, 32, seed=2)


def embedding(rows=2):
    return rand(rows, 256, seed=3)


def random_lora(unet, seed=5, **options):
    """Updates as large as if they had been trained."""
    lora = LoRA.new(unet, **{"rank": 3} | options)
    with torch.no_grad():
        for i, update in enumerate(lora.layers):
            update.B += 0.2 * rand(*update.B.shape, seed=seed + i)
    return lora


# -------------------------------------------------------------------------------------- the updates

@pytest.mark.parametrize("w_embed", [False, True])
def test_at_step_0_the_student_equals_the_teacher_and_then_not(unet, w_embed):
    student = sharing(unet, time_cond_proj_dim=256 if w_embed else None)
    LoRA.new(student, 4).attach(student)
    more = (embedding(),) if w_embed else ()
    assert torch.equal(student(*inputs(), *more), unet(*inputs()))
    for update in student.lora.layers:
        update.B.data.add_(0.1)
    assert not torch.allclose(student(*inputs(), *more), unet(*inputs()), atol=1e-2)


def test_one_set_of_weights_serves_teacher_student_and_target(unet):
    """None takes the memory twice, and what one of them trains does not reach the others."""
    before = unet(*inputs())
    student, target = (random_lora(other, seed).attach(other)
                       for seed, other in ((1, sharing(unet)), (2, sharing(unet))))
    for name, weight in unet.state_dict().items():
        assert student.state_dict()[name].data_ptr() == weight.data_ptr()
        assert target.state_dict()[name].data_ptr() == weight.data_ptr()
    frozen = {name for name in student.state_dict() if "lora." not in name}
    assert frozen == set(unet.state_dict())
    outputs = [net(*inputs()) for net in (student, unet, target, student)]
    assert torch.equal(outputs[1], before) and torch.equal(outputs[0], outputs[3])
    assert not torch.allclose(outputs[0], outputs[2], atol=1e-2)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("options", [{}, {"alpha": 1.5}, {"layers": "attention"}])
def test_merged_equals_unmerged(unet, scale, options):
    student = sharing(unet, time_cond_proj_dim=256)
    weight = unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight.clone()
    student = random_lora(student, **options).set_scale(scale).attach(student)
    ours = student(*inputs(), embedding())
    one = student.lora.merge(sharing(unet, time_cond_proj_dim=256))
    agree(one(*inputs(), embedding()), ours, 1e-5)
    assert (scale == 0) == torch.allclose(ours, unet(*inputs()), atol=1e-4)
    # and the shared weights are as they were
    query = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    assert torch.equal(unet.get_submodule(query).weight, weight)


def test_gradients_reach_only_the_updates(unet):
    student = sharing(unet, time_cond_proj_dim=256).requires_grad_(True)
    student = random_lora(student).attach(student)
    student(*inputs(), embedding()).square().mean().backward()
    for name, p in student.named_parameters():
        fixed = ".lora." not in name or name == "time_embedding.cond_proj.lora.A"
        assert (p.grad is None) == fixed, name
        assert fixed or p.grad.abs().max() > 0, name


@pytest.mark.parametrize("layer", [nn.Linear(6, 5), nn.Conv2d(3, 5, 3, stride=2, padding=1)])
def test_an_update_of_full_rank_reproduces_full_training_of_the_layer(layer):
    """A fixed to the identity, as the guidance projection's is: then B's gradient is the
    weight's."""
    full, frozen = copy.deepcopy(layer), copy.deepcopy(layer).requires_grad_(False)
    fan_in = layer.weight[0].numel()
    shape = layer.weight.shape
    A = torch.eye(fan_in).view(fan_in, *shape[1:])
    B = torch.zeros(len(layer.weight), fan_in, *(1 for _ in shape[2:]))
    update = Update(frozen, A, B, fan_in)
    update.A.requires_grad_(False)
    x = rand(4, *((6,) if layer.weight.ndim == 2 else (3, 6, 6)))
    goal = rand(*full(x).shape, seed=1)
    ours, theirs = (torch.optim.AdamW([p], lr=0.01, weight_decay=0.0)
                    for p in (update.B, full.weight))
    for _ in range(5):
        for optimizer, output in ((ours, frozen(x) + update(x)), (theirs, full(x))):
            optimizer.zero_grad()
            (output - goal).square().mean().backward()
            optimizer.step()
        agree(frozen.weight + update.matrix(), full.weight, 1e-5)
    assert (full.weight - layer.weight).abs().max() > 0.03


def test_the_layers_are_those_of_the_published_lcm_lora(tmp_path):
    """lcm-lora-sdv1-5: rank 64, 278 layers, 67.25 M numbers; its file, in float16 and kohya's
    names, has 134,621,556 bytes, which ours reaches to the byte but for its metadata."""
    from support import lora_files, single_file
    config = {key: tuple(value) if isinstance(value, list) else value
              for key, value in single_file.CONFIGS["sd1"]["unet"].items()}
    with torch.device("meta"):
        unet = UNet(UNetConfig(**config))
    updates = {}
    for name, layer in layers_of(unet).items():
        shape = layer.weight.shape
        if name not in ("conv_in", "conv_out", *(f"time_embedding.linear_{i}" for i in (1, 2))):
            A = torch.zeros(64, *shape[1:], device="meta")
            B = torch.zeros(shape[0], 64, *(1 for _ in shape[2:]), device="meta")
            updates[name] = Update(layer, A, B, 64)
    assert len(updates) == 278
    assert [name for name in layers_of(unet) if re.search(LAYERS["all"], name)] == [*updates]
    lora = LoRA(updates, {}).half().to_empty(device="cpu")
    assert sum(p.numel() for p in lora.parameters()) == 67_252_224
    lora_files.write(lora, tmp_path / "x.safetensors", "kohya", torch.float16)
    size = (tmp_path / "x.safetensors").stat().st_size
    assert 0 <= size - 134_621_556 <= 32  # "rg_lcd": "{}" in the header, padded to 8


def test_attention_alone_gets_updates_if_asked(unet):
    names = LoRA.new(sharing(unet), 2, layers="attention").updates
    assert len(names) == 7 * 8 and all(".attn1.to_" in n or ".attn2.to_" in n for n in names)


# ------------------------------------------------------------------------------------------ the run

def weights(out, name="lora"):
    return load_file(out / name / NAME)


def apart(a, b):
    assert a.keys() == b.keys()
    return max((a[key] - b[key]).abs().max().item() for key in a)


def through(proxy, model_folder, **more):
    proxied = dict(latent_rm=model_folder / "latent_rm", rm_image_layers=1, rm_text_layers=2,
                   rm_lr=1e-3)
    return dict(reward=f"pocket={model_folder}", lora=3) | (proxied if proxy else {}) | more


def test_a_run_leaves_its_updates_alone(fit, tmp_path, model_folder):
    out = tmp_path / "run"
    assert fit(out, **through(False, model_folder, lora_alpha=6, sample_every=2)) == 0
    assert {f.name for f in out.iterdir()} - {"tensorboard", ".lock"} == {
        "checkpoints", "config.json", "log.jsonl", "samples", "lora", "lora_target"}
    assert {f.name for f in (out / "checkpoints/step-000004").iterdir()} == {
        "lora", "lora_target", "optimizer.pt", "checksums.json"}
    start = LoRA.new(UNet.from_pretrained(model_folder, 256), 3, 6)
    for name, update in start.updates.items():
        A, B = (weights(out)[f"unet.{name}.lora_{part}.weight"] for part in "AB")
        moved = (A - update.A).abs().max().item()
        assert B.any() and (moved == 0) == (name == W_PROJECTION)


def test_target_is_the_moving_average_of_the_updates(fit, tmp_path, model_folder):
    assert fit(tmp_path, steps=3, ema=0.8, checkpoint_every=1, keep=3, lora=3) == 0
    start = LoRA.new(UNet.from_pretrained(model_folder, 256), 3)
    target = {f"unet.{name}.lora_{part}.weight": getattr(update, part).detach()
              for name, update in start.updates.items() for part in "AB"}
    for step in (1, 2, 3):
        folder = tmp_path / "checkpoints" / f"step-{step:06d}"
        target = {key: 0.8 * target[key] + 0.2 * value for key, value in weights(folder).items()}
        assert apart(weights(folder, "lora_target"), target) < 1e-6
    assert apart(weights(tmp_path), target) > 1e-4


@pytest.mark.parametrize("proxy", [False, True])
def test_run_kill_run_equals_one_run_bit_for_bit(proxy, fit, options, tmp_path, model_folder):
    steps = through(proxy, model_folder, steps=14, checkpoint_every=5, lora_alpha=5,
                    w_embed=not proxy)
    whole, out = tmp_path / "whole", tmp_path / "killed"
    assert fit(whole, **steps) == 0
    process, file = launch(options(out, **steps)), out / "log.jsonl"
    lines = lambda: len(file.read_text().splitlines()) if file.is_file() else 0
    while process.alive() and lines() < 7:
        time.sleep(0.005)
    process.send(signal.SIGKILL)
    assert process.wait()[0] == [-signal.SIGKILL] and not (out / "lora").exists()
    launch(options(out, **steps)).succeed()
    for name in ("lora", "lora_target"):
        assert apart(weights(out, name), weights(whole, name)) == 0
    keys = ("step", "loss", "reward", "grad_norm", "lr")
    assert log(out, *keys) == log(whole, *keys)


@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_equal_one_with_the_doubled_batch(
        sharded, fit, options, tmp_path, model_folder):
    same = through(False, model_folder, steps=3, lr=3e-5)
    launch(options(tmp_path / "two", batch_size=2, shard=sharded, **same), world=2).succeed()
    assert fit(tmp_path / "one", batch_size=4, **same) == 0
    for name in ("lora", "lora_target"):
        assert apart(weights(tmp_path / "one", name), weights(tmp_path / "two", name)) <= 1e-5
    keys = "loss", "reward", "grad_norm"
    for one, two in zip(log(tmp_path / "one", *keys), log(tmp_path / "two", *keys), strict=True):
        assert two == pytest.approx(one, rel=1e-3)


def test_recomputed_activations_give_the_same_training(fit, tmp_path, model_folder):
    for again in (False, True):
        same = through(False, model_folder, grad_checkpoint=again)
        assert fit(tmp_path / str(again), **same) == 0
    assert apart(weights(tmp_path / "True"), weights(tmp_path / "False")) <= 1e-5


def test_compiled_blocks_are_compiled_once_a_shape_with_updates_too():
    """As many graphs as without, and the same gradients as without compiling."""
    from torch._dynamo.utils import counters
    unet = frozen_unet()
    inputs_and_w = (*inputs(), embedding())
    graphs, gradients = [], []
    for compiled in (True, False):
        student = sharing(unet, time_cond_proj_dim=256)
        student = random_lora(student).attach(student)
        torch._dynamo.reset(), counters.clear()
        if compiled:
            compile_blocks(unet, (ResnetBlock, Transformer), backend="aot_eager")
            unet(*inputs())
            graphs.append(counters["stats"]["unique_graphs"])
            torch._dynamo.reset(), counters.clear()
            compile_blocks(student, (ResnetBlock, Transformer), backend="aot_eager")
        student(*inputs_and_w).square().mean().backward()
        graphs.append(counters["stats"]["unique_graphs"])
        gradients.append({name: p.grad for name, p in student.lora.named_parameters()
                          if p.grad is not None})
    assert 0 < graphs[1] <= graphs[0] and graphs[2] == 0
    agree_by_name(*gradients)


@pytest.mark.slow
def test_a_compiled_run_follows_an_eager_one(fit, tmp_path, model_folder):
    for compile in (False, True):
        assert fit(tmp_path / str(compile), compile=compile,
                   **through(False, model_folder, steps=3)) == 0
    keys = "loss", "reward"
    for a, b in zip(log(tmp_path / "False", *keys), log(tmp_path / "True", *keys), strict=True):
        assert b == pytest.approx(a, rel=1e-3)


def test_bf16_follows_float32_on_frozen_weights_of_bf16(fit, tmp_path, model_folder, monkeypatch):
    of, seen = train.distillation_loss, []
    monkeypatch.setattr(train, "distillation_loss", lambda *a, **k: seen.append(a) or of(*a, **k))
    for precision in ("fp32", "bf16"):
        assert fit(tmp_path / precision, precision=precision, sample_every=3,
                   **through(False, model_folder, steps=3)) == 0
    keys = "lcd", "reward"
    for a, b in zip(log(tmp_path / "fp32", *keys), log(tmp_path / "bf16", *keys), strict=True):
        assert b == pytest.approx(a, rel=0.1, abs=0.01)
    teacher, student = seen[-1][1:3]
    assert student.conv_in.weight.data_ptr() == teacher.conv_in.weight.data_ptr()
    assert student.conv_in.weight.dtype == torch.bfloat16
    assert {p.dtype for p in student.lora.parameters()} == {torch.float32}


def test_without_w_embed_the_student_does_not_see_w(fit, tmp_path, model_folder):
    out = tmp_path / "run"
    assert fit(out, w_embed=False, **through(False, model_folder)) == 0
    assert not any("cond_proj" in key for key in weights(out))
    student = merged(model_folder, [out / "lora_target"], [1.0])
    assert student.config.time_cond_proj_dim is None and student.config.lcm_grid == 10
    # a whole student too
    assert fit(tmp_path / "full", w_embed=False) == 0
    config = json.loads((tmp_path / "full/unet/config.json").read_text())
    assert "time_cond_proj_dim" not in config and config["lcm_grid"] == 10


def test_a_run_on_the_pocket_is_compared_with_its_updates_merged(tmp_path, monkeypatch):
    compared = []
    monkeypatch.setattr(train.evaluate, "compare", lambda config, *more: compared.append(config))
    assert call(train.main, "--lora", 2, "--steps", 1, "--batch-size", 1, "--device", "cpu",
                "--precision", "fp32", "--no-compile", "--out", tmp_path) == 0
    assert compared[0].unet == str(tmp_path / "unet_target")
    student = UNet.from_pretrained(tmp_path / "unet_target")
    assert same_weights(student, merged(train.POCKET, [tmp_path / "lora_target"], [1.0]))
    size = lambda file: (tmp_path / file).stat().st_size
    assert size(f"lora/{NAME}") < 0.1 * size("unet_target/diffusion_pytorch_model.safetensors")


WRONG = {
    "rank 0": ({"lora": 0}, "--lora 0: expected 1 or more"),
    "alpha 0": ({"lora": 2, "lora_alpha": 0}, "--lora-alpha 0"),
    "alpha without a rank": ({"lora_alpha": 2}, "give --lora RANK"),
    "layers without a rank": ({"lora_layers": "attention"}, "give --lora RANK"),
    "a target of 16 bits": ({"lora": 2, "target_dtype": "bf16"}, "--target-dtype bf16"),
    "8 bits, shared out": ({"optimizer": "adamw8bit", "shard": True}, "--shard"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options_are_one_line_and_exit_code_2(case, fit, tmp_path, capsys):
    changes, named = WRONG[case]
    assert fit(tmp_path, **changes) == 2
    message = capsys.readouterr().err
    assert named in message and "Traceback" not in message


def test_a_rate_that_is_too_small_for_updates_is_said(fit, tmp_path, capsys):
    assert fit(tmp_path / "full", steps=1, lr=1e-6) == 0
    assert "hardly move" not in capsys.readouterr().out
    assert fit(tmp_path / "lora", steps=1, lr=1e-6, lora=2) == 0
    assert "--lr 1e-06 is a rate for full students" in capsys.readouterr().out


def test_a_full_run_does_not_go_on_with_updates(fit, tmp_path, capsys):
    assert fit(tmp_path, steps=2) == 0
    assert fit(tmp_path, steps=2, lora=4) == 2
    assert "lora None (now 4)" in capsys.readouterr().err
