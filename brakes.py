"""What keeps a student from exploiting its reward: options of train.py, all of them off by default.

Each stands below, with where it comes from. docs/latent-proxy.md lists them.
"""
import contextlib
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from lora import W_PROJECTION
from support import processes
from support.cli import at_least, option, positive, require
from support.weights import load_component, save_component
from unet import UNet

# what Averages forgets in a step, and the scored pictures after which it knows a deviation
DECAY, ENOUGH = 0.95, 8


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
    reward_normalize: bool = option(
        False, "each part of a sum of rewards counts in deviations from its own running mean")
    reward_ratio: float | None = option(
        None, "the weight of the reward is such that its gradient to the student's latents is so "
              "long for one of the distillation; --reward-scale is that of the first step")
    teacher_pull: float = option(
        0.0, "weight in the loss of half the squared distance of the student's weights from the "
             "teacher's (with --lora: of the updates, as matrices)",
        group="what else holds a student back")
    anchor: float = option(
        0.0, "weight in the loss of a discriminator on the teacher's features, which learns to "
             "tell the student's latents from real ones (discriminator.py)")
    anchor_lr: float = option(1e-4, "learning rate of the discriminator")


def check(args):
    given = [f"--{name.replace('_', '-')}" for name in Options.__dataclass_fields__
             if name.startswith("reward_") and getattr(args, name) != getattr(Options, name)]
    require(args.reward != "none" or not given,
            f"{', '.join(given)}: of the reward, and there is none; give --reward too")
    if args.reward_resolution is not None:
        positive(args, "reward_resolution")
    at_least(0, args, "reward_jitter", "reward_weight_noise", "teacher_pull",
             "anchor")
    positive(args, "anchor_lr")
    require(args.anchor > 0 or args.anchor_lr == Options.anchor_lr,
            "--anchor-lr: of the discriminator, and there is none; give --anchor too")
    require(not (args.teacher_pull and args.lora and args.shard),
            "--teacher-pull with --lora and --shard: the updates would have to be put together; "
            "leave out --shard, they are a few megabytes")
    if args.reward_ratio is not None:
        positive(args, "reward_ratio", "reward_scale")
    if "imagereward" in args.reward and args.reward_cap is None:
        print("note: the published code has --reward-cap 2 for imagereward, and here is none")
    if args.reward_normalize and args.latent_rm is not None:
        print("note: with --reward-normalize the expert's scores are in deviations, and --rm-tau "
              f"{args.rm_tau:g} is a temperature of those: they are about 1, not 0.05")
    require(args.reward_jitter < 0.5,
            f"--reward-jitter {args.reward_jitter}: a share of the picture's side; "
            "expected less than 0.5, such as 0.05")
    require(args.reward_weight_noise == 0 or args.latent_rm is None,
            "--reward-weight-noise with --latent-rm: it is for a reward whose gradient is "
            "followed, and a proxy's expert is only compared; leave out one of the two")


def check_reward(reward, args):
    require(args.reward_weight_noise == 0 or any(True for _ in reward.parameters()),
            f"--reward-weight-noise: --reward {args.reward} has no weights; leave it out")


def score(reward, images, captions, args, view=(), averages=None):
    """Images [B,3,H,W] in [0,1] and B captions -> {name: [B]} of each part of the reward, as it is
    maximised and compared, and {name: [B]} as it is. view: draws for --reward-jitter, or nothing.

    --reward-cap: min(R, cap), which gives no gradient beyond it. The published code has
    -relu(2 - R) for ImageReward, also where that is one part of a sum (reward_fn.py, after ReFL of
    arXiv 2304.05977)."""
    if view:
        images = jittered(images, *view, args.reward_jitter)
    plain = reward.parts(images, captions)
    parts = capped(plain, args)
    if args.reward_normalize:
        parts = averages.normalized(parts)
    return parts, plain


def capped(parts, args):
    if args.reward_cap is None:
        return parts
    return {name: part.clamp(max=args.reward_cap) for name, part in parts.items()}


@dataclass(frozen=True)
class AveragesConfig:
    names: tuple = ()
    ignored: ClassVar = set()
    inert: ClassVar = {}


