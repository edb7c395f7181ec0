"""What a student is worth: a table of models on held-out prompts, results.json and grid.png.

    python evaluate.py                                        # the shipped student
    python evaluate.py --unet runs/pocket/unet_target         # yours, beside the recorded teacher

    # any rows: teachers and students at any steps, three training seeds as one row, pictures drawn
    # elsewhere, real pictures
    python evaluate.py --rows teacher@50 student@2 runs/a/unet_target@4 \\
        RG-LCM=runs/s0/unet_target+runs/s1/unet_target+runs/s2/unet_target@2 folder:pictures real

    # a published protocol (support/protocols.py), on all GPUs
    torchrun --nproc_per_node=8 evaluate.py --protocol hpsv2 --prompts benchmark/ --model MODEL \\
        --rows teacher@50 runs/sd21/unet_target@2 --guidance 7.5 --rewards hpsv2.1=FILE

    python evaluate.py --compare A/results.json B/results.json    # what moved beyond noise

Pictures are written once, so that the same command goes on where it was stopped. The reward is what
training maximised. The judge takes part in no training; the pocket's has seen the real held-out
pictures, so that it knows the answers. docs/evaluation.md says what each column is.
"""
import dataclasses
import datetime
import importlib.util
import platform
import re
import shlex
import sys
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch

from data import TRIES, Shards
from lcm_solver import lcm_timesteps
from pipeline import Pipeline, labelled_grid
from reward import REWARDS, load_reward, parse_spec
from support import cli, processes, protocols, results, scoring
from support.cli import POCKET, at_least, option, parse, require, run
from support.drawn import Drawn
from support.pictures import save_png, to_pil, to_tensor
from support.rows import REAL, Row, parse_row, unet_row
from support.scoring import Scorers, real_pictures
from support.shards import BadSample
from support.weights import InputError, find_component, parse_config, read_json
from unet import UNet

RESULTS = POCKET / "results.json"  # what build.py recorded: real pictures, teacher and plain LCM
SIDE, LIMIT, N = 64, 256, 4  # of the pocket's pictures, and of those recorded
PLAIN = "plain LCM, 2-step (recorded)"


@dataclass
class Config:
    rows: str | None = option(
        None, "the rows of the table, with commas or spaces between: teacher@STEPS, student@STEPS "
              "(of --model, --unet), PATH@STEPS (any UNet), NAME=PATH+PATH@STEPS (training seeds "
              "as one row), folder:PATH (pictures drawn elsewhere), real, round-trip (through the "
              "VAE); left out: --teacher-steps, --unet and --real choose them",
        several=True, group="what to compare")
    unet: str = option(str(POCKET / "student"), "the student")
    steps: int = option(2, "steps of the student")
    n: int | None = option(
        None, f"pictures per prompt, whose scores are averaged; left out: {N}, or what the "
              "protocol says")
    model: str = option(str(POCKET), "model folder with the teacher")
    teacher_steps: int = option(50, "DDIM steps of the teacher; 0: leave the teacher out")
    teacher_n: int = option(
        0, "pictures per prompt of the teacher, which is slow (4 for a fair comparison, since one "
           "is half luck); 0: its scores are those recorded in pocket/results.json, with four")
    guidance: float = option(3.0, "w of teacher and student: cond + w (cond - uncond)")
    real: bool = option(False, "also score the real pictures and their VAE round trip")
    against: str | None = option(
        None, "the row that the others' wins are against (left out: the teacher, else the first)")

    reward: str = option("pocket", "what training maximised (reward.py), or none",
                         group="by what")
    judge: str = option(
        str(POCKET / "judge"), "the judge, which takes part in no training: a folder of a CLIP "
                               "like pocket/judge, any reward (reward.py), or none")
    rewards: str | None = option(
        None, "other rewards (reward.py), with commas or spaces between; clipscore=FILE: CLIPScore "
              "by ViT-g-14", several=True)
    features: str = option(
        "judge", "of Frechet distance, recall and diversity: judge, inception or inception=FILE "
                 "(torch-fidelity), a CLIP (clip:MODEL:TAG=FILE), or none")

    protocol: str | None = option(
        None, "a published protocol, to the letter", choices=tuple(protocols.PROTOCOLS),
        group="on what")
    prompts: str | None = option(
        None, "prompts without pictures: .txt, .tsv, .json, .jsonl or a folder; of a protocol, the "
              "file or folder that its authors publish (support/protocols.py)")
    data: str = option(
        str(POCKET / "data" / "heldout-*.tar"), "shards with the prompts and real pictures")
    reference: str | None = option(
        None, "folder of real pictures that distances are to, for --prompts")
    limit: int | None = option(
        None, f"number of prompts (left out: {LIMIT} of shards, all of --prompts)")
    show: str = option(
        "0,1,2,3,4,5,6,7,8,9", "numbers of the prompts whose pictures grid.png shows")

    batch: int = option(64, "pictures at a time", group="the machine")
    device: str = option("auto", "auto, cpu or cuda")
    precision: str = option("auto", "arithmetic of the networks", choices=("auto", "bf16", "fp32"))
    pictures: str | None = option(
        None, "folder of the drawn pictures, which evaluations may share (left out: OUT/pictures)")
    out: str = option("runs/evaluation", "folder for results.json and grid.png")

    votes: str | None = option(
        None, "votes.json from the report's page: adds people's win rate", group="afterwards")
    compare: str | None = option(
        None, "two results.json: print what moved beyond noise, and do nothing else", several=True)


