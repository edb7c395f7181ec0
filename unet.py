"""The UNet of Stable Diffusion (UNet2DConditionModel): noisy latents, t and text -> epsilon or v.

Attribute names equal the keys of diffusers' `unet/diffusion_pytorch_model.safetensors`. The
config's defaults are SD2.1-base (865.9 M parameters). A student adds one matrix,
`time_embedding.cond_proj`, through which the guidance weight w enters (LCM, arXiv 2310.04378,
section 4.2).
Source of the topology: Rombach et al. 2022 (arXiv 2112.10752), `unet_config` of stable-diffusion-2.
"""
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from support.kernels import Upsample, attention
from support.weights import InputError, load_component, save_component


@dataclass(frozen=True)
class UNetConfig:
    sample_size: int = 64
    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    down_block_types: tuple = (
        "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
    up_block_types: tuple = (
        "UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")
    cross_attention_dim: int = 1024
    attention_head_dim: int | tuple = (5, 10, 20, 20)  # head *counts*: diffusers' old mistake
    use_linear_projection: bool = True
    upcast_attention: bool = False  # 2.1-768: q.k overflows in half precision
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    time_cond_proj_dim: int | None = None  # 256 in a student: the width of the embedding of w
    lcm_grid: int | None = None  # ours: N, the points of the grid it was distilled on; None: 50

    # how support/weights.py reads a config.json: the values of fields that it leaves out,
    absent: ClassVar = {
        "use_linear_projection": False, "attention_head_dim": 8, "cross_attention_dim": 1280}
    # fields to pass over (this one says nothing while addition_embed_type is None),
    ignored: ClassVar = {"addition_embed_type_num_heads"}
    inert: ClassVar = {  # and fields with the only values we build
        "act_fn": ("silu",), "conv_in_kernel": (3,), "conv_out_kernel": (3,),
        "downsample_padding": (1,), "flip_sin_to_cos": (True,), "mid_block_scale_factor": (1, 1.0),
        "mid_block_type": ("UNetMidBlock2DCrossAttn",), "resnet_out_scale_factor": (1.0,),
        "resnet_time_scale_shift": ("default",), "time_embedding_type": ("positional",),
        "transformer_layers_per_block": (1,), "attention_type": ("default",),
        "resnet_skip_time_act": (False,), "freq_shift": (0,), "dropout": (0, 0.0)}

    @property
    def distilled(self):
        """Is this a student's?"""
        return bool(self.time_cond_proj_dim or self.lcm_grid)

    def heads(self, level):
        if isinstance(self.attention_head_dim, int):
            return self.attention_head_dim
        return self.attention_head_dim[level]


class ResnetBlock(nn.Module):
    def __init__(self, cin, cout, temb_dim, groups, eps):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, cin, eps)
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.time_emb_proj = nn.Linear(temb_dim, cout)
        self.norm2 = nn.GroupNorm(groups, cout, eps)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x, temb):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(F.silu(temb))[:, :, None, None]  # [B, C] onto every pixel
        h = self.conv2(F.silu(self.norm2(h)))
        return self.conv_shortcut(x) + h


class Attention(nn.Module):
    def __init__(self, dim, context_dim, heads, upcast):
        super().__init__()
        if dim % heads:
            raise InputError(f"attention_head_dim {heads}, the number of heads, "
                             f"does not divide the {dim} channels")
        self.heads, self.upcast = heads, upcast
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, x, context):
        # [B, length, dim] -> [B, heads, length, dim / heads]
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for y in (self.to_q(x), self.to_k(context), self.to_v(context)))
        y = attention(q, k, v, self.upcast)
        return self.to_out[0](y.transpose(1, 2).flatten(2))  # [B, length, dim]


class GEGLU(nn.Module):
    def __init__(self, dim, inner):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner)

    def forward(self, x):
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, dim):
        super().__init__()
        # the Identity stands where diffusers has a dropout, so that the keys are the same
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x):
        return self.net(x)


