r"""Prompts -> PNG.

    python sample.py --steps 2 --prompt "a red apple"            # the student in pocket/student
    python sample.py --steps 2 --unet runs/pocket/unet_target    # a student of your own
    python sample.py --steps 2 --lora runs/lora/lora_target      # updates of the teacher
    python sample.py --solver ddim --steps 50 --guidance 3       # the teacher
    python sample.py --model v2-1_512-ema-pruned.safetensors --solver ddim --steps 50 \
        --guidance 6.5 --prompt "a lighthouse"
"""
import math
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from lcm_solver import lcm_timesteps
from pipeline import Pipeline, grid, save_png, to_pil
from support import lora_files
from support.cli import (
    POCKET,
    at_least,
    make_folder,
    option,
    parse,
    parse_size,
    peak_memory,
    pick_device,
    pick_precision,
    require,
    run,
)
from support.kernels import compile_for_drawing
from support.weights import InputError

# without a prompt: the pocket's README in small
STYLES = ("3d", "gradient", "flat", "noto", "blob", "twemoji")
FIRST_LOOK = [f"{word}, {style}" for word in ("red apple", "cat face", "rocket", "snowman")
              for style in STYLES]
GRID = 64  # pictures that grid.png shows at most


@dataclass
class Config:
    prompt: list[str] = option(
        (), "a prompt; may be given several times (without any: four words in six styles)",
        list=True, group="what to draw")
    prompts: str | None = option(None, "a text file with one prompt a line")
    steps: int = option(2, "network calls per picture (ddim: twice as many passes, for guidance)")
    n: int = option(1, "pictures per prompt")
    seed: int = option(0, "picture i of a prompt uses seed + i")
    size: str | None = option(
        None, "HxW in pixels, multiples of the VAE's factor (8); "
        "what the model was trained at if not given")
    model: str = option(
        str(POCKET), "VAE, text encoder, scheduler and UNet: "
        "a folder in the diffusers layout, a single file, or a hub id", group="with what")
    unet: str | None = option(
        None, "UNet from elsewhere: a folder, file or hub id "
        "(default: MODEL/student for lcm if there is one, else MODEL's)")
    lora: list[str] = option(
        (), "a LoRA to merge into the UNet (default then: MODEL's): a file of any program, a "
        "folder, or a hub id; may be given several times", list=True)
    lora_scale: list[str] = option(
        (), "how much of it: 0 none, 1 all; once for all, or once for each (default: 1)", list=True)
    solver: str = option("lcm", "lcm: a student; ddim: a teacher", choices=("lcm", "ddim"))
    guidance: float = option(
        3.0, "w of the LCM paper: cond + w (cond - uncond); diffusers' guidance_scale is w + 1; "
        "a student without a guidance embedding does not read it")
    negative: str = option("", "negative prompt (ddim): what guidance leads away from")
    device: str = option("auto", "auto, cpu or cuda", group="the machine")
    precision: str = option("auto", "arithmetic of the networks", choices=("auto", "bf16", "fp32"))
    compile: bool = option(False, "torch.compile the UNet: slower start, faster pictures")
    batch: int = option(16, "pictures at a time")
    out: str = option("samples", "folder for the PNGs")


def read_prompts(args):
    prompts = list(args.prompt)
    if args.prompts:
        try:
            lines = Path(args.prompts).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--prompts {args.prompts}: not readable ({error}); "
                             "expected a UTF-8 text file, one prompt a line") from None
        found = [line.strip() for line in lines if line.strip()]
        require(found, f"--prompts {args.prompts}: no prompt in it; expected one a line")
        prompts += found
    return prompts or FIRST_LOOK


