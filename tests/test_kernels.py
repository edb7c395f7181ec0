"""The CPU's faster ways give the same numbers, and change nothing else."""
import copy
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import vae
from conftest import UNET, VAE, agree, agree_by_name, rand, randomize, same_weights
from lora import LoRA
from support import kernels
from support.kernels import (
    PackedConv2d,
    attention,
    compile_blocks,
    fast_attention,
    prepare_for_inference,
)
from unet import ResnetBlock, Transformer, UNet, UNetConfig

INPUTS = rand(2, 4, 8, 8), torch.tensor([999, 19]), rand(2, 7, 32, seed=1)


def new_unet():
    torch.manual_seed(0)
    return randomize(UNet(UNetConfig(**UNET))).eval().requires_grad_(False)


def packs(network):
    """The layers that keep weights in another layout. Upsample keeps those of its convolution."""
    inner = {m.conv for m in network.modules() if isinstance(m, kernels.PackedUpsample)}
    return [m for m in network.modules() if hasattr(m, "pack") and m not in inner]


@pytest.fixture
def pair():
    """A UNet as it is and the same prepared, which has drawn once."""
    plain = new_unet()
    prepared = prepare_for_inference(copy.deepcopy(plain))
    prepared(*INPUTS)
    assert all(m.packed[1] is not None for m in packs(prepared))
    return plain, prepared


@torch.no_grad()
@pytest.mark.parametrize("spread", [1, 8])
@pytest.mark.parametrize("queries, keys, width", [
    (600, 600, 64), (600, 600, 40), (300, 300, 512), (600, 77, 64), (1, 5, 64)])
def test_bf16_attention_in_slices_is_off_float32_by_less_than_twice_what_pytorchs_is(
        queries, keys, width, spread, monkeypatch):
    monkeypatch.setattr(kernels, "has_matrix_units", lambda: False)
    monkeypatch.setattr(kernels, "SCORES", 2 ** 18)  # several slices, the last one partial,
    monkeypatch.setattr(kernels, "ROWS", 2 ** 7)  # of 3 of the 6 heads or fewer
    q, k, v = (rand(2, 3, length, width, seed=i).bfloat16()
               for i, length in enumerate((queries, keys, keys)))
    q = q * spread
    exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    errors = [(way(q, k, v).float() - exact).abs().mean()
              for way in (attention, F.scaled_dot_product_attention)]
    assert errors[0] <= 2 * errors[1]


@torch.no_grad()
def test_bf16_attention_is_never_farther_off_than_rounded_scores_are(monkeypatch):
    """Where two keys have all the weight, the greatest score, here 30, is far above those that it
    is estimated from, and the centre is of no use."""
    monkeypatch.setattr(kernels, "has_matrix_units", lambda: False)
    q, k, v = (rand(1, 1, 64, 64, seed=i) for i in range(3))
    direction = F.normalize(rand(64, seed=3), dim=0)
    q, k = q / 8 + 15 * direction, k / 8
    k[:, :, 5] += 16 * direction
    k[:, :, 6] += 16 * direction
    q, k, v = (x.bfloat16() for x in (q, k, v))
    exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    assert exact[..., 0].std() < 0.2 * v[..., 0].float().std()  # all queries see the same two
    assert (attention(q, k, v).float() - exact).norm() <= 0.04 * exact.norm()


@torch.no_grad()
@pytest.mark.parametrize("units", [False, True])
def test_where_there_are_matrix_units_bf16_attention_is_pytorchs(units, monkeypatch):
    monkeypatch.setattr(kernels, "has_matrix_units", lambda: units)
    asked, pytorchs = [], F.scaled_dot_product_attention
    monkeypatch.setattr(kernels.F, "scaled_dot_product_attention",
                        lambda *tensors: asked.append(0) or pytorchs(*tensors))
    attention(*(rand(1, 2, 9, 8, seed=i).bfloat16() for i in range(3)))
    assert len(asked) == units


@torch.no_grad()
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("size", [(10, 14), (9, 13), None])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_upsample_is_the_convolution_of_the_picture_twice_as_large(layout, size, dtype, tolerance):
    torch.manual_seed(0)
    upsample = prepare_for_inference(kernels.Upsample(16).to(dtype))
    x = rand(3, 16, 5, 7).to(dtype).contiguous(memory_format=layout)
    large = F.interpolate(x.float(), size=size or (10, 14), mode="nearest")
    exact = F.conv2d(large, upsample.conv.weight.float(), upsample.conv.bias.float(), padding=1)
    out = upsample(x, size)
    assert out.dtype == dtype and out.shape == exact.shape
    assert (out.float() - exact).norm() <= tolerance * exact.norm()
    assert (upsample.packed is None) == (size == (9, 13))


