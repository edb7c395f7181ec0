"""Seconds, TFLOP/s and memory of the parts, on the pocket or at SD2.1's size with random weights; beside diffusers if asked.

    python bench.py                                                          # the pocket
    python bench.py --size sd21 --device cuda --compile --against diffusers  # the first thing to run on a new GPU
    python bench.py --size sd21 --rows unet,vae_decode                       # some of the rows

    unet             one call of the student in the arithmetic of sample.py
    vae_decode       latents -> image
    text_encode      prompt -> embeddings, tokenizer included
    picture          prompt -> image in 2 steps: all of the above, the sampler included
    training_step    distillation loss without reward, and its backward pass (train.py)
    reward_direct    direct reward: decode, score, and back to the latents
    reward_latent    the same reward through the latent proxy: its score and back to the latents, three decoded candidates compared by
                     the expert, the proxy's own loss and back to its top
    reward_student   the student's part of that: the price of one more rewarded row that the expert does not compare
    optimizer        gradient clipping, AdamW and EMA

Every row is timed --repeats times after --warmup calls; the first call, which compiles, is apart. diffusers does the same work on the
same weights, its calls between ours: channels_last, scaled_dot_product_attention, the same precision, compiled if ours is. The ratio is
its median over ours: above 1 we are faster. The last line is one JSON document.
"""
import dataclasses
import json
import platform
import statistics
import time
from dataclasses import dataclass

import open_clip
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

from latent_rm import Config as LatentRMTraining, new_latent_rm
from lcm_solver import DDIMSolver, NoiseSchedule, guidance_embedding
from pipeline import Pipeline
from reward import ClipReward, load_reward, recompute_activations
from support import single_file
from support.cli import (
    POCKET,
    at_least,
    autocast,
    fast_attention,
    option,
    parse,
    peak_memory,
    pick_device,
    pick_precision,
    require,
    run,
)
from support.weights import InputError, load_tokenizer
from text_encoder import TextEncoder
from train import (
    W_DIM,
    Config as TrainConfig,
    direct_reward,
    distillation_loss,
    latent_reward,
    proxy_loss,
)
from unet import UNet, UNetConfig
from vae import VAE

ROWS = ("unet", "vae_decode", "text_encode", "picture", "training_step", "reward_direct", "reward_latent", "reward_student", "optimizer")


@dataclass
class Config:
    size: str = option("pocket", "pocket, or sd21 with random weights", choices=("pocket", "sd21"))
    rows: str = option("all", f"some of {','.join(ROWS)}")
    batch: int = option(1, "pictures at a time")
    device: str = option("auto", "auto, cpu or cuda")
    precision: str = option("auto", "arithmetic of the networks", choices=("auto", "bf16", "fp32"))
    compile: bool = option(False, "torch.compile the networks")
    grad_checkpoint: bool = option(False, "training step and direct reward: recompute activations in the backward pass")
    against: str | None = option(None, "time the same work through another library, between our calls", choices=("diffusers",))
    warmup: int = option(3, "calls before the clock starts")
    repeats: int = option(7, "calls timed")


# ------------------------------------------------------------------------------------------- the work

def random_model(device, dtype):
    """A Pipeline of SD2.1's size with random weights, and a student's UNet."""
    with torch.device(device):
        text = CLIPTextModel(CLIPTextConfig(**single_file.CONFIGS["sd2"]["text_encoder"]))
        networks = VAE(), TextEncoder(text, single_file.tokenizer("sd2", load_tokenizer)), UNet(UNetConfig(time_cond_proj_dim=W_DIM))
    vae, text_encoder, unet = (network.to(dtype).eval().requires_grad_(False) for network in networks)
    vae.to(memory_format=torch.channels_last)  # as VAE.from_pretrained does at this size
    return Pipeline(vae, text_encoder, NoiseSchedule(device=device), device, dtype), unet


def rewards(size, device, dtype, side, grad_checkpoint=False):
    """The expert and the latent proxy, for latents of that side: the pocket's reward and a proxy of the pocket's size, or HPSv2.1's
    network and the published proxy's, with random weights."""
    with device:
        latent_rm = new_latent_rm(LatentRMTraining(size=size), (4, side, side)).train()
    latent_rm.train_top(TrainConfig.rm_image_layers, TrainConfig.rm_text_layers)
    if size == "pocket":
        return load_reward("pocket", device, dtype, grad_checkpoint), latent_rm
    with device:
        reward = ClipReward(open_clip.CLIP(**open_clip.get_model_config("ViT-H-14")), open_clip.get_tokenizer("ViT-H-14"), "longest")
    if grad_checkpoint:
        recompute_activations(reward)
    return reward.to(dtype).eval().requires_grad_(False), latent_rm


