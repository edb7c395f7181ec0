import json
import math
import shutil
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import train
from conftest import (
    CAPTIONS,
    ROOT,
    agree,
    call,
    launch,
    lines_of,
    log,
    rand,
    randomize,
    write_shard,
)
from data import Shards, positions
from latent_rm import LatentRM, preference_loss
from lcm_solver import DDIMSolver, NoiseSchedule, ScheduleConfig
from pipeline import Pipeline
from reward import load_reward
from support import cli
from support.runs import rate_factor
from support.weights import WEIGHTS
from unet import UNet


def weights(out, name="unet"):
    return load_file(out / name / WEIGHTS)


def start_of(model_folder):
    return UNet.from_pretrained(model_folder, 256).state_dict()


def apart(a, b):
    assert a.keys() == b.keys()
    return max((a[key] - b[key]).abs().max().item() for key in a)


def assert_same_training(one, two, model_folder):
    """Adam turns the rounding of a tiny gradient into a visible step, so: 1e-5 everywhere, and
    together 5% of the way moved."""
    starts = {"unet": start_of(model_folder), "unet_target": start_of(model_folder)}
    if (one / "latent_rm").is_dir():
        starts["latent_rm"] = load_file(model_folder / "latent_rm" / WEIGHTS)
    for name, start in starts.items():
        a, b = weights(one, name), weights(two, name)
        assert apart(a, b) <= 1e-5 and apart(a, start) > 0
        length = lambda x, y: sum((x[key] - y[key]).square().sum().item() for key in x) ** 0.5
        assert length(a, b) <= 0.05 * length(a, start)
    keys = "loss", "reward", "grad_norm", "lcd_at"
    for first, second in zip(log(one, *keys), log(two, *keys), strict=True):
        assert second[:3] == pytest.approx(first[:3], rel=1e-3)
        assert second[3] == pytest.approx(first[3], rel=1e-3)
    first, second = (
        json.loads((run / "log.jsonl").read_text().split("\n")[0]) for run in (one, two))
    for key in ("grad_norm/lcd", "grad_norm/reward"):  # measured at the first step
        assert second[key] == pytest.approx(first[key], rel=1e-3)


# ----------------------------------------------------------------------------------------- the loss

def network(model_folder, seed, **more):
    return randomize(UNet.from_pretrained(model_folder, **more), seed)


@pytest.fixture(params=["epsilon", "v_prediction"])
def scene(request, model_folder, shard):
    """All that one call of distillation_loss takes; the four networks differ from each other."""
    model = Pipeline.from_pretrained(model_folder, torch.device("cpu"), torch.float32)
    model.schedule = NoiseSchedule(ScheduleConfig(prediction_type=request.param))
    teacher = network(model_folder, 1).requires_grad_(False)
    student = network(model_folder, 2, w_embed_dim=256)
    target = network(model_folder, 3, w_embed_dim=256).requires_grad_(False)
    images, captions = zip(*(Shards(shard, 32)[i] for i in range(4)))
    draws = (rand(4, 4, 8, 8, seed=4), rand(4, 4, 8, 8, seed=5),
             torch.tensor([0.0, 0.3, 0.6, 0.9]), torch.tensor([0.0, 0.15, 0.61, 0.999]))
    # w is small because sin(1000 w) in float32 is worth fewer digits the larger w is
    args = train.Config(ddim_steps=50, w_min=0.2, w_max=0.6, reward_scale=0.7, reward_batch=3)
    return dict(
        model=model, teacher=teacher, student=student, target=target,
        reward=load_reward(f"pocket={model_folder}"), solver=DDIMSolver(model.schedule, 50),
        batch=(torch.stack(images), list(captions), draws), args=args)


def plain_loss(model, teacher, student, target, reward, solver, batch, args):
    """Algorithm 1 again, row by row and straight from section 3 of the design."""
    images, captions, (noise_1, noise_2, u, u_s) = batch
    kind = model.schedule.config.prediction_type
    ab = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).tolist()

    def x0_of(z, out, t):
        if kind == "epsilon":
            return (z - (1 - ab[t]) ** 0.5 * out) / ab[t] ** 0.5
        return ab[t] ** 0.5 * z - (1 - ab[t]) ** 0.5 * out

    def eps_of(z, out, t):
        if kind == "epsilon":
            return out
        return ab[t] ** 0.5 * out + (1 - ab[t]) ** 0.5 * z

    def f(net, z, w, c, t):
        angles = 1000 * w * torch.exp(-math.log(10000) / 127 * torch.arange(128))
        out = net(z, torch.tensor([t]), c, torch.cat([angles.sin(), angles.cos()])[None])
        c_skip, c_out = 0.25 / ((10 * t) ** 2 + 0.25), 10 * t / ((10 * t) ** 2 + 0.25) ** 0.5
        return c_skip * z + c_out * x0_of(z, out, t)

    distances, scores = [], []
    for row in range(len(images)):
        with torch.no_grad():
            mean, std = model.vae.posterior(images[row:row + 1])
            z = (mean + std * noise_1[row]) * 0.18215
            c, empty = model.text_encoder([captions[row]]), model.text_encoder([""])
            w = 0.2 + 0.4 * u[row]
            s = (int(u_s[row].item() * 50) + 1) * 20 - 1
            t = max(s - 20, 0)
            z_s = ab[s] ** 0.5 * z + (1 - ab[s]) ** 0.5 * noise_2[row]
            conditional = teacher(z_s, torch.tensor([s]), c)
            unconditional = teacher(z_s, torch.tensor([s]), empty)
            out = (1 + w) * conditional - w * unconditional
            z_t = ab[t] ** 0.5 * x0_of(z_s, out, s) + (1 - ab[t]) ** 0.5 * eps_of(z_s, out, s)
            goal = f(target, z_t, w, c, t)
        prediction = f(student, z_s, w, c, s)
        distances.append((((prediction - goal) ** 2 + 0.001**2).sqrt() - 0.001).mean())
        if row < 3:
            picture = (model.vae.decode(prediction) / 2 + 0.5).clamp(0, 1)
            scores.append(reward(picture, captions[row:row + 1])[0])
    return sum(distances) / 4 - 0.7 * sum(scores) / 3


