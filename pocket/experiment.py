"""How far a student can be pushed along a reward before it gets worse, by each path: on the pocket.

    # the pocket's reward; and the same without noise and blur in its training, as a third one
    python pocket/build.py --stages fragile --work runs/state
    python pocket/experiment.py --third pocket=runs/state/fragile
    # more paths at other scales, in the same tables
    python pocket/experiment.py --third pocket=runs/state/fragile --paths never-fitted,at-24 \\
        --scales 1
    # that other one is easier to exploit
    python pocket/experiment.py --expert pocket=runs/state/fragile --third pocket --paths direct \\
        --out runs/experiment-fragile
    # an expert without gradient, so through proxies alone
    python pocket/experiment.py --expert jpeg --third pocket --paths proxy --scales 0.5 \\
        --rm-tau 0.1 --rm-lr 3e-4 --out runs/experiment-jpeg

For each seed, students are distilled without reward, and by each path (PATHS) at several reward
scales, long and at a constant rate. They are measured on the way, so that each path has a curve
over the *amount of optimisation*, scale x steps. A path is told by what it reaches at its best, and
by how far it falls at four times the scale: to compare paths at equal reward would
punish the one that does not exploit it. All is told as the difference to plain distillation as long
and of the same seed, which sees the same pictures and noise. Each seed's best is where the *other*
seeds have theirs, so that it is not chosen for its own luck. Every step's gradient is shortened to
the same length, so at large scales the reward has nearly all of it, and more scale adds little.

Resumable: the same command goes on where it stopped. Given in several shells at once, each takes
runs that no other is at (on a CPU, one with OMP_NUM_THREADS=1 for each core is the fastest; a file
system without locks keeps no shell out). The tables and the figure have the runs of all commands
with the same --out. The pictures of every look are kept, 25 MB each by default, so other rewards
and judges need no other training, and the folders `references` and of the plain runs may be copied
to another experiment's --out.

The measures, on 2-step pictures of the held-out prompts with the same noise for every student:

    expert           what training maximises
    third            another reward (--third). Proxies have the text tower of the pocket's reward,
                     so for them that one is not a stranger
    judge            a CLIP that takes part in no training
    distance         Frechet distance of the judge's features from those of the real held-out
                     pictures; mean over rounds of one picture a prompt, because it falls with the
                     number of pictures
    recall           the share of real pictures that lie among the drawn ones, in the same features
    diversity        mean distance of two pictures of one prompt, in the same features
    high frequency   energy above half the Nyquist frequency relative to the same prompt's real
                     picture after the VAE's round trip, median
    roughness        how far neighbouring pixels differ, median over what is flat white in the real
                     picture, in units of 1/255
    follows          the share of pairs that the proxy ranked as the expert did, in the steps since
                     the last look
    generated        the share of pairs in which the expert preferred a generated picture to the
                     real one, in the same steps
"""
import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import io
import json
import math
import random
import re
import shutil
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

POCKET = Path(__file__).resolve().parent
HELDOUT = str(POCKET / "data/heldout-*.tar")
sys.path.insert(0, str(POCKET.parent))
from build import python, read_split, vary, warp
from data import Shards, add_pair
from pipeline import Pipeline, grid, save_png, to_pil
from reward import load_reward
from support.checkpoints import Busy, lock
from support.cli import (
    at_least,
    make_folder,
    option,
    parse,
    pick_device,
    pick_precision,
    positive,
    precision_name,
    require,
    run,
)
from support.drawn import draw_all
from support.metrics import covered, diversity, frechet_distance, high_frequency, roughness
from support.runs import same_options
from support.weights import WEIGHTS, read_json, whole_file, write_whole
from unet import UNet

