"""Remake the pocket: a small, real text-to-image stack in the Stable Diffusion folder layout, from
seven npm packages.

    npm pack emojibase-data@17.0.0 @lobehub/fluent-emoji-3d@1.1.0
    npm pack @iconify-json/fluent-emoji@1.2.7 @iconify-json/fluent-emoji-flat@1.2.6
    npm pack @iconify-json/noto@1.2.9 @iconify-json/noto-v1@1.2.5 @iconify-json/twemoji@1.2.5
    pip install resvg-py
    python pocket/build.py --packages . --stages all

On two cores or more, processes of one thread each train a network faster than one of many threads
(the teacher, half a million pictures: 2.2 hours on two cores, minutes on a GPU):

    OMP_NUM_THREADS=1 torchrun --nproc_per_node=2 pocket/build.py --stages teacher

Stages, in this order. Each is resumable (the same command goes on where it stopped, on any number
of processes), and each prints what it reached:

    data       11,169 captioned 64x64 pictures in six styles (emoji.py) -> data/train-000.tar and
               three tars of held-out ones: heldout, validation, unseen (webdataset)
    tokenizer  the CLIP BPE cut to 4,096 entries
    vae        64x64x3 <-> 16x16x4
    judge      CLIP with a ConvNeXt image tower; scores the results, takes part in no training
    reward     CLIP with a ViT image tower; the reward model
    teacher    text encoder (first trained against latents) + UNet
    student    plain LCM as long as train.py's default run, the shipped 2-step student, which is
               trained longer at a quarter of that run's reward, results.json, and two pictures
    fragile    (not among `all`) the reward without noise and blur in its training, which is easier
               to exploit: for experiment.py, in --work

Nothing but the judge's training sees the held-out pictures or captions before they are scored.
"""
import argparse
import collections
import functools
import io
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.functional import gaussian_blur

POCKET = Path(__file__).resolve().parent
sys.path.insert(0, str(POCKET.parent))
import emoji
from emoji import SIZE
from latent_rm import LatentRMConfig, LatentViT, clip_loss
from lcm_solver import NoiseSchedule
from pipeline import Pipeline, labelled_grid, save_png
from reward import PocketReward
from support import processes
from support.cli import autocast, pick_device, pick_precision, require, run
from support.kernels import fast_attention
from support.tokenizer import Tokenizer, write_tokenizer
from support.weights import write_whole
from text_encoder import TextConfig, TextEncoder, TextTower
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig

VOCABULARY = 4096
# Times --scale. About what made the pocket that ships (docs/pocket.md); with a GPU at hand reward
# and teacher gain by two to four times as much.
STEPS = {"vae": 9000, "judge": 2400, "reward": 1700, "text": 700, "teacher": 8000,
         "plain": 300, "student": 2000, "fragile": 1700}
BATCH = {"vae": 8, "judge": 128, "reward": 128, "text": 128, "teacher": 64, "fragile": 128}
# README's picture: words that a stranger knows at a glance
SHOWN = ("red apple", "cat face", "rocket", "firefighter", "snowman", "desert island", "mushroom",
         "octopus")


# ---------------------------------------------------------------- data

def stage_data(args):
    samples = emoji.read_families(args.packages)
    splits = emoji.hold_out(samples)
    emoji.write_shards(splits, args.out / "data")
    print(f"data: {len(samples) - sum(map(len, splits.values()))} pictures left out, which show a "
          "concept of unseen in another style, or a held-out pair with a skin tone")


def read_split(pocket, name):
    """-> uint8 images [N,3,64,64] and N captions of data/{name}-000.tar in a pocket, in file
    order."""
    images, captions = [], []
    with tarfile.open(pocket / f"data/{name}-000.tar") as tar:
        for member in tar:
            data = tar.extractfile(member).read()
            if member.name.endswith(".webp"):
                images.append(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
            else:
                captions.append(data.decode())
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), captions


def stage_tokenizer(args):
    write_tokenizer(args.out / "tokenizer", "sd1", VOCABULARY, 32)
    tokenizer = Tokenizer.from_pretrained(args.out / "tokenizer")
    lengths = [len(ids) for ids in tokenizer.encode(read_split(args.out, "train")[1])]
    print(f"tokenizer: {len(tokenizer)} entries; "
          f"captions take {np.mean(lengths):.1f} tokens on average, "
          f"{sum(n > 32 for n in lengths)} of {len(lengths)} more than 32")