def test_upsample_gives_gradients_and_follows_its_weights():
    upsample, x = prepare_for_inference(kernels.Upsample(8)), rand(1, 8, 4, 4)
    with torch.no_grad():
        before = upsample(x)
    upsample(x).sum().backward()
    with torch.no_grad():
        upsample.conv.weight -= upsample.conv.weight.grad
        after = upsample(x)
    assert (after - before).abs().max() > 0.1
    agree(after, upsample(x).detach(), 1e-5)


@torch.no_grad()
def test_upsample_adds_the_update_of_a_lora():
    unet = new_unet()
    updates = LoRA.new(unet, rank=2)
    name = next(name for name in updates.updates if "upsamplers" in name)
    torch.nn.init.ones_(updates.updates[name].B)
    x = rand(1, unet.get_submodule(name).in_channels, 4, 4)
    upsample = unet.get_submodule(name.removesuffix(".conv"))
    before = upsample(x)
    with_update = prepare_for_inference(updates.attach(unet)).get_submodule(
        name.removesuffix(".conv"))(x)
    assert (with_update - before).abs().max() > 0.1
    updates.merge(fresh := new_unet())
    agree(fresh.get_submodule(name.removesuffix(".conv"))(x), with_update, 1e-5)


@torch.no_grad()
def test_what_is_traced_for_another_engine_changes_nothing_in_place():
    traced = torch.jit.trace(kernels.silu, rand(2, 3))
    assert "silu_" not in str(traced.graph)
    x = rand(2, 3)
    assert kernels.silu(x) is x  # drawn, it does


@torch.no_grad()
def test_a_lora_goes_to_a_prepared_network_too(pair):
    plain, prepared = pair
    for unet in pair:
        updates = LoRA.new(unet, rank=2)
        for update in updates.layers:
            torch.nn.init.constant_(update.B, 0.05)
        updates.attach(unet)
    before = new_unet()(*INPUTS)
    agree(prepared(*INPUTS), plain(*INPUTS), 1e-5)
    assert (prepared(*INPUTS) - before).abs().max() > 1e-3


def test_attention_with_a_gradient_is_pytorchs_outside_of_training(monkeypatch):
    q, k, v = (rand(1, 2, 9, 8, seed=i).bfloat16().requires_grad_() for i in range(3))
    attention(q, k, v).sum().backward()
    ours = [x.grad.clone() for x in (q, k, v)]
    q.grad = k.grad = v.grad = None
    F.scaled_dot_product_attention(q, k, v).sum().backward()
    assert all(torch.equal(mine, x.grad) for mine, x in zip(ours, (q, k, v)))


NOTHING_IN_ONE_ROW = torch.ones(5, 9, dtype=torch.bool)
NOTHING_IN_ONE_ROW[2] = False
MASKS = {
    "none": {}, "scaled": {"scale": 0.7}, "a masked row": {"attn_mask": NOTHING_IN_ONE_ROW},
    "causal": {"is_causal": True}, "added": {"attn_mask": rand(5, 9, seed=7)},
    "bool": {"attn_mask": torch.ones(5, 9, dtype=torch.bool).tril(3)},
    "by head": {"attn_mask": rand(2, 3, 5, 9, seed=7)}}


@pytest.mark.parametrize("mask", MASKS)
def test_attention_in_training_and_its_gradient_are_pytorchs(mask):
    inputs = [rand(2, 3, length, 8, seed=i).requires_grad_() for i, length in enumerate((5, 9, 9))]
    way = rand(2, 3, 5, 8, seed=9)
    theirs = F.scaled_dot_product_attention(*inputs, **MASKS[mask])
    with fast_attention("cpu"):
        assert F.scaled_dot_product_attention is not kernels.PYTORCHS_ATTENTION
        ours = F.scaled_dot_product_attention(
            **dict(zip(("query", "key", "value"), inputs)), **MASKS[mask])
    agree(ours, theirs, 1e-5)
    for mine, other in zip(torch.autograd.grad(ours, inputs, way),
                           torch.autograd.grad(theirs, inputs, way)):
        agree(mine, other, 1e-5)


@pytest.mark.parametrize("spread", [1, 8])
def test_in_bf16_they_are_off_float32_by_little_more_than_pytorchs(spread):
    """Scores rounded to bf16 are off by six times that where they are large."""
    exact = [rand(2, 3, 64, 32, seed=i) * (spread if i == 0 else 1) for i in range(3)]
    half = [x.bfloat16().requires_grad_() for x in exact]
    exact = [x.detach().float().requires_grad_() for x in half]
    way = rand(2, 3, 64, 32, seed=9)

    def both(inputs):  # what comes out, and the gradients
        out = F.scaled_dot_product_attention(*inputs)
        return [out, *torch.autograd.grad(out, inputs, way.to(out.dtype))]

    def error(found):
        return [(x.float() - y).norm() / y.norm() for x, y in zip(found, true)]

    true, theirs = both(exact), both(half)
    with fast_attention("cpu"):
        ours = both(half)
    for mine, other in zip(error(ours), error(theirs)):
        assert mine <= 2.5 * other


