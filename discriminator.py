"""A discriminator on the frozen teacher's features, with real latents as an anchor for the
student's distribution: train.py --anchor. (LADD, arXiv 2403.12015, section 3, judges latents by
such features, noised as the teacher knows them, but takes the teacher's own pictures for real.
DMD2, arXiv 2405.14867, section 4.3, has real ones, by features of its fake score, which train.)"""
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from support.weights import load_component, save_component


@dataclass(frozen=True)
class DiscriminatorConfig:
    channels: int = 4800  # of teacher_features
    ignored: ClassVar = set()
    inert: ClassVar = {}


def teacher_features(unet, latents, timesteps, context):
    """What a UNet sees in its inputs (as of UNet.forward): the last map of each level of the down
    path, averaged to the size of the middle, and the middle -> [B,C,h',w'] float32."""
    middle, skips, *_ = unet.contract(latents, timesteps, context)
    layers = unet.config.layers_per_block
    ends = skips[layers::layers + 1]  # after conv_in, each level has its layers and a half-size
    maps = [F.adaptive_avg_pool2d(x, middle.shape[-2:]) for x in ends]
    return torch.cat([*maps, middle], dim=1).float()


def feature_channels(unet):
    """The C of teacher_features."""
    widths = unet.config.block_out_channels
    return sum(widths) + widths[-1]


class Discriminator(nn.Module):
    """Features of the teacher [B,C,h',w'] -> [B,1,h',w'], above 0 where they look real."""
    Config = DiscriminatorConfig

    def __init__(self, config, width=256):
        super().__init__()
        self.config = config
        self.head = nn.Sequential(nn.GroupNorm(1, config.channels), nn.Conv2d(
            config.channels, width, 1), nn.SiLU(), nn.Conv2d(width, 1, 1))

    @classmethod
    def load(cls, teacher, seed, newest, device):
        """newest: the checkpoint to go on from, or None: a new one, the same for every process."""
        if newest:
            return load_component(cls, newest / "discriminator", "discriminator", device=device)
        torch.manual_seed(seed)
        return cls(DiscriminatorConfig(feature_channels(teacher))).to(device)

    def save_pretrained(self, folder):
        save_component(self, folder, "Discriminator")

    def losses(self, teacher, solver, latents, z, noise, u_s, context):
        """The student's latents, real ones z and draws, as in train.distillation_loss -> the
        student's loss, -mean D, with gradient to the latents only, and the hinge loss of D, with
        gradient to its weights only."""
        # at any point of the grid: how far u_s lies within its own point's share is independent of
        # that; and with noise that no place shares with what its own prediction began with
        t = solver.timesteps[(u_s * len(solver.timesteps) % 1 * len(solver.timesteps)).long()]
        noised = lambda x: solver.schedule.add_noise(x, noise.flip(-1, -2), t)
        fake = teacher_features(teacher, noised(latents), t, context)
        with torch.no_grad():
            real = teacher_features(teacher, noised(z), t, context)
        frozen = {name: p.detach() for name, p in self.head.named_parameters()}
        loss = F.relu(1 + self.head(fake.detach())).mean() + F.relu(1 - self.head(real)).mean()
        return -functional_call(self.head, frozen, (fake,)).mean(), loss