def tell_cut(text_encoder, prompts):
    """Say once which prompts are longer than what the text encoder reads."""
    cut, longest = text_encoder.cut(prompts), text_encoder.tokenizer.model_max_length
    if cut:
        first = textwrap.shorten(next(iter(cut)), 40, placeholder="...")
        print(f"note: {len(cut)} of {len(set(prompts))} prompts cut at {longest} tokens, the rest "
              f"is not read: \"{first}\" has {next(iter(cut.values()))}")


def main():
    start = time.perf_counter()
    args = parse(Config(), __doc__)
    device = pick_device(args.device)
    dtype = pick_precision(args.precision, device)
    at_least(1, args, "n", "batch")
    require(0 <= args.seed <= 2**63 - args.n,
            f"--seed {args.seed}: expected 0 or more, and less than 2^63 with --n")
    prompts = [prompt for prompt in read_prompts(args) for _ in range(args.n)]  # one a picture
    seeds = [args.seed + i % args.n for i in range(len(prompts))]
    scales = lora_files.scales_of(args.lora, args.lora_scale)
    out = make_folder(args.out)

    model = Pipeline.from_pretrained(args.model, device, dtype)
    student = Path(args.model) / "student"
    own = args.solver == "lcm" and student.is_dir() and not args.lora
    where = args.unet or str(student if own else args.model)
    unet = model.load_unet(where, args.solver == "lcm", args.lora, scales)
    if args.solver == "lcm":
        # called for its error: a wrong number of steps is refused before any work
        lcm_timesteps(model.schedule, args.steps, unet.config.lcm_grid or 50)
        if not unet.config.time_cond_proj_dim:
            print("note: the student has no guidance embedding: it does not read --guidance")
        require(not args.negative, "--negative: a student has no unconditional branch to lead "
                "away from; it works with --solver ddim")
    else:
        require(1 <= args.steps < len(model.schedule),
                f"--steps {args.steps}: expected 1 to {len(model.schedule) - 1} for ddim")
    size = parse_size(args.size, model.vae.factor) if args.size else None
    tell_cut(model.text_encoder, [*prompts, args.negative] if args.negative else prompts)
    if args.compile:
        compile_for_drawing(unet)

    facts = {"steps": args.steps, "solver": args.solver, "guidance": args.guidance,
             "negative": args.negative, "model": args.model, "unet": where}
    if args.lora:
        facts["lora"] = lora_files.as_text(args.lora, scales)
    loaded, drawing, shown = time.perf_counter(), 0.0, []
    bar = tqdm(total=math.ceil(len(prompts) / args.batch) * args.steps, unit="call", leave=False)
    for first in range(0, len(prompts), args.batch):
        part, begin = slice(first, first + args.batch), time.perf_counter()
        images = model.draw(
            unet, prompts[part], seeds[part], args.steps, args.guidance, args.solver, size,
            args.negative, lambda timesteps: ticking(timesteps, bar)).cpu()
        drawing += time.perf_counter() - begin
        for i, (image, prompt, seed) in enumerate(zip(images, prompts[part], seeds[part]), first):
            file = out / f"{i:05d}.png"
            save_png(to_pil(image), file, prompt=prompt, seed=seed, **facts)
            tqdm.write(f"{file}  {prompt}  (seed {seed})")
        shown += list(images[:GRID - len(shown)])
    bar.close()
    if len(shown) > 1:
        columns = args.n if args.n > 1 else (
            len(STYLES) if prompts == FIRST_LOOK else math.ceil(len(shown) ** 0.5))
        save_png(grid(torch.stack(shown), columns), out / "grid.png",
                 prompt=" | ".join(prompts[:len(shown)]), seed=args.seed, **facts)
        print(out / "grid.png")
    print(f"{loaded - start:.1f} s to load, {drawing:.2f} s for {len(prompts)} pictures "
          f"in {args.steps} steps "
          f"({device}, {str(dtype)[6:]}), peak memory {peak_memory(device):.2f} GiB")


def ticking(timesteps, bar):
    for t in timesteps:
        yield t
        bar.update()


if __name__ == "__main__":
    run(main)
