"""A training run: its options, processes and folder. What train.py and latent_rm.py share.

A run is resumed by the command that began it. Its folder holds config.json, log.jsonl, checkpoints/
and, in the end, the networks.
"""
import contextlib
import dataclasses
import hashlib
import json
import math
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from support.broken import Broken
from support.checkpoints import Checkpoints, checkpoints, lock, newest_sound
from support.cli import make_folder, option, require
from support.processes import average, gather
from support.shards import changed
from support.weights import InputError, read_json, write_whole

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
    compile: bool = option(
        False, "torch.compile the networks: minutes before the first step, faster ones after")
    workers: int = option(0, "data loading processes")
    caption_lines: bool = option(
        False, "a caption file holds one caption a line, of which one is drawn", group=DATA)
    max_bad: float = option(
        0.01, "share of broken samples at which the run stops; before, others take their places")
    skip_bad_shards: bool = option(False, "go on without damaged tars (config.json names them)")
    cache: str | None = option(
        None, "folder for copies of remote shards; left out, in the cache folder of the user")
    cache_gb: float = option(20.0, "how much that folder holds at most")
    max_bad_steps: int = option(
        10, "steps in a row at which the run stops because their losses or gradients were not "
            "finite; such steps are skipped", group=TRAINING)
    checkpoint_every: int = option(200, "steps between checkpoints", group=LOOKING)
    keep: int = option(2, "checkpoints kept")
    wandb: str | None = option(
        None, "project of Weights & Biases that gets what log.jsonl gets (the extra `wandb`)")


# What may be given otherwise when a run is resumed
MAY_CHANGE = {"preset", "out", "checkpoint_every", "log_every", "norms_every", "sample_every",
              "keep", "workers", "device", "compile", "evaluate", "heldout_every", "max_bad",
              "max_bad_steps", "skip_bad_shards", "wandb", "shard", "cache", "cache_gb",
              "judge", "judge_every", "judge_prompts"}
# and what may if each step takes as many pictures as before, and rewards as many
SPREAD = {"batch_size", "grad_accum", "processes", "reward_batch", "rm_batch"}


# ---------------------------------------------------------------------------------- the run folder

def open_run(args, rank, world):
    """Make the run folder, or check that the run found there was started with the same options.

    config.json keeps the options, the number of processes, and under "code" what the run was made
    with: one entry for each state of the sources, with the step from which on it trained.
    -> Checkpoints, which know the one to go on from"""
    out, settings = Path(args.out), dataclasses.asdict(args) | {"processes": world}
    if rank == 0:
        make_folder(out / "checkpoints")
    run = Checkpoints(out, args.keep, rank, world, lock(out) if rank == 0 else None)
    with contextlib.ExitStack() as on_error:
        on_error.push(run)
        if rank == 0:
            # left over from a save or a removal that a kill cut short
            for left in (out / "checkpoints").glob(".step-*"):
                shutil.rmtree(left, ignore_errors=True)
        if checkpoints(out):
            # under a cosine the number of steps shapes every rate; a constant rate may go on longer
            longer = {"steps"} if args.lr_schedule == "constant" else set()
            same_options(out, settings, MAY_CHANGE | longer | spread_differently(out, settings),
                         defaults=type(args)())
        run.go_on_from(newest_sound(out) if rank == 0 else None)
        if rank == 0:
            settings["code"] = code_of_run(out, run.start, args.steps)
            settings |= {name: kept(out, name) for name in ("skipped_shards", "shards")}
            write_whole(out / "config.json", json.dumps(settings, indent=2) + "\n")
            announce(args, run.start)
        on_error.pop_all()
    return run


def spread_differently(out, settings):
    """The options that may change because a step takes the same pictures all the same, by another
    number of processes or passes, and rewards as many of them. Or none."""
    file = out / "config.json"
    before = read_json(file) if file.is_file() else settings
    totals = []
    for run in (before, settings):
        passes = run.get("grad_accum", 1) * run.get("processes", 1)
        rows = run.get("batch_size", 1)  # of a pass
        used = [min(rows, run.get(name, rows)) for name in ("reward_batch", "rm_batch")]
        totals.append([passes * count for count in (rows, *used)])
    return SPREAD if totals[0] == totals[1] else set()


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


def kept(out, name):
    """A field of config.json, or None."""
    file = out / "config.json"
    return read_json(file).get(name) if file.is_file() else None


def record_data(args, shards, start, rank):
    """Keep in config.json what tells the shards from others, and which damaged ones the run goes
    without. A run that goes on must find the same: the order of samples hangs on them."""
    out, now, skipped = Path(args.out), shards.record(), sorted(shards.skipped)
    before, skipped_before = kept(out, "shards"), kept(out, "skipped_shards")
    if start > 0:
        differ = [] if before is None else changed(before, now)
        if skipped_before is not None and skipped != skipped_before:
            differ.append(f"without the damaged shards {skipped_before or 'none'} before, without "
                          f"{skipped or 'none'} now")
        require(not differ,
                f"--out {out}: begun with other shards: {'; '.join(differ[:4])}; the samples would "
                f"come in another order; bring back the shards as they were, or give another --out")
    if rank == 0:
        settings = read_json(out / "config.json") | {"skipped_shards": skipped, "shards": now}
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