class TransformerBlock(nn.Module):
    def __init__(self, dim, context_dim, heads, upcast):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.attn1 = Attention(dim, dim, heads, upcast)
        self.attn2 = Attention(dim, context_dim, heads, upcast)
        self.ff = FeedForward(dim)

    def forward(self, x, context):
        y = self.norm1(x)
        x = x + self.attn1(y, y)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer(nn.Module):
    """One transformer block over the pixels of a feature map; its cross-attention reads text."""

    def __init__(self, dim, config, heads):
        super().__init__()
        self.norm = nn.GroupNorm(config.norm_num_groups, dim, eps=1e-6)
        self.linear = config.use_linear_projection
        projection = nn.Linear if self.linear else lambda cin, cout: nn.Conv2d(cin, cout, 1)
        self.proj_in = projection(dim, dim)
        self.transformer_blocks = nn.ModuleList([
            TransformerBlock(dim, config.cross_attention_dim, heads, config.upcast_attention)])
        self.proj_out = projection(dim, dim)

    def forward(self, x, context):
        h, w = x.shape[-2:]
        y = self.norm(x)  # [B, C, h, w]
        if self.linear:  # contiguous: see kernels.fast_attention
            y = self.proj_in(y.flatten(2).transpose(1, 2).contiguous())
        else:
            y = self.proj_in(y).flatten(2).transpose(1, 2)
        y = self.transformer_blocks[0](y, context)  # [B, h*w, C]
        if self.linear:  # back to [B, C, h, w]
            y = self.proj_out(y).transpose(1, 2).unflatten(2, (h, w))
        else:
            y = self.proj_out(y.transpose(1, 2).unflatten(2, (h, w)))
        return x + y


class Downsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x):
        return self.conv(x)


class Level(nn.Module):
    """One resolution of the down or up path: resnets, each with a transformer if `heads` is set."""

    def __init__(self, channels, cout, temb_dim, config, heads=None, down=False, up=False):
        """channels: the number of input channels of each resnet, skips included."""
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(cin, cout, temb_dim, config.norm_num_groups, config.norm_eps)
            for cin in channels)
        if heads:
            self.attentions = nn.ModuleList(Transformer(cout, config, heads) for _ in channels)
        if down:
            self.downsamplers = nn.ModuleList([Downsample(cout)])
        if up:
            self.upsamplers = nn.ModuleList([Upsample(cout)])

    def stages(self):
        attentions = getattr(self, "attentions", [None] * len(self.resnets))
        return zip(self.resnets, attentions)


class MidBlock(nn.Module):
    def __init__(self, channels, temb_dim, config, heads):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(channels, channels, temb_dim, config.norm_num_groups, config.norm_eps)
            for _ in range(2))
        self.attentions = nn.ModuleList([Transformer(channels, config, heads)])


class TimestepEmbedding(nn.Module):
    def __init__(self, cin, dim, cond_dim):
        super().__init__()
        self.linear_1 = nn.Linear(cin, dim)
        self.linear_2 = nn.Linear(dim, dim)
        if cond_dim:
            self.cond_proj = nn.Linear(cond_dim, cin, bias=False)
            nn.init.zeros_(self.cond_proj.weight)  # at step 0 the student equals the teacher

    def forward(self, t_emb, w_embedding):
        if w_embedding is not None:  # LCM, section 4.2: w enters beside t
            t_emb = t_emb + self.cond_proj(w_embedding.to(t_emb.dtype))
        return self.linear_2(F.silu(self.linear_1(t_emb)))


