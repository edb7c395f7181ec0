"""The same numbers sooner. On a CPU: attention by plain products, weights laid out once for oneDNN,
upsampling by its four phases, small groups normed plane by plane; on CUDA these leave everything to
PyTorch. On both: compiling block by block.

What each buys stands in docs/speed.md.
"""
import contextlib
import functools
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

# of attention at a time: 8 MB of scores (half and twice as many are as fast), of so many queries of
# a head or more
SCORES, ROWS = 2 ** 22, 256


def attention(q, k, v, upcast=False):
    """softmax(q k^T / sqrt(d)) v: [B, heads, L, d] and two of [B, heads, M, d] -> as q. upcast: in
    float32, whatever surrounds it.

    PyTorch's CPU kernel does it in float32 as fast as can be, and in bfloat16 where there are
    matrix units; without them at 20% of what plain matrix products reach."""
    if upcast:
        with torch.autocast(q.device.type, enabled=False):
            return attention(q.float(), k.float(), v.float()).to(v.dtype)
    wanted = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if (q.device.type != "cpu" or q.dtype != torch.bfloat16 or wanted or is_traced()
            or has_matrix_units()):
        return F.scaled_dot_product_attention(q, k, v)
    shape = q.shape[:2]
    q, k, v = (x.flatten(0, 1).contiguous() for x in (q, k, v))
    out, heads = torch.empty_like(q), max(1, SCORES // (ROWS * k.shape[1]))
    for part in zip(*(x.split(heads) for x in (q, k, v, out))):
        sliced(*part)
    return out.unflatten(0, shape)


def sliced(q, k, v, out):
    """The same of [N, L, d] and two of [N, M, d], written into `out`, by plain products: a slice of
    the queries at a time, which has SCORES scores.

    Rounded to bfloat16, a score of 30 is wrong by up to 0.06 and its share by 6%. But shares stay
    as they are when a number is taken off all scores of a row. With about the greatest taken off
    before they are rounded, those that count are small, and their shares nearly as good as those of
    float32 scores. The greatest is looked for among every fourth key."""
    keys = k.transpose(1, 2)
    some = keys[:, :, ::4].contiguous()
    rows = max(1, SCORES // (keys.shape[0] * keys.shape[2]))
    for first in range(0, q.shape[1], rows):
        scores = centred_scores(q[:, first:first + rows], keys, some, q.shape[-1] ** -0.5)
        out[:, first:first + rows] = torch.bmm(scores.softmax(dim=-1), v)


def centred_scores(q, keys, some, scale):
    """[N, L, d] and [N, d, M] -> [N, L, M], less about the greatest of each row. some: a few of the
    keys, among which it is looked for."""
    with torch.no_grad():
        greatest = torch.bmm(q, some).amax(dim=-1, keepdim=True)
    return torch.baddbmm(greatest, q, keys, beta=-scale, alpha=scale)


@functools.cache
def has_matrix_units():
    """Intel's AMX: there PyTorch's kernel is 2 to 5 times as fast as slices (docs/speed.md)."""
    return getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()


PYTORCHS_ATTENTION, PYTORCHS_LINEAR = F.scaled_dot_product_attention, F.linear


@contextlib.contextmanager
def fast_attention(device):
    """The context for training. On a CPU attention that wants a gradient goes by plain matrix
    products, whichever library asks for it: PyTorch's own kernels take two to three times as long,
    there and back. And linear layers make what nn.MultiheadAttention has transposed contiguous:
    else PyTorch multiplies each row by a copy of a frozen weight. Elsewhere nothing changes."""
    if torch.device(device).type != "cpu":
        yield
        return
    with mock.patch.multiple(F, scaled_dot_product_attention=attention_by_products,
                             linear=linear_of_contiguous):
        yield


def attention_by_products(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False,
                          scale=None, enable_gqa=False):
    """In the place of F.scaled_dot_product_attention."""
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    odd = (dropout_p or enable_gqa or is_causal and attn_mask is not None
           or not query.shape[:-2] == key.shape[:-2] == value.shape[:-2])
    if not wanted or odd or is_traced():
        return PYTORCHS_ATTENTION(query, key, value, attn_mask, dropout_p, is_causal,
                                  scale=scale, enable_gqa=enable_gqa)
    batch = query.shape[:-2]
    q, k, v = (x.reshape(-1, *x.shape[-2:]) for x in (query, key, value))
    keys = k.transpose(1, 2)
    scores = centred_scores(q, keys, keys[:, :, ::4], scale or q.shape[-1] ** -0.5)
    if is_causal:
        attn_mask = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).tril()
    if attn_mask is None:
        return torch.bmm(scores.softmax(dim=-1), v).unflatten(0, batch)
    scores = scores.unflatten(0, batch)
    if attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    else:
        scores = scores + attn_mask.to(scores.dtype)
    # safe: a row that is masked throughout gives 0
    return torch._safe_softmax(scores, -1).to(value.dtype) @ value


def linear_of_contiguous(input, weight, bias=None):
    """In the place of F.linear."""
    return PYTORCHS_LINEAR(input.contiguous(), weight, bias)


def silu(x):
    """Of a tensor that nobody else reads: in its place where no gradient is wanted. At a decode's
    sizes a new tensor costs more than the arithmetic."""
    return F.silu(x, inplace=not torch.is_grad_enabled() and not is_traced())


def is_traced():
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def prepare_for_inference(network):
    """Let the convolutions and linear layers of a frozen network keep their weights in oneDNN's
    layout too: PyTorch keeps only the plain one, and brings it into the other at every call, which
    at SD2.1's 16x16 and 8x8 pixels takes as long as the convolution. And let pictures be doubled by
    PackedUpsample and normed by PlanarGroupNorm. -> the network

    The first call packs; a weight that has changed since is packed anew (but for changes of its
    `.data`, which PyTorch does not count). Parameters, state_dict() and saving stay as they are.
    Memory grows by the packed copy, little more than the weights. Where a gradient is wanted, under
    autocast or torch.compile and on CUDA, the plain weights are used."""
    for module in network.modules():
        module.__class__ = PREPARED.get(type(module), type(module))
    return network


class Packs:
    """What layers that keep weights in oneDNN's layout share. packed: (what they were made from,
    they)."""
    packed = None

    def packed_output(self, x, layer=None):
        """-> what `by_pack` gives with what `pack` makes of the weight of the layer, which is this
        one if left out; or None: the plain way is to be taken."""
        layer = layer or self
        weight = layer.weight
        if (torch.is_grad_enabled() and any(p.requires_grad for p in (x, *layer.parameters()))
                or x.device.type != "cpu" or x.dtype != weight.dtype or is_traced()
                or torch.is_autocast_enabled("cpu") or not torch.backends.mkldnn.is_available()
                or weight.is_inference()):  # which does not count its changes
            if x.device.type != "cpu":
                self.packed = None  # moved there for good
            return None
        origin = weight.data_ptr(), weight._version, weight.dtype, weight.shape
        if self.packed is None or self.packed[0] != origin:
            try:
                made = self.pack(x)
                out = self.by_pack(x, made)
            except (AttributeError, RuntimeError, TypeError):  # private operators may change
                made = out = None
            # the plain weight stays too, so that no other can come to lie at its address
            self.packed = origin, made, weight.detach()
            return out
        return None if self.packed[1] is None else self.by_pack(x, self.packed[1])

    def forward(self, x):
        out = self.packed_output(x)
        return super().forward(x) if out is None else out

    def __getstate__(self):  # a copy packs its own
        return {key: value for key, value in self.__dict__.items() if key != "packed"}


class PackedConv2d(Packs, nn.Conv2d):
    def geometry(self):
        return *map(list, (self.padding, self.stride, self.dilation)), self.groups

    def pack(self, x):
        return torch.ops.mkldnn._reorder_convolution_weight(
            self.weight.detach(), *self.geometry(), list(x.shape))

    def by_pack(self, x, weight):
        return torch.ops.mkldnn._convolution_pointwise(
            x, weight, self.bias, *self.geometry(), "none", [], "")


class PackedLinear(Packs, nn.Linear):
    def pack(self, x):
        rows = x.numel() // x.shape[-1]
        return torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), rows)

    def by_pack(self, x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, self.bias, "none", [], "")