# ------------------------------------------------------------------------------------------- rows

def config_of(path):
    return parse_config(find_component(path, "unet"), UNet.Config)


def default_rows(args, student, record):
    """The rows where --rows names none, the student last."""
    rows = [Row(name, kind, n=1) for kind, name in REAL.items() if args.real]
    if args.teacher_steps:
        teacher = unet_row([args.model], args.teacher_steps, config_of, max(1, args.teacher_n),
                           kind="teacher")
        if "teacher" in record and not args.teacher_n:  # only what is shown has to be drawn
            teacher.record, teacher.kind = record["teacher"], "recorded"
        rows.append(teacher)
    if "plain" in record:
        rows.append(Row(record["plain"]["name"], "recorded", record=record["plain"]))
    return [*rows, student]


def recorded(args, prompts, side):
    """What of pocket/results.json may stand beside a comparison of pictures of that side. ->
    {"teacher": row of results.json, "plain": ...}, each only if made with the same options."""
    if not RESULTS.is_file() or len(prompts) != LIMIT or side != SIDE or args.prompts:
        return {}
    same = lambda *names: all(getattr(args, name) == getattr(Config, name) for name in names)
    record, found = read_json(RESULTS), {}
    if same("model", "data", "judge", "guidance", "teacher_steps"):
        for row in record.get("shipped", []):
            if row["name"].startswith("teacher, "):
                found["teacher"] = row | {"name": f"{row['name']} (recorded)"}
    if same("model", "data", "judge", "guidance", "steps") and args.n in (None, N) \
            and "plain" in record:
        found["plain"] = record["plain"] | {"name": PLAIN}
    for key, row in found.items():
        found[key] = row = results.modern(row) | {"kind": "recorded", "win": None, "votes": None}
        if args.reward != Config.reward:  # by which the recorded pictures were not scored
            row["summary"].pop("reward", None)
            row["scores"].pop("reward", None)
    return found


# ------------------------------------------------------------------------------------------- task

def load_task(args, side):
    """-> protocols.Task: the prompts, and what of real pictures there is, at `side` pixels."""
    if args.protocol:
        require(args.prompts, f"--protocol {args.protocol} needs --prompts: the file or folder of "
                "prompts that its authors publish (support/protocols.py)")
        return protocols.PROTOCOLS[args.protocol](args.prompts, args.limit, args.reference)
    if args.prompts:
        reference = protocols.pictures_in(args.reference) if args.reference else None
        prompts = protocols.read_prompts(args.prompts)[:args.limit]
        return protocols.Task(args.prompts, prompts, reference=reference)
    shards = Shards(args.data, side)
    require(not shards.encoded, f"{args.data}: the comparison needs pictures, not latents")
    numbers, prompts, limit = [], [], args.limit or LIMIT
    for i in range(min(len(shards), limit + TRIES)):
        try:
            prompts.append(shards[i][1])
            numbers.append(i)
        except BadSample as bad:
            require(i + 1 < len(shards) or prompts, str(bad))
        if len(prompts) == limit:
            break

    def real(chosen):
        return [to_pil(shards[numbers[i]][0] / 2 + 0.5) for i in chosen]
    return protocols.Task(args.data, prompts, real=real, n=N)