def test_it_leaves_cuda_dropout_and_what_wants_no_gradient_to_pytorch(monkeypatch):
    q, asked = rand(1, 2, 5, 8), []
    monkeypatch.setattr(
        kernels, "PYTORCHS_ATTENTION", lambda *given, **more: asked.append(given) or q)
    with fast_attention("cpu"):
        F.scaled_dot_product_attention(q, q, q)
        assert len(asked) == 1
        F.scaled_dot_product_attention(q.requires_grad_(), q, q, dropout_p=0.5)
        assert len(asked) == 2
        F.scaled_dot_product_attention(q, q, q)
        assert len(asked) == 2
    before = F.scaled_dot_product_attention, F.linear
    with fast_attention("cuda"):
        assert (F.scaled_dot_product_attention, F.linear) == before
    with pytest.raises(KeyError), fast_attention("cpu"):
        raise KeyError
    assert (F.scaled_dot_product_attention, F.linear) == before


class Expanded(TorchDispatchMode):
    """Notes the shapes of the weights that are multiplied as one copy for each row of a batch."""

    def __init__(self, network):
        super().__init__()
        self.weights = {p.data_ptr() for p in network.parameters() if p.ndim > 1}
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.expand.default and args[0].data_ptr() in self.weights:
            self.seen.append(tuple(args[0].shape))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("make, inputs, context", [  # what is ours needs no context for it
    (new_unet, INPUTS, nullcontext()),
    (lambda: vae.VAE(vae.VAEConfig(**VAE)), [rand(2, 3, 32, 32)], nullcontext()),
    (lambda: torch.nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True), [rand(4, 5, 16)],
     fast_attention("cpu"))],
    ids=["unet", "vae", "a library's tower"])
def test_no_frozen_weight_is_copied_for_each_row(make, inputs, context):
    """By which the default run's reward took three times as long."""
    network = make().requires_grad_(False)
    first, *others = inputs
    call = network.posterior if hasattr(network, "posterior") else network
    with context, Expanded(network) as expanded:
        call(first.clone().requires_grad_(), *others)
    assert not expanded.seen


@torch.no_grad()
@pytest.mark.parametrize("dtype, channels, side, planar", [
    (torch.bfloat16, 32, 8, True), (torch.bfloat16, 32, 32, False),
    (torch.bfloat16, 64, 8, False), (torch.bfloat16, 96, 8, True), (torch.float32, 32, 8, False)])
def test_groups_that_do_not_fill_registers_are_normed_plane_by_plane(dtype, channels, side, planar):
    norm = randomize(torch.nn.GroupNorm(4, channels)).to(dtype)
    x = rand(3, channels, side, side).to(dtype).contiguous(memory_format=torch.channels_last)
    exact = norm.float()(x.float())
    found = prepare_for_inference(norm.to(dtype))(x)
    assert found.is_contiguous() == planar
    agree(found.float(), exact, 1e-6 if dtype == torch.float32 else 1e-2)


def test_a_prepared_network_gives_the_same_pictures_from_the_same_state(pair):
    plain, prepared = pair
    agree(prepared(*INPUTS), plain(*INPUTS), 1e-5)
    agree(prepared(rand(3, 4, 9, 5), torch.tensor([1, 2, 3]), rand(3, 7, 32)),  # another shape
          plain(rand(3, 4, 9, 5), torch.tensor([1, 2, 3]), rand(3, 7, 32)), 1e-5)
    assert same_weights(plain, prepared)
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in prepared.named_parameters()]


def test_a_prepared_network_saves_and_loads_as_ever(pair, tmp_path):
    plain, prepared = pair
    prepared.save_pretrained(tmp_path)
    assert same_weights(UNet.from_pretrained(tmp_path), plain)
    again = copy.deepcopy(prepared)
    assert all(m.packed is None for m in packs(again))
    agree(again(*INPUTS), plain(*INPUTS), 1e-5)


def moved(network):
    with torch.no_grad():
        for p in network.parameters():
            p += 0.01


def averaged(network):
    """As train.py moves its moving average."""
    weights = [p.detach() for p in network.parameters()]
    torch._foreach_lerp_(weights, [w + 0.02 for w in weights], 0.5)


def replaced(network):
    network.load_state_dict({k: v + 0.01 for k, v in network.state_dict().items()})


def assigned(network):
    network.load_state_dict({k: v + 0.01 for k, v in network.state_dict().items()}, assign=True)


def merged(network):
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(p + 0.01 * rand(*p.shape))


