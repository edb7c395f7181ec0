"""The mathematics of latent consistency distillation: pure functions on tensors, all in float32.

    noise schedule    NoiseSchedule           z_t = sqrt(ab_t) z + sqrt(1 - ab_t) noise
    DDIM solver       DDIMSolver              z_s -> z_t along the teacher's probability-flow ODE
    consistency       consistency_function    f(z_t, t) = c_skip(t) z_t + c_out(t) x0_hat
    losses            huber
    samplers          sample_lcm, sample_ddim

Guidance w is the LCM paper's: out = cond + w (cond - uncond); diffusers' `guidance_scale` is w + 1.
Sources: LCM (arXiv 2310.04378), RG-LCD (arXiv 2403.11027), DDIM (arXiv 2010.02502).
"""
import math
from dataclasses import dataclass

import numpy as np
import torch

from support.weights import InputError, local, predicts, read_json


@dataclass(frozen=True)
class ScheduleConfig:
    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    prediction_type: str = "epsilon"  # or "v_prediction" (2.1-768)

    @classmethod
    def from_pretrained(cls, path):
        """Of a model folder or hub id: what scheduler/scheduler_config.json says, or SD2.1-base's
        values if there is none. Of a single file: SD's values, with the prediction type that its
        metadata or name tells. Raises InputError for a schedule that is not built here."""
        path = local(path, "scheduler")
        if path.is_file():
            return cls(prediction_type=predicts(path))
        file = path / "scheduler" / "scheduler_config.json"
        if not file.is_file():
            return cls()
        raw = read_json(file)
        if raw.get("beta_schedule", "scaled_linear") != "scaled_linear":
            raise InputError(f"{file}: beta_schedule {raw['beta_schedule']!r}; "
                             "expected scaled_linear, as in every SD1 and SD2 file")
        if raw.get("prediction_type", "epsilon") not in ("epsilon", "v_prediction"):
            raise InputError(f"{file}: prediction_type {raw['prediction_type']!r}; "
                             "expected epsilon or v_prediction")
        for key in ("rescale_betas_zero_snr", "trained_betas"):
            if raw.get(key):
                raise InputError(f"{file}: {key} is set; expected the scaled-linear schedule "
                                 "as it is, with noise left out of no timestep")
        return cls(**{k: raw[k] for k in cls.__dataclass_fields__ if k in raw})


class NoiseSchedule:
    """alphas_cumprod [T] of the scaled-linear schedule, and the conversions that it defines.
    timesteps: [B] integers in 0..T-1. Latents, noise and network outputs: [B,4,h,w] of any dtype.
    Results are float32."""

    def __init__(self, config=ScheduleConfig(), device=None):
        if config.prediction_type not in ("epsilon", "v_prediction"):
            raise InputError(f"prediction_type {config.prediction_type!r}; "
                             "expected epsilon or v_prediction")
        self.config = config
        # "scaled linear": the square roots of the betas are evenly spaced
        start, end = config.beta_start**0.5, config.beta_end**0.5
        betas = torch.linspace(start, end, config.num_train_timesteps, dtype=torch.float32) ** 2
        self.alphas_cumprod = torch.cumprod(1 - betas, dim=0).to(device)

    def __len__(self):
        return len(self.alphas_cumprod)

    def alpha_sigma(self, timesteps):
        """-> sqrt(ab_t), sqrt(1 - ab_t), each [B,1,1,1]."""
        ab = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        return ab.sqrt(), (1 - ab).sqrt()

    def add_noise(self, latents, noise, timesteps):
        """-> z_t = sqrt(ab_t) latents + sqrt(1 - ab_t) noise."""
        alpha, sigma = self.alpha_sigma(timesteps)
        return alpha * latents.float() + sigma * noise.float()

    def to_x0(self, output, noisy, timesteps):
        """The network's output (epsilon or v) at `noisy` -> its estimate of the clean latents."""
        alpha, sigma = self.alpha_sigma(timesteps)
        if self.config.prediction_type == "v_prediction":  # v = alpha noise - sigma latents
            return alpha * noisy.float() - sigma * output.float()
        return (noisy.float() - sigma * output.float()) / alpha

    def to_eps(self, output, noisy, timesteps):
        """The network's output (epsilon or v) at `noisy` -> its estimate of the noise."""
        if self.config.prediction_type == "v_prediction":
            alpha, sigma = self.alpha_sigma(timesteps)
            return alpha * output.float() + sigma * noisy.float()
        return output.float()


