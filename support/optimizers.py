"""Optimizers that train.py knows by name, and the moving average in bfloat16."""
import importlib.metadata
import re

import torch

from support.cli import require


def adamw(groups, **options):
    return torch.optim.AdamW(groups, fused=True, **options)


def adamw8bit(groups, **options):
    """Moments of 8 bits (arXiv 2110.02861), of tensors with 4,096 numbers or more."""
    from bitsandbytes.optim import AdamW8bit
    return AdamW8bit(groups, **options)


KINDS = {"adamw": adamw, "adamw8bit": adamw8bit}


def check(name):
    """Raises InputError if the package of the optimizer of this name is not there."""
    if name != "adamw8bit":
        return
    try:
        version = importlib.metadata.version("bitsandbytes")
    except importlib.metadata.PackageNotFoundError:
        version = "none"
    numbers = [int(number) for number in re.findall(r"\d+", version)]
    require(numbers >= [0, 50],  # the first that runs on a CPU too
            f"--optimizer adamw8bit needs the package bitsandbytes, 0.50 or newer, found "
            f"{version}: pip install 'rg-lcd[8bit]'")


@torch.no_grad()
def lerp_rounded(targets, sources, weight, seed):
    """In place, target <- target + weight (source - target), where targets are bfloat16.

    To the nearest number most steps would round back to where they began: a number of 8 bits moves
    by 0.4% or not at all. So each is rounded up or down at random, as probably as it is near: the
    mean is right. The draws are a function of the seed alone, on each kind of device."""
    device = targets[0].device
    generator = torch.Generator(device).manual_seed(seed % 2**63)
    for target, source in zip(targets, sources):
        exact = target.float().lerp_(source.float(), weight)
        # bfloat16 is the upper half of float32's bits; what is added to the lower half carries over
        # with the probability that it stands for
        noise = torch.randint(
            0, 2**16, exact.shape, dtype=torch.int32, device=device, generator=generator)
        bits = exact.view(torch.int32).add_(noise).bitwise_and_(-(2**16))
        target.copy_(bits.view(torch.float32))