@pytest.mark.parametrize("change", [moved, averaged, replaced, assigned, merged])
def test_a_weight_that_changes_is_packed_anew(pair, change):
    plain, prepared = pair
    before = prepared(*INPUTS)
    change(plain)
    change(prepared)
    agree(prepared(*INPUTS), plain(*INPUTS), 1e-5)
    assert (prepared(*INPUTS) - before).abs().max() > 1e-3


def test_a_prepared_network_in_another_precision_follows(pair):
    exact = pair[0](*INPUTS)
    outs = [network.bfloat16()(*INPUTS).float() for network in pair]
    one, two = ((out - exact).square().mean().sqrt() for out in outs)
    assert 0 < two <= 1.3 * one  # bf16's own error, each with its own rounding
    assert any(m.packed[1] is not None and m.packed[0][2] == torch.bfloat16
               for m in packs(pair[1]))


def test_a_prepared_network_trains_as_ever(pair):
    plain, prepared = (network.requires_grad_() for network in pair)
    gradients = []
    for network in (plain, prepared):
        network(*INPUTS).square().mean().backward()
        gradients.append({n: p.grad for n, p in network.named_parameters()})
    agree_by_name(gradients[1], gradients[0])


def test_a_prepared_network_gives_its_input_a_gradient():
    layer = PackedConv2d(3, 4, 3).requires_grad_(False)
    x = rand(1, 3, 8, 8).requires_grad_()
    layer(x).sum().backward()
    assert x.grad.abs().max() > 0


def test_autocast_computes_in_its_own_precision(pair):
    plain, prepared = pair
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(prepared(*INPUTS), plain(*INPUTS))


def test_a_prepared_network_compiles(pair):
    plain, prepared = pair
    prepared.compile(backend="eager", fullgraph=True)
    agree(prepared(*INPUTS), plain(*INPUTS), 1e-5)


@pytest.mark.parametrize("error", [AttributeError, RuntimeError, TypeError])
@pytest.mark.parametrize("part", ["pack", "by_pack"])
def test_without_the_private_operators_the_plain_way_remains(monkeypatch, error, part):
    def gone(self, *given):
        raise error("no such operator")

    plain = new_unet()
    prepared = prepare_for_inference(copy.deepcopy(plain))
    for kind in kernels.Packs.__subclasses__():
        monkeypatch.setattr(kind, part, gone)
    assert torch.equal(prepared(*INPUTS), plain(*INPUTS))


@torch.no_grad()
def test_in_bf16_we_are_no_farther_from_float32_than_diffusers(tmp_path):
    from diffusers import UNet2DConditionModel
    exact = new_unet()
    exact.save_pretrained(tmp_path)
    ours = prepare_for_inference(UNet.from_pretrained(tmp_path, dtype=torch.bfloat16))
    theirs = UNet2DConditionModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    errors = []
    for seed in range(8):  # of one input alone ours is 0.9 to 1.1 of theirs
        z, t, context = rand(2, 4, 8, 8, seed=seed), INPUTS[1], rand(2, 7, 32, seed=100 + seed)
        right = exact(z, t, context)
        outs = ours(z, t, context), theirs(z.bfloat16(), t, context.bfloat16()).sample
        errors.append([(out.float() - right).square().mean() for out in outs])
    mine, diffusers = torch.tensor(errors).mean(dim=0).sqrt()
    assert mine <= 1.1 * diffusers


@pytest.mark.parametrize("device, options", [
    ("cpu", {}), ("cuda", {"mode": "max-autotune", "dynamic": False})])
def test_a_unet_that_draws_is_compiled_for_its_device(device, options):
    seen = []
    kernels.compile_for_drawing(SimpleNamespace(
        parameters=lambda: iter([SimpleNamespace(device=torch.device(device))]),
        compile=lambda **given: seen.append(given)))
    assert seen == [options]


class Count:
    """A backend of torch.compile that counts what it is given."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


def test_compiled_blocks_of_one_shape_are_compiled_once_and_change_nothing():
    torch._dynamo.reset()
    plain, backend = new_unet().requires_grad_(), Count()
    compiled = copy.deepcopy(plain)
    compile_blocks(compiled, (ResnetBlock, Transformer), backend=backend, fullgraph=True)
    blocks = [m for m in plain.modules() if isinstance(m, (ResnetBlock, Transformer))]
    shapes = set()
    for block in blocks:
        block.register_forward_hook(
            lambda m, i, o: shapes.add((type(m), i[0].shape, o.shape)))
    gradients = []
    for network in (plain, compiled):
        out = network(*INPUTS)
        out.square().mean().backward()
        gradients.append((out, {n: p.grad for n, p in network.named_parameters()}))
    assert 8 < backend.graphs == len(shapes) < len(blocks)
    agree(gradients[1][0], gradients[0][0], 1e-5)
    agree_by_name(gradients[1][1], gradients[0][1])
    compiled(*INPUTS)
    assert backend.graphs == len(shapes)
