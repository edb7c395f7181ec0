"""A training run: its options, processes and folder. What train.py and latent_rm.py share.

A run is resumed by the command that began it. Its folder holds config.json, log.jsonl, checkpoints/
and, in the end, the networks.
"""
import contextlib
import dataclasses
import json
import math
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from support import cli
from support.cli import make_folder, option, require
from support.weights import read_json, whole_folder, write_whole


@dataclass
class RunConfig:
    lr_schedule: str = option("cosine", "after the warm-up", choices=("constant", "cosine"))
    seed: int = option(0, "seed of everything random")
    precision: str = option(
        "auto", "arithmetic of the networks; weights stay float32",
        choices=("auto", "bf16", "fp32"))
    compile: bool = option(torch.cuda.is_available(), "torch.compile the networks")
    checkpoint_every: int = option(200, "steps between checkpoints")
    keep: int = option(2, "checkpoints kept")
    workers: int = option(0, "data loading processes")
    device: str = option("auto", "auto, cpu or cuda")


# What may be given otherwise when a run is resumed
MAY_CHANGE = {"out", "checkpoint_every", "log_every", "sample_every", "keep", "workers", "device",
              "compile", "evaluate", "heldout_every"}


# ---------------------------------------------------------------------------- one process of many

def setup_processes(args):
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
        device, backend = torch.device("cuda", local), "nccl"
        torch.cuda.set_device(device)
    chosen = [cli.precision_name(cli.pick_precision(args.precision, device))]
    if world > 1:
        dist.init_process_group(backend)
        dist.broadcast_object_list(chosen, device=device)
    args.precision = chosen[0]
    torch.set_float32_matmul_precision("high")
    return rank, world, device, cli.pick_precision(args.precision, device)


def average_over_processes(tensors, world):
    if world > 1:
        for work in [dist.all_reduce(t, async_op=True) for t in tensors]:
            work.wait()
        torch._foreach_div_(tensors, world)


# ---------------------------------------------------------------------------------- the run folder

def open_run(args, rank, world):
    """Make the run folder, or check that the run found there was started with the same options.
    -> newest checkpoint or None, its step"""
    out, settings = Path(args.out), dataclasses.asdict(args) | {"processes": world}
    if rank == 0:
        make_folder(out / "checkpoints")
    if checkpoints(out):
        # under a cosine the number of steps shapes every rate; a constant rate may go on longer
        longer = {"steps"} if args.lr_schedule == "constant" else set()
        same_options(out, settings, MAY_CHANGE | longer)
    newest = checkpoints(out)[-1] if checkpoints(out) else None
    if world > 1:
        seen = [None] * world
        dist.all_gather_object(seen, newest and newest.name)
        require(len(set(seen)) == 1,
                f"--out {out}: the processes see different checkpoints there ({seen}); "
                f"all machines need the same folder")
    if rank == 0:
        # left over from a save or a removal that a kill cut short
        for left in (out / "checkpoints").glob(".step-*"):
            shutil.rmtree(left, ignore_errors=True)
        write_whole(out / "config.json", json.dumps(settings, indent=2) + "\n")
    return newest, step_of(newest) if newest else 0


def same_options(folder, settings, may_change=()):
    """Refuse a folder whose config.json, if it has one, says that it was made otherwise.

    settings: {name: value} of now; may_change: names of those that need not agree."""
    file = Path(folder) / "config.json"
    before = read_json(file) if file.is_file() else settings
    changed = [f"{name} {before.get(name)} (now {value})" for name, value in settings.items()
               if name not in may_change and before.get(name) != value]
    require(not changed,
            f"--out {folder} was made with other options: {', '.join(changed[:4])}; "
            f"give the same to go on there, or another --out")


def step_of(checkpoint):
    return int(checkpoint.name.removeprefix("step-"))


def checkpoints(out):
    """The whole checkpoint folders of a run, oldest first; anything else there is not one."""
    found = [path for path in (out / "checkpoints").glob("step-*")
             if path.is_dir() and path.name.removeprefix("step-").isdigit()]
    return sorted(found, key=step_of)


def save_checkpoint(out, step, networks, optimizer, keep):
    """networks: {name of its folder: network}."""
    folder = out / "checkpoints" / f"step-{step:06d}"
    with whole_folder(folder) as new:
        for name, network in networks.items():
            network.save_pretrained(new / name)
        torch.save(optimizer.state_dict(), new / "optimizer.pt")
    for old in checkpoints(out)[:-keep]:
        # renamed first: never a half-deleted folder under a checkpoint's name
        shutil.rmtree(old.rename(old.with_name("." + old.name)))


class Log:
    """log.jsonl, one JSON object a line, and the progress bar. Every process calls it, the first
    one writes. rows: samples that a step takes, those of all processes."""

    def __init__(self, out, start, steps, rows, rank):
        self.file, self.rows, self.writes = out / "log.jsonl", rows, rank == 0
        if self.writes and self.file.is_file():
            # drop what a killed run wrote after its last checkpoint; a kill may leave half a line
            lines = [line for line in self.file.read_text().splitlines() if line.endswith("}")]
            kept = [line + "\n" for line in lines if json.loads(line)["step"] <= start]
            write_whole(self.file, "".join(kept))
        self.progress = tqdm(total=steps, initial=start, disable=rank != 0, unit="step")
        self.clock, self.step = time.perf_counter(), start

    @contextlib.contextmanager
    def pause(self):
        """What is done inside (looking, saving) is no training and does not count as its time."""
        began = time.perf_counter()
        yield
        self.clock += time.perf_counter() - began

    def __call__(self, line, shown, remedy):
        """line: {"step": its number, name: number}; the keys in `shown` go to the progress bar.
        -> the line with the speed since the last one. Raises InputError, with the remedy, if a
        number is not finite."""
        require(all(abs(value) < float("inf") for value in line.values()),
                f"step {line['step']}: loss or gradient is not finite ({line}); the last "
                f"checkpoint in {self.file.parent}/checkpoints is sound: {remedy}, "
                f"with another --out")
        seconds = (time.perf_counter() - self.clock) / (line["step"] - self.step)
        self.clock, self.step = time.perf_counter(), line["step"]
        line = line | {"seconds_per_step": round(seconds, 4),
                       "images_per_second": round(self.rows / seconds, 2)}
        if self.writes:
            with open(self.file, "a") as file:
                file.write(json.dumps(line) + "\n")
        self.progress.set_postfix({key: f"{line[key]:.3f}" for key in shown if key in line})
        return line


def rate_factor(step, args):
    """The factor on the learning rate: a linear warm-up, then constant or a cosine down to 5%."""
    decay = 1.0
    if args.lr_schedule == "cosine":
        decay = 0.05 + 0.95 * (1 + math.cos(math.pi * step / args.steps)) / 2
    return min(1, (step + 1) / args.warmup) * decay