class Averages(nn.Module):
    """What a run remembers of its reward: decayed sums over the steps before this one, the same on
    all processes, kept in checkpoints. names: of the reward's parts."""
    Config = AveragesConfig

    def __init__(self, config):
        super().__init__()
        self.config = config
        # of each part: pictures, sum of scores, sum of their squares
        self.register_buffer("scores", torch.zeros(3, len(config.names)))
        # squared length of the gradients of L_LCD, and of the reward at scale 1
        self.register_buffer("squares", torch.zeros(2))

    @classmethod
    def of(cls, reward, args, newest, device):
        """For a run with --reward-normalize or --reward-ratio, else None."""
        if not args.reward_normalize and args.reward_ratio is None:
            return None
        if newest:
            return load_component(cls, newest / "averages", "averages", device=device)
        return cls(AveragesConfig(tuple(reward.weights))).to(device)

    def save_pretrained(self, folder):
        save_component(self, folder, "Averages")

    def normalized(self, parts):
        """--reward-normalize: {name: scores [B]} -> (score - mean) / deviation of each, so that in
        a sum the factors say what counts, and not the units (PopArt, arXiv 1602.07714, divides so
        by running moments). Until ENOUGH pictures have been scored, 0."""
        count, total, squares = self.scores
        mean = total / count.clamp(min=1)
        deviation = (squares / count.clamp(min=1) - mean**2).clamp(min=0).sqrt()
        factor = (count >= ENOUGH) / deviation.clamp(min=1e-6)
        return {name: (part - m) * f for (name, part), m, f in zip(parts.items(), mean, factor)}

    def scale(self, args):
        """beta. --reward-ratio R: R |grad L_LCD| / |grad R|, both to the student's latents, from
        the steps before; nothing goes back through the UNet twice. (The adaptive weight of VQGAN,
        arXiv 2012.09841, eq. 7; its code stops at 1e4 too.)"""
        if args.reward_ratio is None:
            return self.squares.new_full((), args.reward_scale)
        lcd, reward = self.squares
        balanced = args.reward_ratio * (lcd / reward.clamp(min=1e-30)).sqrt()
        return torch.where(reward > 0, balanced.clamp(max=1e4), args.reward_scale)

    def learn(self, stats, args, world):
        """Add a step. stats: {name: mean over the passes of a step}, of which "scores" [3, parts]
        (sums_of) is taken out, and to which the step's beta is added."""
        scores, squares = stats.pop("scores"), stats["latent_grad"][:2].clone()
        stats["reward_scale"] = self.scale(args)
        processes.average([scores, squares], world)
        squares[1] /= stats["reward_scale"] ** 2
        self.scores.mul_(DECAY).add_(scores, alpha=args.grad_accum * world)
        self.squares.mul_(DECAY).add_(squares * (squares[1] > 0))  # both, or neither


def sums_of(parts, args):
    """{name: scores [B]} of K parts as they are -> number, sum and sum of squares of what counts of
    them, [3, K]."""
    scores = torch.stack([part.detach() for part in capped(parts, args).values()])  # [K, B]
    return torch.stack([torch.ones_like(scores), scores, scores**2]).sum(dim=2)


def jittered(images, u, noise, strength):
    """--reward-jitter: images [B,3,H,W] in [0,1], u [B,3] uniform in [0,1) and noise [B,3,H,W] unit
    normal -> the pictures, each shifted and resized by up to `strength` either way, and with noise.
    What comes in from outside repeats the edge.

    A reward that is climbed on one sharp ridge of its landscape falls off it; the mean over small
    changes of the picture is flatter (AugCLIP of FuseDream, arXiv 2112.01573; RSA-FT, arXiv
    2603.21175, takes the worst of small changes, by the gradient, instead of the mean)."""
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

    The gradient is then that of a flatter reward in the mean. (RSA-FT, arXiv 2603.21175, moves the
    weights of the generator, against the gradient; noise in the reward's own is our variant.)"""
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
    """Latents [B,4,h,w] -> the same three times, for L_LCD, the reward and the anchor, and a tensor
    [3] that after the backward pass holds the squared lengths of their gradients to them. It costs
    a sum each, and changes no bit of the gradient."""
    squares = latents.new_zeros(3)
    views = [latents.view_as(latents) for _ in squares]
    for place, view in enumerate(views):
        if view.requires_grad:
            view.register_hook(Measure(squares, place))
    return *views, squares


class Measure:
    def __init__(self, squares, place):
        self.squares, self.place = squares, place

    def __call__(self, gradient):
        self.squares[self.place] = gradient.detach().square().sum()


def teacher_pull(student, teacher, args, device):
    """--teacher-pull alpha: alpha / 2 |weights - teacher's weights|^2 in the loss (L2-SP,
    arXiv 1802.01483, eq. 3) -> a function that adds its gradient to that of the student, or None.
    What the teacher lacks, the projection of the guidance embedding, is free.

    A student of its own weights is measured from the file's float32: rounded to the bf16 of the
    frozen teacher they are further away than a student goes."""
    alpha = args.teacher_pull
    if alpha == 0:
        return None
    if args.lora:
        updates = [u for name, u in student.lora.updates.items() if name != W_PROJECTION]
        return lambda: [pull_update(update, alpha) for update in updates]
    if teacher.conv_in.weight.dtype != torch.float32:
        teacher = UNet.from_pretrained(args.teacher, device=device)
    theirs = dict(teacher.named_parameters())
    pairs = [(p, processes.placed_as(theirs[name].detach(), p))
             for name, p in student.named_parameters() if name in theirs]

    def pull():
        for p, weight in pairs:
            p.grad.add_(p.detach() - weight, alpha=alpha)
    return pull


def pull_update(update, alpha):
    """The gradient of alpha / 2 |s B A|^2 to A and B, by products of rank x rank alone."""
    A, B = update.A.detach().flatten(1), update.B.detach().flatten(1)
    factor = alpha * update.factor**2
    update.A.grad += (factor * (B.T @ B) @ A).view_as(update.A)
    update.B.grad += (factor * B @ (A @ A.T)).view_as(update.B)
