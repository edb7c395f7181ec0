"""A prompt becomes a picture: `Pipeline`, the frozen parts around a UNet, and pictures as PIL
images and PNG files."""
import math
import textwrap
from dataclasses import dataclass, replace

import torch
from PIL import Image, ImageDraw, ImageFont

from lcm_solver import NoiseSchedule, ScheduleConfig, draw_noise, sample_ddim, sample_lcm
from lora import LoRA
from support import lora_files
from support.cli import autocast, require
from support.kernels import prepare_for_inference
from support.pictures import save_png as save_png, to_pil
from text_encoder import TextEncoder
from unet import UNet
from vae import VAE


@dataclass
class Pipeline:
    """The frozen parts around a UNet: VAE and text encoder with weights of `dtype`, and the noise
    schedule."""
    vae: VAE
    text_encoder: TextEncoder
    schedule: NoiseSchedule
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def from_pretrained(cls, path, device, dtype):
        """path: a model folder, a single-file checkpoint or a hub id. Raises InputError if a part
        is missing or does not fit."""
        vae = prepare_for_inference(VAE.from_pretrained(path, dtype, device).requires_grad_(False))
        text_encoder = TextEncoder.from_pretrained(path, dtype, device).requires_grad_(False)
        schedule = NoiseSchedule(ScheduleConfig.from_pretrained(path), device)
        return cls(vae, text_encoder, schedule, device, dtype)

    def load_unet(self, where, student, loras=(), scales=()):
        """-> the UNet of `where` (see UNet.from_pretrained), with these LoRA files merged at these
        scales, checked, frozen and prepared for drawing in `dtype`."""
        if loras:
            unet = merged(where, loras, scales, self.dtype, self.device, student)
        else:
            unet = UNet.from_pretrained(where, dtype=self.dtype, device=self.device)
        return prepare_for_inference(self.check(unet, where, student).requires_grad_(False))

    def check(self, unet, where, student):
        """-> the UNet, or InputError unless it belongs to this model and is a student (one with a
        guidance embedding, or that was distilled without) if `student`, else a teacher. where:
        names the UNet in messages."""
        config, latents = unet.config, self.vae.config.latent_channels
        require(config.in_channels == config.out_channels == latents,
                f"{where}: a UNet from {config.in_channels} to {config.out_channels} channels, "
                f"but the VAE's latents have {latents}; "
                "inpainting, depth and upscaling models do not work here")
        if student:
            require(config.distilled,
                    f"{where}: a teacher (no guidance embedding); "
                    "expected a student (teachers: sample.py --solver ddim)")
        else:
            require(not config.distilled,
                    f"{where}: a student; expected a teacher (students: sample.py --solver lcm)")
        require(config.cross_attention_dim == self.text_encoder.dim,
                f"{where}: the UNet's config says cross_attention_dim "
                f"{config.cross_attention_dim}, the text encoder gives {self.text_encoder.dim}: "
                "do the UNet and the model belong together?")
        return unet

    def decode(self, latents):
        """Scaled latents [B,4,h,w] -> images [B,3,H,W] in [0,1], float32."""
        return (self.vae.decode(latents).float() / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def draw(self, unet, prompts, seeds, steps, w, solver="lcm", size=None, negative="",
             progress=iter, see=None):
        """B prompts and B seeds -> images [B,3,H,W] in [0,1], float32.

        w: guidance, cond + w (cond - uncond). solver: "lcm" for a student, "ddim" for a teacher.
        size: (H, W) in pixels; what the UNet was trained at if None. negative: the prompt that
        ddim's guidance leads away from. progress: wraps the list of timesteps, as tqdm does. see:
        called with a student's scaled latents at each step."""
        height, width = size or (unet.config.sample_size * self.vae.factor,) * 2
        shape = (len(prompts), unet.config.in_channels,
                 height // self.vae.factor, width // self.vae.factor)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        latents = draw_noise(shape, generators, self.device)  # [B, 4, H/f, W/f]
        # In training the UNet's weights are float32; autocast computes in self.dtype all the same.
        # A UNet loaded in self.dtype needs none (and autocast in float32 does nothing).
        master = unet.conv_in.weight.dtype == torch.float32
        with autocast(self.device, self.dtype if master else torch.float32):
            context = self.text_encoder(prompts)  # [B, L, D]
            if solver == "lcm":
                latents = sample_lcm(
                    unet, self.schedule, latents, context, w, steps, generators, progress, see)
            else:
                uncond_context = self.text_encoder([negative])  # [1, L, D]
                latents = sample_ddim(
                    unet, self.schedule, latents, context, uncond_context, w, steps, progress)
            return self.decode(latents)

    @torch.no_grad()
    def round_trip(self, images):
        """Images [N,3,H,W] in [0,1] -> the same through the VAE (the posterior's mean, decoded),
        float32 on the CPU."""
        decoded = []
        for part in (2 * images - 1).split(64):
            latents = self.vae.posterior(part.to(self.device))[0] * self.vae.config.scaling_factor
            decoded.append(self.decode(latents).cpu())
        return torch.cat(decoded)


def merged(path, files, scales, dtype=None, device=None, student=True):
    """The UNet of `path` with LoRA files merged at these scales. It is a student (Pipeline.check)
    if one of them says so, or `student`, since published LCM-LoRAs say nothing: of 50 points."""
    facts = lora_files.facts(files)
    unet = UNet.from_pretrained(path, facts.pop("time_cond_proj_dim"), dtype, device, **facts)
    if student and not unet.config.distilled:
        print(f"{' '.join(map(str, files))}: says nothing of a student; taken for an LCM-LoRA of "
              "50 points (a style for the teacher is drawn with --solver ddim)")
        unet.config = replace(unet.config, lcm_grid=50)
    for file, scale in zip(files, scales):
        LoRA.from_pretrained(file, unet).set_scale(scale).merge(unet)
    return unet


def grid(images, columns):
    """[N,3,H,W] in [0,1] -> one PIL image of the pictures in rows of `columns`, on white."""
    n, _, h, w = images.shape
    sheet = Image.new("RGB", (columns * w, math.ceil(n / columns) * h), "white")
    for i, image in enumerate(images):
        sheet.paste(to_pil(image), (i % columns * w, i // columns * h))
    return sheet


def labelled_grid(images, row_names, captions, scale=1):
    """[R*C,3,H,W] in [0,1], row by row -> one PIL image with R names at the left of the rows and C
    captions above the columns. scale: each pixel becomes scale x scale of them."""
    columns = len(captions)
    n, _, h, w = images.shape
    pictures = grid(images, columns).resize(
        (columns * w * scale, n // columns * h * scale), Image.Resampling.NEAREST)
    w, h, size = w * scale, h * scale, 13
    font = ImageFont.load_default(size)
    above = [textwrap.fill(caption, max(8, w // 7)) for caption in captions]
    top = (size + 4) * max(text.count("\n") + 1 for text in above) + 8
    left = 12 + max(int(font.getlength(line)) for name in row_names for line in name.split("\n"))
    sheet = Image.new("RGB", (left + pictures.width, top + pictures.height), "white")
    sheet.paste(pictures, (left, top))
    draw = ImageDraw.Draw(sheet)
    for i, text in enumerate(above):
        draw.multiline_text((left + (i + 0.5) * w, top - 6), text, "black", font, anchor="md",
                            align="center")
    for i, name in enumerate(row_names):
        draw.multiline_text((left - 8, top + (i + 0.5) * h), name, "black", font, anchor="rm",
                            align="right")
    return sheet
