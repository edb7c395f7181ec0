"""The comparison on the pocket's held-out prompts: teacher in 50 steps, plain LCM and RG-LCM in 2.

    python evaluate.py                                        # the shipped student
    python evaluate.py --unet runs/pocket/unet_target         # yours

The reward is what training maximised. The judge is a second CLIP that no training has seen: believe
its differences between students, not its level.
"""
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from data import Shards
from lcm_solver import lcm_timesteps
from pipeline import Pipeline, labelled_grid, save_png
from reward import load_reward, parse_spec
from support import cli
from support.cli import POCKET, at_least, option, parse, require, run
from support.weights import InputError, read_json, write_whole

RESULTS = POCKET / "results.json"  # what build.py recorded: real pictures, teacher and plain LCM
SIDE = 64  # pixels of the pocket's pictures, and of those recorded


@dataclass
class Config:
    unet: str = option(str(POCKET / "student"), "the student", group="what to compare")
    steps: int = option(2, "steps of the student")
    n: int = option(4, "pictures per prompt of the student, whose scores are averaged")
    model: str = option(str(POCKET), "model folder with the teacher")
    teacher_steps: int = option(50, "DDIM steps of the teacher; 0: leave the teacher out")
    teacher_n: int = option(
        0, "pictures per prompt of the teacher, which is slow (4 for a fair comparison, since one "
           "is half luck); 0: its scores are those recorded in pocket/results.json, with four")
    guidance: float = option(3.0, "w of teacher and student: cond + w (cond - uncond)")
    real: bool = option(False, "also score the real pictures and their VAE round trip")

    reward: str = option("pocket", "what training maximised (reward.py)", group="by what")
    judge: str = option(str(POCKET / "judge"), "folder of the CLIP that judges")
    data: str = option(
        str(POCKET / "data" / "heldout-*.tar"), "shards with the prompts and real pictures")
    limit: int = option(256, "number of prompts")
    show: str = option(
        "0,1,2,3,4,5,6,7,8,9", "numbers of the prompts whose pictures grid.png shows")

    batch: int = option(64, "pictures at a time", group="the machine")
    device: str = option("auto", "auto, cpu or cuda")
    precision: str = option("auto", "arithmetic of the networks", choices=("auto", "bf16", "fp32"))
    out: str = option("runs/evaluation", "folder for results.json and grid.png")


def frechet_distance(a, b):
    """Features [N,D] and [M,D] -> |mean difference|^2 + tr(A + B - 2 (AB)^(1/2)) of the Gaussians
    with their means and covariances A and B (arXiv 1706.08500, eq. 6). Too large for few
    features, the more so the fewer they are: compare equal numbers."""
    a, b = a.double(), b.double()
    A, B = a.T.cov(), b.T.cov()
    # the eigenvalues of AB are those of the symmetric A^(1/2) B A^(1/2)
    values, vectors = torch.linalg.eigh(A)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ B @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + A.trace() + B.trace() - 2 * cross
    return distance.clamp(min=0).item()  # rounding may go below


class Scorer:
    """Scores pictures for one fixed list of N prompts by the reward and by the judge."""

    def __init__(self, prompts, real, reward, judge, device):
        """real: the real pictures [N,3,H,W] in [0,1], which the judge's Frechet distance is to."""
        self.prompts, self.device = prompts, device
        self.reward = load_reward(reward, device)
        self.judge = load_reward(f"pocket={judge}", device)
        self.real = self.features(real)

    @torch.no_grad()
    def features(self, images):
        """[n,3,H,W] in [0,1] -> the judge's unit features [n,D]"""
        return torch.cat([self.judge.image_features(part.to(self.device))
                          for part in images.split(64)])

    @torch.no_grad()
    def __call__(self, name, images, calls=None, seconds=None):
        """images [n*N,3,H,W] in [0,1], n rounds of one per prompt; calls: network calls a picture;
        seconds: that all pictures took. -> a row of the table, where "scores" holds for each of the
        N prompts the judge's mean over n, and KEY_se is the standard error of KEY."""
        n, batches = len(images) // len(self.prompts), range(0, len(images), 64)
        prompts = self.prompts * n
        parts = [images[i:i + 64].to(self.device) for i in batches]
        rewards = [self.reward(part, prompts[i:i + 64]) for i, part in zip(batches, parts)]
        text = self.judge.text_features(self.prompts)  # [N, D]
        image = self.features(images).unflatten(0, (n, -1))  # [n*N, D] -> [n, N, D]
        by_prompt = {
            "reward": torch.cat(rewards).unflatten(0, (n, -1)).mean(dim=0),  # [N]
            "judge": (image * text).sum(dim=2).mean(dim=0),
        }
        row = {"name": name, "calls": calls, "seconds_per_image": seconds and seconds / len(images)}
        for key, scores in by_prompt.items():
            row[key] = scores.mean().item()
            row[key + "_se"] = (scores.std() / len(scores) ** 0.5).item()
        # is the picture nearest to its own prompt among all, as the judge sees it?
        nearest = (image @ text.T).argmax(dim=2)  # [n, N]
        own = torch.arange(len(text), device=text.device)
        row["top1"] = (nearest == own).float().mean().item()
        # of N pictures each, so that rows of different n can be compared
        row["frechet"] = sum(frechet_distance(one, self.real) for one in image) / n
        return row | {"scores": by_prompt["judge"].cpu().tolist()}