class DDIMSolver:
    """The grid t_i = (i+1) T/N - 1, i = 0..N-1, and DDIM steps (eta = 0) between any timesteps."""

    def __init__(self, schedule, steps=50):
        if not 1 <= steps <= len(schedule) or len(schedule) % steps:
            raise InputError(f"a DDIM grid of {steps} steps; expected a divisor of the "
                             f"{len(schedule)} training timesteps, such as 50")
        self.schedule, self.skip = schedule, len(schedule) // steps  # skip: k = T/N
        points = torch.arange(1, steps + 1, device=schedule.alphas_cumprod.device)
        self.timesteps = points * self.skip - 1  # [N]: 19, 39, ..., 999

    def step(self, x0, eps, t):
        """x0, eps [B,4,h,w] at any timestep, t [B] the timesteps walked to
        -> z_t = sqrt(ab_t) x0 + sqrt(1 - ab_t) eps   (DDIM, eq. 12 with eta = 0)."""
        return self.schedule.add_noise(x0, eps, t)

    @torch.no_grad()
    def solve(self, teacher, z_s, s, context, uncond_context, w, substeps=1):
        """Walk the teacher's ODE from s down to t = max(s - skip, 0), in `substeps` equal DDIM
        steps, each with classifier-free guidance: LCM's psi, for the ODE of its eq. 13.

        z_s [B,4,h,w], s [B], context [B,L,D], uncond_context [1,L,D] or [B,L,D], w a number or [B].
        -> z_t [B,4,h,w] float32, t [B]"""
        t = (s - self.skip).clamp(min=0)  # s = t_{n+k} -> t = t_n
        z, now = z_s, s
        for i in range(1, substeps + 1):
            # the fraction i / substeps of the way, in whole timesteps; t itself at the last
            following = s + ((t - s) * i).div(substeps, rounding_mode="floor")
            output = guided(teacher, z, now, context, uncond_context, w)
            x0, eps = self.schedule.to_x0(output, z, now), self.schedule.to_eps(output, z, now)
            z = self.step(x0, eps, following)
            now = following
        return z, t


def guided(teacher, z, t, context, uncond_context, w):
    """(1 + w) teacher(z, c, t) - w teacher(z, "", t), [B,4,h,w] float32. w: a number or [B].
    Both halves run as one batch of 2B."""
    contexts = torch.cat([context, uncond_context.expand_as(context)])  # [2B, L, D]
    both = teacher(torch.cat([z, z]), torch.cat([t, t]), contexts)  # [2B, 4, h, w]
    cond, uncond = both.float().chunk(2)
    w = torch.as_tensor(w, dtype=torch.float32, device=z.device).view(-1, 1, 1, 1)
    return cond + w * (cond - uncond)


def boundary_scalings(t, sigma_data=0.5, timestep_scaling=10.0):
    """timesteps [B] -> c_skip, c_out [B,1,1,1], with c_skip(0) = 1 and c_out(0) = 0
    (as in LCM's code; the form: consistency models, eq. 5)."""
    scaled = timestep_scaling * t.float().view(-1, 1, 1, 1)
    c_skip = sigma_data**2 / (scaled**2 + sigma_data**2)
    c_out = scaled / (scaled**2 + sigma_data**2).sqrt()
    return c_skip, c_out


def guidance_embedding(w, dim=256):
    """w [B] -> [B, dim] float32: sin then cos of 1000 w at frequencies 10000^(-j / (dim/2 - 1))."""
    half = dim // 2
    j = torch.arange(half, device=w.device, dtype=torch.float32)
    frequencies = torch.exp(-math.log(10000) / (half - 1) * j)
    angles = 1000 * w.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def consistency_function(unet, schedule, z, t, context, w):
    """f(z, w, c, t) = c_skip(t) z + c_out(t) x0_hat, [B,4,h,w] float32 (LCM, eq. 9). w: [B], which
    a student without a guidance embedding does not see."""
    dim = unet.config.time_cond_proj_dim
    output = unet(z, t, context, guidance_embedding(w, dim) if dim else None)
    c_skip, c_out = boundary_scalings(t)
    return c_skip * z.float() + c_out * schedule.to_x0(output, z, t)


