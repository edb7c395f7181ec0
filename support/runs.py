"""A training run: its options, processes and folder. What train.py and latent_rm.py share.

A run is resumed by the command that began it. Its folder holds config.json, log.jsonl, checkpoints/
and, in the end, the networks.
"""
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from support import cli
from support.broken import Broken
from support.cli import make_folder, option, require
from support.weights import InputError, read_json, whole_folder, write_whole

try:  # the extra `tensorboard`: curves beside log.jsonl
    from torch.utils.tensorboard import SummaryWriter
except ImportError:
    SummaryWriter = None

# headings of --help
TRAINING, DATA = "what to train", "the data"
MACHINE, LOOKING = "the machine", "looking and saving"
ROOT = Path(__file__).resolve().parent.parent


@dataclass
class RunConfig:
    lr_schedule: str = option(
        "cosine", "after the warm-up", choices=("constant", "cosine"), group=TRAINING)
    max_grad_norm: float = option(1.0, "a longer gradient is shortened to this norm")
    seed: int = option(0, "seed of everything random")
    device: str = option("auto", "auto, cpu or cuda", group=MACHINE)
    precision: str = option(
        "auto", "arithmetic of the networks; weights stay float32",
        choices=("auto", "bf16", "fp32"))
    compile: bool = option(torch.cuda.is_available(), "torch.compile the networks")
    workers: int = option(0, "data loading processes")
    caption_lines: bool = option(
        False, "a caption file holds one caption a line, of which one is drawn", group=DATA)
    max_bad: float = option(
        0.01, "share of broken samples at which the run stops; before, others take their places")
    skip_bad_shards: bool = option(False, "go on without damaged tars (config.json names them)")
    checkpoint_every: int = option(200, "steps between checkpoints", group=LOOKING)
    keep: int = option(2, "checkpoints kept")


# What may be given otherwise when a run is resumed
MAY_CHANGE = {"preset", "out", "checkpoint_every", "log_every", "norms_every", "sample_every",
              "keep", "workers", "device", "compile", "evaluate", "heldout_every", "max_bad",
              "skip_bad_shards"}


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


def end_processes(world, device):
    """After the last step. torch 2.6 may wait for ever here, on the CPU: its end waits for a
    thread that waits for Python, to release a tensor that nothing else holds any more. So the last
    tensor that the thread works on is held here."""
    if world > 1:
        held = torch.zeros(1, device=device)
        dist.all_reduce(held)
        dist.destroy_process_group()


# ---------------------------------------------------------------------------------- the run folder

def open_run(args, rank, world):
    """Make the run folder, or check that the run found there was started with the same options.

    config.json keeps the options, the number of processes, and under "code" what the run was made
    with: one entry for each state of the sources, with the step from which on it trained.
    -> newest checkpoint or None, its step"""
    out, settings = Path(args.out), dataclasses.asdict(args) | {"processes": world}
    if rank == 0:
        make_folder(out / "checkpoints")
    if checkpoints(out):
        # under a cosine the number of steps shapes every rate; a constant rate may go on longer
        longer = {"steps"} if args.lr_schedule == "constant" else set()
        same_options(out, settings, MAY_CHANGE | longer, defaults=type(args)())
    newest = checkpoints(out)[-1] if checkpoints(out) else None
    if world > 1:
        seen = [None] * world
        dist.all_gather_object(seen, newest and newest.name)
        require(len(set(seen)) == 1,
                f"--out {out}: the processes see different checkpoints there ({seen}); "
                f"all machines need the same folder")
    start = step_of(newest) if newest else 0
    if rank == 0:
        # left over from a save or a removal that a kill cut short
        for left in (out / "checkpoints").glob(".step-*"):
            shutil.rmtree(left, ignore_errors=True)
        settings["code"] = code_of_run(out, start, args.steps)
        settings["skipped_shards"] = skipped_shards(out)
        write_whole(out / "config.json", json.dumps(settings, indent=2) + "\n")
        announce(args, start)
    return newest, start


def check_preset(args, *names):
    """The options that a preset leaves open must be given."""
    for name in names:
        require(getattr(args, name) is not None,
                f"--preset {args.preset} needs --{name.replace('_', '-')}; see --help")


