"""What keeps a student from exploiting its reward: options of train.py, all of them off by default.

Each stands below, with where it comes from. docs/latent-proxy.md lists them.
"""
import contextlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from support.cli import at_least, option, positive, require


@dataclass
class Options:
    reward_cap: float | None = option(
        None, "of each reward no more than this counts (published for imagereward: 2)",
        group="against the exploitation of a reward")
    reward_resolution: int | None = option(
        None, "side in pixels to which pictures are brought before a reward reads them")
    reward_jitter: float = option(
        0.0, "each picture that a reward reads is shifted by up to this share of its side, resized "
             "by up to this share, and gets noise of this deviation; another draw each step")
    reward_weight_noise: float = option(
        0.0, "the reward's own weights are off by this share, at random, anew each step")


def check(args):
    given = [f"--{name.replace('_', '-')}" for name in Options.__dataclass_fields__
             if getattr(args, name) != getattr(Options, name)]
    require(args.reward != "none" or not given,
            f"{', '.join(given)}: of the reward, and there is none; give --reward too")
    if args.reward_resolution is not None:
        positive(args, "reward_resolution")
    at_least(0, args, "reward_jitter", "reward_weight_noise")
    require(args.reward_jitter < 0.5,
            f"--reward-jitter {args.reward_jitter}: a share of the picture's side; "
            "expected less than 0.5, such as 0.05")
    require(args.reward_weight_noise == 0 or args.latent_rm is None,
            "--reward-weight-noise with --latent-rm: it is for a reward whose gradient is "
            "followed, and a proxy's expert is only compared; leave out one of the two")


def check_reward(reward, args):
    require(args.reward_weight_noise == 0 or any(True for _ in reward.parameters()),
            f"--reward-weight-noise: --reward {args.reward} has no weights; leave it out")


def score(reward, images, captions, args, view=()):
    """Images [B,3,H,W] in [0,1] and B captions -> {name: [B]} of each part of the reward, as it is
    maximised and compared, and {name: [B]} as it is. view: draws for --reward-jitter, or nothing.

    --reward-cap: min(R, cap), which gives no gradient beyond it. The published code has
    -relu(2 - R) for ImageReward, also where that is one part of a sum (reward_fn.py, after ReFL of
    arXiv 2304.05977)."""
    if view:
        images = jittered(images, *view, args.reward_jitter)
    parts = plain = reward.parts(images, captions)
    if args.reward_cap is not None:
        parts = {name: part.clamp(max=args.reward_cap) for name, part in parts.items()}
    return parts, plain


def jittered(images, u, noise, strength):
    """--reward-jitter: images [B,3,H,W] in [0,1], u [B,3] uniform in [0,1) and noise [B,3,H,W] unit
    normal -> the pictures, each shifted and resized by up to `strength` either way, and with noise.
    What comes in from outside repeats the edge.

    A reward that is climbed on one sharp ridge of its landscape falls off it; the mean over small
    changes of the picture is flatter (RSA-FT, arXiv 2603.21175, which changes the generated
    pictures too; before it AugCLIP of FuseDream, arXiv 2112.01573)."""
    x, y, zoom = (strength * (2 * u.float() - 1)).unbind(1)
    zero = torch.zeros_like(x)
    # the output's point p shows the input's at (1 + zoom) p + 2 (x, y), sides being 2 long
    rows = [torch.stack(row, dim=1) for row in ((1 + zoom, zero, 2 * x), (zero, 1 + zoom, 2 * y))]
    with torch.autocast(images.device.type, enabled=False):  # bf16 knows places to 1/256 of a side
        places = F.affine_grid(torch.stack(rows, dim=1), images.shape, align_corners=False)
        moved = F.grid_sample(images.float(), places, padding_mode="border", align_corners=False)
    return (moved + strength * noise).clamp(0, 1)


@contextlib.contextmanager
def shaken(network, args, step):
    """--reward-weight-noise: inside, each weight of the reward is w (1 + strength n), n unit normal
    and a function of seed and step alone; afterwards all are as they were. It holds them twice.

    The gradient is then that of a flatter reward in the mean. (RSA-FT, arXiv 2603.21175, does so
    with the weights of the generator; the reward's own are our variant.)"""
    if network is None or args.reward_weight_noise == 0:
        yield
        return
    weights = [p.detach() for p in network.parameters()]
    kept = [weight.clone() for weight in weights]
    generator = torch.Generator(weights[0].device)
    generator.manual_seed((args.seed * 1_000_003 + step) % 2**63)
    for weight in weights:
        noise = torch.randn(weight.shape, generator=generator, device=weight.device)
        weight.mul_(1 + args.reward_weight_noise * noise)
    try:
        yield
    finally:
        for weight, before in zip(weights, kept):
            weight.copy_(before)


def apart(latents):
    """Latents [B,4,h,w] -> the same twice, for two losses, and a tensor [2] that after the backward
    pass holds the squared lengths of the two losses' gradients to them. It costs two sums, and
    changes no bit of the gradient."""
    squares = latents.new_zeros(2)
    twice = latents.view_as(latents), latents.view_as(latents)
    for place, view in enumerate(twice):
        if view.requires_grad:
            view.register_hook(Measure(squares, place))
    return *twice, squares


class Measure:
    def __init__(self, squares, place):
        self.squares, self.place = squares, place

    def __call__(self, gradient):
        self.squares[self.place] = gradient.detach().square().sum()
