"""The comparison on the pocket's held-out prompts: teacher in 50 steps, plain LCM and RG-LCM in 2.

    python evaluate.py                                        # the shipped student
    python evaluate.py --unet runs/pocket/unet_target         # yours

The reward is what training maximises. The judge is a second CLIP that no training has seen: its
number is the one to believe.
"""
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from data import Shards
from lcm_solver import lcm_timesteps
from pipeline import Pipeline, grid, save_png
from reward import load_reward
from support.cli import (
    POCKET,
    at_least,
    make_folder,
    option,
    parse,
    pick_device,
    pick_precision,
    require,
    run,
)
from support.weights import write_whole
from unet import UNet

RESULTS = POCKET / "results.json"  # what build.py recorded: real pictures and plain LCM


@dataclass
class Config:
    unet: str = option(str(POCKET / "student"), "the student")
    model: str = option(str(POCKET), "model folder with the teacher")
    data: str = option(
        str(POCKET / "data" / "heldout-*.tar"), "shards with the prompts and real pictures")
    guidance: float = option(3.0, "w of teacher and student: cond + w (cond - uncond)")
    steps: int = option(2, "steps of the student")
    teacher_steps: int = option(50, "DDIM steps of the teacher; 0: leave the teacher out")
    real: bool = option(False, "also score the real pictures and their VAE round trip")
    limit: int = option(256, "number of prompts")
    n: int = option(4, "pictures per prompt of the student, whose scores are averaged")
    teacher_n: int = option(
        1, "the same of the teacher, which is slow; 4 for a comparison with it, "
        "since one picture is half luck")
    batch: int = option(64, "pictures at a time")
    device: str = option("auto", "auto, cpu or cuda")
    precision: str = option("auto", "arithmetic of the networks", choices=("auto", "bf16", "fp32"))
    out: str = option("runs/evaluation", "folder for results.json and grid.png")


class Scorer:
    """Scores pictures for one fixed list of prompts by the reward and by the judge."""

    def __init__(self, prompts, device):
        self.prompts = prompts
        self.models = {
            "reward": load_reward("pocket", device),
            "judge": load_reward(f"pocket={POCKET / 'judge'}", device)}  # last: see __call__

    @torch.no_grad()
    def __call__(self, name, images, calls=None, seconds=None):
        """images [n*N,3,H,W] in [0,1], n rounds of one per prompt; calls: network calls a picture;
        seconds: that all pictures took. -> a row of the table, where "scores" holds for each of the
        N prompts the judge's mean over n, and KEY_se is the standard error of KEY."""
        row = {"name": name, "calls": calls, "seconds_per_image": seconds and seconds / len(images)}
        for key, model in self.models.items():
            device = model.clip.logit_scale.device
            parts = [model.image_features(part.to(device)) for part in images.split(64)]
            text = model.text_features(self.prompts)  # [N, D]
            image = torch.cat(parts).unflatten(0, (-1, len(text)))  # [n*N, D] -> [n, N, D]
            scores = (image * text).sum(dim=2).mean(dim=0)  # [N]
            row[key] = scores.mean().item()
            row[key + "_se"] = (scores.std() / len(scores) ** 0.5).item()
        # of the last model, the judge: is the picture nearest to its own prompt among all?
        nearest = (image @ text.T).argmax(dim=2)  # [n, N]
        own = torch.arange(len(text), device=text.device)
        row["top1"] = (nearest == own).float().mean().item()
        return row | {"scores": scores.cpu().tolist()}


def draw_all(model, unet, prompts, steps, w, solver, batch, n=1):
    """n rounds of one picture per prompt, picture i from seed i, `batch` at a time
    -> images [n*N,3,H,W] in [0,1] on the CPU, seconds."""
    unet.eval()
    prompts, images, start = prompts * n, [], time.perf_counter()
    firsts = range(0, len(prompts), batch)
    for first in tqdm(firsts, desc=f"{solver} {steps} steps", leave=False):
        part = prompts[first:first + batch]
        seeds = range(first, first + len(part))
        images.append(model.draw(unet, part, seeds, steps, w, solver).cpu())
    return torch.cat(images), time.perf_counter() - start


