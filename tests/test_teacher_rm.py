"""The latent proxy on the teacher's features (teacher_rm.py): latent_rm.py --backbone teacher."""
import copy
import json
import re
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import latent_rm as script
from conftest import UNET, agree, call, launch, rand, randomize
from discriminator import teacher_features
from latent_rm import LatentRM, frozen
from pipeline import Pipeline
from support.weights import WEIGHTS, InputError
from teacher_rm import TeacherRM, load
from test_latent_rm import log, options, posteriors, weights
from unet import UNet, UNetConfig

SIZES = {"width": 32, "heads": 2, "embed_dim": 16}
CPU = torch.device("cpu")


@pytest.fixture
def stands_on(model_folder):
    """The teacher and its Pipeline."""
    model = Pipeline.from_pretrained(model_folder, CPU, torch.float32)
    return UNet.from_pretrained(model_folder).requires_grad_(False), model


@pytest.fixture
def latent_rm(stands_on):
    return randomize(TeacherRM.new(*stands_on, (4, 8, 8), SIZES, seed=0)).eval()


@pytest.fixture
def pretrain(model_folder, shard, monkeypatch):
    """pretrain(out, ...): latent_rm.py --backbone teacher in this process -> exit code."""
    monkeypatch.setitem(script.SIZES, "pocket", SIZES)
    return lambda out, **changes: call(
        script.main, *options(model_folder, shard, out, backbone="teacher", **changes))


def test_what_it_sees_is_the_frozen_teachers_at_a_little_noise(latent_rm, stands_on):
    """Without words, and the same noise each time."""
    teacher, model = stands_on
    latents = rand(3, 4, 8, 8, seed=5)
    ab = model.schedule.alphas_cumprod[49]
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    noisy = ab.sqrt() * 0.18215 * latents + (1 - ab).sqrt() * noise
    nothing = model.text_encoder([""]).expand(3, -1, -1)
    maps = teacher_features(teacher, noisy, torch.tensor([49] * 3), nothing)
    maps = (maps - maps.mean((1, 2, 3), True)) / maps.var((1, 2, 3), False, keepdim=True).sqrt()
    agree(latent_rm.image_features(latents), F.normalize(latent_rm.visual(maps), dim=-1), 1e-4)
    words = latent_rm.text(model.text_encoder(["moon", "a fish"]).mean(1))
    agree(latent_rm.text_features(["moon", "a fish"]), F.normalize(words, dim=-1), 1e-5)


def test_gradients_reach_latents_and_head_and_never_the_teacher(latent_rm, stands_on):
    teacher, model = stands_on
    latents, prompts = rand(2, 4, 8, 8).requires_grad_(), ["moon", "rocket"]
    scores = latent_rm(latents, prompts)
    assert scores.shape == (2,) and scores.abs().max() <= 1
    scores.sum().backward()
    assert latents.grad.abs().max() > 0
    still = [p for part in (teacher, model.text_encoder) for p in part.parameters()]
    assert all(p.grad is None for p in still)
    head = dict(latent_rm.named_parameters())
    assert all(p.grad.abs().max() > 0 for name, p in head.items()
               if "in_proj_bias" not in name and name != "logit_scale")
    assert len(list(head)) < len(still)  # none of theirs among them
    latent_rm.zero_grad()
    with frozen(latent_rm):
        latent_rm.image_features(latents).sum().backward()
    assert all(p.grad is None for p in latent_rm.parameters())


def test_the_last_blocks_of_the_head_train(latent_rm):
    names = lambda *layers: {id(p) for p in latent_rm.train_top(*layers)}
    ids = lambda module: {id(p) for p in module.parameters()}
    assert names(1, 0) == ids(latent_rm.visual.blocks[1])
    assert names(99, 1) == ids(latent_rm.visual.blocks) | ids(latent_rm.text)
    assert names(0, 0) == set()


@torch.no_grad()
def test_saved_and_loaded_it_is_the_head_alone(latent_rm, stands_on, tmp_path, model_folder):
    latent_rm.save_pretrained(tmp_path / "latent_rm")
    again = load(tmp_path, *stands_on, CPU)
    latents, prompts = rand(3, 4, 8, 8), ["a red apple", "rocket", ""]
    assert isinstance(again, TeacherRM) and set(again.state_dict()) == set(weights(tmp_path))
    assert torch.equal(again(latents, prompts), latent_rm(latents, prompts))
    assert copy.deepcopy(again).frozen is None  # of a checkpoint, without the teacher
    assert type(load(model_folder, *stands_on, CPU)) is LatentRM


