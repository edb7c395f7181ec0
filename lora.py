"""Low-rank updates of a UNet (LoRA, arXiv 2106.09685): W x + scale * alpha / rank * B A x.

The UNet's own weights stay where and as they are: each chosen layer adds its update to what it
gives. All updates of a UNet together are `unet.lora`, which is what trains and is saved. So one set
of frozen weights serves several UNets (`sharing`), with other updates each, or none:

    teacher = UNet.from_pretrained(MODEL, dtype=torch.bfloat16)
    student, target = sharing(teacher), sharing(teacher)
    for unet in (student, target):
        LoRA.new(unet, rank=64).attach(unet)    # equal to the teacher as yet
"""
import dataclasses
import re

import torch
import torch.nn.functional as F
from torch import nn

from support import lora_files
from support.weights import whole_folder
from unet import UNet

W_PROJECTION = "time_embedding.cond_proj"  # through which the guidance weight enters
LAYERS = {  # names of the layers that get updates; "all": as in the published LCM-LoRAs
    "all": r"^(?!conv_in$|conv_out$|time_embedding\.)",
    "attention": r"\.attn[12]\.to_"}


class Update(nn.Module):
    """What is added to the output of a linear layer or a convolution with weight [out, in, ...]: A
    [rank, in, ...] is a layer like it, to `rank` channels, and B [out, rank, 1...] acts on each
    place by itself. It computes in the arithmetic of its input."""

    def __init__(self, layer, A, B, alpha):
        super().__init__()
        self.A, self.B = (nn.Parameter(part.to(layer.weight.device)) for part in (A, B))
        self.alpha, self.scale = alpha, 1.0
        self.geometry = {name: getattr(layer, name) for name in ("stride", "padding")
                         if isinstance(layer, nn.Conv2d)}

    @property
    def factor(self):
        return self.scale * self.alpha / len(self.A)

    def forward(self, x):
        A, B = self.A.to(x.dtype), self.factor * self.B.to(x.dtype)
        if A.ndim == 2:
            return F.linear(F.linear(x, A), B)
        return F.conv2d(F.conv2d(x, A, **self.geometry), B)

    def matrix(self):
        """-> what merging adds to the weight, of its shape, in float32."""
        A, B = self.A.float(), self.B.float()
        return self.factor * (B.flatten(1) @ A.flatten(1)).unflatten(1, A.shape[1:])


class Updated:
    def forward(self, x):
        return super().forward(x) + self.lora(x)


UPDATED = {kind: type(f"Updated{kind.__name__}", (Updated, kind), {})  # keeps weight and names
           for kind in (nn.Linear, nn.Conv2d)}


class LoRA(nn.Module):
    """updates: {name of a layer: Update}; facts: what the file tells about the student beside them
    (lora_files.FACTS)."""

    def __init__(self, updates, facts):
        super().__init__()
        self.updates, self.facts = updates, facts
        self.layers = nn.ModuleList(updates.values())  # a ModuleDict would have no dots in names
        if W_PROJECTION in updates:
            updates[W_PROJECTION].A.requires_grad_(False)

    @classmethod
    def new(cls, unet, rank, alpha=None, layers="all", seed=0):
        """Updates that change nothing yet: B is zero, A uniform with the variance 1 / (3 fan-in),
        as in published code. alpha: `rank` if None. The projection of a guidance embedding trains
        in full: its A stays the identity, so that B is its matrix."""
        generator, updates = torch.Generator().manual_seed(seed), {}
        for name, layer in layers_of(unet).items():
            weight, own_alpha = layer.weight, rank if alpha is None else alpha
            if name == W_PROJECTION:
                A, own_alpha = torch.eye(weight.shape[1]), weight.shape[1]
            elif re.search(LAYERS[layers], name):
                bound = weight[0].numel() ** -0.5
                A = torch.rand(rank, *weight.shape[1:], generator=generator) * 2 * bound - bound
            else:
                continue
            B = torch.zeros(len(weight), len(A), *(1 for _ in weight.shape[2:]))
            updates[name] = Update(layer, A, B, own_alpha)
        return cls(updates, {key: getattr(unet.config, key) for key in lora_files.FACTS})

    @classmethod
    def from_pretrained(cls, path, unet):
        """The updates in `path` (lora_files.find). Raises InputError unless all are for layers of
        this UNet."""
        found, layers = lora_files.read(path, unet), layers_of(unet)
        return cls({name: Update(layers[name], *update) for name, update in found.updates.items()},
                   found.facts)

    def set_scale(self, scale):
        """1 in training; 0 is the frozen UNet, and between them lies what is between the two."""
        for update in self.layers:
            update.scale = scale
        return self

    def attach(self, unet):
        """Let the layers of `unet`, whose weights freeze, add the updates. -> unet"""
        unet.requires_grad_(False).lora = self
        for name, update in self.updates.items():
            layer = unet.get_submodule(name)
            layer.__class__ = next(UPDATED[kind] for kind in UPDATED if isinstance(layer, kind))
            layer.lora = update
        return unet

    @torch.no_grad()
    def merge(self, unet):
        """Add the updates to the weights of `unet`, to which they are not attached. These become
        new tensors, so that a UNet which shares the old ones keeps them. -> unet"""
        for name, update in self.updates.items():
            layer = unet.get_submodule(name)
            weight = layer.weight.float() + update.matrix()
            layer.weight = nn.Parameter(weight.to(layer.weight.dtype), layer.weight.requires_grad)
        return unet

    def save_pretrained(self, folder):
        """Write a folder whose one file diffusers' load_lora_weights takes, in float32."""
        with whole_folder(folder) as new:
            lora_files.write(self, new / lora_files.NAME)


def layers_of(unet):
    """-> {name: layer} of the linear layers and convolutions, in the UNet's order."""
    return {name: layer for name, layer in unet.named_modules()
            if isinstance(layer, (nn.Linear, nn.Conv2d))}


def sharing(unet, **changes):
    """Another UNet around the same weights, which take no memory twice. changes: of its config; a
    projection of a guidance embedding (time_cond_proj_dim) may come in, and is zero."""
    with torch.device("meta"):
        other = UNet(dataclasses.replace(unet.config, **changes))
    state = unet.state_dict()
    for name in other.state_dict().keys() - state.keys():
        state[name] = unet.conv_in.weight.new_zeros(other.get_parameter(name).shape)
    other.load_state_dict(state, assign=True)
    return other.requires_grad_(False).eval()
