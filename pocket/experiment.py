"""What too much reward does to pictures, and what the latent proxy reward model (LRM) changes, on
the pocket.

    python pocket/experiment.py    # then the tables and the grid; 1.5 hours on 2 cores
    python pocket/experiment.py --steps 450 --lr-schedule constant --scales 0.25,1,4 \\
        --out runs/experiment-long
    # an expert without gradient, so through the LRM alone
    python pocket/experiment.py --expert jpeg --out runs/experiment-jpeg

For each seed an LRM is pre-trained with the pocket reward's text tower, on warped training pictures
with varied captions. Students are then distilled without reward, with direct reward and through the
LRM at four reward scales, and through an LRM that is never fitted to the expert. Runs of one seed
see the same pictures and noise for the same number of steps. Resumable: the same command goes on
where it stopped.

The measures, on 2-step pictures of the held-out prompts with the same noise for every student:

    expert           what training maximises
    judge            what no training has seen
    distance         Frechet distance of the judge's features from those of the real held-out
                     pictures; mean over rounds of one picture a prompt, because it falls with the
                     number of pictures
    high frequency   energy above half the Nyquist frequency relative to the same prompt's real
                     picture after the VAE's round trip, median
    roughness        how far neighbouring pixels differ, median over what is flat white in the real
                     picture, in units of 1/255
    follows          the share of pairs that the LRM ranked as the expert did, in the logged steps
                     of the training's second half
"""
import dataclasses
import hashlib
import io
import json
import random
import re
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

POCKET = Path(__file__).resolve().parent
HELDOUT = str(POCKET / "data/heldout-*.tar")
sys.path.insert(0, str(POCKET.parent))
from build import python, read_split, vary, warp
from data import Shards, add_pair
from pipeline import Pipeline, grid, save_png, to_pil
from reward import load_reward
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
from support.metrics import frechet_distance, high_frequency, roughness
from support.runs import same_options
from support.weights import WEIGHTS, write_whole
from unet import UNet


@dataclass
class Config:
    expert: str = option(
        "pocket", "reward model that training maximises (reward.py)", group="the runs")
    judge: str = option(f"pocket={POCKET / 'judge'}", "another CLIP, that no training sees")
    scale: float = option(0.5, "reward scale 1x")
    scales: str = option("0.25,1,4,16", "times that")
    seeds: int = option(3, "runs of each setting")
    steps: int = option(150, "optimizer steps of a run")
    lr_schedule: str = option("cosine", "of the runs, after the warm-up",
                              choices=("constant", "cosine"))
    batch_size: int = option(16, "pictures a step, all rewarded")
    copies: int = option(8, "warped copies of each training picture for the LRM's pre-training")
    rm_steps: int = option(400, "steps of the LRM's pre-training")
    rm_batch: int = option(8, "rows a step that the expert compares")
    rm_lr: float = option(1e-4, "learning rate of the LRM while it follows the expert, "
                                "with all blocks of its image tower")
    rm_tau: float = option(0.05, "temperature of the expert's scores")
    guidance: float = option(3.0, "w of the pictures", group="the pictures")
    limit: int = option(256, "number of prompts")
    n: int = option(2, "pictures per prompt")
    device: str = option("auto", "auto, cpu or cuda", group="the machine")
    precision: str = option("auto", "arithmetic of the trainings; pictures are drawn in float32",
                            choices=("auto", "bf16", "fp32"))
    out: str = option("runs/experiment", "folder for the runs, results.json and grid.png")


# What may differ when the command is repeated: the choice of runs, and how they are measured
MAY_CHANGE = {"scales", "seeds", "judge", "guidance", "limit", "n", "device", "out"}


# ---------------------------------------------------------------- measures