def gradients(net, loss):
    net.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in net.named_parameters()}


def assert_same_gradients(ours, theirs):
    # some gradients are zero but for rounding
    floor = 1e-2 * max(g.abs().max().item() for g in theirs.values())
    for name in theirs:
        agree(ours[name], theirs[name], floor=floor)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_equal_the_paper_written_out(checkpointing, scene):
    scene["args"].grad_checkpoint = scene["student"].checkpointing = checkpointing
    loss, stats = train.distillation_loss(**scene)
    expected = plain_loss(**scene)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4) and stats["loss"] == loss
    assert loss.item() == pytest.approx((stats["lcd"] - 0.7 * stats["reward"]).item(), rel=1e-5)
    assert_same_gradients(gradients(scene["student"], loss), gradients(scene["student"], expected))


def test_beta_zero_and_no_reward_give_plain_lcd(scene):
    scene["args"].reward_scale = 0.0
    with_reward = gradients(scene["student"], train.distillation_loss(**scene)[0])
    loss, stats = train.distillation_loss(**scene | {"reward": None})
    assert "reward" not in stats and loss == stats["lcd"]
    assert_same_gradients(with_reward, gradients(scene["student"], loss))


def test_encoded_and_plain_pictures_give_the_same_loss(scene):
    images, *rest = scene["batch"]
    with torch.no_grad():
        posteriors = torch.stack(scene["model"].vae.posterior(images), dim=1)
    loss, again = (
        train.distillation_loss(**scene | {"batch": (tensors, *rest)})[0]
        for tensors in (images, posteriors))
    assert loss.item() == pytest.approx(again.item(), rel=1e-5)


def test_only_the_student_gets_gradients(scene):
    model = scene["model"]
    frozen = [
        scene["teacher"], scene["target"], model.vae, model.text_encoder, scene["reward"]]
    train.distillation_loss(**scene)[0].backward()
    assert all(p.grad is None for net in frozen for p in net.parameters())
    assert all(p.grad is not None for p in scene["student"].parameters())


def gradients_of_top(latent_rm, loss):
    latent_rm.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in latent_rm.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["kl", "ce"])
def test_reward_through_the_proxy_equals_the_paper_written_out(kind, proxied, monkeypatch):
    """Both losses row by row: so captions stay with their pictures, and the expert labels what the
    LRM is asked about."""
    seen, proxied["args"].rm_loss = {}, kind
    rewarded, fitted = train.latent_reward, train.proxy_loss

    def seen_reward(*args):
        seen.update(rewarded=args[2])
        return rewarded(*args)

    def seen_loss(*args):
        seen.update(args[3])
        return fitted(*args)

    monkeypatch.setattr(train, "latent_reward", seen_reward)
    monkeypatch.setattr(train, "proxy_loss", seen_loss)
    loss, stats = train.distillation_loss(**proxied)
    prediction, goal, z = (seen[name] for name in ("rewarded", "ema", "real"))
    assert torch.equal(seen["prediction"], prediction[:2])
    model, latent_rm, reward = proxied["model"], proxied["latent_rm"], proxied["reward"]
    captions = proxied["batch"][1]

    def plain_reward(model, lrm, latents, text):
        return sum(lrm(latents[i:i + 1] / 0.18215, captions[i:i + 1])[0] for i in range(3)) / 3

    plain, _ = train.distillation_loss(**proxied | {"reward": None, "latent_rm": None})
    score = plain_reward(model, latent_rm, prediction, captions)
    assert stats["loss"].item() == pytest.approx((plain - 0.7 * score).item(), rel=1e-5)
    assert stats["rm_score"].item() == pytest.approx(score.item(), rel=1e-5)
    expert, lrm = [], []
    for i in range(2):
        text, row = captions[i:i + 1], [x[i:i + 1].detach() for x in (prediction, goal, z)]
        with torch.no_grad():
            decoded = [(model.vae.decode(x) / 2 + 0.5).clamp(0, 1) for x in row]
            expert.append([reward(picture, text)[0] for picture in decoded])
        lrm.append(torch.cat([latent_rm(x / 0.18215, text) for x in row]))
    expert, lrm = torch.tensor(expert), torch.stack(lrm)
    rm_loss = preference_loss(expert, lrm, 0.3, 0.2, kind)
    assert stats["rm_loss"].item() == pytest.approx(rm_loss.item(), rel=1e-4) and rm_loss > 0
    means = [stats[f"expert/{name}"].item() for name in ("prediction", "ema", "real")]
    assert means == pytest.approx(expert.mean(0).tolist(), rel=1e-4)
    pairs = [(i, j, k) for i in range(2) for j, k in ((0, 1), (0, 2), (1, 2))]
    right = sum((expert[i, j] > expert[i, k]) == (lrm[i, j] > lrm[i, k]) for i, j, k in pairs)
    assert stats["rm_accuracy"].item() == pytest.approx(right.item() / 6)

    expected = gradients_of_top(latent_rm, rm_loss)
    again, _ = train.distillation_loss(**proxied)
    assert_same_gradients(gradients_of_top(latent_rm, again), expected)
    ours, student = gradients(proxied["student"], loss), proxied["student"]
    monkeypatch.setattr(train, "latent_reward", plain_reward)
    assert_same_gradients(ours, gradients(student, train.distillation_loss(**proxied)[0]))


def test_the_proxy_learns_from_the_preferences_alone_and_the_student_from_its_score_alone(proxied):
    """In bf16 too, where autocast keeps a copy of the weights."""
    student, latent_rm = proxied["student"], proxied["latent_rm"]
    top = {"visual.blocks.1", "visual.blocks.2"}
    top |= {f"text.transformer.resblocks.{i}" for i in (1, 2, 3)}
    for dtype in (torch.float32, torch.bfloat16):
        def parts(beta, dtype=dtype):
            proxied["args"].reward_scale = beta
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss, stats = train.distillation_loss(**proxied)
            student.zero_grad()
            of_top = gradients_of_top(latent_rm, loss)  # which runs backward
            return of_top, {name: p.grad.clone() for name, p in student.named_parameters()}
        (lrm, one), (lrm_again, two) = parts(0.5), parts(50.0)
        assert {".".join(name.split(".")[:3 if name[0] == "v" else 4]) for name in lrm} == top
        assert all(g.abs().max() > 0 for name, g in lrm.items() if "in_proj_bias" not in name)
        # beta, the student's, does not reach it
        assert all(torch.equal(lrm[name], lrm_again[name]) for name in lrm)
        assert any((one[name] - two[name]).abs().max() > 1e-4 for name in one)
    model = proxied["model"]
    frozen = [
        proxied["teacher"], proxied["target"], model.vae, model.text_encoder, proxied["reward"]]
    assert all(p.grad is None for net in frozen for p in net.parameters())