# {what stands for its folder in PATHS: options of latent_rm.py} of proxies, which train beforehand
PROXIES = {
    "LATENT_RM": ["--text-tower", POCKET / "reward" / WEIGHTS, "--no-train-text"],
    "TEACHER_RM": ["--backbone", "teacher"],
}
# {path: options of train.py}
PROXY = ["--latent-rm", "LATENT_RM", "--rm-image-layers", 99, "--rm-text-layers", 0]
PATHS = {
    "direct": [],
    "proxy": PROXY,
    # preferences as in the published code: CLIP's own temperature, the real picture privileged
    "published": [*PROXY, "--rm-tau", 0.01, "--rm-tau-lrm", 0.01, "--rm-privileged"],
    "never-fitted": ["--latent-rm", "LATENT_RM", "--rm-image-layers", 0, "--rm-text-layers", 0],
    "features": ["--latent-rm", "TEACHER_RM", "--rm-image-layers", 99, "--rm-text-layers", 0],
    "at-32": ["--reward-resolution", 32],
    "at-24": ["--reward-resolution", 24],
    "jitter": ["--reward-jitter", 0.05],
    "weight-noise": ["--reward-weight-noise", 0.05],
    "pull": ["--teacher-pull", 1],
    "anchor": ["--anchor", 0.1],
}
SHARES = "follows", "generated"  # of pairs: what plain distillation has none of
KEYS = ("expert", "third", "judge", "distance", "recall", "diversity", "high frequency",
        "roughness", *SHARES)


@dataclass
class Config:
    expert: str = option(
        "pocket", "reward model that training maximises (reward.py)", group="the runs")
    paths: str = option("direct,proxy,published", f"some of {', '.join(PATHS)}")
    scale: float = option(0.5, "reward scale 1x")
    scales: str = option("1,8", "times that")
    seeds: int = option(3, "runs of each setting")
    looks: str = option("100,200,300", "steps at which students are measured; the last one ends")
    batch_size: int = option(16, "pictures a step, all rewarded")
    copies: int = option(2, "warped copies of each training picture for the proxies' pre-training")
    rm_steps: int = option(400, "steps of the proxies' pre-training")
    rm_batch: int = option(8, "rows a step that the expert compares")
    rm_lr: float = option(1e-4, "learning rate of a proxy while it follows the expert")
    rm_tau: float = option(0.05, "temperature of the expert's scores, where the path has none")
    judge: str = option(f"pocket={POCKET / 'judge'}", "another CLIP, which takes part in no "
                                                      "training", group="the pictures")
    third: str = option("none", "another reward, of which training knows nothing, or none")
    guidance: float = option(3.0, "w")
    limit: int = option(256, "number of prompts")
    n: int = option(2, "pictures per prompt")
    device: str = option("auto", "auto, cpu or cuda", group="the machine")
    precision: str = option("auto", "arithmetic of the trainings; pictures are drawn in float32",
                            choices=("auto", "bf16", "fp32"))
    out: str = option("runs/experiment", "folder for the runs, results.json, and the figures")


# What may differ when the command is repeated: the choice of runs, and who else measures them
MAY_CHANGE = {"paths", "scales", "seeds", "third", "judge", "device", "out"}


# ---------------------------------------------------------------- measures

