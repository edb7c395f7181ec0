"""Seconds, TFLOP/s and memory of the parts, on the pocket or at SD2.1's size with random weights;
beside other ways to do the same work if asked.

    python bench.py                                       # the pocket
    python bench.py --size sd21 --rows unet,vae_decode    # some of the rows
    python bench.py --size sd21 --rows memory             # what training takes, by card
    # the first thing to run on a new GPU
    python bench.py --size sd21 --device cuda --compile --against diffusers,published
    python bench.py --size sd21 --rows unet --sweep batch # how time and memory grow

    unet             one call of the student in the arithmetic of sample.py
    vae_decode       latents -> image
    text_encode      prompt -> embeddings, tokenizer included
    picture          prompt -> image in 2 steps: all of the above, the sampler included
    training_step    distillation loss without reward, and its backward pass (train.py)
    reward_direct    direct reward: decode, score, and back to the latents
    reward_latent    the same reward through the latent proxy: its score and back to the latents,
                     three decoded candidates compared by the expert, the proxy's own loss and back
                     to its top
    reward_student   the student's part of that: the price of one more rewarded row that the expert
                     does not compare
    optimizer        gradient clipping, AdamW and EMA
    memory           not timed, and alone: GB of a training step, of full and of LoRA students, and
                     the smallest card that holds it (support/memory.py counts); on a GPU measured
                     too

Every row is timed --repeats times after --warmup calls; the first call, which compiles, is apart.
The limit is the time that its convolutions and matrix products would take at the speed that one
large convolution and one large product reach in the same run; the share is that over the median.

Others do the same work on the same weights, their calls between ours. The ratio is their median
over ours: above 1 we are faster.

    diffusers        its networks and pipeline: channels_last, scaled_dot_product_attention, the
                     same precision, compiled if ours is
    openvino         (CPU) the UNet and the decoder compiled by it, for latency; our sampler
    published        the published script's order of work by diffusers' networks: a teacher's pass
                     for the prompt and one for no prompt, decoding with all activations kept, AdamW
                     and EMA parameter by parameter

--sweep repeats the rows for several values of one option, each in a process of its own, and fits
time and peak memory ~ value^exponent. --sweep processes trains the pocket by train.py on as many
processes, no more than there are GPUs or cores. The last line is one JSON document.
"""
import dataclasses
import functools
import gc
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import (
    FlopCounterMode,
    conv_flop_count,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

import latent_rm as proxy
import train
from lcm_solver import DDIMSolver, NoiseSchedule, guidance_embedding
from lora import LoRA, sharing
from pipeline import Pipeline
from reward import ClipReward, load_reward, recompute_activations
from support import cli, memory, optimizers, peers
from support.cli import POCKET, at_least, option, parse, require, run
from support.kernels import (
    compile_blocks,
    compile_for_drawing,
    fast_attention,
    prepare_for_inference,
)
from support.tokenizer import built_in
from support.weights import InputError
from text_encoder import TextEncoder, TextTower
from unet import ResnetBlock, Transformer, UNet, UNetConfig
from vae import VAE

REWARD_ROWS = "reward_direct", "reward_latent", "reward_student"
ROWS = ("unet", "vae_decode", "text_encode", "picture", "training_step", *REWARD_ROWS, "optimizer")
PROMPT = "a photo of an astronaut riding a horse"
PEERS = "diffusers", "openvino", "published"
SWEEPS = {"batch": (1, 2, 4, 8), "resolution": (0.5, 1, 1.5, 2), "steps": (1, 2, 4, 8),
          "processes": (1, 2, 4, 8)}


@dataclass
class Config:
    size: str = option(
        "pocket", "pocket, or sd21 with random weights", choices=("pocket", "sd21"),
        group="what to time")
    rows: str = option("all", f"some of {','.join(ROWS)}, or memory")
    batch: int = option(1, "pictures at a time")
    resolution: int | None = option(None, "side of the pictures (default: 64 or 512)")
    lora: int = option(64, "rank of the LoRA of the row memory")
    steps: int = option(2, "network calls of the row picture")
    against: str | None = option(
        None, f"time the same work done otherwise, between our calls: some of {','.join(PEERS)}")
    sweep: str | None = option(
        None, "time the rows for several values of this option (resolution: times the default; "
        "processes: of train.py on the pocket)",
        choices=tuple(SWEEPS))
    warmup: int = option(3, "calls before the clock starts")
    repeats: int = option(7, "calls timed")

    device: str = option("auto", "auto, cpu or cuda", group="the machine")
    precision: str = option("auto", "arithmetic of the networks", choices=("auto", "bf16", "fp32"))
    compile: bool = option(False, "torch.compile the networks")
    grad_checkpoint: bool = option(
        False, "training step and direct reward: recompute activations in the backward pass")


# --------------------------------------------------------------------------------------- the work

def random_model(device, dtype):
    """A Pipeline of SD2.1's size with random weights, and a student's UNet."""
    with torch.device(device):
        networks = (VAE(), TextEncoder(TextTower(), built_in("sd2")),
                    UNet(UNetConfig(time_cond_proj_dim=train.W_DIM)))
    vae, text_encoder, unet = (net.to(dtype).eval().requires_grad_(False) for net in networks)
    vae.to(memory_format=torch.channels_last)  # as VAE.from_pretrained does at this size
    prepare_for_inference(vae)
    return Pipeline(vae, text_encoder, NoiseSchedule(device=device), device, dtype), unet


def rewards(size, device, dtype, side, grad_checkpoint=False):
    """The expert and the latent proxy, for latents of that side: the pocket's reward and a proxy of
    the pocket's size, or HPSv2.1's network and the published proxy's, with random weights."""
    with device:
        latent_rm = proxy.new_latent_rm(proxy.Config(size=size), (4, side, side)).train()
    latent_rm.train_top(train.Config.rm_image_layers, train.Config.rm_text_layers)
    if size == "pocket":
        return load_reward("pocket", device, dtype, grad_checkpoint), latent_rm
    with device:
        clip = open_clip.CLIP(**open_clip.get_model_config("ViT-H-14"))
        reward = ClipReward(clip, open_clip.get_tokenizer("ViT-H-14"), "longest")
    if grad_checkpoint:
        recompute_activations(reward)
    return reward.to(dtype).eval().requires_grad_(False), latent_rm


def reward_work(model, reward, latent_rm, z, prompts, settings):
    """{row: function}. z: scaled latents [B,4,h,w]."""
    prediction = z.clone().requires_grad_()

    def run(loss):
        def call():
            with fast_attention(z.device):
                with cli.autocast(z.device, model.dtype):
                    value = loss()
                value.backward()
            prediction.grad = None
            latent_rm.zero_grad(set_to_none=True)
        return call

    def direct():
        return train.direct_reward(model, reward, prediction, prompts, settings)[0]

    def student():
        text = latent_rm.text_features(prompts)
        return train.latent_reward(model, latent_rm, prediction, text)

    def latent():
        text = latent_rm.text_features(prompts)
        score = train.latent_reward(model, latent_rm, prediction, text)
        candidates = {"prediction": z, "ema": z, "real": z}
        fitted, _ = train.proxy_loss(
            model, latent_rm, reward, candidates, prompts, text, settings)
        return score + fitted

    return dict(zip(REWARD_ROWS, (run(direct), run(latent), run(student))))


def training_work(args, model, unet, student, target, images, prompts, draws):
    """{row: function} of the training step without reward, and of the optimizer."""
    solver = DDIMSolver(model.schedule, 50)
    settings = train.Config(reward="none", ddim_steps=50)
    weights, target_weights = list(student.parameters()), list(target.parameters())
    optimizer = torch.optim.AdamW(weights, lr=1e-6, fused=True)  # as in train.py

    def training_step():
        with fast_attention(model.device):
            with cli.autocast(model.device, model.dtype):
                loss, _ = train.distillation_loss(
                    model, unet, student, target, None, solver, (images, prompts, draws), settings)
            loss.backward()
        student.zero_grad(set_to_none=True)

    def update():
        for p in weights:
            p.grad = torch.zeros_like(p)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        torch._foreach_lerp_(target_weights, [p.detach() for p in weights], 0.05)
        student.zero_grad(set_to_none=True)

    return {"training_step": training_step, "optimizer": update}


def published_update(student, target):
    """The optimizer's row as the published script does it."""
    weights, target_weights = list(student.parameters()), list(target.parameters())
    optimizer = torch.optim.AdamW(weights, lr=1e-6)

    def update():
        for p in weights:
            p.grad = torch.zeros_like(p)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        for moving, p in zip(target_weights, weights):
            moving.detach().mul_(0.95).add_(p.detach(), alpha=0.05)
        student.zero_grad(set_to_none=True)
    return update


def inputs(args, model, unet):
    """-> latents [B,4,h,w], timesteps [B], embeddings of the prompt, embedding of w: a UNet's."""
    side = side_of(args, model, unet)
    latents = torch.randn(args.batch, 4, side, side, device=model.device, dtype=model.dtype)
    t = torch.full((args.batch,), 499, device=model.device)
    w = torch.full((args.batch,), 3.0, device=model.device)
    with torch.no_grad():
        context = model.text_encoder([PROMPT] * args.batch)
    return latents, t, context, guidance_embedding(w, train.W_DIM).to(model.dtype)


def side_of(args, model, unet):
    """The side of a latent."""
    return args.resolution // model.vae.factor if args.resolution else unet.config.sample_size


def work(args, model, unet, trained, teacher=None):
    """{row: function to time}. unet: draws; teacher: the training step's, of the same weights
    (default: unet); trained(): -> student and target, float32."""
    device = model.device
    side = side_of(args, model, unet)
    z = torch.randn(args.batch, 4, side, side, device=device)
    prompts = [PROMPT] * args.batch
    latents, t, context, embedding = inputs(args, model, unet)
    w = torch.full((args.batch,), 3.0, device=device)
    pixels = side * model.vae.factor
    images = torch.rand(args.batch, 3, pixels, pixels, device=device) * 2 - 1
    calls = {
        "unet": lambda: unet(latents, t, context, embedding),
        "vae_decode": lambda: model.vae.decode(latents),
        "text_encode": lambda: model.text_encoder(prompts),
        "picture": lambda: model.draw(unet, prompts, range(args.batch), args.steps, 3.0,
                                      size=(pixels, pixels)),
    }
    calls = {name: torch.no_grad()(call) for name, call in calls.items()}
    if set(REWARD_ROWS) & set(args.rows):
        settings = train.Config(reward_batch=args.batch, rm_batch=args.batch,
                                grad_checkpoint=args.grad_checkpoint)
        reward, latent_rm = rewards(args.size, device, model.dtype, side, args.grad_checkpoint)
        if args.compile:
            reward.compile()
            latent_rm.compile()
        calls |= reward_work(model, reward, latent_rm, z, prompts, settings)
    if {"training_step", "optimizer"} & set(args.rows):
        draws = z, z.flip(0), w / 10, w / 30
        calls |= training_work(args, model, teacher or unet, *trained(), images, prompts, draws)
    return calls


# --------------------------------------------------------------------- the same work by others

def diffusers_work(args, ours, unet, trained, published=False):
    """-> {row: function}, the networks that --compile is to reach; the one that draws is compiled
    as ours. published: in the published script's order of work (the rows of the training alone)."""
    vae = peers.DiffusersVAE(ours.vae, ours.dtype)
    net = peers.DiffusersUNet(unet)
    teacher = peers.DiffusersUNet(unet, passes=2) if published else net
    # its encode() and decode() call the two halves
    networks, pair = [vae.net.encoder, vae.net.decoder], []
    if published:
        networks.append(teacher.net)
    if args.compile:
        compile_for_drawing(net.net)

    def twins():
        pair.extend(peers.DiffusersUNet(network, args.grad_checkpoint) for network in trained())
        networks.extend(twin.net for twin in pair)
        return pair

    kept = dataclasses.replace(args, grad_checkpoint=args.grad_checkpoint and not published)
    calls = work(kept, dataclasses.replace(ours, vae=vae), net, twins, teacher)
    if published:
        names = "training_step", "reward_direct", "optimizer"
        calls = {name: calls[name] for name in names if name in calls}
        if "optimizer" in calls:
            calls["optimizer"] = published_update(*pair)
        return calls, networks
    tokenizer, text = words = peers.transformers_text(ours.text_encoder)
    draw = peers.diffusers_pipeline(vae, words, net, unet.config.lcm_grid or 50)
    prompts, side = [PROMPT] * args.batch, side_of(args, ours, unet) * ours.vae.factor

    @torch.no_grad()
    def text_encode():
        tokens = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
        return text(input_ids=tokens.input_ids.to(ours.device)).last_hidden_state

    picture = torch.no_grad()(lambda: draw(prompts, args.steps, 3.0, side))
    calls |= {"picture": picture, "text_encode": text_encode}
    calls.pop("optimizer", None)  # PyTorch's in both
    return calls, networks


def openvino_work(args, ours, unet):
    """-> {row: function}"""
    require(ours.device.type == "cpu", "--against openvino: on a CPU only")
    latents, *rest = inputs(args, ours, unet)
    net = peers.OpenVINOUNet(unet, (latents, *rest), ours.dtype)
    vae = peers.OpenVINOVAE(ours.vae, latents, ours.dtype)
    calls = work(dataclasses.replace(args, rows=()), dataclasses.replace(ours, vae=vae), net, None)
    return {name: calls[name] for name in ("unet", "vae_decode", "picture")}


def work_of(peer, args, model, unet, trained):
    """-> {row: function}, the networks that --compile is to reach"""
    try:
        if peer == "openvino":
            return openvino_work(args, model, unet), []
        return diffusers_work(args, model, unet, trained, peer == "published")
    except ImportError as error:
        raise InputError(f"--against {peer}: {error.name} is not installed; "
                         f"pip install {error.name}") from None


# -------------------------------------------------------------------------------------- the clock

def seconds(call, device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure(calls, args, device):
    """Time one or more functions turn by turn. -> a row for each"""
    rows = []
    for call in calls:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        rows.append({"first": seconds(call, device)})
        for _ in range(args.warmup - 1):
            call()
        if device.type == "cuda":
            rows[-1]["peak_gib"] = cli.peak_memory(device)
    times = [[seconds(call, device) for call in calls] for _ in range(args.repeats)]
    for row, column in zip(rows, zip(*times)):
        row |= {"median": statistics.median(column), "min": min(column), "max": max(column)}
    return rows


def peaks(device, dtype, args):
    """TFLOP/s in this run of a large convolution and a large matrix product: of what the limits of
    the rows are made."""
    cuda = device.type == "cuda"
    n, batch = (8192, 32) if cuda else (2048, 1)
    make = functools.partial(torch.randn, device=device, dtype=dtype)
    a, b = make(n, n), make(n, n)
    x, w = (tensor.to(memory_format=torch.channels_last)
            for tensor in (make(batch, 512, 64, 64), make(512, 512, 3, 3)))
    work = {"convolution": (2 * 9 * 512 * x.numel(), lambda: F.conv2d(x, w, padding=1)),
            "product": (2 * n**3, lambda: a @ b)}
    return {name: count / 1e12 / measure([call], args, device)[0]["median"]
            for name, (count, call) in work.items()}


def count_tflop(call):
    """-> {"convolution": TFLOP, "product": TFLOP}, attention among the products"""
    fused = torch.backends.mha.get_fastpath_enabled()
    # the counter does not know the fused layers that towers without gradient run as
    torch.backends.mha.set_fastpath_enabled(False)
    # nor attention's kernel on a CPU
    known = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
             lambda q, k, v, *rest, out_shape, **more: sdpa_flop_count(q, k, v),
             torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
             lambda grad, q, k, v, *rest, out_shape, **more: (
                 sdpa_backward_flop_count(grad, q, k, v))}
    if hasattr(torch.ops.mkldnn, "_convolution_pointwise"):  # nor oneDNN's, in a build that has it
        known |= {
            torch.ops.mkldnn._convolution_pointwise: (
                lambda x, weight, *rest, out_shape, **more: conv_flop_count(x, weight, out_shape)),
            torch.ops.mkldnn._linear_pointwise: (
                lambda x, weight, *rest, out_shape, **more: 2 * math.prod(out_shape) * x[-1])}
    try:
        with FlopCounterMode(display=False, custom_mapping=known) as counter:
            call()
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    found = {"convolution": 0.0, "product": 0.0}
    for operator, count in counter.get_flop_counts()["Global"].items():
        found["convolution" if "convolution" in str(operator) else "product"] += count / 1e12
    return found


# ----------------------------------------------------------------------------------------- memory

PATHS = {"none": "none", "direct": "direct", "latent": "proxy"}  # what gives the reward
# batches, without and with recomputed activations
PASSES = [(batch, again) for again in (False, True) for batch in (1, 4, 16)]


def training_networks(args, rank, path, device, dtype):
    """train.Networks of a run with random weights on `device`, meta too. rank: of a LoRA student,
    or None for a full one; path: of the reward, "none", "direct" or "latent"."""
    if args.size == "sd21":
        model, unet = random_model(device, dtype)
    else:
        model, unet, _ = load(
            args, torch.device("cpu") if device.type == "meta" else device, dtype)
    side = args.resolution // model.vae.factor
    with device:
        plain = dataclasses.replace(unet.config, time_cond_proj_dim=None, sample_size=side)
        teacher = UNet(plain).to(dtype).requires_grad_(False)
        if rank is None:
            student, target = (UNet(dataclasses.replace(plain, time_cond_proj_dim=train.W_DIM))
                               for _ in range(2))
            target.requires_grad_(False)
        else:
            student, target = (sharing(teacher, time_cond_proj_dim=train.W_DIM) for _ in range(2))
            for network in (student, target):
                LoRA.new(network, rank).attach(network)
            target.lora.requires_grad_(False)
    reward = latent_rm = None
    if path != "none":
        reward, latent_rm = rewards(args.size, device, dtype, side)
    for module in (model.vae, model.text_encoder.model, reward):
        if module is not None:
            module.to(device)
    latent_rm = latent_rm if path == "latent" else None
    return train.Networks(model, teacher, reward, student.train(), target, latent_rm)


def one_pass(networks, args, batch, grad_checkpoint):
    """-> a function: forward and backward of so many pictures, all of which are rewarded, and the
    decoding of samples."""
    if grad_checkpoint and networks.reward is not None:
        recompute_activations(networks.reward)
    networks.student.checkpointing = grad_checkpoint
    settings = train.Config(reward_batch=batch, rm_batch=batch, grad_checkpoint=grad_checkpoint)
    device, side = networks.model.device, args.resolution // networks.model.vae.factor
    step = train.Pass(networks, DDIMSolver(networks.model.schedule, 50), settings)
    noise, uniform = torch.zeros(batch, 4, side, side, device=device), torch.zeros(batch)
    draws = noise, noise, uniform.to(device), uniform.to(device)
    images = torch.zeros(batch, 3, args.resolution, args.resolution, device=device)

    def call():
        step((images, [PROMPT] * batch, draws))[0].backward()
        with torch.no_grad(), cli.autocast(device, networks.model.dtype):
            networks.model.decode(noise[:8])

    return call


def count_of(networks, args, passes):
    """passes: pairs of batch and grad_checkpoint, those without recomputing first.
    networks: on the meta device. -> {pair: {part: GB}}"""
    n, found = networks, {}
    with memory.fake_card():
        frozen = [n.teacher, n.model.vae, n.model.text_encoder.model, n.reward, n.student, n.target]
        memory.faked(*frozen, n.latent_rm)
        n.model = dataclasses.replace(
            n.model, device=torch.device("cpu"), schedule=NoiseSchedule())
        if n.reward is not None:  # else it looks whether the numbers are in [0, 1]
            n.reward.forward = lambda images, prompts: n.reward.score(
                images, n.reward.encode(prompts))
        trained, target = n.pair
        for batch, grad_checkpoint in passes:
            call = one_pass(n, args, batch, grad_checkpoint)
            found[batch, grad_checkpoint] = memory.count(
                [trained, n.latent_rm], [target], frozen, call)
            for module in (trained, n.latent_rm):
                if module is not None:
                    module.zero_grad(set_to_none=True)
    return found


def measure_memory(args, rank, path, device, dtype, batch, grad_checkpoint, small):
    """-> GB that a step has held at most on this card, or None: it does not fit. small: with
    --target-dtype bf16 --optimizer adamw8bit."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    try:
        n = training_networks(args, rank, path, device, dtype)
        trained = [m for m in (n.student, n.latent_rm) if m is not None]
        weights = [p for module in trained for p in module.parameters() if p.requires_grad]
        if small:
            n.target.bfloat16()
        kind = "adamw8bit" if small else "adamw"
        optimizer = optimizers.KINDS[kind]([{"params": weights}], lr=1e-6)
        call = one_pass(n, args, batch, grad_checkpoint)
        for _ in range(2):  # from the second on there are moments
            optimizer.zero_grad(set_to_none=True)
            call()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
    except torch.OutOfMemoryError:
        return None
    return torch.cuda.max_memory_allocated(device) / 1e9


def memory_table(args, device):
    """Print a Markdown table, and the same as one JSON document."""
    args.resolution = args.resolution or (64 if args.size == "pocket" else 512)
    if device.type == "cuda":
        optimizers.check("adamw8bit")  # is measured too
    # what is counted is a card, whatever this machine has
    dtype = torch.float32 if args.precision == "fp32" else torch.bfloat16
    parts = ("weights", "target", "frozen", "gradients", "optimizer", "activations")
    print(f"GB of a step at {args.size}'s size, {args.resolution} pixels, {str(dtype)[6:]}, one "
          f"process, every row rewarded, --norms-every 0; a card keeps {memory.SPARE} GB free")
    last = ["sum", "card"] + ["measured"] * (device.type == "cuda")
    print(f"| student | reward | batch | recompute | {' | '.join((*parts, *last))} |")
    print("| --- " * (len(parts) + len(last) + 4) + "|")
    rows = []
    for rank, path in itertools.product((None, args.lora), PATHS):
        networks = training_networks(args, rank, path, torch.device("meta"), dtype)
        for (batch, again), found in count_of(networks, args, PASSES).items():
            kinds = {f"LoRA {rank}": found}
            if rank is None:
                kinds = {"full": found, "full, 8-bit": memory.smaller(found)}
            for student, gb in kinds.items():
                total = sum(gb.values())
                row = {"student": student, "reward": PATHS[path], "batch": batch,
                       "grad_checkpoint": again, "gb": gb, "sum": total,
                       "card": memory.smallest_card(total)}
                cells = [student, PATHS[path], batch, "yes" if again else "",
                         *(f"{gb[part]:.2f}" for part in parts), f"{total:.2f}",
                         row["card"] or "none"]
                if device.type == "cuda":
                    small = gb is not found
                    row["measured"] = measure_memory(
                        args, rank, path, device, dtype, batch, again, small)
                    cells.append(f"{row['measured']:.2f}" if row["measured"] else "does not fit")
                print(f"| {' | '.join(map(str, cells))} |", flush=True)
                rows.append(row)
    print(json.dumps({"torch": torch.__version__, "size": args.size, "precision": str(dtype)[6:],
                      "resolution": args.resolution, "rows": rows}))


# -------------------------------------------------------------------------------------- the table

def load(args, device, dtype):
    """-> Pipeline, the student's UNet of that size, and a second one of the same weights, for the
    training step's teacher."""
    if args.size == "sd21":
        model, unet = random_model(device, dtype)
    else:
        model = Pipeline.from_pretrained(POCKET, device, dtype)
        unet = UNet.from_pretrained(POCKET / "student", dtype=dtype, device=device)
    with torch.device("meta"):
        teacher = UNet(unet.config)
    teacher.load_state_dict(unet.state_dict(), assign=True)
    return model, unet.requires_grad_(False), teacher.requires_grad_(False).eval()


def time_row(name, ours, theirs, tflop, peak, args, device):
    """Time row `name` by our function and by those of theirs, {peer: function}; print its line.
    -> the row, its peak memory in GiB"""
    row, *others = measure([ours, *theirs.values()], args, device)
    gib = max(cli.peak_memory(device), *(one.get("peak_gib", 0) for one in (row, *others)))
    line = (f"{name:14s} {row['median']:9.4f} s  "
            f"({row['min']:.4f} to {row['max']:.4f}, first {row['first']:.2f})")
    if tflop is not None:
        total, limit = sum(tflop.values()), sum(tflop[kind] / peak[kind] for kind in peak)
        row |= {"tflop": total, "tflop_per_s": total / row["median"], "limit": limit,
                "share_of_limit": limit / row["median"]}
        line += (f"  {total:8.3g} TFLOP  {row['tflop_per_s']:8.3g} TFLOP/s  limit {limit:.4f} s"
                 f"  {row['share_of_limit']:6.1%} of it")
    if "peak_gib" in row:
        line += f"  {row['peak_gib']:.1f} GiB"
    for peer, other in zip(theirs, others):
        row[peer] = other | {"ratio": other["median"] / row["median"]}
        line += f"  {peer} {other['median']:.4f} s, ratio {row[peer]['ratio']:.2f}"
    print(line, flush=True)
    return row, gib


def several(text, known, name):
    """A list joined by commas -> its parts, each a known one."""
    parts = text.split(",") if text else []
    require(set(parts) <= set(known), f"--{name} {text}: expected some of {','.join(known)}")
    return parts


def run_rows(args, device, dtype):
    """Time the rows. -> {row: figures}, the peaks, the most memory in GiB"""
    torch.set_float32_matmul_precision("high")  # as train.py has it
    model, unet, teacher = load(args, device, dtype)
    require(not args.resolution or args.resolution % model.vae.factor == 0,
            f"--resolution {args.resolution}: expected a multiple of {model.vae.factor}")
    pair = []

    def trained():  # made once, when a row needs them: 7 GB at SD2.1's size
        if not pair:
            pair.extend(UNet(unet.config).to(device) for _ in range(2))
            pair[0].checkpointing = args.grad_checkpoint
            pair[1].eval().requires_grad_(False)
        return pair

    prepare_for_inference(unet)  # as Pipeline.load_unet does
    calls, theirs, networks = work(args, model, unet, trained, teacher), {}, []
    counted = [name for name in calls if name in args.rows and name != "optimizer"]
    tflop = {name: count_tflop(calls[name]) for name in counted}
    for peer in args.against:
        theirs[peer], found = work_of(peer, args, model, unet, trained)
        networks += found
    if args.compile:
        compile_for_drawing(unet)
        for network in (teacher, *pair):
            compile_blocks(network, (ResnetBlock, Transformer))
        for network in (model.vae.decoder, model.vae.encoder, *networks):
            network.compile()

    peak, gib, rows = peaks(device, dtype, args), 0.0, {}
    print(", ".join(f"{kind} {rate:.3g} TFLOP/s" for kind, rate in peak.items()),
          f"in {str(dtype)[6:]}")
    for name in args.rows:
        others = {peer: found[name] for peer, found in theirs.items() if name in found}
        rows[name], used = time_row(
            name, calls[name], others, tflop.get(name), peak, args, device)
        gib = max(gib, used)
    return rows, peak, gib


# -------------------------------------------------------------------------------------- the sweep

def sweep(args):
    """Run the rows, or a training, once for each value of the option, and print what grows how.
    -> {row: {value: {"median", ...}, "exponents": {"median", ...}}}"""
    normal = args.resolution or {"pocket": 64, "sd21": 512}[args.size]
    unit = normal if args.sweep == "resolution" else 1
    values, measure_one = [int(value * unit) for value in SWEEPS[args.sweep]], rows_of
    if args.sweep == "processes":
        others = ("size", "rows", "resolution", "steps", "against", "grad_checkpoint")
        given = [name for name in others if getattr(args, name) != getattr(Config, name)]
        require(not given, f"--sweep processes trains the pocket by train.py: it takes no "
                           f"--{', --'.join(given).replace('_', '-')}")
        device = cli.pick_device(args.device)  # the same precision for each number of them
        args.precision = cli.precision_name(cli.pick_precision(args.precision, device))
        most = torch.cuda.device_count() if device.type == "cuda" else cli.cores()
        values, measure_one = [value for value in values if value <= most], training_of
    found = {}
    for value in values:
        for name, point in measure_one(args, value).items():
            found.setdefault(name, {})[str(value)] = point
            print(f"{name:14s} {args.sweep} {value:4d}", " ".join(
                f"{key} {number:.4g}" for key, number in point.items()), flush=True)
    for name, points in found.items():
        x = np.log(values)
        points["exponents"] = {
            key: float(np.polyfit(x, np.log([points[str(value)][key] for value in values]), 1)[0])
            for key in points[str(values[0])] if len(values) > 1}
        print(f"{name:14s}", ", ".join(f"{key} ~ {args.sweep}^{exponent:.2f}"
                                       for key, exponent in points["exponents"].items()))
    return found


def rows_of(args, value):
    """This script with another value of the option -> {row: median seconds, peak memory in GiB}"""
    given = {name: value for name, value in vars(args).items()
             if value != getattr(Config, name) and name not in ("sweep", args.sweep)}
    argv = [f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
            for name, value in given.items()]
    done = run_script([__file__, *argv, f"--{args.sweep}={value}"])
    document = json.loads(done.splitlines()[-1])
    # on a CPU the memory is that of the process, loading included
    return {name: {"median": row["median"], "peak_gib": row.get("peak_gib", document["peak_gib"])}
            for name, row in document["rows"].items()}


def training_of(args, processes):
    """A training of the pocket (train.py) on so many processes, which share the machine's cores or
    have a GPU each, --batch pictures each -> {"training": median seconds a step, pictures a
    second}"""
    with tempfile.TemporaryDirectory() as folder:
        run_script([
            "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
            train.__file__, f"--out={folder}/run", f"--batch-size={args.batch}",
            f"--steps={args.warmup + args.repeats}", "--log-every=1", "--norms-every=0",
            "--no-evaluate", f"--device={args.device}", f"--precision={args.precision}",
            "--compile" if args.compile else "--no-compile"],
            OMP_NUM_THREADS=str(max(1, cli.cores() // processes)))
        lines = Path(folder, "run/log.jsonl").read_text().splitlines()[args.warmup:]
    seconds = statistics.median(json.loads(line)["seconds_per_step"] for line in lines)
    return {"training": {
        "median": seconds, "pictures_per_second": processes * args.batch / seconds}}


def run_script(argv, **environment):
    """-> what it prints"""
    done = subprocess.run([sys.executable, *argv], capture_output=True, text=True,
                          env=os.environ | environment)
    require(done.returncode == 0, f"{' '.join(argv)}: {done.stderr.strip()}")
    return done.stdout


def main():
    args = parse(Config(), __doc__)
    at_least(1, args, "batch", "warmup", "repeats", "steps", "lora")
    if args.rows == "memory":
        memory_table(args, cli.pick_device(args.device))
        return
    rows = ROWS if args.rows == "all" else several(args.rows, ROWS, "rows")
    against = several(args.against, PEERS, "against")
    if args.sweep:
        print(json.dumps({"sweep": args.sweep, "rows": sweep(args)}))
        return
    args = dataclasses.replace(args, rows=rows, against=against)
    device = cli.pick_device(args.device)
    dtype = cli.pick_precision(args.precision, device)
    rows, peak, gib = run_rows(args, device, dtype)
    cpu = platform.processor() or platform.machine()
    print(json.dumps({
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "precision": str(dtype)[6:],
        "size": args.size,
        "batch": args.batch,
        "compile": args.compile,
        "grad_checkpoint": args.grad_checkpoint,
        "peak_tflop_per_s": peak,
        "peak_gib": gib,
        "rows": rows,
    }))


if __name__ == "__main__":
    run(main)