def reward_work(model, reward, latent_rm, z, prompts, settings):
    """{row: function}. z: scaled latents [B,4,h,w]."""
    prediction = z.clone().requires_grad_()

    def run(loss):
        def call():
            with fast_attention(z.device):
                with autocast(z.device, model.dtype):
                    value = loss()
                value.backward()
            prediction.grad = None
            latent_rm.zero_grad(set_to_none=True)
        return call

    def student():
        return latent_reward(model, latent_rm, prediction, latent_rm.text_features(prompts))

    def latent():
        text, candidates = latent_rm.text_features(prompts), {"prediction": z, "target": z, "real": z}
        return latent_reward(model, latent_rm, prediction, text) + proxy_loss(model, latent_rm, reward, candidates, prompts, text, settings)[0]

    return {"reward_direct": run(lambda: direct_reward(model, reward, prediction, prompts, settings)[0]),
            "reward_latent": run(latent), "reward_student": run(student)}


def work(args, model, unet, trained):
    """{row: function to time}. trained(): -> student and target, float32."""
    device, dtype = model.device, model.dtype
    side = unet.config.sample_size
    z = torch.randn(args.batch, 4, side, side, device=device)
    prompts = ["a photo of an astronaut riding a horse"] * args.batch
    context = model.text_encoder(prompts)
    t, w = torch.full((args.batch,), 499, device=device), torch.full((args.batch,), 3.0, device=device)
    latents, embedding = z.to(dtype), guidance_embedding(w, W_DIM)
    draws = z, z.flip(0), torch.full((args.batch,), 5, device=device), w / 10
    images = torch.rand(args.batch, 3, side * model.vae.factor, side * model.vae.factor, device=device) * 2 - 1
    calls = {"unet": lambda: unet(latents, t, context, embedding), "vae_decode": lambda: model.vae.decode(latents),
             "text_encode": lambda: model.text_encoder(prompts), "picture": lambda: model.draw(unet, prompts, range(args.batch), 2, 3.0)}
    calls = {name: torch.no_grad()(call) for name, call in calls.items()}
    if {"reward_direct", "reward_latent", "reward_student"} & set(args.rows):
        settings = TrainConfig(reward_batch=args.batch, rm_batch=args.batch, grad_checkpoint=args.grad_checkpoint)
        reward, latent_rm = rewards(args.size, device, dtype, side, args.grad_checkpoint)
        if args.compile:
            reward.compile()
            latent_rm.compile()
        calls |= reward_work(model, reward, latent_rm, z, prompts, settings)
    if not {"training_step", "optimizer"} & set(args.rows):
        return calls
    student, target = trained()
    solver, settings = DDIMSolver(model.schedule, 50), TrainConfig(reward="none", ddim_steps=50)
    weights, target_weights = list(student.parameters()), list(target.parameters())
    optimizer = torch.optim.AdamW(weights, lr=1e-6, fused=True)

    def training_step():
        with fast_attention(device):
            with autocast(device, dtype):
                loss, _ = distillation_loss(model, unet, student, target, None, solver, (images, prompts, draws), settings)
            loss.backward()
        student.zero_grad(set_to_none=True)

    def update():
        for p in weights:
            p.grad = torch.zeros_like(p)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        torch._foreach_lerp_(target_weights, [p.detach() for p in weights], 0.05)
        student.zero_grad(set_to_none=True)

    return calls | {"training_step": training_step, "optimizer": update}


