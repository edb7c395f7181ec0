"""Prompts -> PNG.

    python sample.py --steps 2 --prompt "a red apple"                          # the student that ships in pocket/student
    python sample.py --steps 2 --unet runs/pocket/unet_target                  # a student of your own
    python sample.py --solver ddim --steps 50 --guidance 3                     # the teacher
    python sample.py --model v2-1_512-ema-pruned.safetensors --solver ddim --steps 50 --guidance 6.5 --prompt "a lighthouse"
"""
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from cli import at_least, autocast, make_folder, option, parse, peak_memory, pick_device, pick_precision, require, run
from lcm_solver import NoiseSchedule, ScheduleConfig, draw_noise, lcm_timesteps, sample_ddim, sample_lcm
from text_encoder import TextEncoder
from unet import UNet
from vae import VAE
from weights import InputError

POCKET = Path(__file__).resolve().parent / "pocket"
PROMPTS = ["a red apple", "a smiling cat", "rocket", "a firefighter", "a green heart", "a snowman"]
GRID = 64  # pictures that grid.png shows at most


@dataclass
class Config:
    prompt: list[str] = option((), "a prompt; may be given several times (without any: six for a first look)", list=True)
    prompts: str | None = option(None, "a text file with one prompt a line")
    steps: int = option(2, "network calls per picture (ddim: twice as many passes, for guidance)")
    n: int = option(1, "pictures per prompt")
    seed: int = option(0, "picture i of a prompt uses seed + i")
    size: str | None = option(None, "HxW in pixels, multiples of the VAE's factor (8); what the model was trained at if not given")
    model: str = option(str(POCKET), "VAE, text encoder, scheduler and UNet: a folder in the diffusers layout, a single file, or a hub id")
    unet: str | None = option(None, "UNet from elsewhere: a folder, file or hub id (default: MODEL/student for lcm if there is one, else MODEL's)")
    solver: str = option("lcm", "lcm: a student; ddim: a teacher", choices=("lcm", "ddim"))
    guidance: float = option(3.0, "w of the LCM paper: cond + w (cond - uncond); diffusers' guidance_scale is w + 1")
    negative: str = option("", "negative prompt (ddim): what guidance leads away from")
    device: str = option("auto", "auto, cpu or cuda")
    precision: str = option("auto", "arithmetic of the networks", choices=("auto", "bf16", "fp32"))
    compile: bool = option(False, "torch.compile the UNet: slower start, faster pictures")
    batch: int = option(16, "pictures at a time")
    out: str = option("samples", "folder for the PNGs")