class Measures:
    """Measures pictures for the held-out prompts against the real ones."""

    def __init__(self, args, expert, device, dtype):
        shards = Shards(HELDOUT, 64)
        pairs = shards.first(args.limit)
        real, prompts = zip(*pairs)
        self.args, self.expert, self.prompts = args, expert, list(prompts)
        self.real = torch.stack(real) / 2 + 0.5
        self.model = Pipeline.from_pretrained(str(POCKET), device, dtype)
        self.judge = load_reward(args.judge, device)
        require(hasattr(self.judge, "image_features"),
                f"--judge {args.judge}: has no image features for the Frechet distance; "
                "expected a CLIP, such as pocket=FOLDER")
        self.features = self.features_of(self.real)
        self.round_trip = self.model.round_trip(self.real)

    @torch.no_grad()
    def features_of(self, images):
        """The judge's unit features, [N,D] on the CPU."""
        device = self.model.device
        features = [self.judge.image_features(part.to(device)) for part in images.split(64)]
        return torch.cat(features).cpu()

    def score(self, rewarder, images):
        """Mean score of n rounds of one picture per prompt."""
        rounds = images.chunk(len(images) // len(self.real))
        scores = [rewarder(part.to(self.model.device), self.prompts) for part in rounds]
        return torch.cat(scores).mean().item()

    @torch.no_grad()
    def __call__(self, images):
        """n rounds of one picture per prompt, [n*N,3,H,W] in [0,1] -> {measure: number}"""
        n = len(images) // len(self.real)
        features = self.features_of(images).chunk(n)
        distances = [frechet_distance(part, self.features) for part in features]
        frequencies = high_frequency(images) / high_frequency(self.round_trip).repeat(n)
        return {
            "expert": self.score(self.expert, images),
            "judge": self.score(self.judge, images),
            "distance": sum(distances) / n,
            "high frequency": frequencies.median().item(),
            "roughness": roughness(images, self.real),
        }

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

def warped_latents(folder, copies, *options):
    """Write `copies` warped versions of the training pictures into `folder`, each with a varied
    caption, and encode them with those options of data.py -> folder of the latents."""
    if not (folder / "encoded/warped.tar").is_file():
        images, captions = read_split(POCKET, "train")
        generator, rng = torch.Generator().manual_seed(0), random.Random(0)
        with tarfile.open(make_folder(folder) / "warped.tar", "w") as tar:
            for copy in range(copies):
                pairs = zip(warp(images, generator), vary(captions, rng))
                for i, (image, caption) in enumerate(pairs):
                    png = io.BytesIO()
                    to_pil(image / 2 + 0.5).save(png, "PNG")
                    add_pair(tar, f"{copy}-{i}", "png", png.getvalue(), caption)
        python("data.py", "--data", folder / "warped.tar", "--out", folder / "encoded", *options)
    return folder / "encoded"


def settings(args, latent_rm, differentiable):
    """{name: options of train.py}. latent_rm: the run folder of its pre-training."""
    def rewarded(times, *options):
        return ["--reward", args.expert, "--reward-scale", args.scale * float(times), *options]

    def proxied(times, layers):
        return rewarded(times, "--latent-rm", latent_rm, "--rm-lr", args.rm_lr,
                        "--rm-tau", args.rm_tau, "--rm-batch", args.rm_batch,
                        "--rm-image-layers", layers, "--rm-text-layers", 0)

    every = 99  # more layers than any LRM here has
    scales = sorted(args.scales.split(","), key=float)
    runs = {"plain": ["--reward", "none"]}
    if differentiable:
        runs |= {f"direct {times}x": rewarded(times) for times in scales}
    runs |= {f"LRM {times}x": proxied(times, every) for times in scales}
    return runs | {f"LRM {scales[-1]}x, never fitted": proxied(scales[-1], 0)}


def follows(folder):
    """The LRM's agreement with the expert in the second half of a run's log, if it has an LRM."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    second_half = lines[len(lines) // 2:]
    shares = [line["rm_accuracy"] for line in second_half if "rm_accuracy" in line]
    return {"follows": sum(shares) / len(shares)} if shares else {}


def fingerprint():
    """Of the pocket's networks, so that runs from one edition are not taken for those from
    another."""
    digest = hashlib.sha256()
    for file in sorted([*POCKET.glob(f"*/{WEIGHTS}"), *POCKET.glob("*/model.safetensors")]):
        digest.update(file.read_bytes())
    return digest.hexdigest()


# ---------------------------------------------------------------- report

def at_equal_reward(results, name, key):
    """For each seed of the LRM setting `name`: its measure `key` minus that of direct reward at the
    same expert's score -> list, without the seeds whose score the direct runs do not reach.

    Direct reward's measure is read off the line through that seed's direct runs, from plain to the
    scale with the best score. Beyond that one, more scale only harms."""
    direct = [rows for other, rows in results.items()  # by scale
              if other == "plain" or other.startswith("direct")]
    differences = []
    for seed, row in enumerate(results[name]):
        curve = [rows[seed] for rows in direct]
        best = max(range(len(curve)), key=lambda i: curve[i]["expert"])
        for low, high in zip(curve[:best], curve[1:best + 1]):
            if low["expert"] <= row["expert"] <= high["expert"]:
                share = (row["expert"] - low["expert"]) / (high["expert"] - low["expert"])
                differences.append(row[key] - low[key] - share * (high[key] - low[key]))
                break
    return differences


def cell(values, sign=""):
    """Mean ± standard deviation of a list of numbers; of one the number, of none nothing."""
    values = torch.tensor(values, dtype=torch.float64)
    if not len(values):
        return ""
    spread = f" ± {values.std():.3f}" if len(values) > 1 else ""
    return f"{values.mean():{sign}.3f}" + spread


def table(rows, head):
    """Lines of Markdown. head: the titles of all columns but the first."""
    lines = ["| | " + " | ".join(head) + " |", "| --- " * (len(head) + 1) + "|"]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def report(references, results):
    """{name: one dict of measures a seed}, twice -> the tables, mean ± standard deviation over
    seeds."""
    keys = ["expert", "judge", "distance", "high frequency", "roughness", "follows"]
    body = []
    for name, rows in (references | results).items():
        body.append([name, *(cell([row[key] for row in rows if key in row]) for key in keys)])
    lines = table(body, keys)
    if any(name.startswith("direct") for name in results):
        compared = keys[1:5]  # not the expert's score, which is held equal, nor what only LRMs have
        body = []
        for name in results:
            if name.startswith("LRM"):
                row = [at_equal_reward(results, name, key) for key in compared]
                body.append([name, *(cell(found, "+") for found in row), str(len(row[0]))])
        title = ("At the same expert's score, LRM minus direct, "
                 "of the seeds in which direct runs come to that score:")
        lines += ["", title, "", *table(body, [*compared, "seeds"])]
    return "\n".join(lines)


def check(args):
    at_least(1, args, "seeds", "steps", "copies", "rm_steps", "rm_batch", "n")
    at_least(2, args, "limit", "batch_size")
    positive(args, "rm_lr", "rm_tau")
    require(re.fullmatch(r"\d*\.?\d+(,\d*\.?\d+)*", args.scales),
            f"--scales {args.scales}: expected numbers such as 1,4,16")
    require(args.expert != "none", "--expert none: expected a reward model (reward.py)")


def record(args, out):
    """Write down what the runs in `out` are made with, or refuse a folder that holds others."""
    expert = args.expert.replace(f"{POCKET.parent}/", "")  # the same in any checkout
    made_with = dataclasses.asdict(args) | {"expert": expert, "pocket": fingerprint()}
    same_options(out, made_with, MAY_CHANGE)
    write_whole(out / "config.json", json.dumps(made_with, indent=2) + "\n")


def main():
    args = parse(Config(), __doc__)
    check(args)
    device = pick_device(args.device)
    # what "auto" chose is kept when the runs go on elsewhere
    args.precision = precision_name(pick_precision(args.precision, device))
    expert = load_reward(args.expert, device)
    out = make_folder(args.out)
    common = ["--device", args.device, "--precision", args.precision]
    # in float32, because bf16's steps near white would hide roughness
    measures = Measures(args, expert, device, torch.float32)
    record(args, out)

    results, rows = {}, [measures.round_trip[:12]]
    for seed in range(args.seeds):
        latent_rm = out / f"latent_rm-seed{seed}"
        if not (latent_rm / "latent_rm").is_dir():
            latents = warped_latents(out / "warped", args.copies, *common)
            python("latent_rm.py", "--data", latents, "--heldout", HELDOUT, "--out", latent_rm,
                   "--steps", args.rm_steps, "--seed", seed,
                   "--text-tower", POCKET / "reward" / WEIGHTS, "--no-train-text", *common)
        for name, options in settings(args, latent_rm, expert.differentiable).items():
            folder = out / f"{name.replace(',', '').replace(' ', '-')}-seed{seed}"
            if not (folder / "unet_target").is_dir():
                python("train.py", "--out", folder, "--steps", args.steps,
                       "--lr-schedule", args.lr_schedule, "--batch-size", args.batch_size,
                       "--reward-batch", args.batch_size, "--seed", seed, "--no-evaluate",
                       *common, *options)
            images = measures.draw(folder / "unet_target", 2, "lcm", args.n)
            results.setdefault(name, []).append(measures(images) | follows(folder))
            if seed == 0:
                rows.append(images[:12])
    references = {name: [measures(images)] for name, images in measures.references().items()}
    print(report(references, results))
    document = {"references": references, "results": results}
    write_whole(out / "results.json", json.dumps(document, indent=1))
    names = ", ".join(["real, through the VAE", *results])
    save_png(grid(torch.cat(rows), len(rows[0])), out / "grid.png", rows=names)
    print(f"\n{out / 'grid.png'}: rows are real pictures through the VAE, {', '.join(results)}\n"
          f"{out / 'results.json'}")


if __name__ == "__main__":
    run(main)