class Log:
    """log.jsonl, one JSON object a line, the same in TensorBoard and Weights & Biases, and the
    progress bar. Every process calls it, the first one writes. rows: samples that a step takes,
    those of all processes; peak_step: seconds that one would take at the card's peak, or None."""

    def __init__(self, args, start, rows, rank, world=1, peak_step=None):
        out = Path(args.out)
        self.file, self.rows, self.writes, self.world = out / "log.jsonl", rows, rank == 0, world
        self.broken = Broken(rows, args.max_bad, last_line(self.file, start), world)
        if self.writes and self.file.is_file():
            # drop what a killed run wrote after its last checkpoint; a kill may leave half a line
            lines = [line for line in self.file.read_text().splitlines() if line.endswith("}")]
            kept = [line + "\n" for line in lines if json.loads(line)["step"] <= start]
            write_whole(self.file, "".join(kept))
        self.progress = tqdm(total=args.steps, initial=start, disable=rank != 0, unit="step")
        self.clock, self.step, self.peak_step = time.perf_counter(), start, peak_step
        self.sums, self.counts = {}, {}
        self.bad_steps, self.max_bad_steps = 0, args.max_bad_steps
        self.board = self.wandb = None
        if self.writes and SummaryWriter:
            self.board = SummaryWriter(out / "tensorboard", purge_step=start + 1)
        if self.writes and args.wandb is not None:
            self.wandb = open_wandb(args)

    def add(self, stats):
        """{name: tensor} of one step. They stay on the device: to read one is to wait for it."""
        for name, value in stats.items():
            self.sums[name] = self.sums.get(name, 0) + value
            self.counts[name] = self.counts.get(name, 0) + 1
        self.bad_steps = 0
        self.progress.update()

    def skip(self, step, samples, remedy):
        """A step that was skipped, since its loss or gradient was not finite, with the names of its
        samples. Raises InputError, with the remedy, if too many come in a row."""
        samples = sum(gather(samples, self.world), [])
        self.bad_steps += 1
        self.progress.update()
        if self.writes:
            self.write({"step": step, "skipped": samples})
            tqdm.write(f"step {step} skipped: its loss or gradient is not finite; its samples: "
                       f"{', '.join(samples[:4])}{', ...' if len(samples) > 4 else ''} (all of "
                       f"them in {self.file.name})")
        if self.bad_steps >= self.max_bad_steps:
            self.progress.close()
            raise InputError(
                f"step {step}: loss or gradient not finite in {self.bad_steps} steps in a row "
                f"(--max-bad-steps); the last checkpoint in {self.file.parent}/checkpoints is "
                f"sound: {remedy}, with another --out")

    def means(self, world):
        """-> {name: mean of what was added since the last call}, over all processes, on the CPU."""
        means = {name: total / self.counts[name] for name, total in self.sums.items()}
        average(list(means.values()), world)
        self.sums, self.counts = {}, {}
        return {name: mean.cpu() for name, mean in means.items()}

    @contextlib.contextmanager
    def pause(self):
        """What is done inside (looking, saving) is no training and does not count as its time."""
        began = time.perf_counter()
        yield
        self.clock += time.perf_counter() - began

    def __call__(self, line, shown):
        """line: {"step": its number, name: number, or numbers by name}; the keys in `shown` go to
        the progress bar. -> the line with the speed since the last one"""
        seconds = (time.perf_counter() - self.clock) / (line["step"] - self.step)
        self.clock, self.step = time.perf_counter(), line["step"]
        line = line | {"seconds_per_step": round(seconds, 4),
                       "images_per_second": round(self.rows / seconds, 2)}
        if self.peak_step:
            line["share_of_peak"] = round(self.peak_step / seconds, 4)
        line |= self.broken.gather()
        if self.writes:
            self.write(line)
        for name, value in flat(line).items():
            if self.board:
                self.board.add_scalar(name, value, line["step"])
        if self.wandb:
            self.wandb.log(flat(line), step=line["step"])
        self.show(line, shown)
        try:
            self.broken.check(line["step"])
        except InputError:
            self.progress.close()  # else the message stands behind the bar
            raise
        return line

    def write(self, line):
        with open(self.file, "a") as file:
            file.write(json.dumps(line) + "\n")

    def show(self, line, names):
        shown = {name: f"{line[name]:.3f}" for name in names if name in line}
        shown |= {"lr": f"{line['lr']:.1e}", "img/s": f"{line['images_per_second']:.1f}"}
        if "share_of_peak" in line:
            shown["peak"] = f"{line['share_of_peak']:.0%}"
        if torch.cuda.is_available():
            shown["GB"] = f"{torch.cuda.max_memory_allocated() / 1e9:.1f}"
        self.progress.set_postfix(shown)

    def close(self):
        self.progress.close()
        if self.writes and self.broken.counts:
            print(f"{self.broken}; others took their places")
        if self.board:
            self.board.close()
        if self.wandb:
            self.wandb.finish()


def open_wandb(args):
    """A run of Weights & Biases, the same one when the training is resumed."""
    try:
        import wandb
    except ImportError:
        raise InputError("--wandb needs the package wandb: pip install 'rg-lcd[wandb]'") from None
    file = Path(args.out) / "wandb-id"
    if not file.is_file():
        write_whole(file, wandb.util.generate_id())
    return wandb.init(project=args.wandb, name=Path(args.out).name, id=file.read_text(),
                      dir=args.out, resume="allow", config=dataclasses.asdict(args))


def last_line(file, step):
    """The line of log.jsonl at that step or the last one before it -> dict; {} if there is none."""
    if step == 0 or not file.is_file():
        return {}
    found = {}
    for text in file.read_text().splitlines():
        if text.endswith("}"):
            line = json.loads(text)
            if line["step"] <= step and "skipped" not in line:
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
