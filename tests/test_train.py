import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import train
from conftest import CAPTIONS, ROOT, agree, call, rand, randomize, write_shard
from data import Shards, positions
from lcm_solver import DDIMSolver, NoiseSchedule, ScheduleConfig
from reward import load_reward
from sample import Model
from unet import UNet
from weights import WEIGHTS


@pytest.fixture(autouse=True)
def leave_matmul_precision():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def options(model_folder, shard):
    """options(out, steps=4, ...) -> the arguments of train.py for a small run."""
    def make(out, **changes):
        values = dict(teacher=model_folder, data=shard, out=out, resolution=32, batch_size=2, steps=4, lr=1e-3, reward="none",
                      reward_scale=1.0, log_every=1, checkpoint_every=2, sample_every=100, device="cpu", precision="fp32") | changes
        return [word for key, value in values.items() for word in (f"--{key.replace('_', '-')}", str(value))] + ["--no-compile"]
    return make


@pytest.fixture
def fit(options):
    """fit(out, ...): train.py in this process -> exit code."""
    return lambda out, **changes: call(train.main, *options(out, **changes))


def script(argv, *launcher):
    return subprocess.Popen([sys.executable, *launcher, str(ROOT / "train.py"), *argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def finish(process):
    output = process.communicate(timeout=150)[0]
    assert process.returncode == 0, output


def weights(out, name="unet"):
    return load_file(out / name / WEIGHTS)


def log(out, *keys):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [tuple(line[key] for key in keys) for line in lines]


def start_of(model_folder):
    return UNet.from_pretrained(model_folder, 256).state_dict()


def apart(a, b):
    assert a.keys() == b.keys()
    return max((a[key] - b[key]).abs().max().item() for key in a)


def assert_same_training(one, two, model_folder):
    """Adam turns the rounding of a tiny gradient into a visible step, so: 1e-5 everywhere, and together 5% of the way moved."""
    start = start_of(model_folder)
    for name in ("unet", "unet_target"):
        a, b = weights(one, name), weights(two, name)
        assert apart(a, b) <= 1e-5 and apart(a, start) > 0
        length = lambda x, y: sum((x[key] - y[key]).square().sum().item() for key in x) ** 0.5
        assert length(a, b) <= 0.05 * length(a, start)
    keys = "loss", "reward", "grad_norm"
    for first, second in zip(log(one, *keys), log(two, *keys), strict=True):
        assert second == pytest.approx(first, rel=1e-3)


# ------------------------------------------------------------------------------------------- the loss

def network(model_folder, seed, **more):
    return randomize(UNet.from_pretrained(model_folder, **more), seed)


@pytest.fixture(params=["epsilon", "v_prediction"])
def scene(request, model_folder, shard):
    """All that one call of distillation_loss takes; the four networks differ from each other."""
    model = Model.from_pretrained(model_folder, torch.device("cpu"), torch.float32)
    model.schedule = NoiseSchedule(ScheduleConfig(prediction_type=request.param))
    teacher = network(model_folder, 1).requires_grad_(False)
    student, target = network(model_folder, 2, w_embed_dim=256), network(model_folder, 3, w_embed_dim=256).requires_grad_(False)
    images, captions = zip(*(Shards(shard, 32)[i] for i in range(4)))
    draws = rand(4, 4, 8, 8, seed=4), rand(4, 4, 8, 8, seed=5), torch.tensor([0, 7, 30, 49]), torch.tensor([0.0, 0.3, 0.6, 0.9])
    # w is small because sin(1000 w) in float32 is worth fewer digits the larger w is
    args = train.Config(ddim_steps=50, w_min=0.2, w_max=0.6, reward_scale=0.7, reward_batch=3)
    return dict(model=model, teacher=teacher, student=student, target=target, reward=load_reward(f"pocket={model_folder}"),
                solver=DDIMSolver(model.schedule, 50), batch=(torch.stack(images), list(captions), draws), args=args)


def plain_loss(model, teacher, student, target, reward, solver, batch, args):
    """Algorithm 1 again, row by row and straight from section 3 of the design."""
    (images, captions, (noise_1, noise_2, index, u)), kind = batch, model.schedule.config.prediction_type
    ab = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).tolist()
    x0_of = lambda z, out, t: ((z - (1 - ab[t]) ** 0.5 * out) / ab[t] ** 0.5 if kind == "epsilon"
                               else ab[t] ** 0.5 * z - (1 - ab[t]) ** 0.5 * out)
    eps_of = lambda z, out, t: out if kind == "epsilon" else ab[t] ** 0.5 * out + (1 - ab[t]) ** 0.5 * z

    def f(net, z, w, c, t):
        angles = 1000 * w * torch.exp(-math.log(10000) / 127 * torch.arange(128))
        out = net(z, torch.tensor([t]), c, torch.cat([angles.sin(), angles.cos()])[None])
        return 0.25 / ((10 * t) ** 2 + 0.25) * z + 10 * t / ((10 * t) ** 2 + 0.25) ** 0.5 * x0_of(z, out, t)

    distances, scores = [], []
    for row in range(len(images)):
        with torch.no_grad():
            mean, std = model.vae.posterior(images[row:row + 1])
            z = (mean + std * noise_1[row]) * 0.18215
            c, empty = model.text_encoder([captions[row]]), model.text_encoder([""])
            w = 0.2 + 0.4 * u[row]
            s = (index[row].item() + 1) * 20 - 1
            t = max(s - 20, 0)
            z_s = ab[s] ** 0.5 * z + (1 - ab[s]) ** 0.5 * noise_2[row]
            out = (1 + w) * teacher(z_s, torch.tensor([s]), c) - w * teacher(z_s, torch.tensor([s]), empty)
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
    floor = 1e-2 * max(g.abs().max().item() for g in theirs.values())  # some gradients are zero but for rounding
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
    loss, again = (train.distillation_loss(**scene | {"batch": (tensors, *rest)})[0] for tensors in (images, posteriors))
    assert loss.item() == pytest.approx(again.item(), rel=1e-5)


def test_only_the_student_gets_gradients(scene):
    frozen = [scene["teacher"], scene["target"], scene["model"].vae, scene["model"].text_encoder, scene["reward"]]
    train.distillation_loss(**scene)[0].backward()
    assert all(p.grad is None for net in frozen for p in net.parameters())
    assert all(p.grad is not None for p in scene["student"].parameters())


def test_no_two_ranks_draw_the_same():
    draw = lambda places, seed=0: train.random_draws(seed, places, (4, 8, 8), 50, "cpu")
    first, second = draw(positions(3, 4, rank=0, world=2)), draw(positions(3, 4, rank=1, world=2))
    both = [torch.cat(pair) for pair in zip(first, second)]
    for i in (0, 1, 3):  # posterior noise, diffusion noise, u: eight different rows
        assert len(torch.unique(both[i].flatten(1) if both[i].ndim > 1 else both[i], dim=0)) == 8
    assert not torch.equal(first[0], first[1])
    for joint, alone in zip(both, draw(positions(3, 8))):
        assert torch.equal(joint, alone)  # the rows of one process with the doubled batch
    assert not torch.equal(draw(range(4))[0], draw(range(4), seed=1)[0])


def test_draws_have_the_right_distribution():
    noise, _, index, u = train.random_draws(0, range(3000), (4,), 50, "cpu")
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    assert index.min() == 0 and index.max() == 49 and abs(index.float().mean() - 24.5) < 1
    assert 0 <= u.min() and u.max() < 1 and abs(u.mean() - 0.5) < 0.03


# ------------------------------------------------------------------------------------------- the run

def test_a_run_leaves_all_its_parts_and_students_that_diffusers_opens(fit, tmp_path, model_folder):
    from diffusers import UNet2DConditionModel
    out = tmp_path / "run"
    assert fit(out, steps=5, reward=f"pocket={model_folder}", keep=2, sample_every=3) == 0
    assert sorted(f.name for f in out.iterdir()) == ["checkpoints", "config.json", "log.jsonl", "samples", "unet", "unet_target"]
    assert sorted(f.name for f in (out / "checkpoints").iterdir()) == ["step-000004", "step-000005"]
    assert sorted(f.name for f in (out / "samples").iterdir()) == ["step-000003.png", "step-000005.png"]
    assert Image.open(out / "samples/step-000005.png").text["prompts"] == " | ".join(CAPTIONS)
    assert [step for step, *_ in log(out, "step", "loss", "lcd", "reward", "grad_norm", "lr")] == [1, 2, 3, 4, 5]
    assert json.loads((out / "config.json").read_text())["steps"] == 5
    for name in ("unet", "unet_target"):
        theirs = UNet2DConditionModel.from_pretrained(out / name)
        assert apart(theirs.state_dict(), weights(out, name)) == 0
    assert apart(weights(out), start_of(model_folder)) > 1e-4 and weights(out)["time_embedding.cond_proj.weight"].any()


def test_the_parts_of_a_sum_of_rewards_add_up(scene):
    from reward import Mixture
    first, second = scene["reward"], load_reward(f"pocket={ROOT / 'pocket' / 'judge'}")
    second.name = "judge"
    one, _ = train.distillation_loss(**scene | {"reward": None})
    loss, stats = train.distillation_loss(**scene | {"reward": Mixture([first, second], [0.5, 2.0])})
    assert stats["reward"].item() == pytest.approx(0.5 * stats["reward/pocket"].item() + 2 * stats["reward/judge"].item(), rel=1e-5)
    assert loss.item() == pytest.approx(one.item() - 0.7 * stats["reward"].item(), rel=1e-5)


def test_target_is_the_moving_average_of_the_student(fit, tmp_path, model_folder):
    assert fit(tmp_path, steps=3, ema=0.8, checkpoint_every=1, keep=3) == 0
    target = start_of(model_folder)
    for step in (1, 2, 3):
        folder = tmp_path / "checkpoints" / f"step-{step:06d}"
        target = {key: 0.8 * target[key] + 0.2 * value for key, value in weights(folder).items()}
        assert apart(weights(folder, "unet_target"), target) < 1e-6
    assert apart(weights(tmp_path), target) > 1e-4


def test_run_kill_run_equals_one_run_bit_for_bit(fit, options, tmp_path, model_folder):
    steps = dict(steps=30, checkpoint_every=10, reward=f"pocket={model_folder}")
    whole, out = tmp_path / "whole", tmp_path / "killed"
    assert fit(whole, **steps) == 0
    process = script(options(out, **steps))
    while process.poll() is None and not ((out / "log.jsonl").is_file() and len((out / "log.jsonl").read_text().splitlines()) >= 13):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (out / "unet").exists()
    finish(script(options(out, **steps)))
    for name in ("unet", "unet_target"):
        assert (out / name / WEIGHTS).read_bytes() == (whole / name / WEIGHTS).read_bytes()
    assert log(out, "step", "loss", "reward", "grad_norm", "lr") == log(whole, "step", "loss", "reward", "grad_norm", "lr")
    assert [step for step, in log(out, "step")] == list(range(1, 31))


def test_two_processes_equal_one_with_the_doubled_batch(fit, options, tmp_path, model_folder):
    same = dict(steps=3, lr=3e-5, reward=f"pocket={model_folder}")
    finish(script(options(tmp_path / "two", batch_size=2, **same), "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"))
    assert fit(tmp_path / "one", batch_size=4, **same) == 0
    assert_same_training(tmp_path / "one", tmp_path / "two", model_folder)


def test_accumulating_two_batches_equals_the_doubled_batch(fit, tmp_path, model_folder):
    same = dict(steps=3, lr=3e-5, reward=f"pocket={model_folder}")
    assert fit(tmp_path / "two", batch_size=2, grad_accum=2, **same) == 0 and fit(tmp_path / "one", batch_size=4, **same) == 0
    assert_same_training(tmp_path / "one", tmp_path / "two", model_folder)


def test_an_existing_run_refuses_changed_options(fit, tmp_path, capsys):
    assert fit(tmp_path, steps=1) == 0
    before = (tmp_path / "config.json").read_text()
    assert fit(tmp_path, steps=1, lr=0.5) == 2
    message = capsys.readouterr().err
    assert "--lr 0.001 (now 0.5)" in message and (tmp_path / "config.json").read_text() == before


def test_a_finished_run_started_again_keeps_its_result(fit, tmp_path):
    assert fit(tmp_path, steps=2) == 0
    before = (tmp_path / "unet" / WEIGHTS).read_bytes()
    assert fit(tmp_path, steps=2) == 0
    assert (tmp_path / "unet" / WEIGHTS).read_bytes() == before and log(tmp_path, "step") == [(1,), (2,)]


def test_resume_overlooks_what_is_no_whole_checkpoint(fit, tmp_path):
    assert fit(tmp_path / "whole", steps=4) == 0
    out = tmp_path / "run"
    assert fit(out, steps=4, keep=3) == 0
    (out / "checkpoints/step-000004").rename(out / "checkpoints/.step-000004.77.new")  # killed while writing it
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
    assert fit(tmp_path, steps=4, lr=1e30) == 2
    assert "not finite" in capsys.readouterr().err and not (tmp_path / "unet").exists()


WRONG = {
    "no steps": ({"steps": 0}, "--steps 0"),
    "learning rate 0": ({"lr": 0}, "--lr"),
    "ema 1": ({"ema": 1}, "--ema"),
    "w range upside down": ({"w_min": 9, "w_max": 3}, "--w-min"),
    "grid that does not divide": ({"ddim_steps": 51}, "51"),
    "resolution that does not divide": ({"resolution": 30}, "--resolution 30"),
    "no such reward": ({"reward": "beauty"}, "beauty"),
    "a reward without gradient": ({"reward": "pocket+jpeg"}, "--latent-rm"),
    "no such data": ({"data": "/none/*.tar"}, "/none"),
    "no such teacher": ({"teacher": "/none/model"}, "/none/model"),
    "unwritable out": ({"out": "/dev/null/run"}, "/dev/null/run"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options_are_one_line_and_exit_code_2(case, fit, tmp_path, capsys):
    changes, named = WRONG[case]
    assert fit(**{"out": tmp_path} | changes) == 2
    message = capsys.readouterr().err
    assert named in message and "Traceback" not in message


def test_a_data_error_in_the_middle_of_a_run_names_the_shard(fit, tmp_path, capsys):
    file = write_shard(tmp_path / "bad.tar", [("a.png", b"no picture"), ("a.txt", b"words")])
    assert fit(tmp_path / "run", data=file) == 2 and str(file) in capsys.readouterr().err


@pytest.mark.cuda
def test_bf16_on_cuda_follows_float32(fit, tmp_path):
    for precision in ("fp32", "bf16"):
        assert fit(tmp_path / precision, steps=3, device="cuda", precision=precision) == 0
    for (a,), (b,) in zip(log(tmp_path / "fp32", "loss"), log(tmp_path / "bf16", "loss"), strict=True):
        assert b == pytest.approx(a, rel=0.1)