@dataclass
class Model:
    """The frozen parts around a UNet: VAE and text encoder with weights of `dtype`, and the noise schedule."""
    vae: VAE
    text_encoder: TextEncoder
    schedule: NoiseSchedule
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def from_pretrained(cls, path, device, dtype):
        """path: a model folder, a single-file checkpoint or a hub id."""
        return cls(VAE.from_pretrained(path, dtype, device).requires_grad_(False), TextEncoder.from_pretrained(path, dtype, device).requires_grad_(False),
                   NoiseSchedule(ScheduleConfig.from_pretrained(path), device), device, dtype)

    def check(self, unet, where, student):
        """-> the UNet, if it belongs to this model and is a student (has a guidance embedding) or a teacher, as `student` says."""
        latents = self.vae.config.latent_channels
        require(unet.config.in_channels == unet.config.out_channels == latents, f"{where}: a UNet from {unet.config.in_channels} to "
                f"{unet.config.out_channels} channels, but the VAE's latents have {latents}; inpainting, depth and upscaling models do not work here")
        require(bool(unet.config.time_cond_proj_dim) == student, f"{where}: " + (
            "a teacher (no guidance embedding); expected a student (teachers: sample.py --solver ddim)" if student else
            "a student; expected a teacher (students: sample.py --solver lcm)"))
        require(unet.config.cross_attention_dim == self.text_encoder.dim,
                f"{where}: the UNet's config says cross_attention_dim {unet.config.cross_attention_dim}, the text encoder gives "
                f"{self.text_encoder.dim}: do the UNet and the model belong together?")
        return unet

    def decode(self, latents):
        """Scaled latents [B,4,h,w] -> images [B,3,H,W] in [0,1], float32."""
        return (self.vae.decode(latents).float() / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def draw(self, unet, prompts, seeds, steps, w, solver="lcm", size=None, negative="", progress=iter):
        """B prompts and B seeds -> images [B,3,H,W] in [0,1], float32. size: (H, W) in pixels; negative: prompt that ddim's
        guidance leads away from; progress: wraps the list of timesteps, as tqdm does."""
        h, w_ = size or (unet.config.sample_size * self.vae.factor,) * 2
        shape = (len(prompts), unet.config.in_channels, h // self.vae.factor, w_ // self.vae.factor)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        latents = draw_noise(shape, generators, self.device)
        master = unet.conv_in.weight.dtype == torch.float32  # weights in training: computed with in self.dtype all the same
        with autocast(self.device, self.dtype if master else torch.float32):
            context = self.text_encoder(prompts)
            if solver == "lcm":
                latents = sample_lcm(unet, self.schedule, latents, context, w, steps, generators, progress)
            else:
                latents = sample_ddim(unet, self.schedule, latents, context, self.text_encoder([negative]), w, steps, progress)
            return self.decode(latents)

    @torch.no_grad()
    def round_trip(self, images):
        """Images [N,3,H,W] in [0,1] -> the same through the VAE, float32 on the CPU."""
        decoded = []
        for part in (2 * images - 1).split(64):
            latents = self.vae.posterior(part.to(self.device))[0] * self.vae.config.scaling_factor
            decoded.append(self.decode(latents).cpu())
        return torch.cat(decoded)


def to_pil(image):
    """[3,H,W] in [0,1] -> PIL image."""
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def grid(images, columns):
    """[N,3,H,W] in [0,1] -> one PIL image of the pictures in rows of `columns`, on white."""
    n, _, h, w = images.shape
    sheet = Image.new("RGB", (columns * w, math.ceil(n / columns) * h), "white")
    for i, image in enumerate(images):
        sheet.paste(to_pil(image), (i % columns * w, i // columns * h))
    return sheet


def save_png(image, file, **text):
    info = PngInfo()
    for key, value in text.items():
        info.add_itxt(key, str(value))
    new = file.with_suffix(".new")
    image.save(new, "PNG", pnginfo=info)
    new.rename(file)


def read_prompts(args):
    prompts = list(args.prompt)
    if args.prompts:
        try:
            prompts += [line.strip() for line in Path(args.prompts).read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--prompts {args.prompts}: not readable ({error}); expected a UTF-8 text file, one prompt a line") from None
    return prompts or PROMPTS


def parse_size(text, factor):
    try:
        h, w = (int(x) for x in text.lower().split("x"))
    except ValueError:
        raise InputError(f"--size {text}: expected HxW in pixels, such as 512x768") from None
    require(h > 0 and w > 0 and h % factor == w % factor == 0, f"--size {text}: height and width must be multiples of {factor}")
    return h, w


def main():
    start = time.perf_counter()
    args = parse(Config(), __doc__)
    device = pick_device(args.device)
    dtype = pick_precision(args.precision, device)
    at_least(1, args, "n", "batch")
    require(0 <= args.seed <= 2**63 - args.n, f"--seed {args.seed}: expected 0 or more, and less than 2^63 with --n")
    prompts = [prompt for prompt in read_prompts(args) for _ in range(args.n)]
    seeds = [args.seed + i for _ in range(len(prompts) // args.n) for i in range(args.n)]
    out = make_folder(args.out)

    model = Model.from_pretrained(args.model, device, dtype)
    student = Path(args.model) / "student"
    where = args.unet or str(student if args.solver == "lcm" and student.is_dir() else args.model)
    unet = model.check(UNet.from_pretrained(where, dtype=dtype, device=device), where, student=args.solver == "lcm")
    if args.solver == "lcm":
        lcm_timesteps(model.schedule, args.steps, unet.config.lcm_grid or 50)  # refuses a wrong number of steps before any work
        require(not args.negative, "--negative: a student has no unconditional branch to lead away from; it works with --solver ddim")
    else:
        require(1 <= args.steps < len(model.schedule), f"--steps {args.steps}: expected 1 to {len(model.schedule) - 1} for ddim")
    size = parse_size(args.size, model.vae.factor) if args.size else None
    if args.compile:
        unet.compile()

    facts = {"steps": args.steps, "solver": args.solver, "guidance": args.guidance, "negative": args.negative, "model": args.model, "unet": where}
    loaded, drawing, shown = time.perf_counter(), 0.0, []
    bar = tqdm(total=math.ceil(len(prompts) / args.batch) * args.steps, unit="call", leave=False)
    for first in range(0, len(prompts), args.batch):
        part, begin = slice(first, first + args.batch), time.perf_counter()
        images = model.draw(unet, prompts[part], seeds[part], args.steps, args.guidance, args.solver, size, args.negative,
                            lambda timesteps: ticking(timesteps, bar)).cpu()
        drawing += time.perf_counter() - begin
        for i, (image, prompt, seed) in enumerate(zip(images, prompts[part], seeds[part]), first):
            save_png(to_pil(image), out / f"{i:05d}.png", prompt=prompt, seed=seed, **facts)
            tqdm.write(f"{out / f'{i:05d}.png'}  {prompt}  (seed {seed})")
        shown += list(images[:GRID - len(shown)])
    bar.close()
    if len(shown) > 1:
        columns = args.n if args.n > 1 else math.ceil(len(shown) ** 0.5)
        save_png(grid(torch.stack(shown), columns), out / "grid.png", prompt=" | ".join(prompts[:len(shown)]), seed=args.seed, **facts)
        print(out / "grid.png")
    print(f"{loaded - start:.1f} s to load, {drawing:.2f} s for {len(prompts)} pictures in {args.steps} steps "
          f"({device}, {str(dtype)[6:]}), peak memory {peak_memory(device):.2f} GiB")


def ticking(timesteps, bar):
    for t in timesteps:
        yield t
        bar.update()


if __name__ == "__main__":
    run(main)
