"""The latent proxy on the teacher's own features: latent_rm.py --backbone teacher. The frozen
UNet's down path and middle read the latents at a little noise, and a small trained head turns what
they see into the features of the proxy. Words come from the teacher's text encoder, frozen too.
(LPO, arXiv 2502.01051, and LaSRO, arXiv 2411.15247, take a diffusion model for the reward's
backbone: it has learnt what latents mean.)
"""
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from discriminator import feature_channels, teacher_features
from latent_rm import LatentRM, LatentRMConfig, LatentViT
from support.cli import require
from support.weights import find_component, load_component, save_component


@dataclass(frozen=True)
class TeacherRMConfig:
    latent_channels: int = 4
    latent_size: int = 64
    scaling_factor: float = 0.18215
    channels: int = 4800  # of teacher_features,
    side: int = 8  # and of its maps
    text_width: int = 1024
    width: int = 512
    layers: int = 2
    heads: int = 8
    embed_dim: int = 1024
    timestep: int = 49  # noise of deviation 0.22, of 1 in all

    ignored: ClassVar = set()
    inert: ClassVar = {}


class TeacherRM(LatentRM):
    """A LatentRM whose weights are the head's alone; `frozen`, what it stands on, is the caller's
    and is neither trained nor saved with it."""
    Config = TeacherRMConfig
    frozen = None

    def __init__(self, config=TeacherRMConfig()):
        nn.Module.__init__(self)
        self.config = config
        self.visual = LatentViT(LatentRMConfig(
            config.channels, config.side, 1, config.width, config.layers, config.heads,
            config.embed_dim))  # a place of the maps is a token
        self.text = nn.Sequential(
            nn.LayerNorm(config.text_width), nn.Linear(config.text_width, config.width),
            nn.GELU(), nn.Linear(config.width, config.embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @classmethod
    def new(cls, teacher, model, shape, sizes, seed):
        """For a teacher and its Pipeline and latents of shape (C, s, s), the same on every process.
        sizes: as in latent_rm.SIZES, of which the head takes its own."""
        channels, side, _ = shape
        small = side
        for _ in teacher.config.block_out_channels[1:]:
            small = (small + 1) // 2  # a downsampling rounds up
        own = {key: sizes[key] for key in ("width", "heads", "embed_dim") if key in sizes}
        torch.manual_seed(seed)
        return cls(TeacherRMConfig(
            channels, side, model.vae.config.scaling_factor, feature_channels(teacher), small,
            model.text_encoder.dim, **own)).stand_on(teacher, model)

    @classmethod
    def from_pretrained(cls, path, teacher, model, device=None):
        """path: as LatentRM.from_pretrained."""
        return load_component(cls, path, "latent_rm", device=device).stand_on(teacher, model)

    def save_pretrained(self, folder, dtype=None):
        save_component(self, folder, "TeacherRM", dtype)

    def stand_on(self, teacher, model):
        """Read latents by this UNet, and words by this Pipeline's text encoder. -> self"""
        config = self.config
        wanted = (config.channels, config.text_width)
        found = (feature_channels(teacher), model.text_encoder.dim)
        require(wanted == found,
                f"an LRM on features of {wanted[0]} channels and words of {wanted[1]}, the teacher "
                f"gives {found[0]} and {found[1]}: was it pre-trained on another?")
        # One noise for all: a score is a function of the latents, so runs can be repeated.
        shape = 1, config.latent_channels, config.latent_size, config.latent_size
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu")
        self.frozen = teacher, model, noise.to(model.device)
        return self

    def __getstate__(self):  # a copy for a checkpoint needs no copy of the teacher
        return {key: value for key, value in self.__dict__.items() if key != "frozen"}

    def image_features(self, latents):
        self.check_shape(latents)
        teacher, model, noise = self.frozen
        t = torch.full((len(latents),), self.config.timestep, device=latents.device)
        noisy = model.schedule.add_noise(
            latents * self.config.scaling_factor, noise.expand(latents.shape), t)
        with torch.no_grad():
            nothing = model.text_encoder([""]).expand(len(latents), -1, -1)
        # the levels' maps have sizes of their own: what is learnt begins with numbers of about 1
        maps = F.group_norm(teacher_features(teacher, noisy, t, nothing), 1)
        return F.normalize(self.visual(maps).float(), dim=-1)

    def text_features(self, prompts):
        _, model, _ = self.frozen
        with torch.no_grad():
            words = model.text_encoder(prompts).float().mean(dim=1)
        return F.normalize(self.text(words).float(), dim=-1)

    def train_top(self, image_layers, text_layers):
        """The last so many blocks of the head, and the words' unless text_layers is 0."""
        self.requires_grad_(False)
        blocks = self.visual.blocks
        blocks[max(0, len(blocks) - image_layers):].requires_grad_(True)
        self.text.requires_grad_(text_layers > 0)
        return [p for p in self.parameters() if p.requires_grad]


def load(path, teacher, model, device):
    """-> the LRM of `path`, of either backbone. teacher, model: a UNet and its Pipeline, on which
    a TeacherRM stands."""
    if find_component(path, "latent_rm").config.get("_class_name") == "TeacherRM":
        return TeacherRM.from_pretrained(path, teacher, model, device)
    return LatentRM.from_pretrained(path, device=device)