def test_the_student_learns_nothing_from_the_proxys_loss(proxied):
    lrm = proxied["latent_rm"]
    loss = lambda: train.distillation_loss(**proxied)[0]
    some = gradients(proxied["student"], loss())
    proxied["args"].rm_tau_lrm = 0.01  # another loss of the proxy, the same of the student
    assert gradients_of_top(lrm, loss())
    again = gradients(proxied["student"], loss())
    assert all(torch.equal(some[k], g) for k, g in again.items())


def test_through_the_proxy_no_picture_is_decoded_with_gradients(proxied, monkeypatch):
    decode, calls = proxied["model"].vae.decode, []

    def seen_decode(latents):
        calls.append(torch.is_grad_enabled())
        return decode(latents)

    monkeypatch.setattr(proxied["model"].vae, "decode", seen_decode)
    train.distillation_loss(**proxied)
    assert calls == [False] * 3


def test_captions_stay_with_their_pictures_in_another_order(proxied):
    proxied["args"].reward_batch = proxied["args"].rm_batch = 4
    images, captions, draws = proxied["batch"]
    order = [2, 0, 3, 1]
    moved = [captions[i] for i in order]
    loss, stats = train.distillation_loss(**proxied)
    together = images[order], moved, [d[order] for d in draws]
    _, again = train.distillation_loss(**proxied | {"batch": together})
    _, apart = train.distillation_loss(**proxied | {"batch": (images, moved, draws)})
    for key in ("loss", "rm_score", "rm_loss", "reward", "expert/ema", "expert/real"):
        assert again[key].item() == pytest.approx(stats[key].item(), rel=1e-4)
        assert apart[key].item() != pytest.approx(stats[key].item(), rel=1e-4)


def test_no_two_ranks_draw_the_same():
    draw = lambda places, seed=0: train.data.random_draws(seed, places, (4, 8, 8), "cpu")
    first, second = draw(positions(3, 4, rank=0, world=2)), draw(positions(3, 4, rank=1, world=2))
    both = [torch.cat(pair) for pair in zip(first, second)]
    for column in both:  # posterior noise, diffusion noise, u_w, u_s: eight different rows
        rows = column.flatten(1) if column.ndim > 1 else column
        assert len(torch.unique(rows, dim=0)) == 8
    assert not torch.equal(first[0], first[1])
    for joint, alone in zip(both, draw(positions(3, 8))):
        assert torch.equal(joint, alone)  # the rows of one process with the doubled batch
    assert not torch.equal(draw(range(4))[0], draw(range(4), seed=1)[0])


def test_draws_have_the_right_distribution():
    *noises, u_w, u_s = train.data.random_draws(0, range(3000), (4,), "cpu")
    for noise in noises:
        assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    for u in (u_w, u_s):
        assert u.min() >= 0 and u.max() < 1 and abs(u.mean() - 0.5) < 0.03
    assert not torch.equal(u_w, u_s)


def test_timesteps_are_uniform_over_the_grid_and_lcd_is_known_at_each(scene):
    """lcd_at: at each of the 50 grid points the sum of L_LCD, and how many samples were there."""
    _, stats = train.distillation_loss(**scene | {"reward": None})
    sums, counts = stats["lcd_at"]
    assert counts.nonzero().flatten().tolist() == [0, 7, 30, 49] and counts.sum() == 4
    assert sums.sum().item() / 4 == pytest.approx(stats["lcd"].item(), rel=1e-5)
    images, captions, draws = scene["batch"]
    for row, point in enumerate((0, 7, 30, 49)):
        one = slice(row, row + 1)
        batch = images[one], captions[one], [draw[one] for draw in draws]
        loss, _ = train.distillation_loss(**scene | {"reward": None, "batch": batch})
        assert sums[point].item() == pytest.approx(loss.item(), rel=1e-4)


# ------------------------------------------------------------------------------------------ the run

def test_a_run_leaves_all_its_parts_and_students_that_diffusers_opens(fit, tmp_path, model_folder):
    from diffusers import UNet2DConditionModel
    out = tmp_path / "run"
    assert fit(out, steps=5, reward=f"pocket={model_folder}", keep=2, sample_every=3) == 0
    assert {f.name for f in out.iterdir()} - {"tensorboard", ".lock"} == {
        "checkpoints", "config.json", "log.jsonl", "samples", "unet", "unet_target"}
    assert sorted(f.name for f in (out / "checkpoints").iterdir()) == ["step-000004", "step-000005"]
    assert sorted(f.name for f in (out / "samples").iterdir()) == [
        "step-000003.png", "step-000005.png"]
    assert Image.open(out / "samples/step-000005.png").text["prompts"] == " | ".join(CAPTIONS)
    lines = log(out, "step", "loss", "lcd", "reward", "grad_norm", "lr")
    assert [step for step, *_ in lines] == [1, 2, 3, 4, 5]
    assert json.loads((out / "config.json").read_text())["steps"] == 5
    for name in ("unet", "unet_target"):
        theirs = UNet2DConditionModel.from_pretrained(out / name)
        assert apart(theirs.state_dict(), weights(out, name)) == 0
    assert apart(weights(out), start_of(model_folder)) > 1e-4
    assert weights(out)["time_embedding.cond_proj.weight"].any()