def numbers_to_show(args, count):
    """--show, for so many prompts -> numbers."""
    try:
        shown = [int(number) for number in args.show.split(",")]
    except ValueError:
        raise InputError(
            f"--show {args.show}: expected numbers of prompts, such as 0,3,17") from None
    if args.show == Config.show:
        shown = [i for i in shown if i < count]
    require(all(0 <= i < count for i in shown),
            f"--show {args.show}: expected numbers from 0 to {count - 1}")
    return shown


# ---------------------------------------------------------------------------------------- columns

def as_spec(judge):
    """--judge -> a reward's spec: a folder is that of a CLIP like pocket/judge."""
    try:
        parse_spec(judge)
        return judge
    except InputError:
        return judge if judge == "none" else f"pocket={judge}"


def load_scorer(spec, device):
    """A reward by its spec, or CLIPScore."""
    name, _, file = spec.partition("=")
    if name != "clipscore":
        return load_reward(spec, device)
    reward = load_reward(protocols.CLIPSCORE + (f"={file}" if file else ""), device)
    reward.encode = lambda prompts: reward.text_features(
        [protocols.DEPICTS + prompt for prompt in prompts])
    return reward


def specs_of(args, task):
    """-> {column: spec of a reward}"""
    found = {"reward": args.reward, "judge": as_spec(args.judge)}
    if args.protocol:  # the pocket's own mean nothing on its prompts
        found = {key: spec for key, spec in found.items()
                 if getattr(args, key) != getattr(Config, key)}
    found = {key: spec for key, spec in found.items() if spec != "none"}
    # a comma divides only where a known name follows: aesthetic takes two files
    names = "|".join(map(re.escape, [*REWARDS, "clipscore"]))
    others = re.split(rf",(?=(?:{names})(?:[:=*+]|$))", args.rewards) if args.rewards else []
    if task.rewards and not any(own_reward(task, spec) for spec in [*found.values(), *others]):
        others.append(task.rewards[0])
    for spec in others:
        name = spec if "+" in spec else spec.partition("=")[0]
        require(name not in found, f"--rewards {spec}: {name} stands there twice")
        found[name] = spec
    return found


def own_reward(task, spec):
    """Is this the reward that the protocol scores with?"""
    return spec.partition("=")[0] in task.rewards


def load_features(args, task, rewards, device):
    """-> function: images [B,3,H,W] in [0,1] -> features [B,D], or None; its spec"""
    spec = args.features
    if task.protocol and spec == Config.features:
        spec = task.features or "none"
    kind, _, file = spec.partition("=")
    if kind == "inception":
        return protocols.inception(file, device), spec
    if spec == "none":
        return None, spec
    network = rewards.get("judge") if spec == "judge" else load_reward(spec, device)
    features = getattr(network, "image_features", None)
    require(features or spec == "judge",
            f"--features {spec}: has no image features; expected a CLIP, such as clip:MODEL:TAG")
    return features, spec


# --------------------------------------------------------------------------------------- pictures

def reader(args, row, path, task, model, size):
    """-> what reads the pictures of one network or folder (support/scoring.py), and how many there
    are of each prompt."""
    store, n = Path(args.pictures or Path(args.out) / "pictures"), row.n or args.n
    if row.kind == "folder":
        found = protocols.find_drawn(path, task)
        return scoring.of_folder(found, task), min(n, len(found[0]))
    if row.kind in ("real", "round-trip"):
        change = model.round_trip if row.kind == "round-trip" else None
        return scoring.of_real(task, store / "real", change), 1
    unet = model.load_unet(path, student=row.kind == "student")
    solver = "lcm" if row.kind == "student" else "ddim"
    size = None if row.kind == "student" else size  # a student draws at its own
    facts = {"solver": solver, "steps": row.steps, "w": args.guidance, "size": size,
             "precision": str(model.dtype), "device": model.device.type,
             "config": dataclasses.asdict(unet.config), "schedule": str(model.schedule.config)}

    def draw(prompts, seeds):
        return model.draw(unet, prompts, seeds, row.steps, args.guidance, solver, size)
    drawn = Drawn(store, draw, (unet, model.vae, model.text_encoder), facts, path)
    return scoring.of_drawn(drawn, task), n