def diffusers_work(args, ours, unet, trained):
    """The same through diffusers: its networks around the same weights, in our algorithm for the training step and in its own
    pipeline for the picture."""
    from diffusers import (
        AutoencoderKL,
        LatentConsistencyModelPipeline,
        LCMScheduler,
        UNet2DConditionModel,
    )
    from diffusers.utils import logging
    logging.set_verbosity_error()
    networks = []

    def rebuild(kind, net, **more):
        with torch.device("meta"):
            theirs = kind.from_config({k: v for k, v in dataclasses.asdict(net.config).items() if k != "lcm_grid"} | more)
        theirs.load_state_dict(net.state_dict(), assign=True)
        networks.append(theirs.to(memory_format=torch.channels_last).requires_grad_(net.training))
        return networks[-1]

    class Net(torch.nn.Module):  # diffusers' UNet with our call
        def __init__(self, net):
            super().__init__()
            self.net, self.config, self.conv_in = rebuild(UNet2DConditionModel, net), net.config, net.conv_in
            if args.grad_checkpoint and net.training:
                self.net.train().enable_gradient_checkpointing()

        def forward(self, latents, t, context, w_embedding=None):
            dtype = self.net.conv_in.weight.dtype
            w_embedding = None if w_embedding is None else w_embedding.to(dtype)
            return self.net(latents.to(dtype), t, context.to(dtype), timestep_cond=w_embedding).sample

        def parameters(self, recurse=True):
            return self.net.parameters(recurse)

    levels = len(ours.vae.config.block_out_channels)
    vae = rebuild(AutoencoderKL, ours.vae, down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels)
    networks[-1:] = vae.encoder, vae.decoder  # its encode() and decode() call these, so these are what --compile has to reach

    class Autoencoder:
        config, factor = ours.vae.config, ours.vae.factor

        @staticmethod
        def posterior(images):
            distribution = vae.encode(images.to(ours.dtype)).latent_dist
            return distribution.mean, distribution.std

        @staticmethod
        def decode(latents):
            return vae.decode((latents / vae.config.scaling_factor).to(ours.dtype)).sample

    net, tokenizer, text = Net(unet), ours.text_encoder.tokenizer, ours.text_encoder.model
    scheduler = LCMScheduler(1000, 0.00085, 0.012, "scaled_linear", original_inference_steps=unet.config.lcm_grid or 50,
                             set_alpha_to_one=False, clip_sample=False)
    pipe = LatentConsistencyModelPipeline(vae, text, tokenizer, net.net, scheduler, None, None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    calls = work(args, dataclasses.replace(ours, vae=Autoencoder), net, lambda: tuple(Net(n) for n in trained()))
    prompts = ["a photo of an astronaut riding a horse"] * args.batch
    size = unet.config.sample_size * ours.vae.factor
    calls["picture"] = torch.no_grad()(lambda: pipe(prompts, num_inference_steps=2, guidance_scale=4.0, output_type="pt", height=size, width=size))
    calls["text_encode"] = torch.no_grad()(lambda: text(input_ids=tokenizer(
        prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(ours.device)).last_hidden_state)
    calls.pop("optimizer", None)  # PyTorch's in both
    return calls, networks


# ------------------------------------------------------------------------------------------- the clock

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
            rows[-1]["peak_gib"] = peak_memory(device)
    times = [[seconds(call, device) for call in calls] for _ in range(args.repeats)]
    for row, column in zip(rows, zip(*times)):
        row |= {"median": statistics.median(column), "min": min(column), "max": max(column)}
    return rows


def matmul_peak(device, dtype, args):
    """TFLOP/s of a large matrix product in this run: the ceiling that the shares refer to."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / 1e12 / measure([lambda: a @ b], args, device)[0]["median"]


def count_tflop(call):
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the counter does not know the fused layers that towers without gradient run as
    try:
        with FlopCounterMode(display=False) as counter:
            call()
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return counter.get_total_flops() / 1e12


def main():
    args = parse(Config(), __doc__)
    at_least(1, args, "batch", "warmup", "repeats")
    args.rows = ROWS if args.rows == "all" else args.rows.split(",")
    require(set(args.rows) <= set(ROWS), f"--rows {','.join(args.rows)}: expected some of {','.join(ROWS)}")
    device = pick_device(args.device)
    dtype = pick_precision(args.precision, device)
    if args.size == "pocket":
        model = Pipeline.from_pretrained(POCKET, device, dtype)
        unet = UNet.from_pretrained(POCKET / "student", dtype=dtype, device=device).requires_grad_(False)
    else:
        model, unet = random_model(device, dtype)
    pair = []

    def trained():  # made once, when a row needs them: 7 GB at SD2.1's size
        if not pair:
            pair.extend(UNet(unet.config).to(device) for _ in range(2))
            pair[0].checkpointing = args.grad_checkpoint
            pair[1].eval().requires_grad_(False)
        return pair

    calls = work(args, model, unet, trained)
    networks = [unet, model.vae.decoder, model.vae.encoder, *pair]
    tflop = {name: count_tflop(call) for name, call in calls.items() if name in args.rows and name != "optimizer"}
    theirs = {}
    if args.against:
        try:
            theirs, more = diffusers_work(args, model, unet, trained)
        except ImportError:
            raise InputError("--against diffusers: it is not installed; pip install diffusers") from None
        networks += more
    if args.compile:
        for network in networks:
            network.compile()

    peak, gib = matmul_peak(device, dtype, args), 0.0
    print(f"matmul {peak:.3g} TFLOP/s in {str(dtype)[6:]}")
    rows = {}
    for name in args.rows:
        both = measure([calls[name], *([theirs[name]] if name in theirs else [])], args, device)
        rows[name] = row = both[0]
        gib = max([gib, peak_memory(device)] + [other["peak_gib"] for other in both if "peak_gib" in other])
        line = f"{name:14s} {row['median']:9.4f} s  ({row['min']:.4f} to {row['max']:.4f}, first {row['first']:.2f})"
        if name in tflop:
            row |= {"tflop": tflop[name], "tflop_per_s": tflop[name] / row["median"], "share_of_matmul": tflop[name] / row["median"] / peak}
            line += f"  {row['tflop']:8.3g} TFLOP  {row['tflop_per_s']:8.3g} TFLOP/s  {row['share_of_matmul']:6.1%} of matmul"
        if "peak_gib" in row:
            line += f"  {row['peak_gib']:.1f} GiB"
        if len(both) == 2:
            row |= {"diffusers": both[1], "ratio": both[1]["median"] / row["median"]}
            line += f"  diffusers {both[1]['median']:.4f} s, ratio {row['ratio']:.2f}"
        print(line, flush=True)
    print(json.dumps({
        "torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine(),
        "precision": str(dtype)[6:], "size": args.size, "batch": args.batch, "compile": args.compile, "grad_checkpoint": args.grad_checkpoint,
        "matmul_tflop_per_s": peak, "peak_gib": gib, "rows": rows}))


if __name__ == "__main__":
    run(main)