def test_the_parts_of_a_sum_of_rewards_add_up(scene):
    from reward import Mixture
    first, second = scene["reward"], load_reward(f"pocket={ROOT / 'pocket' / 'judge'}")
    second.name = "judge"
    one, _ = train.distillation_loss(**scene | {"reward": None})
    reward = Mixture([first, second], [0.5, 2.0])
    loss, stats = train.distillation_loss(**scene | {"reward": reward})
    weighted = 0.5 * stats["reward/pocket"].item() + 2 * stats["reward/judge"].item()
    assert stats["reward"].item() == pytest.approx(weighted, rel=1e-5)
    assert loss.item() == pytest.approx(one.item() - 0.7 * stats["reward"].item(), rel=1e-5)


def test_target_is_the_moving_average_of_the_student(fit, tmp_path, model_folder):
    assert fit(tmp_path, steps=3, ema=0.8, checkpoint_every=1, keep=3) == 0
    target = start_of(model_folder)
    for step in (1, 2, 3):
        folder = tmp_path / "checkpoints" / f"step-{step:06d}"
        target = {key: 0.8 * target[key] + 0.2 * value for key, value in weights(folder).items()}
        assert apart(weights(folder, "unet_target"), target) < 1e-6
    assert apart(weights(tmp_path), target) > 1e-4


def through(proxy, model_folder, **more):
    """Options of the reward, direct or through the latent proxy, of which one image block and two
    text blocks train."""
    proxied = dict(
        latent_rm=model_folder / "latent_rm", rm_image_layers=1, rm_text_layers=2,
        rm_lr=more.get("lr", 1e-3))
    return dict(reward=f"pocket={model_folder}") | (proxied if proxy else {}) | more


@pytest.mark.parametrize("proxy", [False, True])
def test_run_kill_run_equals_one_run_bit_for_bit(proxy, fit, options, tmp_path, model_folder):
    steps = through(proxy, model_folder, steps=14, checkpoint_every=5)
    whole, out = tmp_path / "whole", tmp_path / "killed"
    assert fit(whole, **steps) == 0
    process, file = launch(options(out, **steps)), out / "log.jsonl"
    lines = lambda: len(file.read_text().splitlines()) if file.is_file() else 0
    while process.alive() and lines() < 7:
        time.sleep(0.005)
    process.send(signal.SIGKILL)
    assert process.wait()[0] == [-signal.SIGKILL] and not (out / "unet").exists()
    launch(options(out, **steps)).succeed()
    for name in ("unet", "unet_target", "latent_rm")[:2 + proxy]:
        assert (out / name / WEIGHTS).read_bytes() == (whole / name / WEIGHTS).read_bytes()
    keys = ("step", "loss", "reward", "grad_norm", "lr", "rm_loss", "rm_accuracy")[:5 + 2 * proxy]
    assert log(out, *keys) == log(whole, *keys)
    assert [step for step, in log(out, "step")] == list(range(1, 15))


@pytest.mark.parametrize(("sharded", "proxy"), [
    (False, False), (False, True), (True, False),
    pytest.param(True, True, marks=pytest.mark.slow)])
def test_two_processes_equal_one_with_the_doubled_batch(
        sharded, proxy, fit, options, tmp_path, model_folder):
    same = through(proxy, model_folder, steps=3, lr=3e-5)
    argv = options(tmp_path / "two", batch_size=1, grad_accum=2, shard=sharded, **same)
    launch(argv, world=2).succeed()
    assert fit(tmp_path / "one", batch_size=4, **same) == 0
    assert_same_training(tmp_path / "one", tmp_path / "two", model_folder)


