"""Seconds, TFLOP/s and memory of the parts, on the pocket or at SD2.1's size with random weights;
beside diffusers if asked.

    python bench.py                                       # the pocket
    python bench.py --size sd21 --rows unet,vae_decode    # some of the rows
    python bench.py --size sd21 --rows memory             # what training takes, by card
    # the first thing to run on a new GPU
    python bench.py --size sd21 --device cuda --compile --against diffusers

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
diffusers does the same work on the same weights, its calls between ours: channels_last,
scaled_dot_product_attention, the same precision, compiled if ours is. The ratio is its median over
ours: above 1 we are faster. The last line is one JSON document.
"""
import dataclasses
import gc
import itertools
import json
import platform
import statistics
import time
from dataclasses import dataclass

import open_clip
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

import latent_rm as proxy
import train
from lcm_solver import DDIMSolver, NoiseSchedule, guidance_embedding
from lora import LoRA, sharing
from pipeline import Pipeline
from reward import ClipReward, load_reward, recompute_activations
from support import cli, memory, optimizers, single_file
from support.cli import POCKET, at_least, option, parse, require, run
from support.weights import InputError, load_tokenizer
from text_encoder import TextEncoder
from unet import UNet, UNetConfig
from vae import VAE

REWARD_ROWS = "reward_direct", "reward_latent", "reward_student"
ROWS = ("unet", "vae_decode", "text_encode", "picture", "training_step", *REWARD_ROWS, "optimizer")
PROMPT = "a photo of an astronaut riding a horse"


@dataclass
class Config:
    size: str = option(
        "pocket", "pocket, or sd21 with random weights", choices=("pocket", "sd21"),
        group="what to time")
    rows: str = option("all", f"some of {','.join(ROWS)}, or memory")
    batch: int = option(1, "pictures at a time")
    resolution: int | None = option(None, "memory: side of the pictures (default: the model's)")
    lora: int = option(64, "memory: rank of the LoRA")
    against: str | None = option(
        None, "time the same work through another library, between our calls",
        choices=("diffusers",))
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
        text = CLIPTextModel(CLIPTextConfig(**single_file.CONFIGS["sd2"]["text_encoder"]))
        networks = (VAE(), TextEncoder(text, single_file.tokenizer("sd2", load_tokenizer)),
                    UNet(UNetConfig(time_cond_proj_dim=train.W_DIM)))
    vae, text_encoder, unet = (net.to(dtype).eval().requires_grad_(False) for net in networks)
    vae.to(memory_format=torch.channels_last)  # as VAE.from_pretrained does at this size
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
            with cli.fast_attention(z.device):
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
    optimizer = torch.optim.AdamW(weights, lr=1e-6, fused=True)

    def training_step():
        with cli.fast_attention(model.device):
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