def timestep_embedding(timesteps, dim):
    """[B] -> [B, dim] float32: cos then sin of t * 10000^(-j / (dim/2))
    (Ho et al. 2020; order as in LDM)."""
    half = dim // 2
    j = torch.arange(half, device=timesteps.device, dtype=torch.float32)
    frequencies = torch.exp(-math.log(10000) / half * j)
    angles = timesteps.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class UNet(nn.Module):
    Config = UNetConfig

    def __init__(self, config=UNetConfig()):
        super().__init__()
        self.config = config
        widths, layers = config.block_out_channels, config.layers_per_block
        temb_dim = 4 * widths[0]
        # if true, the backward pass recomputes each resnet and transformer: less memory, 1.3x time
        self.checkpointing = False
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], temb_dim, config.time_cond_proj_dim)

        # skips: channels of each feature map that the up path will concatenate, the last one first
        skips, cin = [widths[0]], widths[0]
        self.down_blocks = nn.ModuleList()
        for i, (kind, cout) in enumerate(zip(config.down_block_types, widths, strict=True)):
            heads = config.heads(i) if self._has_attention(kind, "Down") else None
            last = i == len(widths) - 1
            channels = [cin] + [cout] * (layers - 1)
            self.down_blocks.append(Level(channels, cout, temb_dim, config, heads, down=not last))
            skips += [cout] * (layers + (not last))
            cin = cout
        self.mid_block = MidBlock(cin, temb_dim, config, config.heads(-1))
        self.up_blocks = nn.ModuleList()
        for i, (kind, cout) in enumerate(zip(config.up_block_types, widths[::-1], strict=True)):
            level = len(widths) - 1 - i  # the level of the down path that it mirrors
            heads = config.heads(level) if self._has_attention(kind, "Up") else None
            channels = [(cin if j == 0 else cout) + skips.pop() for j in range(layers + 1)]
            self.up_blocks.append(Level(channels, cout, temb_dim, config, heads, up=level > 0))
            cin = cout
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, cin, config.norm_eps)
        self.conv_out = nn.Conv2d(cin, config.out_channels, 3, padding=1)

    @staticmethod
    def _has_attention(kind, way):
        """Has the block type `kind` of the path `way`, "Down" or "Up", transformers?"""
        kinds = {f"CrossAttn{way}Block2D": True, f"{way}Block2D": False}
        if kind not in kinds:
            raise InputError(f"block type {kind!r}; this UNet builds {' and '.join(kinds)}")
        return kinds[kind]

    @classmethod
    def from_pretrained(cls, path, w_embed_dim=None, dtype=None, device=None, **changes):
        """path: a UNet folder, a model folder with unet/, a single-file checkpoint, or a hub id.
        dtype: float32 if None, whatever the file holds. changes: new values of config fields.
        `w_embed_dim=256` makes a student of a teacher: the file may then lack cond_proj, which
        starts at zero, so that student and teacher are equal. Raises InputError unless all else
        fits."""
        if w_embed_dim is None:
            return load_component(cls, path, "unet", dtype, device, **changes)
        return load_component(
            cls, path, "unet", dtype, device, may_lack=("time_embedding.cond_proj.weight",),
            time_cond_proj_dim=w_embed_dim, **changes)

    def save_pretrained(self, folder, dtype=None):
        """Write a folder that diffusers' UNet2DConditionModel opens."""
        save_component(self, folder, "UNet2DConditionModel", dtype)

    def forward(self, latents, timesteps, context, w_embedding=None):
        """latents [B,4,h,w], timesteps [B] in 0..999, context [B,L,D] from the text encoder,
        w_embedding [B,256] (students only; see lcm_solver.guidance_embedding) -> [B,4,h,w]:
        epsilon or v, as the model was trained. Inputs of any dtype are converted to the weights'.
        h and w need not be even."""
        x, skips, temb, context = self.contract(latents, timesteps, context, w_embedding)
        for level in self.up_blocks:
            for resnet, transformer in level.stages():
                x = self.run(resnet, torch.cat([x, skips.pop()], dim=1), temb)
                if transformer is not None:
                    x = self.run(transformer, x, context)
            for upsample in getattr(level, "upsamplers", ()):
                x = upsample(x, skips[-1].shape[-2:])
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def run(self, module, *inputs):
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(module, *inputs, use_reentrant=False)
        return module(*inputs)

    def contract(self, latents, timesteps, context, w_embedding=None):
        """The down path and the middle -> the middle's output [B,C,h',w'], the skips, and what the
        up path reads beside them: the embedding of t and w, and the context."""
        dtype = self.conv_in.weight.dtype
        t_emb = timestep_embedding(timesteps, self.config.block_out_channels[0])
        temb = self.time_embedding(t_emb.to(dtype), w_embedding)  # [B, 4 * widths[0]]
        context = context.to(dtype)
        x = self.conv_in(latents.to(dtype))
        skips = [x]
        for level in self.down_blocks:
            for resnet, transformer in level.stages():
                x = self.run(resnet, x, temb)
                if transformer is not None:
                    x = self.run(transformer, x, context)
                skips.append(x)
            for downsample in getattr(level, "downsamplers", ()):
                x = downsample(x)
                skips.append(x)
        x = self.run(self.mid_block.resnets[0], x, temb)
        x = self.run(self.mid_block.attentions[0], x, context)
        x = self.run(self.mid_block.resnets[1], x, temb)
        return x, skips, temb, context
