"""A page that draws while one types: two network calls a picture, beside the teacher's hundred.

    pip install -e '.[demo]'
    python demo.py                                          # the student in pocket/student
    python demo.py --unet runs/pocket/unet_target --second pocket/student --run runs/pocket

A click on a picture saves it: the bytes that sample.py writes. A PNG of either, dropped on the
page, brings its settings back.
"""
import time
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from pathlib import Path

import torch

from lcm_solver import lcm_timesteps
from pipeline import Pipeline, to_pil
from reward import load_reward, read_picture
from support import lora_files, page
from support.checkpoints import checkpoints, step_of
from support.cli import POCKET, option, parse, pick_device, pick_precision, require, run
from support.kernels import compile_for_drawing

STEPS, TEACHER_STEPS = 8, 50


@dataclass
class Config:
    model: str = option(
        str(POCKET), "VAE, text encoder, scheduler and teacher: a folder in the diffusers layout, "
        "a single file, or a hub id", group="what draws")
    unet: str | None = option(None, "the student (default: MODEL/student, or else MODEL's)")
    lora: list[str] = option(
        (), "a LoRA to merge into the student (default then: MODEL's); may be given several times",
        list=True)
    lora_scale: list[str] = option((), "how much of it, once for all or for each", list=True)
    second: str | None = option(None, "a second student, for Compare")
    run: str | None = option(None, "a run folder, whose checkpoints the tab Reward goes through")
    reward: str = option("pocket", "what training maximised (reward.py), or none", group="scores")
    judge: str = option(f"pocket={POCKET / 'judge'}", "what it did not see, or none")
    rewards: list[str] = option(
        (), "one more for the tab Reward; may be given several times", list=True)
    host: str = option("127.0.0.1", "address to listen at", group="the machine")
    port: int = option(7860, "port to listen at")
    device: str = option("auto", "auto, cpu or cuda")
    precision: str = option("auto", "arithmetic of the networks", choices=("auto", "bf16", "fp32"))
    compile: bool = option(False, "torch.compile the UNet: slower start, faster pictures")