def announce(args, start):
    """Say what a reader of the output would otherwise wonder about."""
    if start >= args.steps:
        longer = "more --steps, " if args.lr_schedule == "constant" else ""
        print(f"{args.out}: finished already at step {start}, nothing was trained; "
              f"to train, give {longer}another --out or remove the folder")
    elif 2 * args.warmup > args.steps:
        peak = max(rate_factor(step, args) for step in range(args.steps))
        print(f"note: --warmup {args.warmup} is more than half of {args.steps} steps; "
              f"the learning rate peaks at {peak:.0%} of --lr")


def code_of_run(out, start, steps):
    """What the run was made with so far, and the present sources if they train it now; says so
    if these are others. -> [{"from_step", "commit", "sources"}, ...]"""
    file, found = out / "config.json", []
    now = {"from_step": start} | state_of_code()
    if start > 0 and file.is_file():
        # an entry from here on trained nothing that was kept
        found = [one for one in read_json(file).get("code", []) if one["from_step"] < start]
        if not found:
            print(f"{out}: begun with other code, before its config.json kept which")
        elif found[-1]["sources"] != now["sources"]:
            was = found[-1]
            print(f"{out}: the code has changed since step {was['from_step']}: sources "
                  f"{was['sources']} (commit {was['commit']}), now {now['sources']} "
                  f"(commit {now['commit']})")
    trains = start < steps
    if trains and (not found or found[-1]["sources"] != now["sources"]):
        found = [*found, now]
    return found


def skipped_shards(out):
    file = out / "config.json"
    return read_json(file).get("skipped_shards", []) if file.is_file() else []


def record_skipped(args, skipped, start, rank):
    """Keep the names of the damaged shards that the run goes without in config.json. A run that
    goes on must go without the same ones: the order of samples hangs on them."""
    out, now = Path(args.out), sorted(skipped)
    before = skipped_shards(out)
    require(start == 0 or now == before,
            f"--out {out} was made without the damaged shards {before or 'none'}, now without "
            f"{now or 'none'}: the samples would come in another order; bring back the shards as "
            f"they were, or give another --out")
    if rank == 0:
        settings = read_json(out / "config.json") | {"skipped_shards": now}
        write_whole(out / "config.json", json.dumps(settings, indent=2) + "\n")


def state_of_code():
    """The commit, with "-dirty" if files differ from it, and a hash of the sources as they are:
    the .py files beside train.py and in support/."""
    sources = hashlib.sha256()
    for file in sorted([*ROOT.glob("*.py"), *ROOT.glob("support/*.py")]):
        sources.update(file.name.encode() + file.read_bytes())
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12",
               "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        commit = done.stdout.strip() or None
    except (OSError, subprocess.SubprocessError):  # no git, or no repository
        commit = None
    return {"commit": commit, "sources": sources.hexdigest()[:16]}


def same_options(folder, settings, may_change=(), defaults=None):
    """Refuse a folder whose config.json, if it has one, says that it was made otherwise.

    settings: {name: value} of now; may_change: names of those that need not agree; defaults: an
    object with the value of an option that the file, written before there was such an option,
    does not name."""
    file = Path(folder) / "config.json"
    before = read_json(file) if file.is_file() else settings
    changed = []
    for name, value in settings.items():
        was = before.get(name, getattr(defaults, name, None))
        if name not in may_change and was != value:
            changed.append(f"{name} {was} (now {value})")
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


def load_optimizer(optimizer, newest, device):
    """Give the optimizer the state that checkpoint `newest` holds; None: leave it new."""
    if newest:
        state = torch.load(newest / "optimizer.pt", map_location=device, weights_only=True)
        optimizer.load_state_dict(state)


