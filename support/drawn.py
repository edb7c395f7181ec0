"""Pictures that a UNet draws for an evaluation. Each is written once, under a key of what it hangs
on, and read back ever after: what is interrupted or repeated draws nothing twice.

    FOLDER/KEY/made.json          what these pictures are drawn with, in words
    FOLDER/KEY/ab/abcd....png     one picture, by its prompt and seed

KEY is a hash of the networks' weights, of the sources that draw, and of solver, steps, w, size and
precision.
"""
import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from support.cli import require
from support.pictures import save_png, to_pil
from support.weights import InputError, first_line, write_whole

ROOT = Path(__file__).resolve().parent.parent
# an edit of one of these may change every picture
SOURCES = ("lcm_solver.py", "pipeline.py", "support/kernels.py", "support/tokenizer.py",
           "text_encoder.py", "unet.py", "vae.py")


def fingerprint(modules, facts):
    """Hash of some modules' weights, of the sources that draw, and of {name: value}: 16 digits."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for name in SOURCES:
        digest.update((ROOT / name).read_bytes())
    for module in modules:
        for key, tensor in sorted(module.state_dict().items()):
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


class Drawn:
    """The pictures of one UNet with one choice of settings.

    draw: (prompts, seeds) -> images [B,3,H,W] in [0,1]. facts: {name: value} of all that they hang
    on beside the weights of `modules`. where: the network's, for people. drawn: how many this
    object has drawn."""

    def __init__(self, folder, draw, modules, facts, where):
        self.draw, self.where, self.drawn = draw, where, 0
        self.folder = Path(folder) / fingerprint(modules, facts)
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "made.json").is_file():
            made = {"unet": str(where)} | facts
            write_whole(self.folder / "made.json", json.dumps(made, indent=1, default=str) + "\n")

    def file(self, prompt, seed):
        name = hashlib.sha256(f"{seed} {prompt}".encode()).hexdigest()[:24]
        return self.folder / name[:2] / f"{name}.png"

    def __call__(self, prompts, seeds):
        """-> the files of these pictures. Where one is not there yet the whole batch is drawn, so
        that what is drawn does not hang on where a run was cut off: the last digits of a network's
        output hang on the size of the batch."""
        files = [self.file(prompt, seed) for prompt, seed in zip(prompts, seeds)]
        if all(map(os.path.exists, files)):
            return files
        start = time.perf_counter()
        images = self.draw(prompts, seeds).cpu()
        seconds = (time.perf_counter() - start) / len(files)
        self.drawn += len(files)
        require(images.isfinite().all(),
                f"{self.where}: drew NaN or infinity; its training diverged, or it needs "
                "--precision fp32")
        for file, image, prompt, seed in zip(files, images, prompts, seeds):
            if not file.exists():
                file.parent.mkdir(exist_ok=True)
                save_png(to_pil(image), file, prompt=prompt, seed=seed, seconds=seconds)
        return files


def read(file):
    """A picture of Drawn -> PIL image, the seconds that it took to draw."""
    try:
        with Image.open(file) as picture:
            return picture.convert("RGB"), float(picture.text["seconds"])
    except Exception as error:  # whatever PIL makes of broken bytes
        raise InputError(f"{file}: not a picture as evaluate.py writes them ({first_line(error)}); "
                         "remove it, and the same command draws it again") from None


def in_threads(function, things):
    """[function(thing)] by a few threads: pictures are unpacked outside of Python's lock."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(function, things))


def draw_all(model, unet, prompts, steps, w, solver, batch, n=1, size=None):
    """n rounds of one picture per prompt, picture i from seed i, `batch` at a time; size: (H, W) in
    pixels, the UNet's own if None -> images [n*N,3,H,W] in [0,1] on the CPU, as they were drawn:
    nothing is rounded or written. model: a Pipeline."""
    unet.eval()
    prompts, images = prompts * n, []
    for first in tqdm(range(0, len(prompts), batch), desc=f"{solver} {steps} steps", leave=False):
        part = prompts[first:first + batch]
        seeds = range(first, first + len(part))
        images.append(model.draw(unet, part, seeds, steps, w, solver, size).cpu())
    return torch.cat(images)