class Studio:
    """The networks behind the page. draw, compare, score and checkpoint take what the page's fields
    hold and give HTML; the first two yield it as it grows. Raises InputError."""

    def __init__(self, args):
        self.args, self.device = args, pick_device(args.device)
        self.model = Pipeline.from_pretrained(
            args.model, self.device, pick_precision(args.precision, self.device))
        encoder = self.model.text_encoder
        encode = lru_cache(256)(lambda *words: type(encoder).forward(encoder, words))
        encoder.forward = lambda prompts: encode(*prompts)
        self.load_unet = cache(self.load)  # student, second, teacher: they stay
        self.load_checkpoint = lru_cache(1)(self.load)
        self.load_reward = cache(lambda spec: load_reward(spec, self.device))
        student = Path(args.model) / "student"
        own = student.is_dir() and not args.lora
        self.student = args.unet or str(student if own else args.model)
        self.scales = lora_files.scales_of(args.lora, args.lora_scale)
        config = self.load_unet(self.student, True).config
        self.side = config.sample_size * self.model.vae.factor
        self.steps = min(STEPS, config.lcm_grid or 50)
        given = {"reward": args.reward, "judge": args.judge}
        self.scorers = {name: spec for name, spec in given.items() if spec != "none"}
        self.offered = self.scorers | {spec: spec for spec in ("jpeg", *args.rewards)}
        require(not args.run or self.checkpoints(),
                f"--run {args.run}: no checkpoints there; expected a run folder of train.py")
        list(self.draw("", 1, 3.0, 0, f"{self.side}x{self.side}"))  # the first takes longer

    def load(self, where, student=True, lora=None):
        """Where each UNet comes from. lora: of a run's checkpoint."""
        loras, scales = ([lora], [1.0]) if lora else ((), ())
        if student and where == self.student and not lora:
            loras, scales = self.args.lora, self.scales
        unet = self.model.load_unet(where, student, loras, scales)
        words = {"lora": lora_files.as_text(loras, scales)} if loras else {}
        unet.origin = {"unet": where} | words  # as sample.py writes them
        if self.args.compile:
            compile_for_drawing(unet)
        return unet

    def checked(self, *fields):
        """prompt, steps, w, seed and size as fields hold them -> the same as numbers, size as
        (height, width)."""
        return page.checked(*fields, self.steps, self.side, self.model.vae.factor)

    def picture(self, settings, title=None, more=0, where=None, unet=None, solver="lcm",
                progress=iter, see=None):
        """One picture, of the seed and `more`, drawn alone: nothing else that is asked for changes
        it. -> image [1,3,H,W], and a function from the lines under it to its figure. see: gets the
        figures of a student's predictions."""
        prompt, steps, w, seed, size = settings
        unet, seed = unet or self.load_unet(where or self.student, solver == "lcm"), seed + more
        facts = {"prompt": prompt, "seed": seed, "steps": steps, "solver": solver, "guidance": w,
                 "negative": "", "model": self.args.model} | unet.origin  # as sample.py, in order
        start, seen = time.perf_counter(), []
        image = self.model.draw(
            unet, [prompt], [seed], steps, w, solver, size, "", progress, see and seen.append)
        drawn = to_pil(image[0])
        title = f"{title or f'seed {seed}'}, {time.perf_counter() - start:.2f} s"
        grid = unet.config.lcm_grid or 50
        for latents, t in zip(seen, lcm_timesteps(self.model.schedule, steps, grid) if see else ()):
            prediction = to_pil(self.model.decode(latents)[0])
            see(page.figure(page.encoded(prediction, facts | {"t": t}), f"t = {t}"))
        return image, partial(
            page.figure, page.encoded(drawn, facts), title, name=f"{prompt[:40]} {seed}.png")

    @torch.no_grad()
    def scores(self, image, prompt, scorers, progress=iter):
        """image [1,3,H,W] in [0,1], scorers {name: spec} -> the first score, all as words."""
        totals, lines = [], []
        for name, spec in progress(scorers.items()):
            reward = self.load_reward(spec)
            parts = {k: v.item() for k, v in reward.parts(image.to(self.device), [prompt]).items()}
            totals.append(sum(reward.weights[part] * score for part, score in parts.items()))
            lines.append(f"{name} {totals[-1]:.3f}")
            lines += [f"{part} {score:.3f}" for part, score in parts.items() if len(parts) > 1]
        return next(iter(totals), 0.0), lines

    def scored(self, settings, *args, scorers=None, **options):
        """picture(), with its scores under it -> the first score, the figure."""
        image, shown = self.picture(settings, *args, **options)
        score, lines = self.scores(image, settings[0], scorers or self.scorers)
        return score, shown(lines)

    def draw(self, prompt, steps, w, seed, size, count=1, progress=iter):
        """Yields `count` pictures, of one seed after the other, and then the same with scores: the
        one who types looks at the picture. progress: wraps timesteps and scorers."""
        settings = self.checked(prompt, steps, w, seed, size)
        drawn = [self.picture(settings, more=i, progress=progress) for i in range(count)]
        arranged = partial(page.sheet, kind="one" if count == 1 else "four",
                           note=page.cut_note(self.model.text_encoder, prompt))
        yield arranged([shown([f"{name} …" for name in self.scorers]) for _, shown in drawn])
        yield arranged([shown(self.scores(image, prompt, self.scorers, progress)[1])
                        for image, shown in drawn])

    def compare(self, prompt, w, seed, size, progress=iter):
        """Yields the page as it grows: each student's pictures, the first one's steps, the
        teacher's picture. progress: wraps the teacher's timesteps."""
        prompt, _, w, seed, size = self.checked(prompt, 1, w, seed, size)
        seen, rows = [], {where: [] for where in (self.student, self.args.second) if where}
        for where, row in rows.items():
            grid = self.load_unet(where, True).config.lcm_grid or 50
            counts = [n for n in (1, 2, 4, 8) if n <= grid]
            for steps in counts:
                see = seen.append if where == self.student and steps == counts[-1] else None
                title = "1 call" if steps == 1 else f"{steps} calls"
                row.append(self.scored((prompt, steps, w, seed, size), title, where=where,
                                       see=see)[1])
                yield page.comparison(rows, seen, seed)
        teacher = self.scored((prompt, TEACHER_STEPS, w, seed, size),
                              f"teacher, {2 * TEACHER_STEPS} calls", where=self.args.model,
                              solver="ddim", progress=progress)[1]
        yield page.comparison(rows, seen, seed, teacher)

    def score(self, prompt, offered, files, draws, steps, w, seed, size):
        """The pictures in `files` and `draws` new ones, the best first, by one reward."""
        settings, files = self.checked(prompt, steps, w, seed, size), files or []
        require(offered in self.offered, f"reward {offered}: expected one of those offered")
        scorers, found = {offered: self.offered[offered]}, []
        for image, shown in page.dropped(files, read_picture):
            score, lines = self.scores(image, prompt, scorers)
            found.append((score, shown(lines)))
        found += [self.scored(settings, more=i, scorers=scorers) for i in range(draws)]
        return page.sheet([html for _, html in sorted(found, key=lambda pair: -pair[0])])

    def checkpoints(self):
        return checkpoints(Path(self.args.run)) if self.args.run else []

    def checkpoint(self, number, prompt, steps, w, seed, size):
        """Four pictures of the run's checkpoint of this number, 1 for the oldest."""
        settings, found = self.checked(prompt, steps, w, seed, size), self.checkpoints()
        require(number in range(1, len(found) + 1), f"checkpoint {number}: there are {len(found)}")
        folder = found[int(number) - 1]
        lora = folder / "lora_target"
        if lora.is_dir():
            unet = self.load_checkpoint(self.args.model, True, str(lora))
        else:
            unet = self.load_checkpoint(str(folder / "unet_target"))
        four = [self.scored(settings, None, i, unet=unet)[1] for i in range(4)]
        return page.reached(four, self.args.run, step_of(folder))


def main():
    args = parse(Config(), __doc__)
    page.needs_gradio()  # said before anything is loaded
    page.serve(Studio(args), args.host, args.port)


if __name__ == "__main__":
    run(main)
