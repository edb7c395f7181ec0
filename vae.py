"""The VAE of Stable Diffusion (AutoencoderKL): images [B,3,H,W] <-> latents [B,4,H/f,W/f].

Attribute names equal the keys of diffusers' `vae/diffusion_pytorch_model.safetensors`. The
config's defaults are SD2.1's VAE (f = 8, 83.7 M parameters); the pocket's has three levels (f = 4)
and small widths.
Source of the topology: Rombach et al. 2022 (arXiv 2112.10752), `first_stage_config` of
stable-diffusion-2.
"""
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from support.kernels import Upsample, attention, silu
from support.weights import InputError, load_component, save_component


@dataclass(frozen=True)
class VAEConfig:
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    sample_size: int = 512

    # how support/weights.py reads a config.json: the values of fields that it leaves out,
    absent: ClassVar = {"layers_per_block": 1, "block_out_channels": (64,)}
    ignored: ClassVar = {"force_upcast"}  # fields to pass over,
    inert: ClassVar = {  # and fields with the only values we build
        "act_fn": ("silu",), "mid_block_add_attention": (True,),
        "use_quant_conv": (True,), "use_post_quant_conv": (True,),
        "down_block_types": tuple(["DownEncoderBlock2D"] * n for n in range(1, 9)),
        "up_block_types": tuple(["UpDecoderBlock2D"] * n for n in range(1, 9))}


class ResnetBlock(nn.Module):
    def __init__(self, cin, cout, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, cin, eps=1e-6)
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, cout, eps=1e-6)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x):
        h = self.conv1(silu(self.norm1(x)))
        h = self.conv2(silu(self.norm2(h)))
        return self.conv_shortcut(x) + h


class Attention(nn.Module):
    """One head over all positions."""

    def __init__(self, channels, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x):
        b, c, h, w = x.shape
        # [B, h*w, C]; contiguous: see kernels.fast_attention
        y = self.group_norm(x).flatten(2).transpose(1, 2).contiguous()
        q, k, v = (to(y).unsqueeze(1) for to in (self.to_q, self.to_k, self.to_v))
        y = attention(q, k, v).squeeze(1)  # [B, 1, h*w, C] -> [B, h*w, C]
        return x + self.to_out[0](y).transpose(1, 2).reshape(b, c, h, w)


class Downsample(nn.Module):
    """Stride 2, padded on the right and bottom only, as the VAE was trained. (The UNet pads all
    sides.)"""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Level(nn.Module):
    """The resnets of one resolution, then a change of resolution unless it is the last."""

    def __init__(self, cin, cout, layers, groups, down=False, up=False):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(cin if i == 0 else cout, cout, groups) for i in range(layers))
        if down:
            self.downsamplers = nn.ModuleList([Downsample(cout)])
        if up:
            self.upsamplers = nn.ModuleList([Upsample(cout)])

    def forward(self, x):
        resamplers = (*getattr(self, "downsamplers", ()), *getattr(self, "upsamplers", ()))
        for module in (*self.resnets, *resamplers):
            x = module(x)
        return x


class MidBlock(nn.Module):
    def __init__(self, channels, groups):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(channels, groups)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, cout in enumerate(widths):
            cin, last = widths[max(i - 1, 0)], i == len(widths) - 1
            self.down_blocks.append(
                Level(cin, cout, config.layers_per_block, groups, down=not last))
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)  # [B, 3, H, W] -> [B, C, H, W]
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)  # [B, C, H/f, W/f]
        return self.conv_out(silu(self.conv_norm_out(x)))  # [B, 8, H/f, W/f]


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups)
        self.up_blocks = nn.ModuleList()
        for i, cout in enumerate(widths):
            cin, last = widths[max(i - 1, 0)], i == len(widths) - 1
            self.up_blocks.append(
                Level(cin, cout, config.layers_per_block + 1, groups, up=not last))
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, z):
        x = self.mid_block(self.conv_in(z))  # [B, 4, h, w] -> [B, C, h, w]
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(silu(self.conv_norm_out(x)))  # [B, 3, h*f, w*f]


class VAE(nn.Module):
    Config = VAEConfig

    def __init__(self, config=VAEConfig()):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        self.factor = 2 ** (len(config.block_out_channels) - 1)  # f: image pixels per latent pixel

    @classmethod
    def from_pretrained(cls, path, dtype=None, device=None):
        """path: a VAE folder, a model folder with vae/, a single-file checkpoint, or a hub id.
        dtype: float32 if None. Raises InputError on anything but an exact fit."""
        vae = load_component(cls, path, "vae", dtype, device)
        # At SD's widths channels_last makes the decode 20% faster on a CPU in bfloat16
        # (bench/RESULTS.md). At the pocket's it is slower.
        if vae.config.block_out_channels[0] >= 128:
            vae = vae.to(memory_format=torch.channels_last)
        return vae

    def save_pretrained(self, folder, dtype=None):
        """Write a folder that diffusers' AutoencoderKL opens."""
        levels = len(self.config.block_out_channels)
        save_component(
            self, folder, "AutoencoderKL", dtype,
            down_block_types=["DownEncoderBlock2D"] * levels,
            up_block_types=["UpDecoderBlock2D"] * levels)

    def posterior(self, images):
        """images [B,3,H,W] in [-1,1], H and W multiples of f -> (mean, std), each [B,4,H/f,W/f],
        unscaled. Raises InputError for other sizes."""
        h, w = images.shape[-2:]
        if h % self.factor or w % self.factor:
            raise InputError(f"images of {h}x{w}: the VAE needs height and width to be "
                             f"multiples of {self.factor}")
        # the encoder gives mean and log variance, stacked
        moments = self.quant_conv(self.encoder(images.to(self.quant_conv.weight.dtype)))
        mean, logvar = moments.chunk(2, dim=1)  # [B, 8, h, w] -> twice [B, 4, h, w]
        return mean, torch.exp(0.5 * logvar.clamp(-30, 20))

    def encode(self, images, generator=None):
        """images [B,3,H,W] in [-1,1] -> one draw from the posterior, times the scaling factor:
        [B,4,H/f,W/f]. `generator` draws on its own device."""
        mean, std = self.posterior(images)
        device = generator.device if generator else mean.device
        noise = torch.randn(mean.shape, generator=generator, device=device)
        return (mean + std * noise.to(mean)) * self.config.scaling_factor

    def decode(self, latents):
        """scaled latents [B,4,h,w] -> images [B,3,h*f,w*f] around [-1,1], not clamped."""
        latents = (latents / self.config.scaling_factor).to(self.post_quant_conv.weight.dtype)
        return self.decoder(self.post_quant_conv(latents))