class Log:
    """log.jsonl, one JSON object a line, the same in TensorBoard, and the progress bar. Every
    process calls it, the first one writes. rows: samples that a step takes, those of all
    processes; max_bad: the share of broken ones, counted in `broken`, that stops the run."""

    def __init__(self, out, start, steps, rows, rank, world=1, max_bad=1.0):
        self.file, self.rows, self.writes = out / "log.jsonl", rows, rank == 0
        self.broken = Broken(rows, max_bad, last_line(self.file, start), world)
        if self.writes and self.file.is_file():
            # drop what a killed run wrote after its last checkpoint; a kill may leave half a line
            lines = [line for line in self.file.read_text().splitlines() if line.endswith("}")]
            kept = [line + "\n" for line in lines if json.loads(line)["step"] <= start]
            write_whole(self.file, "".join(kept))
        self.progress = tqdm(total=steps, initial=start, disable=rank != 0, unit="step")
        self.clock, self.step = time.perf_counter(), start
        self.sums, self.counts = {}, {}
        self.board = None
        if self.writes and SummaryWriter:
            self.board = SummaryWriter(out / "tensorboard", purge_step=start + 1)

    def add(self, stats):
        """{name: tensor} of one step. They stay on the device: to read one is to wait for it."""
        for name, value in stats.items():
            self.sums[name] = self.sums.get(name, 0) + value
            self.counts[name] = self.counts.get(name, 0) + 1
        self.progress.update()

    def means(self, world):
        """-> {name: mean of what was added since the last call}, over all processes, on the CPU."""
        means = {name: total / self.counts[name] for name, total in self.sums.items()}
        average_over_processes(list(means.values()), world)
        self.sums, self.counts = {}, {}
        return {name: mean.cpu() for name, mean in means.items()}

    @contextlib.contextmanager
    def pause(self):
        """What is done inside (looking, saving) is no training and does not count as its time."""
        began = time.perf_counter()
        yield
        self.clock += time.perf_counter() - began

    def __call__(self, line, shown, remedy):
        """line: {"step": its number, name: number, or numbers by name}; the keys in `shown` go to
        the progress bar. -> the line with the speed since the last one. Raises InputError, with
        the remedy, if a number is not finite."""
        numbers = {name: value for name, value in line.items() if not isinstance(value, dict)}
        require(all(abs(value) < float("inf") for value in numbers.values()),
                f"step {line['step']}: loss or gradient is not finite ({numbers}); the last "
                f"checkpoint in {self.file.parent}/checkpoints is sound: {remedy}, "
                f"with another --out")
        seconds = (time.perf_counter() - self.clock) / (line["step"] - self.step)
        self.clock, self.step = time.perf_counter(), line["step"]
        line = line | {"seconds_per_step": round(seconds, 4),
                       "images_per_second": round(self.rows / seconds, 2)} | self.broken.gather()
        if self.writes:
            with open(self.file, "a") as file:
                file.write(json.dumps(line) + "\n")
        if self.board:
            for name, value in flat(line).items():
                self.board.add_scalar(name, value, line["step"])
        self.progress.set_postfix({key: f"{line[key]:.3f}" for key in shown if key in line})
        try:
            self.broken.check(line["step"])
        except InputError:
            self.progress.close()  # else the message stands behind the bar
            raise
        return line

    def close(self):
        self.progress.close()
        if self.writes and self.broken.counts:
            print(f"{self.broken}; others took their places")
        if self.board:
            self.board.close()


def last_line(file, step):
    """The line of log.jsonl at that step or the last one before it -> dict; {} if there is none."""
    if step == 0 or not file.is_file():
        return {}
    found = {}
    for text in file.read_text().splitlines():
        if text.endswith("}"):
            line = json.loads(text)
            if line["step"] <= step:
                found = line
    return found


def flat(line):
    """{"a": 1, "b": {"c": 2}} -> {"a": 1, "b/c": 2}"""
    found = {}
    for name, value in line.items():
        if isinstance(value, dict):
            found |= {f"{name}/{key}": part for key, part in value.items()}
        else:
            found[name] = value
    return found


def rate_factor(step, args):
    """The factor on the learning rate: a linear warm-up, then constant or a cosine down to 5%."""
    decay = 1.0
    if args.lr_schedule == "cosine":
        decay = 0.05 + 0.95 * (1 + math.cos(math.pi * step / args.steps)) / 2
    return min(1, (step + 1) / args.warmup) * decay