@pytest.mark.parametrize("sharded", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_of_two_processes_goes_on_as_one_and_as_four(
        sharded, fit, options, tmp_path, model_folder):
    same = dict(steps=4, lr=3e-5, checkpoint_every=2, keep=3, reward=f"pocket={model_folder}")
    two, one = tmp_path / "two", tmp_path / "one"
    launch(options(two, batch_size=2, shard=sharded, **same), world=2).succeed()
    shutil.copytree(two, one)
    for out, world in ((one, 1), (two, 4)):
        shutil.rmtree(out / "checkpoints/step-000004")
        more = dict(batch_size=4 // world, shard=sharded and world > 1)
        launch(options(out, **more, **same), world).succeed()
    assert fit(tmp_path / "whole", batch_size=4, **same) == 0
    for out in (one, two):
        assert_same_training(tmp_path / "whole", out, model_folder)


def test_a_run_with_another_number_of_pictures_a_step_is_refused(fit, tmp_path, capsys):
    assert fit(tmp_path, steps=1, batch_size=4, grad_accum=1) == 0
    assert fit(tmp_path, steps=1, batch_size=2, grad_accum=2) == 0
    assert fit(tmp_path, steps=1, batch_size=2, grad_accum=1) == 2
    assert "grad_accum 2 (now 1)" in capsys.readouterr().err
    # the same pictures, but fewer of them rewarded
    assert fit(tmp_path, steps=1, batch_size=4, grad_accum=1, reward_batch=2) == 2
    assert "reward_batch" in capsys.readouterr().err


@pytest.mark.parametrize("proxy", [False, True])
def test_accumulating_two_batches_equals_the_doubled_batch(proxy, fit, tmp_path, model_folder):
    same = through(proxy, model_folder, steps=3, lr=3e-5)
    assert fit(tmp_path / "two", batch_size=2, grad_accum=2, **same) == 0
    assert fit(tmp_path / "one", batch_size=4, **same) == 0
    assert_same_training(tmp_path / "one", tmp_path / "two", model_folder)


def test_of_the_proxy_only_the_chosen_blocks_move(fit, tmp_path, model_folder):
    assert fit(tmp_path, **through(True, model_folder, steps=2)) == 0
    before, after = load_file(model_folder / "latent_rm" / WEIGHTS), weights(tmp_path, "latent_rm")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    chosen = (
        "visual.blocks.2.", "text.transformer.resblocks.2.", "text.transformer.resblocks.3.")
    assert moved == {name for name in before if name.startswith(chosen)}
    kept = tmp_path / "checkpoints/step-000002/latent_rm" / WEIGHTS
    assert kept.read_bytes() == (tmp_path / "latent_rm" / WEIGHTS).read_bytes()


def test_student_and_proxy_have_rates_of_their_own(fit, tmp_path, model_folder):
    # the first step of AdamW moves a weight with a gradient by the rate
    assert fit(tmp_path, steps=1, warmup=1, **through(True, model_folder, lr=1e-3, rm_lr=2e-4)) == 0
    before = load_file(model_folder / "latent_rm" / WEIGHTS)
    assert apart(weights(tmp_path, "latent_rm"), before) == pytest.approx(2e-4, rel=1e-2)
    student = {key: value for key, value in weights(tmp_path).items() if "cond_proj" not in key}
    before = load_file(model_folder / "unet" / WEIGHTS)
    assert apart(student, before) == pytest.approx(1e-3, rel=1e-2)


def test_a_proxy_whose_gradient_is_not_finite_stops_the_run(
        fit, tmp_path, model_folder, monkeypatch, capsys):
    flat = lambda expert, lrm, *more: (lrm.sum() * 0).abs().sqrt()  # 0, with no slope there
    monkeypatch.setattr(train.proxy, "preference_loss", flat)
    assert fit(tmp_path, steps=4, max_bad_steps=3, **through(True, model_folder)) == 2
    assert "3 steps in a row" in capsys.readouterr().err


def test_the_rate_warms_up_and_follows_a_cosine_down_to_5_percent():
    def factor(step, **more):
        values = dict(lr_schedule="cosine", steps=100, warmup=4) | more
        return rate_factor(step, SimpleNamespace(**values))

    constant = [factor(step, lr_schedule="constant") for step in (0, 1, 3, 4, 99)]
    assert constant == [0.25, 0.5, 1, 1, 1]
    assert factor(50) == pytest.approx(0.525) and factor(100) == pytest.approx(0.05)
    assert factor(25) == pytest.approx(0.05 + 0.95 * (1 + 0.5 ** 0.5) / 2)


def test_a_black_box_is_an_expert_to_learn_from(fit, tmp_path, model_folder):
    reward = f"jpeg+pocket={model_folder}*0.5"
    assert fit(tmp_path, **through(True, model_folder, steps=2, reward=reward)) == 0
    assert all(kilobytes < 0 for kilobytes, in log(tmp_path, "expert/real"))
    before = load_file(model_folder / "latent_rm" / WEIGHTS)
    assert apart(weights(tmp_path, "latent_rm"), before) > 1e-4


def test_a_proxy_that_trains_nothing_stays_as_it_was(fit, tmp_path, model_folder):
    same = through(True, model_folder, steps=2) | {"rm_image_layers": 0, "rm_text_layers": 0}
    assert fit(tmp_path, **same) == 0
    before = load_file(model_folder / "latent_rm" / WEIGHTS)
    assert apart(weights(tmp_path, "latent_rm"), before) == 0


def test_a_proxy_for_other_latents_is_refused(fit, tmp_path, model_folder, capsys):
    from conftest import LATENT_RM
    from latent_rm import LatentRMConfig
    tokenizer = LatentRM.from_pretrained(model_folder).tokenizer
    other = tmp_path / "other"
    for change, named in (
            ({"latent_size": 16}, "(4, 16, 16)"),
            ({"latent_channels": 16}, "(16, 8, 8)")):
        LatentRM(LatentRMConfig(**LATENT_RM | change), tokenizer).save_pretrained(other)
        assert fit(tmp_path / "run", **through(True, model_folder, latent_rm=other)) == 2
        message = capsys.readouterr().err
        assert named in message and "(4, 8, 8)" in message and "--latent-rm" in message


def test_an_existing_run_refuses_changed_options(fit, tmp_path, capsys):
    assert fit(tmp_path, steps=1) == 0
    before = (tmp_path / "config.json").read_text()
    assert fit(tmp_path, steps=1, lr=0.5) == 2
    message = capsys.readouterr().err
    assert "lr 0.001 (now 0.5)" in message and (tmp_path / "config.json").read_text() == before


def test_a_run_begun_on_another_number_of_processes_is_refused(fit, tmp_path, capsys):
    assert fit(tmp_path, steps=1) == 0
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"processes": 2}))
    assert fit(tmp_path, steps=1) == 2
    assert "processes 2 (now 1)" in capsys.readouterr().err


def test_a_run_is_resumed_in_the_arithmetic_that_auto_chose_for_it(
        fit, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "cpu_is_faster_in_bf16", lambda: False)
    assert fit(tmp_path, precision="auto", steps=1) == 0
    monkeypatch.setattr(cli, "cpu_is_faster_in_bf16", lambda: True)  # on another machine
    assert fit(tmp_path, precision="auto", steps=1) == 2
    assert "precision fp32 (now bf16)" in capsys.readouterr().err


def test_a_finished_run_started_again_keeps_its_result(fit, tmp_path):
    assert fit(tmp_path, steps=2) == 0
    before = (tmp_path / "unet" / WEIGHTS).read_bytes()
    assert fit(tmp_path, steps=2) == 0
    assert (tmp_path / "unet" / WEIGHTS).read_bytes() == before
    assert log(tmp_path, "step") == [(1,), (2,)]


def test_a_finished_run_started_again_says_that_nothing_was_trained(fit, tmp_path, capsys):
    assert fit(tmp_path, steps=2) == 0
    assert "finished already" not in capsys.readouterr().out
    assert fit(tmp_path, steps=2) == 0
    said = capsys.readouterr().out
    assert "finished already at step 2, nothing was trained" in said and "resumes" not in said
    assert fit(tmp_path, steps=3) == 2  # under a cosine the steps shape every rate: another run
    assert "steps 2 (now 3)" in capsys.readouterr().err
    assert fit(tmp_path, steps=3, lr_schedule="constant") == 2


def test_a_warm_up_longer_than_half_the_run_is_told(fit, tmp_path, capsys):
    assert fit(tmp_path / "short", steps=4, warmup=8, lr_schedule="constant") == 0
    assert "peaks at 50% of --lr" in capsys.readouterr().out
    assert fit(tmp_path / "long", steps=4, warmup=2) == 0
    assert "peaks" not in capsys.readouterr().out
    assert fit(tmp_path / "cosine", steps=5, warmup=20) == 0
    assert "peaks at 10% of --lr" in capsys.readouterr().out


