"""What a step computes, as a share of what the card could."""
import re

import torch
from torch.utils.flop_counter import FlopCounterMode

# dense bf16 matrix products, TFLOP/s, as the makers print them; an unknown card has no share
PEAKS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "A10G": 70,
         "RTX 4090": 165, "RTX 3090": 71}
SLOWER = r"PCIe|NVL|Laptop|Ti|Max-Q|SUPER"  # other cards of these names


def peak(device):
    """-> FLOP/s of the card, or None"""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    if re.search(rf"\b({SLOWER})\b", name) and "A100" not in name:
        return None
    found = [tera for card, tera in PEAKS.items() if re.search(rf"\b{card}\b", name)]
    return 1e12 * found[0] if found else None


def of_step(one_pass, shape, encoded, args, device):
    """FLOPs of this process's part of a step: those of one row, forward and backward, times the
    rows, of which the first --reward-batch (with a latent proxy --rm-batch) of a pass are rewarded.
    What --grad-checkpoint computes again counts again. one_pass: train.Pass, before
    anything is compiled; shape: of a latent; encoded: posteriors are trained on, no pictures."""
    zeros = lambda *size: torch.zeros(size, device=device)
    draws = [zeros(1, *shape), zeros(1, *shape), zeros(1), zeros(1)]
    side = args.resolution
    batch = zeros(1, 2, *shape) if encoded else zeros(1, 3, side, side), [""], draws
    counts = []
    for with_reward in (False, True):
        with FlopCounterMode(display=False) as counter:
            one_pass(batch, with_reward)[0].backward()
        counts.append(counter.get_total_flops())
        one_pass.zero_grad(set_to_none=True)
    plain, rewarded = counts
    rewards = args.reward_batch if one_pass.latent_rm is None else args.rm_batch
    rows = min(rewards, args.batch_size)
    return args.grad_accum * (args.batch_size * plain + rows * (rewarded - plain))