class Measures:
    """Measures pictures for the held-out prompts against the real ones."""

    def __init__(self, args, rewards, device, dtype):
        """rewards: {"expert": ..., "third": ...}, from pictures and prompts to scores"""
        shards = Shards(HELDOUT, 64)
        real, prompts = zip(*shards.first(args.limit))
        self.args, self.prompts = args, list(prompts)
        self.real = torch.stack(real) / 2 + 0.5
        self.model = Pipeline.from_pretrained(str(POCKET), device, dtype)
        judge = load_reward(args.judge, device)
        require(hasattr(judge, "image_features"),
                f"--judge {args.judge}: has no image features for the Frechet distance; "
                "expected a CLIP, such as pocket=FOLDER")
        self.rewards = rewards | {"judge": judge}
        # changes with whoever measures; a change of how they do is not seen
        self.key = [args.expert, args.third, fingerprint(*self.rewards.values())]
        self.features = self.features_of(self.real)
        self.round_trip = self.model.round_trip(self.real)

    @torch.no_grad()
    def features_of(self, images):
        """The judge's unit features, [N,D] on the CPU."""
        judge, device = self.rewards["judge"], self.model.device
        return torch.cat([judge.image_features(part.to(device)).cpu() for part in images.split(64)])

    @torch.no_grad()
    def __call__(self, images):
        """n rounds of one picture per prompt, [n*N,3,H,W] in [0,1] -> {measure: number}"""
        n = len(images) // len(self.real)
        found = {}
        for name, reward in self.rewards.items():
            scores = [reward(part.to(self.model.device), self.prompts) for part in images.chunk(n)]
            found[name] = torch.cat(scores).mean().item()
        features = self.features_of(images).chunk(n)
        found["distance"] = sum(frechet_distance(part, self.features) for part in features) / n
        found["recall"] = sum(covered(self.features, by=part) for part in features) / n
        if n > 1:
            found["diversity"] = diversity(torch.stack(features, dim=1)).mean().item()
        frequencies = high_frequency(images) / high_frequency(self.round_trip).repeat(n)
        return found | {"high frequency": frequencies.median().item(),
                        "roughness": roughness(images, self.real)}

    def draw(self, folder, steps, solver, n):
        """n rounds of pictures by the UNet in `folder`, [n*N,3,64,64] in [0,1]."""
        unet = UNet.from_pretrained(folder, dtype=self.model.dtype, device=self.model.device)
        return draw_all(self.model, unet, self.prompts, steps, self.args.guidance, solver, 64, n)

    def references(self):
        """{name: images [N,3,H,W]}, one a prompt, among them what the noise measures are to catch
        and what they are not to reward."""
        noise = 0.02 * torch.randn(self.real.shape, generator=torch.Generator().manual_seed(0))
        blurred = F.avg_pool2d(F.pad(self.round_trip, (1, 1, 1, 1), "replicate"), 3, 1)
        return {
            "real pictures": self.real,
            "real, through the VAE": self.round_trip,
            "the same, with noise of 5/255": (self.round_trip + noise).clamp(0, 1),
            "the same, blurred": blurred,
            "teacher, 50-step DDIM": self.draw(POCKET, 50, "ddim", 1),
        }


# ---------------------------------------------------------------- runs

@contextlib.contextmanager
def alone(folder):
    """Make the folder and keep other shells out of it; raises Busy if one is at work there, or a
    training that has outlived its shell."""
    make_folder(folder)
    with lock(folder, ".claim"):
        lock(folder).close()
        yield folder


def warped_latents(folder, copies, *options):
    """Write `copies` warped versions of the training pictures into `folder`, each with a varied
    caption, and encode them with those options of data.py -> folder of the latents."""
    with alone(folder):
        if not (folder / "encoded/warped.tar").is_file():
            images, captions = read_split(POCKET, "train")
            generator, rng = torch.Generator().manual_seed(0), random.Random(0)
            with tarfile.open(folder / "warped.tar", "w") as tar:
                for copy in range(copies):
                    pairs = zip(warp(images, generator), vary(captions, rng))
                    for i, (image, caption) in enumerate(pairs):
                        png = io.BytesIO()
                        to_pil(image / 2 + 0.5).save(png, "PNG")
                        add_pair(tar, f"{copy}-{i}", "png", png.getvalue(), caption)
            python("data.py", "--data", folder / "warped.tar", "--out", folder / "encoded",
                   *options)
    return folder / "encoded"


def trained_proxy(kind, args, out, seed, common):
    """-> the run folder of a pre-trained proxy. kind: a key of PROXIES"""
    with alone(out / f"{kind.lower()}-{seed}") as folder:
        if not (folder / "latent_rm").is_dir():
            latents = warped_latents(out / "warped", args.copies, *common)
            python("latent_rm.py", "--data", latents, "--heldout", HELDOUT, "--out", folder,
                   "--steps", args.rm_steps, "--seed", seed, *PROXIES[kind], *common)
            require_trained(folder / "latent_rm")
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return folder