def test_another_teacher_and_other_latents_are_refused(latent_rm, stands_on, tmp_path):
    latent_rm.save_pretrained(tmp_path)
    wider = UNet(UNetConfig(**UNET | {"block_out_channels": (16, 32, 64)}))
    with pytest.raises(InputError, match="features of 112 channels.*gives 176"):
        load(tmp_path, wider, stands_on[1], CPU)
    with pytest.raises(InputError, match=re.escape("[B, 4, 8, 8]")):
        latent_rm.image_features(rand(1, 4, 16, 16))


def test_pre_training_finds_the_captions_of_what_it_saw(pretrain, tmp_path):
    data = posteriors(tmp_path / "latents.tar")
    assert pretrain(tmp_path, data=data, heldout=data, steps=30, batch_size=8, warmup=5, lr=3e-3,
                    checkpoint_every=100) == 0
    assert log(tmp_path, "retrieval")[-1][0] >= 0.75  # chance: 1 in 8
    losses = [loss for loss, in log(tmp_path, "loss")]
    assert losses[0] > 1.5 and losses[-1] < 1


def test_stopped_and_resumed_pre_training_equals_one_run_bit_for_bit(pretrain, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "resumed"
    assert pretrain(whole, keep=3) == 0
    shutil.copytree(whole, out)
    (out / "checkpoints/step-000004").rename(tmp_path / "moved-away")
    shutil.rmtree(out / "latent_rm")
    assert pretrain(out, keep=3) == 0
    resumed, unstopped = (folder / "latent_rm" / WEIGHTS for folder in (out, whole))
    assert resumed.read_bytes() == unstopped.read_bytes()
    keys = "step", "loss", "grad_norm", "logit_scale", "retrieval", "lr"
    assert log(out, *keys) == log(whole, *keys)


@pytest.mark.slow
def test_two_processes_compare_the_pairs_of_both(model_folder, shard, tmp_path):
    for name, world, rows in (("two", 2, 4), ("one", 1, 8)):
        argv = options(model_folder, shard, tmp_path / name, backbone="teacher", steps=3, lr=3e-5,
                       batch_size=rows)
        launch(argv, world, "latent_rm").succeed()
    for one, two in zip(log(tmp_path / "one", "loss", "grad_norm"),
                        log(tmp_path / "two", "loss", "grad_norm"), strict=True):
        assert two == pytest.approx(one, rel=1e-3)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert max((one[key] - two[key]).abs().max().item() for key in one) <= 1e-5


def test_it_is_distilled_through_as_any_other_and_resumed_bit_for_bit(
        fit, latent_rm, tmp_path, model_folder):
    latent_rm.save_pretrained(tmp_path / "proxy/latent_rm")
    same = dict(reward=f"pocket={model_folder}", latent_rm=tmp_path / "proxy", rm_lr=1e-3, keep=3)
    whole, out = tmp_path / "whole", tmp_path / "resumed"
    assert fit(whole, **same) == 0
    shutil.copytree(whole, out)
    (out / "checkpoints/step-000004").rename(tmp_path / "moved-away")
    assert fit(out, **same) == 0
    for name in ("unet", "latent_rm"):
        assert (out / name / WEIGHTS).read_bytes() == (whole / name / WEIGHTS).read_bytes()
    before, after = load_file(tmp_path / "proxy/latent_rm" / WEIGHTS), weights(whole)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.startswith(("visual.blocks.", "text."))}
    line = json.loads((whole / "log.jsonl").read_text().splitlines()[0])
    assert line["reward_ratio"] > 0 and line["rm_loss"] > 0


def test_of_a_text_tower_it_has_none(pretrain, tmp_path, model_folder, shard, capsys):
    assert pretrain(tmp_path, text_tower="x") == 2
    assert "--backbone teacher has none" in capsys.readouterr().err
    argv = options(model_folder, shard, tmp_path, backbone="teacher")
    assert call(script.main, *argv, "--no-train-text") == 2
    assert "--backbone teacher has none" in capsys.readouterr().err
    assert call(script.main, "--preset", "sd21", "--backbone", "teacher", "--data", shard,
                "--heldout", shard, "--out", tmp_path) == 2
    assert "--preset sd21 needs --model" in capsys.readouterr().err
    student = tmp_path / "model"
    shutil.copytree(model_folder, student)
    shutil.rmtree(student / "unet")
    (student / "student").rename(student / "unet")
    assert pretrain(tmp_path / "run", model=student) == 2
    assert "a student; expected a teacher" in capsys.readouterr().err