def work(args, model, unet, trained):
    """{row: function to time}. trained(): -> student and target, float32."""
    device = model.device
    side = unet.config.sample_size
    z = torch.randn(args.batch, 4, side, side, device=device)
    prompts = [PROMPT] * args.batch
    context = model.text_encoder(prompts)
    t = torch.full((args.batch,), 499, device=device)
    w = torch.full((args.batch,), 3.0, device=device)
    latents, embedding = z.to(model.dtype), guidance_embedding(w, train.W_DIM)
    pixels = side * model.vae.factor
    images = torch.rand(args.batch, 3, pixels, pixels, device=device) * 2 - 1
    calls = {
        "unet": lambda: unet(latents, t, context, embedding),
        "vae_decode": lambda: model.vae.decode(latents),
        "text_encode": lambda: model.text_encoder(prompts),
        "picture": lambda: model.draw(unet, prompts, range(args.batch), 2, 3.0),
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
        calls |= training_work(args, model, unet, *trained(), images, prompts, draws)
    return calls


# ------------------------------------------------------------------------- the same by diffusers

def diffusers_twin(kind, net, **more):
    """A network of diffusers' class `kind` around the weights of ours."""
    config = {k: v for k, v in dataclasses.asdict(net.config).items() if k != "lcm_grid"}
    with torch.device("meta"):
        twin = kind.from_config(config | more)
    twin.load_state_dict(net.state_dict(), assign=True)
    return twin.to(memory_format=torch.channels_last).requires_grad_(net.training)


class DiffusersUNet(torch.nn.Module):
    """diffusers' UNet with our call."""

    def __init__(self, net, grad_checkpoint):
        super().__init__()
        from diffusers import UNet2DConditionModel
        self.net, self.config, self.conv_in = (
            diffusers_twin(UNet2DConditionModel, net), net.config, net.conv_in)
        if grad_checkpoint and net.training:
            self.net.train().enable_gradient_checkpointing()

    def forward(self, latents, t, context, w_embedding=None):
        dtype = self.net.conv_in.weight.dtype
        w_embedding = None if w_embedding is None else w_embedding.to(dtype)
        return self.net(
            latents.to(dtype), t, context.to(dtype), timestep_cond=w_embedding).sample

    def parameters(self, recurse=True):
        return self.net.parameters(recurse)


class DiffusersVAE:
    """diffusers' VAE with our calls."""

    def __init__(self, vae, dtype):
        from diffusers import AutoencoderKL
        levels = len(vae.config.block_out_channels)
        self.net = diffusers_twin(
            AutoencoderKL, vae, down_block_types=["DownEncoderBlock2D"] * levels,
            up_block_types=["UpDecoderBlock2D"] * levels)
        self.config, self.factor, self.dtype = vae.config, vae.factor, dtype

    def posterior(self, images):
        distribution = self.net.encode(images.to(self.dtype)).latent_dist
        return distribution.mean, distribution.std

    def decode(self, latents):
        return self.net.decode((latents / self.config.scaling_factor).to(self.dtype)).sample


def diffusers_work(args, ours, unet, trained):
    """The same through diffusers: its networks around the same weights, in our algorithm for the
    training step and in its own pipeline for the picture. -> {row: function}, its networks"""
    from diffusers import LatentConsistencyModelPipeline, LCMScheduler
    from diffusers.utils import logging
    logging.set_verbosity_error()
    vae = DiffusersVAE(ours.vae, ours.dtype)
    net = DiffusersUNet(unet, args.grad_checkpoint)
    # its encode() and decode() call the two halves, so these are what --compile has to reach
    networks = [vae.net.encoder, vae.net.decoder, net.net]

    def trained_twins():
        twins = [DiffusersUNet(network, args.grad_checkpoint) for network in trained()]
        networks.extend(twin.net for twin in twins)
        return twins

    calls = work(args, dataclasses.replace(ours, vae=vae), net, trained_twins)
    tokenizer, text = ours.text_encoder.tokenizer, ours.text_encoder.model
    scheduler = LCMScheduler(
        1000, 0.00085, 0.012, "scaled_linear", set_alpha_to_one=False, clip_sample=False,
        original_inference_steps=unet.config.lcm_grid or 50)
    pipe = LatentConsistencyModelPipeline(
        vae.net, text, tokenizer, net.net, scheduler, None, None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    prompts, size = [PROMPT] * args.batch, unet.config.sample_size * ours.vae.factor

    @torch.no_grad()
    def picture():
        return pipe(prompts, num_inference_steps=2, guidance_scale=4.0, output_type="pt",
                    height=size, width=size)

    @torch.no_grad()
    def text_encode():
        tokens = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
        return text(input_ids=tokens.input_ids.to(ours.device)).last_hidden_state

    calls |= {"picture": picture, "text_encode": text_encode}
    calls.pop("optimizer", None)  # PyTorch's in both
    return calls, networks


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


def matmul_peak(device, dtype, args):
    """TFLOP/s of a large matrix product in this run: the ceiling that the shares refer to."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / 1e12 / measure([lambda: a @ b], args, device)[0]["median"]


def count_tflop(call):
    fused = torch.backends.mha.get_fastpath_enabled()
    # the counter does not know the fused layers that towers without gradient run as
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter:
            call()
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return counter.get_total_flops() / 1e12


# ----------------------------------------------------------------------------------------- memory

PATHS = {"none": "none", "direct": "direct", "latent": "proxy"}  # what gives the reward
# batches, without and with recomputed activations
PASSES = [(batch, again) for again in (False, True) for batch in (1, 4, 16)]


def training_networks(args, rank, path, device, dtype):
    """train.Networks of a run with random weights on `device`, meta too. rank: of a LoRA student,
    or None for a full one; path: of the reward, "none", "direct" or "latent"."""
    model, unet = load(args, torch.device("cpu") if device.type == "meta" else device, dtype) \
        if args.size == "pocket" else random_model(device, dtype)
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
    """-> a function: forward and backward of so many pictures, all of which are rewarded."""
    if grad_checkpoint and networks.reward is not None:
        recompute_activations(networks.reward)
    networks.student.checkpointing = grad_checkpoint
    settings = train.Config(reward_batch=batch, rm_batch=batch, grad_checkpoint=grad_checkpoint)
    device, side = networks.model.device, args.resolution // networks.model.vae.factor
    step = train.Pass(networks, DDIMSolver(networks.model.schedule, 50), settings)
    noise, uniform = torch.zeros(batch, 4, side, side, device=device), torch.zeros(batch)
    draws = noise, noise, uniform.to(device), uniform.to(device)
    images = torch.zeros(batch, 3, args.resolution, args.resolution, device=device)
    return lambda: step((images, [PROMPT] * batch, draws))[0].backward()


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
        trained, target, *_ = n.trained().values()
        for batch, grad_checkpoint in passes:
            call = one_pass(n, args, batch, grad_checkpoint)
            found[batch, grad_checkpoint] = memory.count(
                [trained, n.latent_rm], [target], frozen, call)
            for module in (trained, n.latent_rm):
                if module is not None:
                    module.zero_grad(set_to_none=True)
    return found


def measure_memory(args, rank, path, device, dtype, batch, grad_checkpoint):
    """-> GB that a step has held at most on this card, or None: it does not fit."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    try:
        n = training_networks(args, rank, path, device, dtype)
        trained = [m for m in (n.student, n.latent_rm) if m is not None]
        weights = [p for module in trained for p in module.parameters() if p.requires_grad]
        optimizer = optimizers.adamw([{"params": weights}], lr=1e-6)
        call = one_pass(n, args, batch, grad_checkpoint)
        for _ in range(2):  # from the second on there are moments
            optimizer.zero_grad(set_to_none=True)
            call()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
    except torch.OutOfMemoryError:
        return None
    return torch.cuda.max_memory_allocated(device) / 1e9


def memory_table(args, device, dtype):
    """Print a Markdown table, and the same as one JSON document."""
    parts = ("weights", "target", "frozen", "gradients", "optimizer", "activations")
    print(f"GB of a step at {args.size}'s size, {args.resolution} pixels, {str(dtype)[6:]}, one "
          f"process, every row rewarded, --norms-every 0; a card keeps {memory.SPARE} GB free")
    print(f"| student | reward | batch | recompute | {' | '.join(parts)} | sum | card |")
    print("| --- " * (len(parts) + 6) + "|")
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
                if device.type == "cuda" and gb is found:
                    row["measured"] = measure_memory(args, rank, path, device, dtype, batch, again)
                    cells.append(f"measured {row['measured']}")
                print(f"| {' | '.join(map(str, cells))} |", flush=True)
                rows.append(row)
    print(json.dumps({"torch": torch.__version__, "size": args.size, "precision": str(dtype)[6:],
                      "resolution": args.resolution, "rows": rows}))


# -------------------------------------------------------------------------------------- the table

def load(args, device, dtype):
    """-> Pipeline, the student's UNet of that size."""
    if args.size == "sd21":
        return random_model(device, dtype)
    unet = UNet.from_pretrained(POCKET / "student", dtype=dtype, device=device)
    return Pipeline.from_pretrained(POCKET, device, dtype), unet.requires_grad_(False)


def time_row(name, ours, theirs, tflop, peak, args, device):
    """Time row `name` by our function and, unless it is None, by diffusers'; print its line.
    -> the row, its peak memory in GiB"""
    both = measure([ours] if theirs is None else [ours, theirs], args, device)
    row = both[0]
    gib = max([cli.peak_memory(device)] + [one["peak_gib"] for one in both if "peak_gib" in one])
    line = (f"{name:14s} {row['median']:9.4f} s  "
            f"({row['min']:.4f} to {row['max']:.4f}, first {row['first']:.2f})")
    if tflop is not None:
        rate = tflop / row["median"]
        row |= {"tflop": tflop, "tflop_per_s": rate, "share_of_matmul": rate / peak}
        line += f"  {tflop:8.3g} TFLOP  {rate:8.3g} TFLOP/s  {rate / peak:6.1%} of matmul"
    if "peak_gib" in row:
        line += f"  {row['peak_gib']:.1f} GiB"
    if theirs is not None:
        row |= {"diffusers": both[1], "ratio": both[1]["median"] / row["median"]}
        line += f"  diffusers {both[1]['median']:.4f} s, ratio {row['ratio']:.2f}"
    print(line, flush=True)
    return row, gib


def main():
    args = parse(Config(), __doc__)
    at_least(1, args, "batch", "warmup", "repeats", "lora")
    if args.rows == "memory":
        args.resolution = args.resolution or (64 if args.size == "pocket" else 512)
        device = cli.pick_device(args.device)
        # what is counted is a card, whatever this machine has
        dtype = torch.float32 if args.precision == "fp32" else torch.bfloat16
        return memory_table(args, device, dtype)
    args.rows = ROWS if args.rows == "all" else args.rows.split(",")
    require(set(args.rows) <= set(ROWS),
            f"--rows {','.join(args.rows)}: expected some of {','.join(ROWS)}")
    device = cli.pick_device(args.device)
    dtype = cli.pick_precision(args.precision, device)
    model, unet = load(args, device, dtype)
    pair = []

    def trained():  # made once, when a row needs them: 7 GB at SD2.1's size
        if not pair:
            pair.extend(UNet(unet.config).to(device) for _ in range(2))
            pair[0].checkpointing = args.grad_checkpoint
            pair[1].eval().requires_grad_(False)
        return pair

    calls, theirs = work(args, model, unet, trained), {}
    networks = [unet, model.vae.decoder, model.vae.encoder, *pair]
    counted = [name for name in calls if name in args.rows and name != "optimizer"]
    tflop = {name: count_tflop(calls[name]) for name in counted}
    if args.against:
        try:
            theirs, more = diffusers_work(args, model, unet, trained)
        except ImportError:
            raise InputError(
                "--against diffusers: it is not installed; pip install diffusers") from None
        networks += more
    if args.compile:
        for network in networks:
            network.compile()

    peak, gib, rows = matmul_peak(device, dtype, args), 0.0, {}
    print(f"matmul {peak:.3g} TFLOP/s in {str(dtype)[6:]}")
    for name in args.rows:
        rows[name], used = time_row(
            name, calls[name], theirs.get(name), tflop.get(name), peak, args, device)
        gib = max(gib, used)
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
        "matmul_tflop_per_s": peak,
        "peak_gib": gib,
        "rows": rows,
    }))
    return None


if __name__ == "__main__":
    run(main)
