import types

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, LatentConsistencyModelPipeline, LCMScheduler

from conftest import agree, edit_json, generators, rand
from lcm_solver import (
    DDIMSolver,
    NoiseSchedule,
    ScheduleConfig,
    boundary_scalings,
    consistency_function,
    guidance_embedding,
    guided,
    huber,
    sample_ddim,
    sample_lcm,
)
from support.weights import InputError

SD21 = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "clip_sample": False, "set_alpha_to_one": False,
}
KINDS = ["epsilon", "v_prediction"]
ALPHAS_CUMPROD = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)  # float64


class Net:
    """A smooth function of all its inputs in place of a UNet."""
    config = types.SimpleNamespace(time_cond_proj_dim=256)

    def __init__(self):
        self.calls = []

    def __call__(self, z, t, context, w_embedding=None):
        self.calls.append(t.tolist())
        mood = torch.sin(context.float().mean(dim=(1, 2)) * 5) + torch.cos(t / 300)
        if w_embedding is not None:
            mood = mood + (w_embedding * torch.linspace(0, 1, w_embedding.shape[1])).mean(dim=1)
        mood = mood.view(-1, 1, 1, 1)
        return torch.tanh(z + mood) + 0.3 * z.roll(1, dims=-1) * mood


def schedule(kind="epsilon"):
    return NoiseSchedule(ScheduleConfig(prediction_type=kind))


def start(batch=3):
    return rand(batch, 4, 6, 5, seed=1), rand(batch, 7, 8, seed=2), rand(1, 7, 8, seed=3)


def test_alphas_cumprod_equal_diffusers():
    assert torch.equal(schedule().alphas_cumprod, DDIMScheduler(**SD21).alphas_cumprod)
    agree(schedule().alphas_cumprod.double(), torch.from_numpy(ALPHAS_CUMPROD), 1e-5)


def test_add_noise_equals_diffusers():
    z, noise, t = rand(3, 4, 6, 5), rand(3, 4, 6, 5, seed=1), torch.tensor([0, 19, 999])
    agree(schedule().add_noise(z, noise, t), DDIMScheduler(**SD21).add_noise(z, noise, t), 1e-6)


def test_ddim_step_equals_its_closed_form():
    t = torch.tensor([0, 19, 499])
    x0, eps = rand(3, 4, 6, 5), rand(3, 4, 6, 5, seed=1)
    ab = torch.from_numpy(ALPHAS_CUMPROD)[t].view(-1, 1, 1, 1)
    expected = ab.sqrt() * x0 + (1 - ab).sqrt() * eps
    agree(DDIMSolver(schedule()).step(x0, eps, t).double(), expected, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_to_x0_and_to_eps_recover_what_was_mixed(kind):
    x0, eps, t = rand(4, 4, 6, 5), rand(4, 4, 6, 5, seed=1), torch.tensor([0, 19, 499, 999])
    ab = torch.from_numpy(ALPHAS_CUMPROD).float()[t].view(-1, 1, 1, 1)
    noisy = ab.sqrt() * x0 + (1 - ab).sqrt() * eps
    v = ab.sqrt() * eps - (1 - ab).sqrt() * x0  # Salimans & Ho 2022
    output = eps if kind == "epsilon" else v
    agree(schedule(kind).to_x0(output, noisy, t), x0)
    agree(schedule(kind).to_eps(output, noisy, t), eps)


def test_grid_is_19_to_999():
    solver = DDIMSolver(schedule())
    assert solver.timesteps.tolist() == list(range(19, 1000, 20)) and solver.skip == 20


@pytest.mark.parametrize("steps", [0, 51, 1001, -5])
def test_a_grid_that_does_not_divide_the_training_timesteps_is_refused(steps):
    with pytest.raises(InputError, match=str(steps)):
        DDIMSolver(schedule(), steps)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("substeps, walks", [
    (1, [[999, 979], [19, 0]]),
    (2, [[999, 989, 979], [19, 9, 0]]),
    (4, [[999, 994, 989, 984, 979], [19, 14, 9, 4, 0]]),
])
def test_solve_equals_a_loop_of_guided_ddim_steps(kind, substeps, walks):
    z, context, uncond = start(2)
    w, net, d = torch.tensor([5.0, 14.0]), Net(), schedule(kind)
    starts = torch.tensor([walk[0] for walk in walks])
    z_t, t = DDIMSolver(d).solve(net, z, starts, context, uncond, w, substeps)
    assert t.tolist() == [walk[-1] for walk in walks]
    # one batch of 2B each, not two passes
    assert net.calls == [[walk[i] for walk in walks] * 2 for i in range(substeps)]
    for row, walk in enumerate(walks):
        x = z[row:row + 1]
        for now, following in zip(walk, walk[1:]):
            at = torch.tensor([now])
            cond, free = net(x, at, context[row:row + 1]), net(x, at, uncond)
            out = (1 + w[row]) * cond - w[row] * free
            a, b = ALPHAS_CUMPROD[now], ALPHAS_CUMPROD[following]
            if kind == "epsilon":
                eps, x0 = out, (x - (1 - a) ** 0.5 * out) / a**0.5
            else:
                eps, x0 = a**0.5 * out + (1 - a) ** 0.5 * x, a**0.5 * x - (1 - a) ** 0.5 * out
            x = b**0.5 * x0 + (1 - b) ** 0.5 * eps
        agree(z_t[row:row + 1], x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 50])