# ---------------------------------------------------------------- training, shared by the stages

def fit(name, args, modules, loss_of_step, lr, ema=None, weight_decay=0.01, warmup=200):
    """AdamW with warm-up and cosine decay over STEPS[name] -> the number of steps done now.

    modules: {name: (module, lr factor)}. loss_of_step(step, generator) -> loss, of the rows of the
    batch that are this process's (`rows`); all processes draw the whole batch.
    State goes to args.work/{name}.pt every two minutes, so that the same command resumes.
    Ends with the EMA weights in the modules."""
    steps = max(1, round(STEPS[name] * args.scale))
    file = args.work / f"{name}.pt"
    groups = [{"params": list(m.parameters()), "factor": factor} for m, factor in modules.values()]
    parameters = [p for group in groups for p in group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay,
                                  fused=True)
    average = [p.detach().clone() for p in parameters] if ema else None
    first = 0
    if file.exists():
        state = torch.load(file, map_location=args.device)
        if state["steps"] != steps:
            sys.exit(f"{file} is of a stage of {state['steps']} steps, not {steps}: "
                     "remove it, or give the same --scale")
        for key, (module, _) in modules.items():
            module.load_state_dict(state["modules"][key])
        optimizer.load_state_dict(state["optimizer"])
        average, first = state["average"], state["step"]
        print(f"{name}: resumes at step {first}")

    def save(step):
        state = {"modules": {key: module.state_dict() for key, (module, _) in modules.items()},
                 "optimizer": optimizer.state_dict(),
                 "average": average, "step": step, "steps": steps}
        torch.save(state, file.with_suffix(".new"))
        file.with_suffix(".new").rename(file)

    losses, start, saved = [], time.time(), time.time()
    for step in range(first, steps):
        generator = torch.Generator().manual_seed(1_000_003 * step + 17)
        decay = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps))
        rate = lr * min(1, (step + 1) / warmup) * decay
        for group in optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        with fast_attention(args.device):
            loss = loss_of_step(step, generator)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
        processes.average([p.grad for p in parameters], args.world)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if ema:
            with torch.no_grad():
                torch._foreach_lerp_(average, parameters, 1 - min(ema, (step + 1) / (step + 10)))
        losses.append(loss.detach())
        if args.rank == 0 and ((step + 1) % 100 == 0 or step + 1 in (20, steps)):
            seconds = (time.time() - start) / (step + 1 - first)
            print(f"{name}: step {step + 1}/{steps}  loss {torch.stack(losses).mean():.4f}  "
                  f"{seconds:.3f} s/step  {seconds * (steps - step - 1) / 60:.1f} min left",
                  flush=True)
            losses.clear()
        if args.rank == 0 and (time.time() - saved > 120 or step + 1 == steps):
            save(step + 1)
            saved = time.time()
    if ema:
        with torch.no_grad():
            torch._foreach_copy_(parameters, average)
    return steps - first


def augment(images, generator, shift=6, flip=False):
    """uint8 [B,3,64,64] -> [-1,1], each picture moved by up to `shift` pixels on its white ground;
    with `flip`, half of them mirrored."""
    padded = F.pad(images, (shift,) * 4, value=255)
    moves = torch.randint(0, 2 * shift + 1, (len(images), 2), generator=generator).tolist()
    moved = [p[:, y:y + SIZE, x:x + SIZE] for p, (y, x) in zip(padded, moves)]
    out = torch.stack(moved).float() / 127.5 - 1
    if flip:
        chosen = torch.rand(len(images), generator=generator) < 0.5
        out[chosen] = out[chosen].flip(-1)
    return out


def warp(images, generator):
    """uint8 [B,3,64,64] -> [-1,1]: small random scale, rotation, shift, contrast and brightness.
    White comes in at the edges."""
    b = len(images)
    uniform = lambda low, high: low + (high - low) * torch.rand(b, generator=generator)
    scale, angle = uniform(0.85, 1.2), uniform(-0.2, 0.2)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    theta = torch.stack([cos, -sin, uniform(-0.15, 0.15),
                         sin, cos, uniform(-0.15, 0.15)], dim=1).view(b, 2, 3)
    ink = 1 - images.float() / 255  # so that the zeros of the padding are white
    grid = F.affine_grid(theta, ink.shape, align_corners=False)
    ink = F.grid_sample(ink, grid, align_corners=False)
    ink = ink * uniform(0.8, 1.15).view(b, 1, 1, 1) + uniform(-0.05, 0.05).view(b, 1, 1, 1)
    return (1 - 2 * ink).clamp(-1, 1)