def require_trained(folder):
    require(folder.is_dir(), f"{folder} is not there: the training was stopped before its end; "
                             "repeat the command, which goes on")


def settings(args):
    """{name of a run: (path, reward scale, options of train.py)}, the plain one first."""
    runs = {"plain": ("plain", 0, ["--reward", "none"])}
    for path in args.paths.split(","):
        own = list(PATHS[path])
        if "--latent-rm" in own:
            own += ["--rm-lr", args.rm_lr, "--rm-batch", args.rm_batch]
            own += [] if "--rm-tau" in own else ["--rm-tau", args.rm_tau]
        for times in sorted(set(map(float, args.scales.split(",")))):
            scale = args.scale * times
            runs[f"{path} {times:g}x"] = path, scale, [
                "--reward", args.expert, "--reward-scale", scale, *own]
    return runs


def follows(folder, after, until):
    """The SHARES in the log's lines of these steps, if the run has a proxy."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    lines = [line for line in lines if after < line["step"] <= until and "rm_accuracy" in line]
    names = {"follows": "rm_accuracy", "generated": "expert/prefers_generated"} if lines else {}
    return {key: mean(lines, name) for key, name in names.items()}


def kept(file, key, make):
    """What the JSON file keeps, or make() if it keeps nothing or what was made with another key."""
    found = read_json(file) if file.is_file() else {}
    if found.get("with") != key:
        found = {"with": key, "found": make()}
        write_whole(file, json.dumps(found, indent=1))
    return found["found"]


def distil(folder, options, measures, looks, machine):
    """Train a student in `folder` with options of train.py, and keep its pictures at each look."""
    if not all(pictures_at(folder, step).is_file() for step in looks):
        python("train.py", "--out", folder, "--steps", looks[-1], "--checkpoint-every",
               math.gcd(*looks), "--keep", looks[-1], "--sample-every", looks[-1], *options,
               *machine)
        for step in looks:
            student = folder / f"checkpoints/step-{step:06d}/unet_target"
            require_trained(student)
            images = measures.draw(student, 2, "lcm", measures.args.n)
            save_png(grid(images[:12], 12), folder / "last.png")
            with whole_file(pictures_at(folder, step)) as new:
                torch.save(images, new)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # gigabytes, over all runs


def pictures_at(folder, step):
    return folder / f"pictures-{step:06d}.pt"


def made_with(folder, options, args):
    """Write down what the pictures in `folder` are made with, or refuse others. options: of
    train.py, but for those of the machine and with the names of PROXIES for their folders"""
    file = folder / "made-with.txt"
    now = (" ".join(map(str, options)) + f" ({args.n} x {args.limit} pictures, w {args.guidance:g},"
           f" {args.precision}, pocket {fingerprint()[:12]})")
    before = file.read_text() if file.is_file() else now
    require(before == now, f"{folder} is of a run with {before}, and now it would be with {now}; "
                           "remove the folder, or give another --out")
    write_whole(file, now)


def measured(folder, options, proxies, measures, machine=()):
    """-> {step: measures} of the student that these options of train.py make. proxies: {their name
    in the options: function that gives the folder}"""
    args, looks = measures.args, steps_of(measures.args)

    def measure():
        found = {}
        for before, step in zip([0, *looks], looks):
            images = torch.load(pictures_at(folder, step))
            found[step] = measures(images) | follows(folder, before, step)
        return found

    with alone(folder):
        made_with(folder, options, args)
        options = [proxies[word]() if word in proxies else word for word in options]
        distil(folder, options, measures, looks, machine)
        found = kept(folder / "looks.json", [*measures.key, looks], measure)
    return {int(step): row for step, row in found.items()}


def referred(folder, measures):
    """-> {name: measures} of pictures that no student drew."""
    file = folder / "pictures.pt"
    with alone(folder):
        made_with(folder, ["references"], measures.args)
        if not file.is_file():
            with whole_file(file) as new:
                torch.save(measures.references(), new)
        return kept(folder / "looks.json", measures.key, lambda: {
            name: measures(images) for name, images in torch.load(file).items()})


def done(jobs):
    """{key: function} -> {key: what it returns}. What another shell is at comes later."""
    found, left = {}, list(jobs)
    while left:
        for key in left:
            with contextlib.suppress(Busy):
                found[key] = jobs[key]()
        before, left = left, [key for key in left if key not in found]
        if left == before:
            time.sleep(20)
    return found


def all_runs(args, out, measures, machine):
    """Make and measure what is missing -> references, {name: {"path", "scale", "seeds": [looks of
    each]}}"""
    common = ["--lr-schedule", "constant", "--batch-size", args.batch_size, "--reward-batch",
              args.batch_size, "--no-evaluate"]
    runs, jobs = settings(args), {}
    for seed in range(args.seeds):
        proxies = {kind: functools.partial(trained_proxy, kind, args, out, seed, machine)
                   for kind in PROXIES}
        for name, (_, _, options) in runs.items():
            jobs[name, seed] = functools.partial(
                measured, out / f"{name.replace(' ', '-')}-{seed}",
                [*options, "--seed", seed, *common], proxies, measures, machine)
    jobs["references"] = functools.partial(referred, out / "references", measures)
    found = done(jobs)
    return found["references"], {
        name: {"path": path, "scale": scale,
               "seeds": [found[name, seed] for seed in range(args.seeds)]}
        for name, (path, scale, _) in runs.items()}


def with_earlier(file, references, results, key):
    """Add to the results those that earlier commands have put in the file, if the key is the same,
    and keep all there: so paths may be given other scales than other paths."""
    found = read_json(file) if file.is_file() else {}
    if found.get("with") == key:
        earlier = {name: run | {"seeds": [{int(step): row for step, row in seed.items()}
                                          for seed in run["seeds"]]}
                   for name, run in found["results"].items()}
        results = earlier | results
    write_whole(file, json.dumps(
        {"with": key, "references": references, "results": results}, indent=1))
    return results


def fingerprint(*networks):
    """Of the pocket's networks and of others, so that what was made with others is not taken for
    theirs."""
    digest = hashlib.sha256()
    for file in sorted([*POCKET.glob(f"*/{WEIGHTS}"), *POCKET.glob("*/model.safetensors")]):
        digest.update(file.read_bytes())
    for network in networks:
        for tensor in network.state_dict().values():
            digest.update(tensor.float().cpu().numpy().tobytes())
    return digest.hexdigest()


# ---------------------------------------------------------------- report

class Point(NamedTuple):
    """A reward scale, a number of steps, and the measures of each seed there."""
    scale: float
    step: int
    rows: list

    @property
    def amount(self):
        return self.scale * self.step


def curve(results, path):
    """results: {name: {"path", "scale", "seeds": [{step: measures}]}} -> a path's Points, from the
    least amount of optimisation to the greatest. The measures are differences to plain distillation
    as long, but "follows" and "generated"; those of plain are as they are."""
    plain, points = results["plain"]["seeds"], []
    for found in results.values():
        if found["path"] == path:
            for step in found["seeds"][0]:
                rows = [seed[step] for seed in found["seeds"]]
                if path != "plain":
                    rows = [less(row, bare[step]) for row, bare in zip(rows, plain)]
                points.append(Point(found["scale"], step, rows))
    return sorted(points, key=lambda point: (point.amount, point.step))


def curves(results):
    """-> {path: its curve} of all but plain."""
    paths = dict.fromkeys(found["path"] for found in results.values())
    return {path: curve(results, path) for path in paths if path != "plain"}


def less(row, plain):
    return {key: value - plain.get(key, 0) for key, value in row.items()}


def mean(rows, key):
    return sum(row[key] for row in rows) / len(rows)


def at_best(points):
    """What a path reaches. points: its curve -> for each seed a Point, the measures of the seed
    there, and what the judge's score changes by after as many steps at the least scale that is four
    times as large or more, or None if none was tried. The Point is the one that the judge likes
    best in the mean over the other seeds."""
    seeds, found = range(len(points[0].rows)), []
    for seed in seeds:
        others = [other for other in seeds if other != seed] or [seed]
        best = max(points,
                   key=lambda point: mean([point.rows[other] for other in others], "judge"))
        further = [point.rows[seed]["judge"] - best.rows[seed]["judge"] for point in points
                   if point.step == best.step and point.scale >= 4 * best.scale]
        found.append((best, best.rows[seed], further[0] if further else None))
    return found


# Student's t at 97.5%, for 2 values and more
T = 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262


def cell(values, sign=""):
    """Mean ± standard deviation of a list of numbers; of one the number, of none nothing.
    sign: "+" of differences, which get a star if 0 is outside the 95% interval of their mean."""
    values = torch.tensor(values, dtype=torch.float64)
    n = len(values)
    if n == 0:
        return ""
    text = f"{values.mean():{sign}.3f}"
    if n > 1:
        half = T[min(n, len(T) + 1) - 2] * values.std() / n**0.5
        text += f" ± {values.std():.3f}" + "*" * bool(sign and values.mean().abs() > half)
    return text


def cells(rows, keys, sign=""):
    """A cell for each of the keys, over rows of measures that may lack some."""
    return [cell([row[key] for row in rows if key in row], "" if key in SHARES else sign)
            for key in keys]


def table(rows, head):
    """Lines of Markdown. head: the titles of all columns but the first."""
    lines = ["| | " + " | ".join(head) + " |", "| --- " * (len(head) + 1) + "|"]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def report(references, results):
    """references: {name: measures} -> the tables, mean ± standard deviation over seeds."""
    points = curves(results)
    measured = {key for some in points.values() for point in some for key in point.rows[0]}
    keys = [key for key in KEYS if key in measured]
    body = [[name, *cells([row], keys)] for name, row in references.items()]
    body += [[f"plain, {point.step} steps", *cells(point.rows, keys)]
             for point in curve(results, "plain")]
    lines = [*table(body, keys), "", "Less plain distillation as long:", ""]
    body = [[path, f"{point.amount:g}", str(point.step), *cells(point.rows, keys, "+")]
            for path, some in points.items() for point in some]
    lines += [*table(body, ["scale x steps", "steps", *keys]), "",
              "At the judge's best; and what the judge's score changes by after as many steps at "
              "four times the scale or more (for how many seeds):", ""]
    body = []
    for path, some in points.items():
        places, rows, changes = zip(*at_best(some))
        changes = [change for change in changes if change is not None]
        body.append([path, " ".join(f"{point.amount:g}" for point in places),
                     *cells(rows, keys, "+"), f"{cell(changes, '+')} ({len(changes)})"])
    return "\n".join([*lines, *table(body, ["scale x steps", *keys, "pushed on"])])


def draw_curves(results, file):
    """The figure: judge, third reward, expert and distance over the amount of optimisation. One
    line for each reward scale, in the colour of its path."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    points = curves(results)
    measured = next(iter(points.values()))[0].rows[0]
    keys = [key for key in ("judge", "third", "expert", "distance") if key in measured]
    figure, axes = plt.subplots(1, len(keys), figsize=(3.4 * len(keys), 3.2), squeeze=False)
    for axis, key in zip(axes[0], keys):
        axis.axhline(0, color="0.6", linewidth=1)
        for number, (path, some) in enumerate(points.items()):
            scales = sorted({point.scale for point in some})
            for scale in scales:
                line = [point for point in some if point.scale == scale]
                # [points, seeds]
                values = torch.tensor([[row[key] for row in point.rows] for point in line])
                spread = values.std(dim=1) if values.shape[1] > 1 else torch.zeros(len(values))
                axis.errorbar([point.amount for point in line], values.mean(dim=1), spread,
                              color=f"C{number}", marker=".", capsize=2,
                              label=path if scale == scales[0] else None)
        axis.set(title=f"{key}, less plain's", xlabel="reward scale x steps", xscale="log")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def steps_of(args):
    return sorted({int(look) for look in args.looks.split(",")})