def test_a_run_from_before_an_option_existed_goes_on_with_its_default(fit, tmp_path, capsys):
    assert fit(tmp_path, steps=4, keep=3) == 0
    file = tmp_path / "config.json"
    old = json.loads(file.read_text())
    for name in ("max_grad_norm", "norms_every", "preset", "code"):
        del old[name]
    file.write_text(json.dumps(old))
    (tmp_path / "checkpoints/step-000004").rename(tmp_path / "moved-away")
    assert fit(tmp_path, steps=4, keep=3) == 0 and "resumes at step 2" in capsys.readouterr().out
    file.write_text(json.dumps(old))
    assert fit(tmp_path, steps=4, keep=3, max_grad_norm=2) == 2
    assert "max_grad_norm 1.0 (now 2.0)" in capsys.readouterr().err


def test_gradients_are_clipped_at_the_norm_that_is_asked_for(fit, tmp_path, model_folder):
    """The student's and the proxy's. AdamW's steps hardly change with the length of a gradient;
    its first moments, a tenth of the first gradient, do."""
    proxied = through(True, model_folder, steps=1)
    for norm in (1e-4, 1e9):
        out = tmp_path / str(norm)
        assert fit(out, max_grad_norm=norm, **proxied) == 0
        saved = torch.load(out / "checkpoints/step-000001/optimizer.pt", weights_only=True)
        ((*norms,),) = log(out, "grad_norm", "rm_grad_norm")
        for group, seen in zip(saved["param_groups"], norms, strict=True):
            moments = [saved["state"][i]["exp_avg"] for i in group["params"]]
            length = sum(moment.square().sum().item() for moment in moments) ** 0.5
            assert seen > 1e-4 and length == pytest.approx(0.1 * min(norm, seen), rel=1e-3)


def test_the_log_shows_the_mean_of_all_steps_since_its_last_line(fit, tmp_path):
    for every in (1, 3):
        assert fit(tmp_path / str(every), steps=6, log_every=every, checkpoint_every=100) == 0
    keys = "lcd", "loss", "grad_norm"
    each, together = log(tmp_path / "1", *keys), log(tmp_path / "3", *keys)
    assert len(each) == 6 and len(together) == 2
    for line, three in zip(together, (each[:3], each[3:])):
        means = [sum(column) / 3 for column in zip(*three)]
        assert line == pytest.approx(means, rel=1e-5)


def test_the_log_shows_lcd_at_each_timestep_that_was_drawn(fit, tmp_path):
    assert fit(tmp_path, steps=4, log_every=4, checkpoint_every=100, ddim_steps=10) == 0
    ((lcd, at),) = log(tmp_path, "lcd", "lcd_at")
    *_, u_s = train.data.random_draws(0, range(8), (4, 8, 8), "cpu")
    drawn = [100 * int(10 * u) + 99 for u in u_s.tolist()]
    assert set(at) == {str(t) for t in drawn}
    assert sum(at[str(t)] for t in drawn) / 8 == pytest.approx(lcd, rel=1e-4)


@pytest.mark.parametrize("proxy", [False, True])
def test_gradient_norms_of_distillation_and_reward_are_seen_apart_and_change_nothing(
        proxy, fit, tmp_path, model_folder):
    same = through(proxy, model_folder, steps=2, grad_accum=2)
    assert fit(tmp_path / "apart", norms_every=2, **same) == 0
    assert fit(tmp_path / "without", norms_every=0, **same) == 0
    for name in ("unet", "unet_target"):
        assert apart(weights(tmp_path / "apart", name), weights(tmp_path / "without", name)) == 0
    first, second = [
        json.loads(line) for line in (tmp_path / "apart/log.jsonl").read_text().splitlines()]
    assert first["grad_norm/reward"] > 0 and "grad_norm/lcd" not in second
    # the first gradient of L_LCD is that of a run without a reward
    assert fit(tmp_path / "plain", steps=2, grad_accum=2, norms_every=1) == 0
    assert "grad_norm/lcd" not in (tmp_path / "plain/log.jsonl").read_text()
    (plain,), _ = log(tmp_path / "plain", "grad_norm")
    assert first["grad_norm/lcd"] == pytest.approx(plain, rel=1e-4)


def test_with_the_reward_at_scale_0_nothing_is_left_for_its_gradient(fit, tmp_path, model_folder):
    direct = through(False, model_folder, steps=1, norms_every=1)
    assert fit(tmp_path, reward_scale=0, **direct) == 0
    ((whole, lcd, reward),) = log(tmp_path, "grad_norm", "grad_norm/lcd", "grad_norm/reward")
    assert lcd == pytest.approx(whole, rel=1e-4) and reward < 1e-3 * whole


PUBLISHED = {  # Ji4chenLi/rg-lcd, train_lcm_distill_sd_wds.py: its defaults, and README's command
    "resolution": 512, "batch_size": 16, "grad_accum": 1, "steps": 10_000, "lr": 1e-6,
    "lr_schedule": "constant", "max_grad_norm": 1.0, "ema": 0.95, "ddim_steps": 50, "w_min": 5.0,
    "w_max": 15.0, "reward": "hpsv2.1", "reward_scale": 1.0, "reward_batch": 16,
    "rm_lr": 3.3e-6, "rm_batch": 16, "rm_text_layers": 5, "rm_loss": "kl",
    "rm_tau": 0.01, "rm_tau_lrm": 0.01,  # there both scores are multiplied by 100
}


@pytest.mark.parametrize("preset", ["sd21", "sd21-768", "sd15"])
def test_a_preset_stands_for_the_published_recipe_and_options_beside_it_win(preset):
    argv = ["--preset", preset, "--teacher", "MODEL", "--data", "shards"]
    parse = lambda *more: cli.parse(train.Config(), "", [*argv, *more], train.PRESETS)
    args = parse()
    resolution = 768 if preset == "sd21-768" else 512
    for name, value in (PUBLISHED | {"resolution": resolution}).items():
        assert getattr(args, name) == value, name
    assert (args.preset, args.teacher, args.data) == (preset, "MODEL", "shards")
    assert [min(1, train.runs.rate_factor(step, args)) for step in (0, 9_999)] == [1, 1]
    args.reward = "pocket"
    train.check(args)  # the preset's own rm_tau asks for no proxy
    other = parse("--lr", "2e-6", "--no-grad-checkpoint")
    assert (other.lr, other.grad_checkpoint, other.w_max) == (2e-6, False, 15.0)