def measured(args, row, task, scorers, model, size, own, rank, world):
    """-> a row of results.json"""
    parts = []
    for path in row.paths:
        read, n = reader(args, row, path, task, model, size)
        parts.append(scoring.Measured(read, n, scorers, args.batch, rank, world, row.name))
        del read  # and its network
    seeds = None if row.kind in ("real", "round-trip") else [*range(n)] * len(parts)
    return {"name": row.name, "kind": row.kind, "steps": row.steps, "calls": row.calls(),
            "seeds": seeds} | scoring.joined(parts, scorers, own, Path(args.out))


def write_grid(args, found, task, rows, shown, model, size, file):
    """grid.png: the pictures of the prompts that are shown, a row a model."""
    lines = {"real": real_pictures(task, shown)} if task.real else {}
    for row, one in zip(rows, found):
        if row.kind == "recorded" and row.configs:  # the teacher, of which only these are drawn
            teacher = replace(row, kind="teacher")
            read, _ = reader(args, teacher, row.paths[0], task, model, size)
            lines[f"teacher\n{row.steps} steps"] = read(0, shown)[0]
        elif one["pictures"] and row.kind != "real" and (args.rows or row.configs):
            label = textwrap.fill(row.name, 24) if args.rows else f"{row.kind}\n{row.steps} steps"
            files = [file.parent / one["pictures"][i][0] for i in shown]
            lines[label] = scoring.pictures_of(files, task)
    if not shown or not lines:
        return
    captions, last = [task.prompts[i] for i in shown], list(lines.values())[-1][0].size
    tensors = [to_tensor(picture.resize(last)) for line in lines.values() for picture in line]
    sheet = labelled_grid(torch.stack(tensors), list(lines),
                          [caption.split(",")[0] for caption in captions],
                          scale=max(1, 128 // last[1]))
    save_png(sheet, file, prompts=" | ".join(captions))


# ----------------------------------------------------------------------------------- the command

def check(args):
    at_least(1, args, "batch")
    at_least(0, args, "teacher_n")
    for name in ("n", "limit"):
        if getattr(args, name) is not None:
            at_least(1, args, name)
    require(0 <= args.teacher_steps < 1000,
            f"--teacher-steps {args.teacher_steps}: expected 0 to 999")
    require(args.prompts is None or args.data == Config.data,
            "--prompts and --data: prompts without pictures or shards with them; give one")
    require(args.prompts or args.reference is None,
            "--reference is for --prompts; with --data the distances are to its own pictures")
    alone = ("steps", "teacher_steps", "teacher_n", "real")
    idle = [f"--{name.replace('_', '-')}" for name in alone
            if args.rows and getattr(args, name) != getattr(Config, name)]
    require(not idle, f"{', '.join(idle)} with --rows: the rows say that themselves, as in "
            "teacher@50 student@2 real")


def check_row(row, args, task, model):
    """Refuse what could not be measured, before any work."""
    require(row.kind not in ("real", "round-trip") or task.real,
            f"--rows {row.kind}: these prompts have no real pictures; expected shards (--data)")
    if row.kind == "folder":
        protocols.find_drawn(row.paths[0], task)
    for path, config in zip(row.paths, row.configs):
        model.check(SimpleNamespace(config=config), path, row.kind == "student")
        if row.kind == "student":
            lcm_timesteps(model.schedule, row.steps, config.lcm_grid or 50)
    require(row.kind != "teacher" or row.steps < len(model.schedule),
            f"{row.name}: expected 1 to {len(model.schedule) - 1} DDIM steps")


def prepare(args, model):
    """-> the rows, the task, (H, W) at which teachers draw, the options with n and against"""
    own = {"teacher": args.model, "student": args.unet}
    if args.rows:
        rows = [parse_row(text, own, config_of, args.n) for text in args.rows.split(",")]
    else:
        rows = [unet_row([args.unet], args.steps, config_of, args.n, kind="student")]
    configs = [row.configs[0] for row in rows if row.kind == "student"] or [config_of(args.model)]
    side = configs[0].sample_size * model.vae.factor
    task = load_task(args, side)
    require(task.prompts, f"{task.source}: no prompts")
    if not args.rows:
        rows = default_rows(args, rows[0], recorded(args, task.prompts, side))
    names = [row.name for row in rows]
    require(len(set(names)) == len(names),
            f"--rows: two are called {max(names, key=names.count)!r}; write NAME=... before one")
    for row in rows:
        check_row(row, args, task, model)
    texts = dict(zip((args.rows or "").split(","), names))  # a row may be named as in --rows
    args = replace(args, n=args.n or task.n, against=texts.get(args.against, args.against))
    voted = results.read_votes(args.votes)[0] if args.votes else ()
    for name in (args.against, *voted):
        require(name is None or name in names, f"no row is called {name!r}, which --against or "
                f"--votes names; the rows are {', '.join(names)}")
    return rows, task, (side, side), args


@torch.no_grad()
def compare(args, device, dtype, rank=0, world=1):
    """Draw, score, print the table and write results.json, grid.png and the report. -> rows of
    results.json"""
    check(args)
    out = cli.make_folder(args.out)
    model = Pipeline.from_pretrained(args.model, device, dtype)
    rows, task, size, args = prepare(args, model)
    shown = numbers_to_show(args, len(task.prompts))
    specs = specs_of(args, task)
    rewards = {key: load_scorer(spec, device) for key, spec in specs.items()}
    features, name = load_features(args, task, rewards, device)
    scorers = Scorers(task, rewards, features, model.round_trip, device)
    scorers.look_at_real(args.batch, rank, world)
    own = next((key for key, spec in specs.items() if own_reward(task, spec)), None)
    found = [row.record or measured(args, row, task, scorers, model, size, own, rank, world)
             for row in rows]
    document = {
        "version": results.VERSION, "command": shlex.join(sys.argv),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        # of a file of the project without its place on this machine: reports are published
        "protocol": task.name(), "source": task.source.removeprefix(f"{POCKET.parent}/"),
        "prompts": task.prompts,
        "columns": results.columns_of(found, specs, args.reward, name), "rows": found}
    results.add_wins(document, args.against, ("judge", own, *specs))
    if args.votes:
        results.add_votes(document, args.votes)
    if rank == 0:
        finish(args, document, task, rows, shown, model, size, out)
    return found


def finish(args, document, task, rows, shown, model, size, out):
    """Print the table and the differences; write what is written."""
    print(results.table(document))
    last = document["rows"][-1]
    for other in document["rows"][:-1]:
        if "judge" in last["scores"] and "judge" in other["scores"]:
            print(results.difference_line(last, other))
    if any(row["name"] == PLAIN for row in document["rows"]):
        print("plain LCM: `python train.py --reward none --out runs/plain` remakes it")
    if judge_is_reward(args):
        print("the judge is part of the reward that was maximised: its scores say nothing")
    if task.name() != task.protocol:
        print(f"{task.name()}: not comparable with published numbers")
    results.write(document, out / "results.json")
    write_grid(args, document["rows"], task, rows, shown, model, size, out / "grid.png")
    print(f"{out / 'grid.png'}\n{out / 'results.json'}")
    if task.write:
        protocols.write_layout(document["rows"], task, out)
    if importlib.util.find_spec("support.report"):
        from support import report
        try:
            report.write(document, out)
        except InputError as error:  # a package that it needs is not there
            print(f"no report: {error}")


def judge_is_reward(args):
    """Is the judge a part of the reward that was maximised?"""
    if "none" in (args.reward, args.judge):
        return False

    def parts(spec):
        return {(name, option, str(Path(path).resolve()) if path else path)
                for name, option, path, _ in parse_spec(spec)}
    return bool(parts(args.reward) & parts(as_spec(args.judge)))


def main():
    args = parse(Config(), __doc__)
    if args.compare:
        files = args.compare.split(",")
        require(len(files) == 2, f"--compare {args.compare}: expected two results.json")
        print("\n".join(results.compared(*files)))
        return
    rank, world, device, dtype = processes.setup(args)
    torch.set_float32_matmul_precision("highest")  # scores as published ones are computed
    compare(args, device, dtype, rank, world)
    processes.end(world, device)


if __name__ == "__main__":
    run(main)