def spoil(pictures, generator):
    """[-1,1]: half of the batch blurred, and all with noise, as generated pictures are: a score
    must not hang on sharpness or on a pixel's last bit."""
    half = len(pictures) // 2
    sigma = 0.3 + 0.9 * torch.rand((), generator=generator).item()
    pictures = torch.cat([gaussian_blur(pictures[:half], 5, sigma), pictures[half:]])
    level = 0.1 * torch.rand(len(pictures), 1, 1, 1, generator=generator)
    return pictures + level * torch.randn(pictures.shape, generator=generator)


def vary(captions, rng):
    """Captions as people type them: the label alone or with some of its tags, now and then with
    an article or without the style."""
    out = []
    for caption in captions:
        label, *more = caption.split(", ")
        tags, style = more[:-1], more[-1:]
        tags = rng.sample(tags, rng.randint(0, len(tags)))
        article = "a " if rng.random() < 0.2 else ""
        if rng.random() < 0.15:
            style = []
        out.append(article + ", ".join([label, *tags, *style]))
    return out


def rarity(captions):
    """How likely each picture is to be drawn, [N]: 1 / sqrt(the number of its style that share
    its concept). 227 flags, or a gesture in two skin tones, teach less than as many different
    things."""
    concepts = [(caption.split(", ")[0].split(":")[0], caption.split(", ")[-1])
                for caption in captions]
    count = collections.Counter(concepts)
    return torch.tensor([count[concept] ** -0.5 for concept in concepts])


def draw(count, batch, generator):
    return torch.randint(0, count, (batch,), generator=generator)


def faster(function, args):
    """torch.compile on a GPU. On a CPU it takes minutes and buys little."""
    return torch.compile(function) if args.device.type == "cuda" else function


def rows(args):
    """The rows of a batch that this process computes."""
    return slice(args.rank, None, args.world)


# ---------------------------------------------------------------- vae