def test_sample_ddim_equals_diffusers(steps, kind):
    z, context, uncond = start()
    w, net = 6.5, Net()
    out = sample_ddim(net, schedule(kind), z, context, uncond, w, steps)
    theirs = DDIMScheduler(**SD21, steps_offset=1, prediction_type=kind)
    theirs.set_timesteps(steps)
    for t in theirs.timesteps:
        cond, free = net(z, t.expand(3), context), net(z, t.expand(3), uncond)
        z = theirs.step(free + (w + 1) * (cond - free), t, z).prev_sample
    agree(out, z)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 2, 4, 8, 50])
def test_sample_lcm_equals_diffusers(steps, kind):
    z, context, _ = start()
    net, w = Net(), 7.0
    out = sample_lcm(net, schedule(kind), z, context, w, steps, torch.Generator().manual_seed(5))
    theirs, generator = LCMScheduler(**SD21, prediction_type=kind), torch.Generator().manual_seed(5)
    theirs.set_timesteps(steps)
    embedding = diffusers_embedding(torch.full((3,), w), 256)
    for t in theirs.timesteps:
        output = net(z, t.expand(3), context, embedding)
        z, denoised = theirs.step(output, t, z, generator=generator, return_dict=False)
    agree(out, denoised)


def diffusers_embedding(w, dim):
    return LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, w, embedding_dim=dim)


@pytest.mark.parametrize("dim", [32, 256])
def test_guidance_embedding_equals_diffusers(dim):
    w = torch.tensor([0.0, 1.0, 5.25, 15.0])
    # the angles reach 15,000, where one unit in the last place of float32 is 1e-3
    agree(guidance_embedding(w, dim), diffusers_embedding(w, dim), 2e-3)


def test_boundary_scalings_give_the_identity_at_zero():
    c_skip, c_out = boundary_scalings(torch.tensor([0, 1, 999]))
    assert c_skip.shape == c_out.shape == (3, 1, 1, 1)
    assert c_skip[0] == 1 and c_out[0] == 0
    for i, t in ((1, 1), (2, 999)):
        assert c_skip[i].item() == pytest.approx(0.25 / ((10 * t) ** 2 + 0.25), rel=1e-5)
        assert c_out[i].item() == pytest.approx(10 * t / ((10 * t) ** 2 + 0.25) ** 0.5, rel=1e-5)


def test_consistency_function_is_the_identity_at_zero():
    z, context, _ = start()
    zero = torch.zeros(3, dtype=torch.long)
    assert torch.equal(consistency_function(Net(), schedule(), z, zero, context, torch.ones(3)), z)


