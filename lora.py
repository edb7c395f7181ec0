"""Low-rank updates of a UNet (LoRA, arXiv 2106.09685): W x + scale * alpha / rank * B A x.

The UNet's own layers stay where and as they are: each chosen one has a forward hook that adds
its update. All updates of a UNet are one module, `unet.lora`, which is what trains and is saved. So
one set of frozen weights serves several UNets (`sharing`), with other updates each, or none:

    teacher = UNet.from_pretrained(MODEL, dtype=torch.bfloat16)
    student = LoRA.new(sharing(teacher), rank=64).attach()     # equals the teacher
    target = LoRA.new(sharing(teacher), rank=64).attach()

Files: support/lora_files.py.
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
# the layers that get updates. "all": those of the published LCM-LoRAs
LAYERS = {
    "all": r"^(?!conv_in$|conv_out$|time_embedding\.)",
    "attention": r"\.attn[12]\.to_"}


class Update(nn.Module):
    """What is added to the output of a linear layer or a convolution of weight [out, in, ...]: A
    [rank, in, ...] is a layer like it, to `rank` channels, and B [out, rank, 1...] acts on each
    place. In float32, or in the arithmetic of its input."""

    def __init__(self, layer, A, B, alpha):
        super().__init__()
        self.A, self.B, self.alpha, self.scale = nn.Parameter(A), nn.Parameter(B), alpha, 1.0
        self.like = {}
        if isinstance(layer, nn.Conv2d):
            self.like = {"stride": layer.stride, "padding": layer.padding}

    @property
    def factor(self):
        return self.scale * self.alpha / len(self.A)

    def forward(self, x):
        A, B = self.A.to(x.dtype), self.B.to(x.dtype)
        if A.ndim == 2:
            return self.factor * F.linear(F.linear(x, A), B)
        return self.factor * F.conv2d(F.conv2d(x, A, **self.like), B)

    def matrix(self):
        """-> float32, of the weight's shape: what merging adds to it."""
        product = self.B.float().flatten(1) @ self.A.float().flatten(1)
        return self.factor * product.unflatten(1, self.A.shape[1:])

    def hook(self, layer, inputs, output):
        return output + self(inputs[0])


class LoRA(nn.Module):
    """The updates of `unet`. updates: {name of a layer: Update}; facts: what its file tells about
    the student beside them (lora_files.FACTS)."""

    def __init__(self, updates, facts):
        super().__init__()
        self.names, self.facts = tuple(updates), facts
        # a module's name has no dots; so it is that of the published LCM-LoRAs
        self.layers = nn.ModuleDict({name.replace(".", "_"): u for name, u in updates.items()})

    @classmethod
    def new(cls, unet, rank, alpha=None, layers="all", seed=0):
        """Updates that change nothing yet: B is zero, A uniform with the variance 1 / (3 fan-in),
        as in published LoRA code. alpha: `rank` if None. The guidance projection of a UNet that has
        one trains in full: its A is fixed to the identity, so that B is its whole matrix."""
        generator, updates = torch.Generator().manual_seed(seed), {}
        for name, layer in layers_of(unet).items():
            weight, own_rank, own_alpha = layer.weight, rank, alpha or rank
            if name == W_PROJECTION:
                own_rank = own_alpha = weight.shape[1]
                A = torch.eye(own_rank)
            elif re.search(LAYERS[layers], name):
                bound = weight[0].numel() ** -0.5
                A = torch.rand(rank, *weight.shape[1:], generator=generator) * 2 * bound - bound
            else:
                continue
            B = torch.zeros(len(weight), own_rank, *(1 for _ in weight.shape[2:]))
            updates[name] = Update(layer, A.to(weight.device), B.to(weight.device), own_alpha)
        facts = {key: getattr(unet.config, key) for key in lora_files.FACTS}
        return cls(updates, facts).prepared()

    @classmethod
    def from_pretrained(cls, path, unet):
        """The updates in `path` (lora_files.find) for `unet`. Raises InputError unless all of them
        are for layers of this UNet."""
        found, layers = lora_files.read(path, unet), layers_of(unet)
        device = unet.conv_in.weight.device
        updates = {name: Update(layers[name], A.to(device), B.to(device), alpha)
                   for name, (A, B, alpha) in found.updates.items()}
        return cls(updates, found.facts).prepared()

    def prepared(self):
        if W_PROJECTION in self.names:
            self.layers[W_PROJECTION.replace(".", "_")].A.requires_grad_(False)
        return self

    def items(self):
        """-> pairs of a layer's name in the UNet and its Update."""
        return zip(self.names, self.layers.values())

    def set_scale(self, scale):
        """1 in training; 0 is the frozen UNet, between them lies what is between the two."""
        for update in self.layers.values():
            update.scale = scale
        return self

    def attach(self, unet):
        """Add the updates to the frozen layers of `unet`, as its module `lora`. -> unet"""
        for name, update in self.items():
            unet.get_submodule(name).register_forward_hook(update.hook)
        unet.requires_grad_(False).lora = self
        return unet

    @torch.no_grad()
    def merge(self, unet):
        """Add the updates to the weights of `unet`, to which they are not attached. The weights
        become new tensors, so that a UNet which shares the old ones keeps them. -> unet"""
        for name, update in self.items():
            layer = unet.get_submodule(name)
            merged = layer.weight.float() + update.matrix().to(layer.weight.device)
            layer.weight = nn.Parameter(merged.to(layer.weight.dtype), layer.weight.requires_grad)
        return unet

    def save_pretrained(self, folder):
        """Write a folder with pytorch_lora_weights.safetensors, which diffusers'
        load_lora_weights takes, in float32."""
        with whole_folder(folder) as new:
            lora_files.write(self, new / lora_files.NAME)


def layers_of(unet):
    """-> {name: layer} of the linear layers and convolutions, in the UNet's order."""
    kinds = (nn.Linear, nn.Conv2d)
    return {name: layer for name, layer in unet.named_modules() if isinstance(layer, kinds)}


def sharing(unet, **changes):
    """Another UNet around the same weights, which take no memory twice. changes: of its config; the
    projection of a guidance embedding (time_cond_proj_dim) may come in, and is zero."""
    with torch.device("meta"):
        other = UNet(dataclasses.replace(unet.config, **changes))
    state, like = unet.state_dict(), unet.conv_in.weight
    key = W_PROJECTION + ".weight"
    for name, tensor in other.state_dict().items():
        if name == key and name not in state:
            state[name] = torch.zeros(tensor.shape, dtype=like.dtype, device=like.device)
    other.load_state_dict(state, assign=True)
    return other.requires_grad_(False).eval()


def merged(path, files, scales, dtype=None, device=None, student=True):
    """The UNet of `path` with one or more LoRAs merged at these scales. It is a student
    (Pipeline.check) if a file or the UNet itself says so, or `student`, since published LCM-LoRAs
    say nothing: of a grid of 50 points then."""
    facts = {}
    for file in files:
        facts |= {key: value for key, value in lora_files.facts(file).items() if value is not None}
    unet = UNet.from_pretrained(path, facts.pop("time_cond_proj_dim", None), dtype, device, **facts)
    if student and unet.config.lcm_grid is None:
        unet.config = dataclasses.replace(unet.config, lcm_grid=50)
    for file, scale in zip(files, scales):
        LoRA.from_pretrained(file, unet).set_scale(scale).merge(unet)
    return unet
