"""What a training step holds in a card's memory, counted on a machine without the card.

Tensors are fake: they have a shape and no numbers (torch's FakeTensorMode, on the CPU). Where a
card computes otherwise than a CPU, it is done as there: under autocast norms are in float32, and
attention keeps its inputs and output, no matrix of all pairs. What is not counted: CUDA's own
context (about half a GB), libraries' work space, and what the allocator loses to pieces of unequal
size.
"""
import contextlib
import weakref
from unittest import mock

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

CARDS = (8, 12, 16, 24, 40, 80)  # GB that cards have
SPARE = 1.5  # GB of a card that are left for what is not counted


class Peak(TorchDispatchMode):
    """Within it, bytes of the tensors that were made and not yet freed: `now`, and at most
    (`peak`). there: tensors from before, views of which are nothing new."""

    def __init__(self, there):
        super().__init__()
        self.now = self.peak = 0
        # {a storage's address: what notes its end}
        self.alive = {tensor.untyped_storage()._cdata: None for tensor in there}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self.see(tensor.untyped_storage())
        return result

    def see(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.alive:
            def gone(_):
                del self.alive[key]
                self.now -= size
            self.alive[key] = weakref.ref(storage, gone)
            self.now += size
            self.peak = max(self.peak, self.now)


class Attention(torch.autograd.Function):
    """The shapes of a fused attention: what it keeps for the backward pass is what it was given,
    its output, and a number for each query."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = q.new_empty((*q.shape[:-1], v.shape[-1]))
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, grad):
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


def attention(q, k, v, *args, **kwargs):
    if torch.is_autocast_enabled("cpu"):
        q, k, v = (x.to(torch.get_autocast_dtype("cpu")) for x in (q, k, v))
    return Attention.apply(q, k, v)


def in_float32(norm):
    """A norm of torch.nn.functional as CUDA's autocast does it."""
    def run(x, *args, **kwargs):
        if torch.is_autocast_enabled("cpu"):
            x = x.float()
            args = [a.float() if torch.is_tensor(a) else a for a in args]
            kwargs = {k: a.float() if torch.is_tensor(a) else a for k, a in kwargs.items()}
        return norm(x, *args, **kwargs)
    return run


@contextlib.contextmanager
def fake_card():
    """Within it tensors are fake, and computed with as on a card."""
    patches = {"scaled_dot_product_attention": attention, "layer_norm": in_float32(F.layer_norm),
               "group_norm": in_float32(F.group_norm)}
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # fused layers of towers without gradient
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), contextlib.ExitStack() as stack:
            for name, function in patches.items():
                stack.enter_context(mock.patch.object(F, name, function))
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def faked(*modules):
    """Give modules on the meta device, None among them, fake tensors in place of theirs; what they
    share they still share. In fake_card() only."""
    made = {}
    for module in modules:
        for part in module.modules() if module is not None else ():
            for kind in (part._parameters, part._buffers):
                for name, tensor in kind.items():
                    if tensor is not None:
                        key = tensor.untyped_storage()._cdata
                        if key not in made:
                            made[key] = torch.empty_like(tensor, device="cpu")
                        new = made[key]
                        if kind is part._parameters:
                            new = torch.nn.Parameter(new, tensor.requires_grad)
                        kind[name] = new


def size_of(tensors):
    """Bytes of these tensors; of those that share their memory, once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def every(modules):
    """The tensors of modules, None among them."""
    return [t for module in modules if module is not None
            for t in [*module.parameters(), *module.buffers()]]


def count(trained, target, frozen, call):
    """GB of one process in a step, with AdamW. trained, target, frozen: lists of modules, None
    among them; trained: those with parameters that require gradients. call(): one pass, forward and
    backward. -> {"weights", "target", "frozen", "gradients", "optimizer", "activations"}, whose sum
    is what the step holds at most"""
    parameters = [p for p in every(trained) if p.requires_grad]
    found = {
        "weights": size_of(parameters),
        "target": size_of(every(target)),
        "gradients": size_of(parameters),
        "optimizer": 2 * size_of(parameters)}
    tensors = [*every(trained), *every(target), *every(frozen)]
    found["frozen"] = size_of(tensors) - size_of([*parameters, *every(target)])
    with Peak(tensors) as peak:
        call()
    # the pass makes the gradients: what it holds beside them at its worst moment
    found["activations"] = max(0, peak.peak - found["gradients"])
    return {name: size / 1e9 for name, size in found.items()}


def smaller(found):
    """The same with --target-dtype bf16, and --optimizer adamw8bit: a byte a number, and 4 for each
    256 of them."""
    return found | {"target": found["target"] / 2, "optimizer": found["optimizer"] * 260 / 1024}


def smallest_card(total):
    """GB -> those of the smallest card that holds so much, or None."""
    return next((card for card in CARDS if total + SPARE <= card), None)