def huber(prediction, goal, c=0.001, dim=None):
    """Pseudo-Huber: the mean over all numbers, or over those of the dimensions `dim`, of
    sqrt((prediction - goal)^2 + c^2) - c."""
    return (torch.sqrt((prediction.float() - goal.float()) ** 2 + c**2) - c).mean(dim)


def lcm_timesteps(schedule, steps, grid=50):
    """`steps` grid points, evenly from the top: 999, 499 for 2. As diffusers' LCMScheduler."""
    if not 1 <= steps <= grid:
        raise InputError(f"{steps} LCM steps; expected 1 to {grid}, "
                         "the points of the grid the student was distilled on")
    points = (np.arange(1, grid + 1) * (len(schedule) // grid) - 1)[::-1]
    chosen = np.floor(np.linspace(0, grid, num=steps, endpoint=False)).astype(int)
    return points[chosen].tolist()


def draw_noise(shape, generator, device):
    """Unit normal noise of `shape` on `device`. generator: one generator (it draws on its own
    device), None (the global one), or a list of shape[0] generators, one a row."""
    if isinstance(generator, (list, tuple)):
        return torch.cat([draw_noise((1, *shape[1:]), g, device) for g in generator])
    own = generator.device if generator else device
    return torch.randn(shape, generator=generator, device=own).to(device, non_blocking=True)


@torch.no_grad()
def sample_lcm(unet, schedule, latents, context, w, steps, generator=None, progress=iter,
               see=None):
    """Multi-step consistency sampling (LCM, algorithm 3) -> scaled latents [B,4,h,w], float32.

    latents: unit normal [B,4,h,w]; w: a number or [B]. Every step but the last re-noises with one
    torch.randn(latents.shape, generator=generator). A list of B generators draws each row from its
    own, so that a picture does not depend on its batch. `progress` wraps the timesteps, as tqdm.
    see: called with each step's prediction f(z, w, c, t), [B,4,h,w]; the last is what returns."""
    batch, device = len(latents), latents.device
    w = torch.as_tensor(w, dtype=torch.float32, device=device).expand(batch)
    timesteps = lcm_timesteps(schedule, steps, getattr(unet.config, "lcm_grid", None) or 50)
    z = latents.float()
    for i, t in enumerate(progress(timesteps)):
        now = torch.full((batch,), t, device=device)
        x0 = consistency_function(unet, schedule, z, now, context, w)
        if see:
            see(x0)
        if i + 1 < steps:
            noise = draw_noise(latents.shape, generator, device)
            following = torch.full((batch,), timesteps[i + 1], device=device)
            z = schedule.add_noise(x0, noise, following)
    return x0


@torch.no_grad()
def sample_ddim(unet, schedule, latents, context, uncond_context, w, steps, progress=iter):
    """The teacher's sampler: guided DDIM with eta = 0 -> scaled latents [B,4,h,w], float32.

    latents: unit normal [B,4,h,w]; w: a number or [B]. uncond_context [1,L,D] or [B,L,D]: of the
    empty prompt, or of a negative one. The timesteps are those of diffusers' DDIMScheduler with
    SD2.1's settings (leading spacing, steps_offset 1): 981, 961, ..., 1 for 50; `progress` wraps
    them."""
    if not 1 <= steps < len(schedule):
        raise InputError(f"{steps} DDIM steps; expected 1 to {len(schedule) - 1}")
    batch, device, skip = len(latents), latents.device, len(schedule) // steps
    w = torch.as_tensor(w, dtype=torch.float32, device=device)
    z = latents.float()
    for t in progress(range(1, steps * skip + 1, skip)[::-1]):
        now = torch.full((batch,), t, device=device)
        output = guided(unet, z, now, context, uncond_context, w)
        x0, eps = schedule.to_x0(output, z, now), schedule.to_eps(output, z, now)
        # DDIM, eq. 12. Before the first point alpha-bar is alpha-bar[0] (set_alpha_to_one = false).
        z = schedule.add_noise(x0, eps, (now - skip).clamp(min=0))
    return z