def stage_vae(args):
    torch.manual_seed(0)
    # With as many groups as channels the norms would take each channel's mean from a picture, and
    # the decoder gets it back by one bright speck a picture.
    vae = VAE(VAEConfig(block_out_channels=(16, 32, 96), norm_num_groups=4, sample_size=SIZE))
    vae.to(args.device, memory_format=torch.channels_last)
    images = read_split(args.out, "train")[0]

    def loss_on(pictures, noise):
        with autocast(args.device, args.precision):
            mean, std = vae.posterior(pictures)
            out = vae.decode((mean + std * noise) * vae.config.scaling_factor).float()
        kl = 0.5 * (mean.float() ** 2 + std.float() ** 2 - 1 - 2 * std.float().log()).mean()
        # L1 keeps edges, L2 (with a weight at which both count alike) sees lone wrong pixels, and
        # L1 at half resolution keeps colours from greying while edges are still wrong
        coarse = (F.avg_pool2d(out, 2) - F.avg_pool2d(pictures, 2)).abs().mean()
        error = out - pictures
        return error.abs().mean() + 5 * error.square().mean() + coarse + 1e-5 * kl

    compiled = faster(loss_on, args)

    def loss_of_step(step, generator):
        pictures = augment(images[draw(len(images), BATCH["vae"], generator)], generator, flip=True)
        noise = torch.randn(BATCH["vae"], 4, SIZE // 4, SIZE // 4, generator=generator)
        pictures, noise = pictures[rows(args)], noise[rows(args)]
        pictures = pictures.to(args.device, memory_format=torch.channels_last)
        return compiled(pictures, noise.to(args.device))

    fit("vae", args, {"vae": (vae, 1.0)}, loss_of_step, 2e-3, ema=0.999)
    if args.rank > 0:
        return
    vae.eval()
    whiten(vae, images, args)
    held_out, captions = read_split(args.out, "heldout")
    held_out = held_out.to(args.device).float() / 127.5 - 1
    with torch.no_grad():
        mean, std = vae.posterior(held_out)
        out = vae.decode(mean * vae.config.scaling_factor).clamp(-1, 1)
    psnr = 10 * torch.log10(4 / (out - held_out).square().mean(dim=(1, 2, 3)))
    print(f"vae: held-out PSNR {psnr.mean():.2f} dB (" + ", ".join(
        f"{style} {psnr[[caption.endswith(', ' + style) for caption in captions]].mean():.1f}"
        for style in emoji.STYLES) + f"), posterior std {std.mean():.3f} (unscaled)")
    vae.save_pretrained(args.out / "vae", dtype=torch.float16)


@torch.no_grad()
def whiten(vae, images, args):
    """Give the scaled latents zero mean and unit variance per channel, with SD's own scaling factor
    0.18215, by folding an affine map into the two 1x1 convolutions. The function image -> image
    stays the same."""
    sums = torch.zeros(2, 4, dtype=torch.float64)  # mean and mean square of each channel
    for chunk in images.split(256):
        mean, _ = vae.posterior(chunk.to(args.device).float() / 127.5 - 1)
        moments = torch.stack([mean.mean(dim=(0, 2, 3)), mean.square().mean(dim=(0, 2, 3))])
        sums += moments.double().cpu() * len(chunk) / len(images)
    shift = sums[0]
    # new = (old - shift) * scale
    scale = 1 / (vae.config.scaling_factor * (sums[1] - shift ** 2).sqrt())
    shift, scale = shift.to(args.device).float(), scale.to(args.device).float()
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.bias[:4] = (quant.bias[:4] - shift) * scale
    quant.weight[:4] *= scale[:, None, None, None]
    quant.bias[4:] += 2 * scale.log()  # log variance
    post.bias += (post.weight[:, :, 0, 0] * shift).sum(1)
    post.weight /= scale[None, :, None, None]


# ---------------------------------------------------------------- judge and reward

CLIPS = {
    "judge": {
        "embed_dim": 192,
        "vision_cfg": {"image_size": SIZE, "timm_model_name": "convnext_atto",
                       "timm_model_pretrained": False, "timm_pool": "avg", "timm_proj": "linear"},
        "text_cfg": {"context_length": 32, "vocab_size": VOCABULARY, "width": 160, "heads": 5,
                     "layers": 2},
    },
    "reward": {
        "embed_dim": 192,
        "vision_cfg": {"image_size": SIZE, "layers": 5, "width": 192, "head_width": 32,
                       "patch_size": 8},
        "text_cfg": {"context_length": 32, "vocab_size": VOCABULARY, "width": 192, "heads": 6,
                     "layers": 2},
    },
}
CLIPS["fragile"] = CLIPS["reward"]


def stage_clip(name, args):
    torch.manual_seed({"judge": 1, "reward": 2, "fragile": 4}[name])
    tokenizer = Tokenizer.from_pretrained(args.out / "tokenizer")
    model = PocketReward(CLIPS[name], tokenizer).to(args.device)
    # The judge takes part in no loss: it may know what the pictures it judges should look like.
    splits = ["train", *emoji.SPLITS] if name == "judge" else ["train"]
    images, captions = zip(*(read_split(args.out, split) for split in splits))
    images, captions = torch.cat(images), sum(captions, [])

    def loss_on(pictures, ids):
        with autocast(args.device, args.precision):
            image = model.clip.encode_image(pictures, normalize=True)
            text = model.clip.encode_text(ids, normalize=True)
        return clip_loss(image, text, model.clip.logit_scale)

    def loss_of_step(step, generator):
        chosen = torch.randperm(len(images), generator=generator)[:BATCH[name]]
        pictures = warp(images[chosen], generator)
        if name != "fragile":
            pictures = spoil(pictures, generator)
        prompts = vary([captions[i] for i in chosen], random.Random(step))
        return loss_on(pictures.to(args.device), model.tokenize(prompts).to(args.device))

    fit(name, args, {"clip": (model.clip, 1.0)}, loss_of_step, 1e-3, ema=0.998, weight_decay=0.1)
    model.eval()
    out = args.out
    if name == "fragile":  # a folder of its own that load_reward takes: pocket=FOLDER
        out = args.work / name
        tokenizer.save_pretrained(out / "tokenizer")
    model.save_pretrained(out / ("judge" if name == "judge" else "reward"), dtype=torch.float16)
    for split in ("heldout", "unseen"):
        images, captions = read_split(args.out, split)
        with torch.no_grad():
            image = model.image_features(images.to(args.device).float() / 255)
            text = model.text_features(captions)
        found = (image @ text.T).argmax(1).cpu() == torch.arange(len(image))
        print(f"{name}: {split}: score {(image * text).sum(1).mean():.3f}, "
              f"image-to-text top-1 of {len(image)}: {found.float().mean():.1%}")
    print(f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")


# ---------------------------------------------------------------- teacher

TEXT_ENCODER = {
    "vocab_size": VOCABULARY, "hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4,
    "num_attention_heads": 6, "max_position_embeddings": 32,
}
UNET = {
    "sample_size": SIZE // 4, "block_out_channels": (64, 128, 160), "layers_per_block": 1,
    "cross_attention_dim": 192,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (2, 4, 5),
}
SCHEDULER = {
    "_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_start": 0.00085,
    "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "epsilon",
    "set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False,
    "timestep_spacing": "leading",
}


@torch.no_grad()
def encode_split(images, args):
    """-> scaled latents [N,4,16,16] of uint8 pictures [N,3,64,64]."""
    vae = VAE.from_pretrained(args.out, dtype=torch.float32, device=args.device)
    means = []
    for part in images.split(256):
        mean, _ = vae.posterior(part.to(args.device).float() / 127.5 - 1)
        means.append(mean)
    return torch.cat(means) * vae.config.scaling_factor


def fit_text_encoder(text_encoder, latents, captions, args):
    """The text encoder's first training: against latents [N,4,16,16], so that neither the reward
    nor the judge has any part in it. The image tower, the head and the scale serve only here."""
    model, tokenizer = text_encoder.model, text_encoder.tokenizer
    image_tower = LatentViT(LatentRMConfig(latent_size=SIZE // 4, patch_size=2, width=192, layers=3,
                                           heads=6, embed_dim=192)).to(args.device)
    head = torch.nn.Linear(192, 192, bias=False).to(args.device)
    scale = torch.nn.ParameterList([torch.tensor(math.log(1 / 0.07))]).to(args.device)

    def contrast(ids, z):
        with autocast(args.device, args.precision):
            hidden = model(ids)
            ends = (ids == tokenizer.eos_token_id).int().argmax(1)  # the first end token of each
            text = head(hidden[torch.arange(len(ids)), ends])
            image = image_tower(z)
        return clip_loss(F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1),
                         scale[0])

    def contrast_of_step(step, generator):
        chosen = draw(len(captions), BATCH["text"], generator)
        prompts = vary([captions[i] for i in chosen], random.Random(step))
        ids = text_encoder.tokenizer(prompts)
        return contrast(ids.to(args.device), latents[chosen.to(args.device)])

    modules = {"text": (model, 1.0), "image": (image_tower, 1.0),
               "head": (head, 1.0), "scale": (scale, 1.0)}
    fit("text", args, modules, contrast_of_step, 7e-4, weight_decay=0.1)


@torch.no_grad()
def tell_loss(denoise, tokenizer, args):
    """Print the loss on as many pictures of training and of `validation`, with the same noise: how
    much the teacher has learnt by heart."""
    told = []
    for split in ("train", "validation"):
        images, captions = read_split(args.out, split)
        count = min(128, len(images))
        latents = encode_split(images[:count], args)
        ids = tokenizer(captions[:count]).to(args.device)
        generator, losses = torch.Generator().manual_seed(0), []
        for _ in range(8):
            noise = torch.randn(latents.shape, generator=generator).to(args.device)
            t = torch.randint(0, 1000, (count,), generator=generator).to(args.device)
            losses.append(denoise(ids, latents, noise, t))
        told.append(f"{split} {torch.stack(losses).mean():.4f}")
    print(f"teacher: loss of {count} pictures: {', '.join(told)}")


def stage_teacher(args):
    torch.manual_seed(3)
    tokenizer = Tokenizer.from_pretrained(args.out / "tokenizer")
    model = TextTower(TextConfig(**TEXT_ENCODER))
    text_encoder = TextEncoder(model, tokenizer).to(args.device)
    unet, schedule = UNet(UNetConfig(**UNET)).to(args.device), NoiseSchedule(device=args.device)
    print(f"teacher: UNet {sum(p.numel() for p in unet.parameters()) / 1e6:.1f} M, "
          f"text encoder {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
    images, captions = read_split(args.out, "train")
    latents = encode_split(images, args)
    fit_text_encoder(text_encoder, latents, captions, args)
    likely = rarity(captions)

    def denoise(ids, z, noise, t):
        noisy = schedule.add_noise(z, noise, t)
        with autocast(args.device, args.precision):
            eps = unet(noisy, t, model(ids))
        snr = schedule.alphas_cumprod[t] / (1 - schedule.alphas_cumprod[t])
        # So every noise level has about the same part in the loss. With equal weights, or
        # min-SNR's, the highest levels have a fiftieth of it: those where the caption decides what
        # the picture is of, and where a 2-step student starts.
        return (snr ** -0.5 * (eps.float() - noise).square().mean(dim=(1, 2, 3))).mean()

    compiled = faster(denoise, args)

    def denoise_of_step(step, generator):
        count = BATCH["teacher"]
        chosen = torch.multinomial(likely, count, replacement=True, generator=generator)
        rng = random.Random(step)
        prompts = vary([captions[i] for i in chosen], rng)
        prompts = ["" if rng.random() < 0.1 else prompt for prompt in prompts]
        noise = torch.randn(count, *latents.shape[1:], generator=generator)
        # one timestep in each of as many equal parts of the schedule as there are pictures
        within = torch.rand(count, generator=generator, dtype=torch.float64)
        t = ((torch.arange(count) + within) / count * len(schedule)).long()
        part = rows(args)
        ids, z = text_encoder.tokenizer(prompts[part]), latents[chosen[part].to(args.device)]
        return compiled(ids.to(args.device), z, noise[part].to(args.device),
                        t[part].to(args.device))

    modules = {"unet": (unet, 1.0), "text": (model, 0.3)}
    if fit("teacher", args, modules, denoise_of_step, 1e-3, ema=0.999):
        for name in ("plain", "student"):  # distilled from an earlier one
            shutil.rmtree(args.work / name, ignore_errors=True)
    if args.rank > 0:
        return
    tell_loss(denoise, text_encoder.tokenizer, args)
    unet.save_pretrained(args.out / "unet", dtype=torch.float16)
    text_encoder.save_pretrained(args.out, dtype=torch.float16)
    (args.out / "scheduler").mkdir(exist_ok=True)
    file = args.out / "scheduler/scheduler_config.json"
    file.write_text(json.dumps(SCHEDULER, indent=2) + "\n")


# ---------------------------------------------------------------- student

def python(script, *options):
    """Run one of the project's scripts, as one would by hand."""
    command = [sys.executable, str(POCKET.parent / script), *map(str, options)]
    require(subprocess.run(command).returncode == 0,
            f"{' '.join(command[1:])} failed, for the reason above")


def distil(name, args, *options):
    """-> the folder of the 2-step student."""
    out = args.work / name
    steps = max(1, round(STEPS[name] * args.scale))
    python("train.py", "--teacher", args.out, "--data", args.out / "data/train-*.tar", "--out", out,
           "--steps", steps, "--no-evaluate", *options)
    return out / "unet_target"


def compare(unet, out, args, *options):
    """-> the rows of evaluate.py's table, with the scores of reward and judge, but not where the
    pictures lie."""
    rehearsal = ["--limit", 8] if args.scale < 0.1 else []
    python("evaluate.py", "--unet", unet, "--out", out, "--model", args.out, "--reward",
           reward_of(args), "--judge", args.out / "judge", "--data",
           args.out / "data/heldout-*.tar", *options, *rehearsal)
    rows = json.loads((out / "results.json").read_text())["rows"]
    rows = [row for row in rows if row["kind"] != "recorded"]  # of the pocket that was here before
    for row in rows:
        row["scores"] = {key: row["scores"][key] for key in ("reward", "judge")}
        row["pictures"] = None
    return rows


def reward_of(args):
    return "pocket" if args.out == POCKET else f"pocket={args.out}"


def stage_student(args):
    plain = distil("plain", args, "--reward", "none")  # as long as the default run
    results = {"plain": compare(plain, args.work / "plain", args, "--teacher-steps", 0)[-1]}
    write_whole(args.out / "results.json", json.dumps(results) + "\n")
    # seven times as long as the default run: crisper. The reward at a quarter: of what it can push
    # a student to, that is as much
    student = distil("student", args, "--reward", reward_of(args), "--reward-scale", 0.125)
    UNet.from_pretrained(student).save_pretrained(args.out / "student", dtype=torch.float16)
    results["shipped"] = compare(args.out / "student", args.work / "shipped", args,
                                 "--real", "--teacher-n", 4)
    write_whole(args.out / "results.json", json.dumps(results) + "\n")
    draw_words(args)
    draw_held_out(args)


class Artists:
    """The teacher in 50 steps and the shipped student in two, w = 3."""

    def __init__(self, args):
        self.model = Pipeline.from_pretrained(args.out, args.device, args.precision)
        self.teacher = self.model.load_unet(str(args.out), student=False)
        self.student = self.model.load_unet(str(args.out / "student"), student=True)

    def __call__(self, prompts):
        """-> two tensors [B,3,64,64]"""
        seeds = range(len(prompts))
        return (self.model.draw(self.teacher, prompts, seeds, 50, 3.0, "ddim").cpu(),
                self.model.draw(self.student, prompts, seeds, 2, 3.0).cpu())


def draw_words(args):
    """words.png, README's picture: rows are words, columns styles, by student and teacher."""
    teacher, student = Artists(args)([f"{word}, {style}" for word in SHOWN
                                      for style in emoji.STYLES])
    by_word = (len(SHOWN), len(emoji.STYLES), 3, SIZE, SIZE)
    gap = torch.ones(len(SHOWN), 1, 3, SIZE, SIZE)
    images = torch.cat([student.view(by_word), gap, teacher.view(by_word)], dim=1)
    columns = [*emoji.STYLES, "", *emoji.STYLES]
    sheet = labelled_grid(images.flatten(0, 1), [*SHOWN], columns, scale=2)
    save_png(sheet, args.out / "words.png")


def draw_held_out(args, count=60, columns=10):
    """heldout.png: held-out pairs drawn by chance, real pictures, teacher's and student's."""
    images, captions = read_split(args.out, "heldout")
    chosen = sorted(random.Random(0).sample(range(len(captions)), min(count, len(captions))))
    artists, sheets = Artists(args), []
    for first in range(0, len(chosen), columns):
        some = chosen[first:first + columns]
        prompts = [captions[i] for i in some]
        short = [f"{prompt.split(', ')[0]}, {prompt.split(', ')[-1]}" for prompt in prompts]
        tensors = torch.cat([images[some].float() / 255, *artists(prompts)])
        names = ["real", "teacher\n50 steps", "student\n2 steps"]
        sheets.append(labelled_grid(tensors, names, short, scale=2))
    page = Image.new("RGB", (max(s.width for s in sheets), sum(s.height for s in sheets)), "white")
    top = 0
    for sheet in sheets:
        page.paste(sheet, (0, top))
        top += sheet.height
    save_png(page, args.out / "heldout.png")


STAGES = {
    "data": stage_data,
    "tokenizer": stage_tokenizer,
    "vae": stage_vae,
    "judge": functools.partial(stage_clip, "judge"),
    "reward": functools.partial(stage_clip, "reward"),
    "teacher": stage_teacher,
    "student": stage_student,
    "fragile": functools.partial(stage_clip, "fragile"),
}

PARALLEL = {"vae", "teacher"}  # a contrast is within the whole batch: the CLIPs are not


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", default="all", help="comma-separated, or all")
    parser.add_argument("--packages", type=Path, default=Path("."),
                        help="folder with the .tgz of npm pack")
    parser.add_argument("--out", type=Path, default=POCKET, help="folder that becomes the pocket")
    parser.add_argument("--work", type=Path, default=POCKET / "state",
                        help="folder for the state of unfinished stages")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--scale", type=float, default=1.0,
                        help="multiplies every stage's number of steps (0.005: a rehearsal)")
    args = parser.parse_args()
    args.out, args.work = args.out.resolve(), args.work.resolve()
    args.device = pick_device(args.device)
    args.precision = pick_precision("auto", args.device)
    args.rank, args.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.world > 1:
        torch.distributed.init_process_group("gloo")
    args.work.mkdir(parents=True, exist_ok=True)
    every = [stage for stage in STAGES if stage != "fragile"]
    chosen = every if args.stages == "all" else args.stages.split(",")
    if set(chosen) - set(STAGES):
        parser.error(f"--stages {args.stages}: expected some of {','.join(STAGES)}")
    if args.world > 1 and set(chosen) - PARALLEL:
        parser.error(f"--stages {args.stages} on {args.world} processes: only "
                     f"{','.join(sorted(PARALLEL))} are shared out; run the others on one")
    for stage in chosen:
        start = time.time()
        STAGES[stage](args)
        if args.rank == 0:
            print(f"{stage}: done in {(time.time() - start) / 60:.1f} min", flush=True)
    processes.end(args.world, torch.device("cpu"))


if __name__ == "__main__":
    run(main)