def draw_all(model, unet, prompts, steps, w, solver, batch, n=1, size=None):
    """n rounds of one picture per prompt, picture i from seed i, `batch` at a time; size: (H, W) in
    pixels, the UNet's own if None -> images [n*N,3,H,W] in [0,1] on the CPU, seconds."""
    unet.eval()
    prompts, images, start = prompts * n, [], time.perf_counter()
    firsts = range(0, len(prompts), batch)
    for first in tqdm(firsts, desc=f"{solver} {steps} steps", leave=False):
        part = prompts[first:first + batch]
        seeds = range(first, first + len(part))
        images.append(model.draw(unet, part, seeds, steps, w, solver, size).cpu())
    return torch.cat(images), time.perf_counter() - start


def table(rows, reward):
    """Rows of Scorer -> a Markdown table; mean ± standard error. A recorded row has no score by
    another reward than the pocket's."""
    heading = "reward" if reward == "pocket" else f"reward {reward}"
    lines = [f"| | network calls | s / image | {heading} | judge | top-1 | Frechet |",
             "| --- | --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        seconds = "" if row["seconds_per_image"] is None else f"{row['seconds_per_image']:.3f}"
        score = "" if row["reward"] is None else f"{row['reward']:.3f} ± {row['reward_se']:.3f}"
        lines.append(f"| {row['name']} | {row['calls'] or ''} | {seconds} | {score} "
                     f"| {row['judge']:.3f} ± {row['judge_se']:.3f} | {row['top1']:.1%} "
                     f"| {format(row['frechet'], '.3f') if 'frechet' in row else ''} |")
    return "\n".join(lines)


def difference(row, other):
    """Mean of the paired differences of the judge's scores, and its standard error."""
    d = torch.tensor(row["scores"]) - torch.tensor(other["scores"])
    return d.mean().item(), (d.std() / len(d) ** 0.5).item()


def recorded(args, prompts, side):
    """What of pocket/results.json may stand beside a comparison of pictures of that side. ->
    {"teacher": row, "plain": row}, each only if it was made with the same options."""
    if not RESULTS.is_file() or len(prompts) != Config.limit or side != SIDE:
        return {}
    same = lambda *names: all(getattr(args, name) == getattr(Config, name) for name in names)
    record, found = read_json(RESULTS), {}
    if same("model", "data", "judge", "guidance", "teacher_steps"):
        for row in record.get("shipped", []):
            if row["name"].startswith("teacher, "):
                found["teacher"] = row | {"name": f"{row['name']} (recorded)"}
    if same("model", "data", "judge", "guidance", "steps", "n") and "plain" in record:
        name = ("plain LCM, 2-step (recorded; "
                "`python train.py --reward none --out runs/plain` remakes it)")
        found["plain"] = record["plain"] | {"name": name}
    if args.reward != Config.reward:
        found = {key: row | {"reward": None} for key, row in found.items()}
    return found


def read_prompts(args, resolution):
    """-> real pictures [N,3,H,W] in [0,1], their N prompts, the numbers of those that are shown."""
    shards = Shards(args.data, resolution)
    require(not shards.encoded, f"{args.data}: the comparison needs pictures, not latents")
    pictures, prompts = zip(*shards.first(args.limit))
    count = len(prompts)
    try:
        shown = [int(number) for number in args.show.split(",")]
    except ValueError:
        raise InputError(
            f"--show {args.show}: expected numbers of prompts, such as 0,3,17") from None
    if args.show == Config.show:
        shown = [i for i in shown if i < count]
    require(all(0 <= i < count for i in shown),
            f"--show {args.show}: expected numbers from 0 to {count - 1}")
    return torch.stack(pictures) / 2 + 0.5, list(prompts), shown


@torch.no_grad()
def compare(args, device, dtype):
    """Draw, score, print the table and write results.json and grid.png. -> rows"""
    at_least(2, args, "limit")
    at_least(1, args, "n", "batch")
    at_least(0, args, "teacher_n")
    require(0 <= args.teacher_steps < 1000,
            f"--teacher-steps {args.teacher_steps}: expected 0 to 999")
    out = cli.make_folder(args.out)
    model = Pipeline.from_pretrained(args.model, device, dtype)
    student = model.load_unet(args.unet, student=True)
    # called for its error: a wrong number of steps is refused before any work
    lcm_timesteps(model.schedule, args.steps, student.config.lcm_grid or 50)
    real, prompts, shown = read_prompts(args, student.config.sample_size * model.vae.factor)
    size = real.shape[-2:]  # the student's, at which the teacher draws too
    score = Scorer(prompts, real, args.reward, args.judge, device)
    record = recorded(args, prompts, size[0])
    rows, pictures = [], {"real": real[shown]}

    if args.real:
        rows.append(score("real pictures", real))
        rows.append(score("real, through the VAE", model.round_trip(real)))
    if args.teacher_steps:
        teacher = model.load_unet(args.model, student=False)
        steps, w = args.teacher_steps, args.guidance
        name = f"teacher\n{steps} steps"
        if "teacher" in record and not args.teacher_n:  # only what is shown has to be drawn
            rows.append(record["teacher"])
            pictures[name] = model.draw(
                teacher, [prompts[i] for i in shown], shown, steps, w, "ddim").cpu()
        else:
            images, seconds = draw_all(
                model, teacher, prompts, steps, w, "ddim", args.batch, max(1, args.teacher_n), size)
            calls = 2 * steps  # conditional and unconditional
            rows.append(score(f"teacher, {steps}-step DDIM", images, calls, seconds))
            pictures[name] = images[shown]
    if "plain" in record:
        rows.append(record["plain"])
    images, seconds = draw_all(
        model, student, prompts, args.steps, args.guidance, "lcm", args.batch, args.n)
    name = f"{Path(args.unet).parent.name}/{Path(args.unet).name}"
    rows.append(score(f"student, {args.steps}-step ({name})", images, args.steps, seconds))
    pictures[f"student\n{args.steps} steps"] = images[shown]
    report(args, rows, pictures, [prompts[i] for i in shown], out)
    return rows


def report(args, rows, pictures, captions, out):
    """Print the table and the differences, write results.json and grid.png. pictures: {name of the
    row of the grid: [C,3,H,W]}, for C captions."""
    print(table(rows, args.reward))
    for other in rows[:-1]:
        mean, se = difference(rows[-1], other)
        print(f"judge, student minus {other['name'].split(' (')[0]}: {mean:+.4f} ± {se:.4f}")
    judge = Path(args.judge).resolve()
    if any(path and Path(path).resolve() == judge for _, _, path, _ in parse_spec(args.reward)):
        print("the judge is part of the reward that was maximised: its scores say nothing")
    titles = [caption.split(",")[0] for caption in captions]
    sheet = labelled_grid(torch.cat(list(pictures.values())), list(pictures), titles, scale=2)
    save_png(sheet, out / "grid.png", prompts=" | ".join(captions))
    write_whole(out / "results.json", json.dumps(rows, indent=1))
    print(f"{out / 'grid.png'}\n{out / 'results.json'}")


def main():
    args = parse(Config(), __doc__)
    device = cli.pick_device(args.device)
    compare(args, device, cli.pick_precision(args.precision, device))


if __name__ == "__main__":
    run(main)
