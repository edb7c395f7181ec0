"""What keeps a student from exploiting its reward: options of train.py, all of them off by default.

Each stands below, with where it comes from. docs/latent-proxy.md lists them.
"""
from dataclasses import dataclass

from support.cli import option, positive, require


@dataclass
class Options:
    reward_cap: float | None = option(
        None, "of each reward no more than this counts (published for imagereward: 2)",
        group="against the exploitation of a reward")
    reward_resolution: int | None = option(
        None, "side in pixels to which pictures are brought before a reward reads them")


def check(args):
    given = [f"--{name.replace('_', '-')}" for name in Options.__dataclass_fields__
             if getattr(args, name) != getattr(Options, name)]
    require(args.reward != "none" or not given,
            f"{', '.join(given)}: of the reward, and there is none; give --reward too")
    if args.reward_resolution is not None:
        positive(args, "reward_resolution")


def score(reward, images, captions, args):
    """Images [B,3,H,W] in [0,1] and B captions -> {name: [B]} of each part of the reward, as it is
    maximised and compared, and {name: [B]} as it is.

    --reward-cap: min(R, cap), which gives no gradient beyond it. The published code has
    -relu(2 - R) for ImageReward, also where that is one part of a sum (reward_fn.py, after ReFL of
    arXiv 2304.05977)."""
    plain = reward.parts(images, captions)
    parts = plain
    if args.reward_cap is not None:
        parts = {name: part.clamp(max=args.reward_cap) for name, part in parts.items()}
    return parts, plain


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