def test_a_preset_asks_for_what_it_leaves_open(tmp_path, capsys):
    assert call(train.main, "--preset", "sd21", "--out", tmp_path) == 2
    assert "--preset sd21 needs --teacher" in capsys.readouterr().err
    assert call(train.main, "--preset", "sd21", "--teacher", "x", "--out", tmp_path) == 2
    assert "--preset sd21 needs --data" in capsys.readouterr().err


def test_a_preset_is_recorded_and_may_be_spelt_out_on_resuming(
        fit, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(train.PRESETS, "sd15", {"w_min": 2.0, "steps": 1})
    assert fit(tmp_path, preset="sd15", steps=2) == 0
    record = json.loads((tmp_path / "config.json").read_text())
    assert (record["preset"], record["w_min"], record["steps"]) == ("sd15", 2.0, 2)
    assert fit(tmp_path, w_min=2.0, steps=2) == 0
    assert fit(tmp_path, steps=2) == 2 and "w_min 2.0 (now 1.0)" in capsys.readouterr().err


def test_resume_overlooks_what_is_no_whole_checkpoint(fit, tmp_path):
    assert fit(tmp_path / "whole", steps=4) == 0
    out = tmp_path / "run"
    assert fit(out, steps=4, keep=3) == 0
    # killed while writing it
    (out / "checkpoints/step-000004").rename(out / "checkpoints/.step-000004.77.new")
    (out / "checkpoints/step-000099.pt").write_bytes(b"of another kind")
    assert fit(out, steps=4, keep=3) == 0
    assert (out / "unet" / WEIGHTS).read_bytes() == (tmp_path / "whole/unet" / WEIGHTS).read_bytes()


def test_resume_overlooks_half_a_line_of_the_log(fit, tmp_path):
    assert fit(tmp_path, steps=4, keep=3) == 0
    (tmp_path / "checkpoints/step-000004").rename(tmp_path / "moved-away")
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    assert fit(tmp_path, steps=4, keep=3) == 0
    assert log(tmp_path, "step") == [(1,), (2,), (3,), (4,)]


def test_a_diverged_run_stops_with_a_message(fit, tmp_path, capsys):
    assert fit(tmp_path, steps=4, lr=1e30, max_bad_steps=2) == 2
    message = capsys.readouterr().err
    assert "not finite in 2 steps in a row" in message and "lower --lr" in message
    assert not (tmp_path / "unet").exists()


def test_of_a_step_that_is_not_finite_nothing_reaches_weights_target_or_optimizer(
        fit, tmp_path, monkeypatch, capsys):
    loss_of, calls = train.distillation_loss, []

    def second_is_nan(*args, **more):
        calls.append(1)
        loss, stats = loss_of(*args, **more)
        return (loss * float("nan"), stats) if len(calls) == 2 else (loss, stats)

    monkeypatch.setattr(train, "distillation_loss", second_is_nan)
    assert fit(tmp_path, steps=3, checkpoint_every=1, keep=3, norms_every=0, batch_size=2) == 0
    one, two, three = (tmp_path / f"checkpoints/step-00000{n}" for n in (1, 2, 3))
    for file in (f"unet/{WEIGHTS}", f"unet_target/{WEIGHTS}", "optimizer.pt"):
        assert (one / file).read_bytes() == (two / file).read_bytes() != (three / file).read_bytes()
    skipped = lines_of(tmp_path)[1]
    assert skipped["step"] == 2 and len(skipped["skipped"]) == 2
    assert skipped["skipped"][0] in capsys.readouterr().out  # shard and member are named
    assert [line.get("loss") is None for line in lines_of(tmp_path)] == [False, True, False]


WRONG = {
    "no steps": ({"steps": 0}, "--steps 0"),
    "learning rate 0": ({"lr": 0}, "--lr"),
    "ema 1": ({"ema": 1}, "--ema"),
    "w range upside down": ({"w_min": 9, "w_max": 3}, "--w-min"),
    "grid that does not divide": ({"ddim_steps": 51}, "51"),
    "resolution that does not divide": ({"resolution": 30}, "--resolution 30"),
    "no such reward": ({"reward": "beauty"}, "beauty"),
    "a reward without gradient": ({"reward": "pocket+jpeg"}, "--latent-rm"),
    "no such proxy": ({"reward": "jpeg", "latent_rm": "/none/lrm"}, "/none/lrm"),
    "a proxy without an expert": ({"latent_rm": "/none/lrm"}, "--reward none"),
    "options of a proxy that is not there": (
        {"rm_lr": 1e-4, "rm_loss": "ce"}, "--rm-lr, --rm-loss: of the latent proxy"),
    "proxy of an empty name": ({"reward": "jpeg", "latent_rm": ""}, "latent_rm/config.json"),
    "temperature 0": ({"rm_tau": 0}, "--rm-tau 0"),
    "fewer than no blocks": ({"rm_text_layers": -1}, "--rm-text-layers -1"),
    "no such data": ({"data": "/none/*.tar"}, "/none"),
    "no such teacher": ({"teacher": "/none/model"}, "/none/model"),
    "a grid with room for one step": ({"ddim_steps": 1}, "--ddim-steps 1"),
    "unwritable out": ({"out": "/dev/null/run"}, "/dev/null/run"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options_are_one_line_and_exit_code_2(case, fit, tmp_path, capsys):
    changes, named = WRONG[case]
    assert fit(**{"out": tmp_path} | changes) == 2
    message = capsys.readouterr().err
    assert named in message and "Traceback" not in message


def test_a_student_as_teacher_is_refused(fit, model_copy, tmp_path, capsys):
    shutil.rmtree(model_copy / "unet")
    (model_copy / "student").rename(model_copy / "unet")
    assert fit(tmp_path / "run", teacher=model_copy) == 2
    assert "a student; expected a teacher" in capsys.readouterr().err


def test_a_data_error_in_the_middle_of_a_run_names_the_shard(fit, tmp_path, capsys):
    file = write_shard(tmp_path / "bad.tar", [("a.png", b"no picture"), ("a.txt", b"words")])
    assert fit(tmp_path / "run", data=file) == 2 and str(file) in capsys.readouterr().err
    assert fit(tmp_path / "run", data=file, workers=1) == 2  # from another process
    lines = capsys.readouterr().err.strip().splitlines()
    assert str(file) in lines[-1] and "Traceback" not in "".join(lines)


def test_the_student_is_of_the_size_that_it_was_trained_at(fit, tmp_path):
    assert fit(tmp_path, steps=1, resolution=64) == 0  # the teacher's is 32
    assert json.loads((tmp_path / "unet_target/config.json").read_text())["sample_size"] == 16
    assert Image.open(tmp_path / "samples/step-000001.png").size == (4 * 64, 2 * 64)


def test_a_run_on_the_pocket_ends_with_the_comparison_of_its_own_student(
        options, tmp_path, monkeypatch):
    compared = []
    compare = lambda config, device, dtype: compared.append(config)
    monkeypatch.setattr(train.evaluate, "compare", compare)
    argv = ["--steps", 1, "--batch-size", 1, "--device", "cpu", "--precision", "fp32",
            "--no-compile", "--out"]
    assert call(train.main, *argv, tmp_path / "run") == 0
    assert call(train.main, *argv, tmp_path / "run", "--no-evaluate") == 0
    (config,) = compared
    assert config == train.evaluate.Config(
        unet=str(tmp_path / "run/unet_target"), out=str(tmp_path / "run"),
        device="cpu", precision="fp32")


def test_the_comparison_shows_the_reward_that_the_run_maximised(tmp_path, monkeypatch):
    compared = []
    monkeypatch.setattr(train.evaluate, "compare", lambda config, *more: compared.append(config))
    judge = f"pocket={ROOT / 'pocket/judge'}"
    argv = ["--steps", 1, "--batch-size", 1, "--device", "cpu", "--precision", "fp32",
            "--no-compile"]
    assert call(train.main, *argv, "--reward", judge, "--out", tmp_path / "judge") == 0
    assert call(train.main, *argv, "--reward", "none", "--out", tmp_path / "plain") == 0
    assert [config.reward for config in compared] == [judge, "pocket"]


def compare_precisions(fit, out, monkeypatch, model_folder, **options):
    """Runs with all that can be trained at once follow float32's, and what is frozen has bf16
    weights in them."""
    rewards = {"direct": {}, "proxy": {"latent_rm": model_folder / "latent_rm"}}
    for path, more in rewards.items():
        assert fit(out / path, steps=3, reward=f"pocket={model_folder}", **more) == 0
    of, seen = train.distillation_loss, []

    def seen_loss(*networks, **more):
        seen.append(networks)
        return of(*networks, **more)

    monkeypatch.setattr(train, "distillation_loss", seen_loss)
    for path, more in rewards.items():
        assert fit(
            out / f"bf16-{path}", steps=3, precision="bf16", reward=f"pocket={model_folder}",
            workers=1, grad_checkpoint=True, **more, **options) == 0
        keys = ("lcd", "rm_score", "rm_loss") if more else ("lcd", "reward")
        # of near ties at a small temperature: off by 0.08 (rms over six seeds), with attention in
        # float32 too
        noise = {"rm_loss": 0.15}
        for a, b in zip(log(out / path, *keys), log(out / f"bf16-{path}", *keys), strict=True):
            for key, exact, found in zip(keys, a, b):
                assert found == pytest.approx(exact, rel=0.1, abs=noise.get(key, 0.01)), key
    model, teacher, student, target, reward, *_, latent_rm = seen[-1]
    networks = model.vae, model.text_encoder, teacher, reward, student, target, latent_rm
    dtypes = [next(network.parameters()).dtype for network in networks]
    assert dtypes == [torch.bfloat16] * 4 + [torch.float32] * 3


def test_bf16_follows_float32(fit, tmp_path, monkeypatch, model_folder):
    compare_precisions(fit, tmp_path, monkeypatch, model_folder)


@pytest.mark.slow
def test_a_compiled_run_follows_an_eager_one(fit, tmp_path, model_folder):
    reward, keys = f"pocket={model_folder}", ("loss", "reward")
    for compile in (False, True):
        assert fit(tmp_path / str(compile), steps=3, reward=reward, compile=compile) == 0
    for a, b in zip(log(tmp_path / "False", *keys), log(tmp_path / "True", *keys), strict=True):
        assert b == pytest.approx(a, rel=1e-3)


@pytest.mark.cuda
def test_bf16_and_compile_on_cuda_follow_float32(fit, tmp_path, monkeypatch, model_folder):
    compare_precisions(fit, tmp_path, monkeypatch, model_folder, device="cuda", compile=True)


def test_the_flops_of_a_step_are_those_of_its_networks(scene, model_folder):
    """Plain LCD: the VAE's encoder, twice the teacher, the target, and the student forward and
    backward, which is three times forward; a reward adds to the rows that get it."""
    from torch.utils.flop_counter import FlopCounterMode

    from support import flops

    def count(call):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            call()
        return counter.get_total_flops()

    args = SimpleNamespace(batch_size=4, grad_accum=2, reward_batch=1, resolution=32)
    model, student = scene["model"], scene["student"]
    one_pass = lambda batch, with_reward: train.distillation_loss(
        **scene | {"batch": batch} | ({} if with_reward else {"reward": None}))
    one_pass.zero_grad, one_pass.latent_rm = student.zero_grad, None
    rewarded = flops.of_step(one_pass, (4, 8, 8), False, args, torch.device("cpu"))
    args.reward_batch = 0
    plain = flops.of_step(one_pass, (4, 8, 8), False, args, torch.device("cpu"))
    z, t, w = torch.zeros(1, 4, 8, 8), torch.zeros(1, dtype=torch.long), torch.zeros(1, 256)
    context = model.text_encoder([""])
    unet = count(lambda: student(z, t, context, w))
    vae = count(lambda: model.vae.posterior(torch.zeros(1, 3, 32, 32)))
    text = count(lambda: model.text_encoder(["", ""]))
    assert plain == pytest.approx(4 * 2 * (vae + text + 6 * unet), rel=0.03)
    assert rewarded > plain
