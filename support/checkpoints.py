"""Checkpoints of a run: folders checkpoints/step-000500, which appear whole or not at all.

The state is taken between two steps and written while training goes on. Each process writes some of
the files. checksums.json tells a damaged checkpoint when one is to be read.
"""
import copy
import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from support.cli import require
from support.processes import all_of, gather, placed_as
from support.weights import (
    InputError,
    first_line,
    load_optimizer_state,
    read_json,
    whole_folder,
    write_whole,
)

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

OPTIMIZER, SUMS = "optimizer.pt", "checksums.json"


# ---------------------------------------------------------------------------------------- reading

def step_of(checkpoint):
    return int(checkpoint.name.removeprefix("step-"))


def checkpoints(out):
    """The checkpoint folders of a run, oldest first; anything else there is not one."""
    found = [path for path in (out / "checkpoints").glob("step-*")
             if path.is_dir() and path.name.removeprefix("step-").isdigit()]
    return sorted(found, key=step_of)


def newest_sound(out):
    """The newest checkpoint whose files are as they were written, or None. Newer ones are set
    aside under another name, and named."""
    found = checkpoints(out)
    for folder in reversed(found):
        wrong = damaged(folder)
        if wrong is None:
            return folder
        aside = folder.with_name(f"damaged-{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        print(f"{folder}: {wrong}; set aside as {aside.name}")
    require(not found, f"--out {out}: all checkpoints there are damaged; is the disk? To begin "
                       f"again, remove the folder or give another --out")
    return None


def damaged(folder):
    """What is wrong with a checkpoint, in words, or None."""
    if not (folder / SUMS).is_file():
        return None  # from before there were checksums
    try:
        sums = read_json(folder / SUMS)
        for name, expected in sums.items():
            if digest(folder / name) != expected:
                return f"{name} is not as it was written"
    except (InputError, OSError) as error:
        return first_line(error)
    return None


def digest(file):
    """SHA-256 of a file, in hexadecimal."""
    total = hashlib.sha256()
    with open(file, "rb") as raw:
        while block := raw.read(2**22):
            total.update(block)
    return total.hexdigest()


def load_optimizer(optimizer, newest, device):
    """Give the optimizer the state that checkpoint `newest` holds, shared out over the processes as
    its parameters are; None: leave it new."""
    if newest is None:
        return
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    if any(isinstance(p, DTensor) for p in weights):
        device = "cpu"  # the whole would not fit
    state = load_optimizer_state(newest / OPTIMIZER, optimizer, device)
    for number, moments in state["state"].items():
        p = weights[number]
        for name, value in moments.items():
            if torch.is_tensor(value) and value.ndim > 0:
                moments[name] = placed_as(value, p)
    optimizer.load_state_dict(state)


# ---------------------------------------------------------------------------------------- writing

class Busy(InputError):
    """Another run is at work in the folder."""


def lock(out, name=".lock"):
    """-> an open file, of that name, that keeps other runs out of the folder as long as it is open,
    even if this process is killed. Raises Busy if another keeps this one out."""
    file = open(out / name, "w")  # noqa: SIM115 (stays open)
    if fcntl is None:
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise Busy(f"--out {out}: another run is at work there; wait for it, stop it, or give "
                   f"another --out") from None
    except OSError:
        pass  # a file system without locks
    os.register_at_fork(after_in_child=file.close)  # else a data loading process holds it too
    return file


def outline(network):
    """A copy of a network without its numbers, which takes no memory."""
    empty = {}
    for tensor in [*network.parameters(), *network.buffers()]:
        new = tensor.detach().to("meta")
        trains = isinstance(tensor, torch.nn.Parameter)
        empty[id(tensor)] = torch.nn.Parameter(new, tensor.requires_grad) if trains else new
    return copy.deepcopy(network, empty)


def on_cpu(state, keep):
    """A copy of a state dict (of dicts, lists and tensors) in the CPU's memory. What is shared out
    over processes is put together, for which all of them must call this; keep: whether this
    process needs the copy."""
    if isinstance(state, DTensor):
        state = state.detach().full_tensor()
    if torch.is_tensor(state):
        return state.detach().to("cpu", copy=True) if keep else None
    if isinstance(state, dict):
        return {key: on_cpu(value, keep) for key, value in state.items()}
    if isinstance(state, list):
        return [on_cpu(value, keep) for value in state]
    return state


def check_same(networks, step):
    """All processes must hold the same weights: each sums up the bits of each tensor. Tensors that
    are shared out over processes are not compared."""
    tensors = {f"{name}: {key}": tensor for name, network in networks.items()
               for key, tensor in network.state_dict().items()
               if not isinstance(tensor, DTensor) and tensor.dtype == torch.float32}
    if not tensors:
        return
    sums = torch.stack([t.detach().contiguous().view(torch.int32).sum(dtype=torch.int64)
                        for t in tensors.values()])
    least, most = sums.clone(), sums.clone()
    dist.all_reduce(least, dist.ReduceOp.MIN)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    differ = [name for name, same in zip(tensors, (least == most).tolist()) if not same]
    require(not differ,
            f"step {step}: the processes hold different weights, first of all {differ[:1]}; the "
            f"last checkpoint is sound: is a card or its memory at fault?")


class Checkpoints:
    """The checkpoints of one run. Every process has one, and they call its methods together.

    newest: the checkpoint to go on from, or None; start: its step. networks, once known: {name of
    a folder: network}, of which outlines are kept, so they are given before they are compiled or
    shared out. Used as `with ... as run:`, at whose end the folder is free for other runs."""

    def __init__(self, out, keep, rank=0, world=1, held=None):
        self.out, self.keep, self.rank, self.world, self.held = out, keep, rank, world, held
        self.newest, self.start = None, 0
        self.networks, self.outlines = {}, {}
        self.thread, self.future, self.step = ThreadPoolExecutor(1), None, None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.world == 1:  # on an error not all of several processes may come here
            self.finish()
        self.thread.shutdown()
        if self.held is not None:
            self.held.close()

    def go_on_from(self, newest):
        """newest: the checkpoint that the first process has found, or None."""
        name = gather(newest and newest.name, self.world)[0]
        if name is not None:
            self.newest = self.out / "checkpoints" / name
            self.start = step_of(self.newest)
        seen = gather((self.newest or self.out / "checkpoints").is_dir(), self.world)
        require(all(seen),
                f"--out {self.out}: not all processes see {name or 'the folder checkpoints'} "
                f"there; all machines need the same folder")

    def know(self, networks):
        self.networks = networks
        self.outlines = {name: outline(network) for name, network in networks.items()}

    def save(self, step, optimizer):
        """Take the state as it is now, and begin to write it."""
        self.finish()
        if self.world > 1:
            check_same(self.networks, step)
        mine = {}
        for i, (name, part) in enumerate([*self.networks.items(), (OPTIMIZER, optimizer)]):
            keep = i % self.world == self.rank
            state = on_cpu(part.state_dict(), keep)
            if keep:
                mine[name] = state
        self.step = step
        self.future = self.thread.submit(self.write, self.folder(".", ".new"), mine)

    def folder(self, before="", after=""):
        return self.out / "checkpoints" / f"{before}step-{self.step:06d}{after}"

    def write(self, folder, states):
        """In the background -> {file: its checksum} of what was written, and an error or None."""
        sums = {}
        try:
            folder.mkdir(exist_ok=True)
            for name, state in states.items():
                if name == OPTIMIZER:
                    torch.save(state, folder / name)
                else:
                    self.outlines[name].load_state_dict(state, assign=True)
                    self.outlines[name].save_pretrained(folder / name)
                    self.outlines[name].to("meta")  # frees the copy
                files = [folder / name, *(folder / name).rglob("*")]
                sums |= {str(file.relative_to(folder)): digest(file)
                         for file in files if file.is_file()}
        except Exception as error:  # a full disk, in many guises
            return sums, f"{type(error).__name__}: {first_line(error)}"
        return sums, None

    def poll(self):
        """After each step: if all processes have written their files, they become a checkpoint."""
        if self.future is not None and all_of(self.future.done(), self.world):
            self.publish()

    def finish(self):
        """Wait for what is being written. -> what went wrong with it, or None"""
        return None if self.future is None else self.publish()

    def end(self):
        """After the last step: wait until its checkpoint is whole."""
        wrong = self.finish()
        require(wrong is None,
                f"--out {self.out}: the last checkpoint could not be written ({wrong}); make room "
                f"and run the same command, which goes on from the one before")

    def export(self):
        """Copy the networks of the newest checkpoint into the run folder."""
        for name in self.networks:
            with whole_folder(self.out / name) as new:
                shutil.copytree(self.newest / name, new, dirs_exist_ok=True)

    def publish(self):
        """Make what all processes have written a checkpoint. -> what went wrong, or None"""
        parts = gather(self.future.result(), self.world)
        self.future = None
        new, wrong = self.folder(".", ".new"), [error for _, error in parts if error]
        if self.rank == 0 and not wrong:
            try:
                sums = {file: value for part, _ in parts for file, value in part.items()}
                write_whole(new / SUMS, json.dumps(sums, indent=1))
                shutil.rmtree(self.folder(), ignore_errors=True)
                new.rename(self.folder())
                self.newest = self.folder()
            except OSError as error:
                wrong = [first_line(error)]
        wrong = gather(wrong, self.world)[0]
        if self.rank == 0 and not wrong:
            for old in checkpoints(self.out)[:-self.keep]:
                # renamed first: never a half-deleted folder under a checkpoint's name
                shutil.rmtree(old.rename(old.with_name("." + old.name)), ignore_errors=True)
        if self.rank == 0 and wrong:
            shutil.rmtree(new, ignore_errors=True)
            tqdm.write(f"step {self.step}: no checkpoint could be written ({wrong[0]}); the ones "
                       f"before are whole, training goes on")
        return wrong[0] if wrong else None
