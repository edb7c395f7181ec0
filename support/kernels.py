"""The same numbers sooner. On a CPU: attention in slices, and weights laid out once for oneDNN; on
CUDA both leave everything to PyTorch. On both: compiling block by block.

What each buys stands in docs/speed.md.
"""
import functools

import torch
import torch.nn.functional as F
from torch import nn

SLICE = 256  # queries at a time: 128 is as fast, 512 slower


def attention(q, k, v, upcast=False):
    """softmax(q k^T / sqrt(d)) v: [B, heads, L, d] and two of [B, heads, M, d] -> as q. upcast: in
    float32, whatever surrounds it.

    PyTorch's CPU kernel does it in float32 as fast as can be, and in bfloat16 where there are
    matrix units; without them at 40% of what plain matrix products reach."""
    if upcast:
        with torch.autocast(q.device.type, enabled=False):
            return attention(q.float(), k.float(), v.float()).to(v.dtype)
    wanted = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if (q.device.type != "cpu" or q.dtype != torch.bfloat16 or wanted or is_traced()
            or has_matrix_units()):
        return F.scaled_dot_product_attention(q, k, v)
    shape, scale = q.shape, q.shape[-1] ** -0.5
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))  # [B * heads, L, d]
    # Scores in float32, as PyTorch's kernel has them: rounded to bfloat16, a score of 30 is wrong
    # by up to 0.06, its share by 6%.
    keys, out = k.float().transpose(1, 2) * scale, torch.empty_like(q)
    for first in range(0, q.shape[1], SLICE):
        part = slice(first, first + SLICE)
        shares = (q[:, part].float() @ keys).softmax(dim=-1)
        out[:, part] = shares.bfloat16() @ v
    return out.unflatten(0, shape[:2])


@functools.cache
def has_matrix_units():
    """Intel's AMX: there PyTorch's kernel is 2 to 5 times as fast as slices (docs/speed.md)."""
    return getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()


def silu(x):
    """Of a tensor that nobody else reads: in its place where no gradient is wanted. At a decode's
    sizes a new tensor costs more than the arithmetic."""
    return F.silu(x, inplace=not torch.is_grad_enabled() and not is_traced())


def is_traced():
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def prepare_for_inference(network):
    """Let the convolutions and linear layers of a frozen network keep their weights in oneDNN's
    layout too: PyTorch keeps only the plain one, and brings it into the other at every call, which
    at SD2.1's 16x16 and 8x8 pixels takes as long as the convolution. -> the network

    The first call packs; a weight that has changed since is packed anew. Parameters, state_dict()
    and saving stay as they are. Memory grows by the packed copy, at most the size of the weights.
    Where a gradient is wanted, under autocast or torch.compile and on CUDA, nothing changes."""
    for module in network.modules():
        module.__class__ = PACKED.get(type(module), type(module))
    return network


class Packs:
    """What the two layers share. packed: (what it was made from, the weight in oneDNN's layout)."""
    packed = None

    def packed_weight(self, x):
        """The weight in oneDNN's layout, or None: the plain way is to be gone."""
        weight = self.weight
        wanted = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        if (wanted or x.device.type != "cpu" or x.dtype != weight.dtype or is_traced()
                or torch.is_autocast_enabled("cpu") or not torch.backends.mkldnn.is_available()):
            return None
        version = None if weight.is_inference() else weight._version
        origin = weight.data_ptr(), version, weight.dtype, weight.shape
        if self.packed is None or self.packed[0] != origin:
            try:
                self.packed = origin, self.pack(x)
            except (AttributeError, RuntimeError):  # private operators may change
                self.packed = origin, None
        return self.packed[1]

    def __getstate__(self):  # a copy packs its own
        return {key: value for key, value in self.__dict__.items() if key != "packed"}


class PackedConv2d(Packs, nn.Conv2d):
    def geometry(self):
        return *map(list, (self.padding, self.stride, self.dilation)), self.groups

    def pack(self, x):
        return torch.ops.mkldnn._reorder_convolution_weight(
            self.weight.detach(), *self.geometry(), list(x.shape))

    def forward(self, x):
        weight = self.packed_weight(x)
        if weight is None:
            return super().forward(x)
        return torch.ops.mkldnn._convolution_pointwise(
            x, weight, self.bias, *self.geometry(), "none", [], "")


class PackedLinear(Packs, nn.Linear):
    def pack(self, x):
        rows = x.numel() // x.shape[-1]
        return torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), rows)

    def forward(self, x):
        weight = self.packed_weight(x)
        if weight is None:
            return super().forward(x)
        return torch.ops.mkldnn._linear_pointwise(x, weight, self.bias, "none", [], "")


PACKED = {nn.Conv2d: PackedConv2d, nn.Linear: PackedLinear}


def compile_blocks(network, kinds, **options):
    """torch.compile of every module of these classes within the network, by itself: blocks of one
    class and shape share one compilation. SD2.1's UNet has 38 such blocks of 18 shapes."""
    import torch._dynamo  # takes a second
    torch._dynamo.config.cache_size_limit = 64  # shapes of a class: PyTorch gives up at 8
    for module in network.modules():
        if isinstance(module, kinds):
            module.compile(dynamic=False, **options)


def compile_for_drawing(unet):
    """torch.compile of a whole frozen UNet. On CUDA for one size and number of pictures (others
    compile again), with kernels tuned for them and launched as one CUDA graph."""
    on_cuda = next(unet.parameters()).device.type == "cuda"
    unet.compile(**({"mode": "max-autotune", "dynamic": False} if on_cuda else {}))
