"""Speed, memory and achieved TFLOP/s of the parts, on random weights (sd21) or on the pocket.

    python bench.py --size pocket --device cpu
    python bench.py --size sd21 --device cuda --precision bf16 --compile

"training step" is the distillation loss without reward and its backward pass, without the optimizer. Seconds are the median of --repeats after --warmup; compile time is apart. The last line is one JSON document.
"""
import json
import platform
import resource
import statistics
import time
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from cli import autocast, fast_attention, option, parse, pick_device, pick_precision, require, run
from lcm_solver import DDIMSolver, NoiseSchedule, guidance_embedding, sample_lcm
from sample import POCKET
from train import Config as TrainConfig
from train import W_DIM, distillation_loss
from unet import UNet, UNetConfig
from vae import VAE


@dataclass
class Config:
    size: str = option("pocket", "pocket, or sd21 with random weights", choices=("pocket", "sd21"))
    batch: int = option(1, "pictures at a time")
    device: str = option("auto", "auto, cpu or cuda")
    precision: str = option("auto", "arithmetic", choices=("auto", "bf16", "fp32"))
    compile: bool = option(False, "torch.compile the networks")
    warmup: int = option(3, "calls before the clock starts")
    repeats: int = option(7, "calls timed")


class Bench:
    def __init__(self, args, device):
        self.args, self.device, self.rows = args, device, {}

    def sync(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, call):
        start = time.perf_counter()
        call()
        self.sync()
        return time.perf_counter() - start

    def measure(self, name, call):
        """Time `call` and print a line: seconds (min..max), TFLOP counted, TFLOP/s, peak memory on CUDA."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        first = self.seconds(call)
        for _ in range(self.args.warmup - 1):
            call()
        times = [self.seconds(call) for _ in range(self.args.repeats)]
        self.rows[name] = row = {"first": first, "median": statistics.median(times), "min": min(times), "max": max(times)}
        if self.device.type == "cuda":
            row["peak_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        return row

    def report(self, name, row, flop):
        row["tflop"] = flop / 1e12
        row["tflop_per_s"] = row["tflop"] / row["median"]
        memory = f"  {row['peak_gib']:.1f} GiB" if "peak_gib" in row else ""
        print(f"{name:14s} {row['median']:9.4f} s  ({row['min']:.4f}..{row['max']:.4f}, first {row['first']:.2f})  "
              f"{row['tflop']:8.3f} TFLOP  {row['tflop_per_s']:8.2f} TFLOP/s  {row['tflop_per_s'] / self.peak:6.1%} of matmul{memory}", flush=True)

    def matmul_peak(self, dtype):
        """TFLOP/s of a large matrix product in this run: the ceiling that the shares refer to."""
        n = 8192 if self.device.type == "cuda" else 2048
        a, b = (torch.randn(n, n, device=self.device, dtype=dtype) for _ in range(2))
        self.peak = 2 * n**3 / 1e12 / self.measure("matmul", lambda: a @ b)["median"]
        print(f"matmul {n}: {self.peak:.2f} TFLOP/s {str(dtype)[6:]}")


def count_flop(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def main():
    args = parse(Config(), __doc__)
    require(args.batch >= 1 and args.warmup >= 1 and args.repeats >= 1, "--batch, --warmup and --repeats: expected 1 or more")
    device = pick_device(args.device)
    dtype = pick_precision(args.precision, device)
    if args.size == "pocket":
        unet, vae = UNet.from_pretrained(POCKET / "student", device=device), VAE.from_pretrained(POCKET, device=device)
    else:
        with torch.device(device):
            unet, vae = UNet(UNetConfig(time_cond_proj_dim=W_DIM)), VAE()
    teacher = UNet(unet.config).to(device, dtype).requires_grad_(False)
    target = UNet(unet.config).to(device).requires_grad_(False)
    vae.requires_grad_(False)

    side, dim, length = unet.config.sample_size, unet.config.cross_attention_dim, 32 if args.size == "pocket" else 77
    schedule = NoiseSchedule(device=device)
    z, context = torch.randn(args.batch, 4, side, side, device=device), torch.randn(args.batch, length, dim, device=device)
    t, w = torch.full((args.batch,), 499, device=device), torch.full((args.batch,), 3.0, device=device)

    class Parts:  # what distillation_loss wants of a model, without a text encoder's weights
        def text_encoder(self, prompts):
            return context if len(prompts) > 1 or args.batch == 1 else context[:1]
    parts = Parts()
    parts.vae = vae
    draws = torch.randn_like(z), torch.randn_like(z), torch.zeros(args.batch, dtype=torch.long, device=device) + 5, w / 10
    images = torch.rand(args.batch, 3, side * vae.factor, side * vae.factor, device=device) * 2 - 1
    settings = TrainConfig(reward="none", ddim_steps=50)

    def forward():
        with torch.no_grad(), autocast(device, dtype):
            unet(z, t, context, guidance_embedding(w, W_DIM))

    def decode():
        with torch.no_grad(), autocast(device, dtype):
            vae.decode(z)

    def picture():
        with autocast(device, dtype), torch.no_grad():
            vae.decode(sample_lcm(unet, schedule, z, context, 3.0, 2))

    def training_step():
        with fast_attention(device):
            with autocast(device, dtype):
                loss, _ = distillation_loss(parts, teacher, unet, target, None, DDIMSolver(schedule, 50),
                                            (images, ["x"] * args.batch, draws), settings)
            loss.backward()
        unet.zero_grad(set_to_none=True)

    bench = Bench(args, device)
    bench.matmul_peak(dtype)
    calls = {"unet": forward, "vae decode": decode, "2-step picture": picture, "training step": training_step}
    flop = {name: count_flop(call) for name, call in calls.items()}
    if args.compile:
        for network in (unet, teacher, target, vae.decoder):
            network.compile()
    for name, call in calls.items():
        bench.report(name, bench.measure(name, call), flop[name])
    facts = {"torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads(),
             "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine(),
             "precision": str(dtype)[6:], "size": args.size, "batch": args.batch, "compile": args.compile,
             "peak_host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    print(json.dumps(facts | {"rows": bench.rows}))


if __name__ == "__main__":
    run(main)