def check(args):
    at_least(1, args, "seeds", "copies", "rm_steps", "rm_batch", "n")
    at_least(2, args, "batch_size")
    at_least(5, args, "limit")  # recall is about third neighbours
    positive(args, "rm_lr", "rm_tau", "scale")
    require(re.fullmatch(r"\d*\.?\d+(,\d*\.?\d+)*", args.scales)
            and min(map(float, args.scales.split(","))) > 0,
            f"--scales {args.scales}: expected numbers above 0, such as 1,8")
    require(re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", args.looks)
            and steps_of(args)[-1] <= 20 * math.gcd(*steps_of(args)),
            f"--looks {args.looks}: expected steps such as 100,200,300, whose common divisor, the "
            "steps between two checkpoints, is a twentieth of the last or more")
    require(importlib.util.find_spec("matplotlib"),
            "the figure needs matplotlib: pip install 'rg-lcd[evaluate]'")
    unknown = [path for path in args.paths.split(",") if path not in PATHS]
    require(not unknown, f"--paths {args.paths}: {', '.join(unknown)} unknown; "
                         f"expected some of {', '.join(PATHS)}")
    require(args.expert != "none", "--expert none: expected a reward model (reward.py)")


def load_rewards(args, device):
    """{"expert": ..., "third": ...}; refuses paths that the expert cannot go."""
    expert = load_reward(args.expert, device)
    blocked = [path for path in args.paths.split(",") if "--latent-rm" not in PATHS[path]]
    require(expert.differentiable or not blocked,
            f"--expert {args.expert}: gives no gradient; --paths {','.join(blocked)} follow it, "
            "give paths through a proxy alone")
    require(any(True for _ in expert.parameters()) or "weight-noise" not in args.paths.split(","),
            f"--expert {args.expert}: has no weights; leave weight-noise out of --paths")
    third = {} if args.third == "none" else {"third": load_reward(args.third, device)}
    return {"expert": expert} | third