def test_guided_is_one_plus_w_cond_minus_w_uncond():
    z, context, uncond = start()
    t, net = torch.tensor([19, 500, 999]), Net()
    for w in (torch.tensor([0.0, 5.0, 14.0]), 3.0):
        v = torch.as_tensor(w).view(-1, 1, 1, 1)
        expected = (1 + v) * net(z, t, context) - v * net(z, t, uncond.expand(3, -1, -1))
        agree(guided(net, z, t, context, uncond, w), expected, 1e-5)


def test_huber_equals_its_formula():
    a, b = rand(2, 4, 3, 3), rand(2, 4, 3, 3, seed=1)
    for c in (0.001, 0.5):
        expected = (((a.double() - b.double()) ** 2 + c**2).sqrt() - c).mean()
        assert huber(a, b, c).item() == pytest.approx(expected.item(), rel=1e-5)
    assert huber(a, a).item() == 0


@pytest.mark.parametrize("steps", [0, 51, -1])
def test_lcm_steps_off_the_grid_are_refused(steps):
    z, context, _ = start()
    with pytest.raises(InputError, match=str(steps)):
        sample_lcm(Net(), schedule(), z, context, 7.0, steps)


@pytest.mark.parametrize("steps", [0, 1000])
def test_ddim_steps_out_of_range_are_refused(steps):
    with pytest.raises(InputError, match=str(steps)):
        sample_ddim(Net(), schedule(), *start(), 7.0, steps)


def test_a_generator_per_row_makes_rows_independent_of_the_batch():
    z, context, _ = start()
    together = sample_lcm(Net(), schedule(), z, context, 7.0, 4, generators([100, 101, 102]))
    for i in range(3):
        row = slice(i, i + 1)
        alone = sample_lcm(Net(), schedule(), z[row], context[row], 7.0, 4, generators([100 + i]))
        agree(alone, together[row], 1e-6)


def test_samplers_leave_their_inputs_alone():
    z, context, uncond = start()
    sample_lcm(Net(), schedule(), z, context, 7.0, 2)
    sample_ddim(Net(), schedule(), z, context, uncond, 7.0, 2)
    assert torch.equal(z, start()[0])


@pytest.mark.parametrize("kind", KINDS)
def test_schedule_arithmetic_stays_float32_with_bf16_inputs(kind):
    d, t = schedule(kind), torch.tensor([19, 19, 999])
    z, out = rand(3, 4, 6, 5).bfloat16(), rand(3, 4, 6, 5, seed=1).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        for convert in (d.add_noise, d.to_x0, d.to_eps):
            low = convert(z, out, t)
            assert low.dtype == torch.float32
            agree(low, convert(z.float(), out.float(), t), 1e-6)
        x0 = consistency_function(Net(), d, z, t, rand(3, 7, 8), torch.ones(3))
    assert x0.dtype == torch.float32 and d.alphas_cumprod.dtype == torch.float32
    assert all(c.dtype == torch.float32 for c in boundary_scalings(t))


def test_schedule_config_reads_the_scheduler_folder(model_folder, model_copy):
    assert ScheduleConfig.from_pretrained(model_folder) == ScheduleConfig()
    file = model_copy / "scheduler" / "scheduler_config.json"
    for old, new in (("scaled_linear", "linear"), ("epsilon", "sample")):
        text = file.read_text()
        file.write_text(text.replace(f'"{old}"', f'"{new}"'))
        with pytest.raises(InputError, match=new):
            ScheduleConfig.from_pretrained(model_copy)
        file.write_text(text.replace("epsilon", "v_prediction"))
        assert ScheduleConfig.from_pretrained(model_copy).prediction_type == "v_prediction"
        file.write_text(text)
    edit_json(file, rescale_betas_zero_snr=True)
    with pytest.raises(InputError, match="rescale_betas_zero_snr"):
        ScheduleConfig.from_pretrained(model_copy)