class Upsample(nn.Module):
    """The picture twice as large by nearest neighbours, then a 3x3 convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, size=None):
        """x: [B,C,H,W] -> [B,C,*size]. size: (2H, 2W) if left out; a UNet that has halved an odd
        one asks for one less."""
        size = size or (2 * x.shape[2], 2 * x.shape[3])
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class PackedUpsample(Packs, Upsample):
    """The same without the large picture. Of three neighbours in it two are one pixel of the small
    one. So each of the four that a pixel becomes is a 2x2 convolution of the small picture, whose
    weights are sums: 4/9 of the arithmetic."""
    geometry = [1, 1], [1, 1], [1, 1], 1  # padding, stride, dilation, groups

    def pack(self, x):
        def halves(weight, dim):  # what the first and the second of two neighbours see
            before, here, after = weight.unbind(dim)
            return (torch.stack((before, here + after), dim),
                    torch.stack((before + here, after), dim))

        weight = self.conv.weight.detach().float()
        return [torch.ops.mkldnn._reorder_convolution_weight(
                    part.to(x.dtype), *self.geometry, list(x.shape))
                for half in halves(weight, 2) for part in halves(half, 3)]

    def forward(self, x, size=None):
        doubled = tuple(size or ()) in ((), (2 * x.shape[2], 2 * x.shape[3]))
        # another class of convolution adds a LoRA's update
        packs = doubled and type(self.conv) is PackedConv2d
        out = self.packed_output(x, self.conv) if packs else None
        return Upsample.forward(self, x, size) if out is None else out

    def by_pack(self, x, packed):
        height, width = x.shape[2:]
        out = torch.empty(*x.shape[:2], 2 * height, 2 * width, dtype=x.dtype, device=x.device,
                          memory_format=torch.channels_last)  # as the parts have it
        for weight, (row, column) in zip(packed, ((0, 0), (0, 1), (1, 0), (1, 1))):
            part = torch.ops.mkldnn._convolution_pointwise(
                x, weight, self.conv.bias, *self.geometry, "none", [], "")
            out[:, :, row::2, column::2] = part[:, :, row:row + height, column:column + width]
        return out


class PlanarGroupNorm(nn.GroupNorm):
    """The layers above leave the channels of a pixel side by side. If there are fewer than 1,024
    pixels, PyTorch's kernel takes a group pixel by pixel then; and what of its channels does not
    fill a register of 16 bf16 numbers goes one by one. Whole planes take up to 14 times less."""

    def forward(self, x):
        if (not is_traced() and x.device.type == "cpu" and x.dtype == torch.bfloat16
                and self.num_channels // self.num_groups % 16 and x.shape[2:].numel() < 1024):
            x = x.contiguous()
        return super().forward(x)


PREPARED = {nn.Conv2d: PackedConv2d, nn.Linear: PackedLinear, Upsample: PackedUpsample,
          nn.GroupNorm: PlanarGroupNorm}


def compile_blocks(network, kinds, **options):
    """torch.compile of every module of these classes within the network, by itself: blocks of one
    class and shape share one compilation. SD2.1's UNet has 38 such blocks of 18 shapes."""
    import torch._dynamo  # takes a second
    # shapes of all these classes together, at which PyTorch gives up: 8 if nothing is said
    torch._dynamo.config.cache_size_limit = 256
    torch._dynamo.config.accumulated_cache_size_limit = 1024
    for module in network.modules():
        if isinstance(module, kinds):
            module.compile(dynamic=False, **options)


def compile_for_drawing(unet):
    """torch.compile of a whole frozen UNet. On CUDA for one size and number of pictures (others
    compile again), with kernels tuned for them and launched as one CUDA graph."""
    on_cuda = next(unet.parameters()).device.type == "cuda"
    unet.compile(**({"mode": "max-autotune", "dynamic": False} if on_cuda else {}))