def chosen_precision(args, out, device):
    """Its name. What "auto" chose, by a timing, is kept when the runs go on."""
    before = out / "config.json"
    if args.precision == "auto" and before.is_file():
        return read_json(before)["precision"]
    return precision_name(pick_precision(args.precision, device))


def record(args, out, expert):
    """Write down what the runs in `out` are made with, or refuse a folder that holds others."""
    made_with = dataclasses.asdict(args) | {"pocket": fingerprint(expert)}
    for name in ("expert", "third", "judge"):  # the same in any checkout
        made_with[name] = made_with[name].replace(f"{POCKET.parent}/", "")
    same_options(out, made_with, MAY_CHANGE)
    write_whole(out / "config.json", json.dumps(made_with, indent=2) + "\n")


def main():
    args = parse(Config(), __doc__)
    check(args)
    device = pick_device(args.device)
    rewards = load_rewards(args, device)
    out = make_folder(args.out).resolve()
    args.precision = chosen_precision(args, out, device)
    # in float32, because bf16's steps near white would hide roughness
    measures = Measures(args, rewards, device, torch.float32)
    record(args, out, rewards["expert"])

    references, results = all_runs(
        args, out, measures, ["--device", args.device, "--precision", args.precision])
    results = with_earlier(out / "results.json", references, results,
                           [*measures.key, steps_of(args), args.seeds])
    print(report(references, results))
    draw_curves(results, out / "curves.png")
    print(f"\n{out / 'curves.png'}  {out / 'results.json'}")


if __name__ == "__main__":
    run(main)
