"""One process of many: who it is, what it shares with the others, and when it stops."""
import os
import signal
import time

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from support import cli
from support.cli import require


def setup(args):
    """-> rank, world, device, dtype of the networks' arithmetic. torchrun is optional.

    args.precision becomes what "auto" chose on the first process: all compute in it, and the run
    is resumed in it."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1 or args.device == "cpu" or not torch.cuda.is_available():
        device, backend = cli.pick_device(args.device), "gloo"
    else:
        local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        require(args.device in ("auto", "cuda"),
                f"--device {args.device}: with several processes each takes its own GPU; "
                f"expected auto, cuda or cpu")
        require(local < count,
                f"process {local} of this machine has no GPU: there are {count}; "
                f"lower --nproc_per_node")
        # gloo for the few numbers and names that the processes tell each other on the CPU
        device, backend = torch.device("cuda", local), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    chosen = [cli.precision_name(cli.pick_precision(args.precision, device))]
    if world > 1:
        dist.init_process_group(backend)
        dist.broadcast_object_list(chosen, device=device)
    args.precision = chosen[0]
    torch.set_float32_matmul_precision("high")
    return rank, world, device, cli.pick_precision(args.precision, device)


def average(tensors, world):
    """In place, over all processes."""
    if world > 1 and tensors:
        for work in [dist.all_reduce(t, async_op=True) for t in tensors]:
            work.wait()
        torch._foreach_div_(tensors, world)


def end(world, device):
    """After the last step. torch 2.6 may wait for ever here, on the CPU: its end waits for a
    thread that waits for Python, to release a tensor that nothing else holds any more. So the last
    tensor that the thread works on is held here."""
    if world > 1:
        held = torch.zeros(1, device=device)
        dist.all_reduce(held)
        dist.destroy_process_group()


def gather(thing, world):
    """-> [what each process gives], in the order of ranks."""
    parts = [thing]
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, thing)
    return parts


def all_of(flag, world):
    """Is the flag true on every process?"""
    if world > 1:
        told = torch.tensor(int(flag))
        dist.all_reduce(told, dist.ReduceOp.MIN)
        flag = bool(told)
    return flag


def averaged(module, world, recomputes=False):
    """The module, whose parameters' gradients are then averaged over all processes while the
    backward pass still computes others (DistributedDataParallel). recomputes: activations are
    recomputed in it."""
    if world == 1:
        return module
    if recomputes:
        # compiled graphs are cut for the sake of the average, which torch 2.6 cannot do with these
        torch._dynamo.config.optimize_ddp = False
    return DistributedDataParallel(module, gradient_as_bucket_view=True)


def shard(network, parts, device, world):
    """FSDP2: share out a network's weights, and with them gradients and Adam's moments, over all
    processes. parts: the classes of the modules in it that are put together one after the
    other when they compute; what is in none of them is put together for the whole pass."""
    mesh = init_device_mesh(device.type, (world,))
    for module in network.modules():
        if isinstance(module, parts):
            fully_shard(module, mesh=mesh)
    # else what is in none of the parts would stay together after a forward pass without a backward
    fully_shard(network, mesh=mesh, reshard_after_forward=True)


def reshard(network):
    """Share out again what a forward pass without a backward has left whole: before torch 2.8 any
    part, and a part that is in no other in all versions."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def placed_as(tensor, like):
    """A whole tensor, shared out over the processes as `like` is."""
    if isinstance(like, DTensor):
        return distribute_tensor(tensor, like.device_mesh, like.placements)
    return tensor


def parts_here(tensors):
    """The parts of these tensors that this process holds: all, unless they are shared out."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


def whole(tensor):
    """A number that was computed from tensors that may be shared out."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def bytes_held(trained, frozen, optimizer):
    """-> {what: bytes of this process's tensors}. trained, frozen: modules, None among them."""
    count = lambda tensors: sum(t.numel() * t.element_size() for t in parts_here(tensors))
    every = lambda modules: [t for module in modules if isinstance(module, torch.nn.Module)
                             for t in [*module.parameters(), *module.buffers()]]
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    moments = [value for state in optimizer.state.values() for value in state.values()
               if torch.is_tensor(value)]
    return {"trained": count(every(trained)), "frozen": count(every(frozen)),
            "gradients": count([p.grad for p in weights if p.grad is not None]),
            "optimizer": count(moments)}


class Stop:
    """Within `with Stop() as stop:` SIGTERM and Ctrl-C only ask for the end, so that the step under
    way can be finished and saved. A second one ends the process at once."""
    ONE = 2  # seconds: torchrun passes a Ctrl-C on that the terminal has sent already

    def __init__(self):
        self.since, self.before = None, {}

    def __enter__(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            self.before[number] = signal.signal(number, self.catch)
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def catch(self, number, _):
        if self.since is None:
            self.since = time.monotonic()
            tqdm.write(f"{signal.Signals(number).name}: finishes this step and saves, so that the "
                       f"same command goes on from there; a second one ends at once")
        elif time.monotonic() - self.since > self.ONE:
            os._exit(128 + number)

    def asked(self, world):
        """Has any process been asked? All must call it."""
        return not all_of(self.since is None, world)