def table(rows):
    """Rows of Scorer -> a Markdown table; mean ± standard error."""
    lines = ["| | network calls | s / image | reward | judge | top-1 |",
             "| --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        seconds = "" if row["seconds_per_image"] is None else f"{row['seconds_per_image']:.3f}"
        lines.append(f"| {row['name']} | {row['calls'] or ''} | {seconds} "
                     f"| {row['reward']:.3f} ± {row['reward_se']:.3f} "
                     f"| {row['judge']:.3f} ± {row['judge_se']:.3f} | {row['top1']:.1%} |")
    return "\n".join(lines)


def difference(row, other):
    """Mean of the paired differences of the judge's scores, and its standard error."""
    d = torch.tensor(row["scores"]) - torch.tensor(other["scores"])
    return d.mean().item(), (d.std() / len(d) ** 0.5).item()


@torch.no_grad()
def compare(args, device, dtype):
    """Draw, score, print the table and write results.json and grid.png. -> rows"""
    at_least(2, args, "limit")
    at_least(1, args, "n", "teacher_n", "batch")
    require(0 <= args.teacher_steps < 1000,
            f"--teacher-steps {args.teacher_steps}: expected 0 to 999")
    out = make_folder(args.out)
    model = Pipeline.from_pretrained(args.model, device, dtype)
    student = UNet.from_pretrained(args.unet, dtype=dtype, device=device)
    model.check(student, args.unet, student=True)
    # called for its error: a wrong number of steps is refused before any work
    lcm_timesteps(model.schedule, args.steps, student.config.lcm_grid or 50)
    shards = Shards(args.data, student.config.sample_size * model.vae.factor)
    require(not shards.encoded, f"{args.data}: the comparison needs pictures, not latents")
    real, prompts = [], []
    for i in range(min(args.limit, len(shards))):
        picture, prompt = shards[i]
        real.append(picture)
        prompts.append(prompt)
    real = torch.stack(real) / 2 + 0.5  # [N, 3, H, W], from [-1, 1] to [0, 1]
    score = Scorer(prompts, device)
    rows, pictures = [], [real]

    if args.real:
        rows.append(score("real pictures", real))
        rows.append(score("real, through the VAE", model.round_trip(real)))
    if args.teacher_steps:
        teacher = UNet.from_pretrained(args.model, dtype=dtype, device=device)
        model.check(teacher, args.model, student=False)
        images, seconds = draw_all(
            model, teacher, prompts, args.teacher_steps, args.guidance, "ddim",
            args.batch, args.teacher_n)
        calls = 2 * args.teacher_steps  # conditional and unconditional
        rows.append(score(f"teacher, {args.teacher_steps}-step DDIM", images, calls, seconds))
        pictures.append(images)
    recorded = json.loads(RESULTS.read_text()).get("plain") if RESULTS.is_file() else None
    plain = Config()  # the record was made with the defaults
    same = all(getattr(args, name) == getattr(plain, name)
               for name in ("model", "data", "guidance", "steps", "n"))
    if recorded and same and len(prompts) == len(recorded["scores"]):
        name = ("plain LCM, 2-step (recorded; "
                "`python train.py --reward none --out runs/plain` remakes it)")
        rows.append(recorded | {"name": name})
    images, seconds = draw_all(
        model, student, prompts, args.steps, args.guidance, "lcm", args.batch, args.n)
    name = f"{Path(args.unet).parent.name}/{Path(args.unet).name}"
    rows.append(score(f"student, {args.steps}-step ({name})", images, args.steps, seconds))
    pictures.append(images)

    print(table(rows))
    for other in rows[:-1]:
        mean, se = difference(rows[-1], other)
        print(f"judge, student minus {other['name'].split(' (')[0]}: {mean:+.4f} ± {se:.4f}")
    columns = min(12, len(prompts))
    sheet = grid(torch.cat([p[:columns] for p in pictures]), columns)
    save_png(sheet, out / "grid.png",
             prompts=" | ".join(prompts[:columns]), rows="real, teacher, student")
    write_whole(out / "results.json", json.dumps(rows, indent=1))
    print(f"{out / 'grid.png'}: rows are real pictures, teacher, student\n{out / 'results.json'}")
    return rows


def main():
    args = parse(Config(), __doc__)
    device = pick_device(args.device)
    compare(args, device, pick_precision(args.precision, device))


if __name__ == "__main__":
    run(main)
