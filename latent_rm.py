"""The latent proxy reward model (LRM): a CLIP whose image tower reads latents, and its pre-training
(RG-LCD, section 4.2).

The student maximises the LRM's score without decoding anything. Meanwhile the LRM learns to rank
like the expert reward model, which is only ever asked to compare and so may be a black box. Before
all that, it learns which latents go with which words:

    # the pocket's, on a laptop
    python latent_rm.py --text-tower pocket/reward/diffusion_pytorch_model.safetensors \\
        --no-train-text

    torchrun --nproc_per_node=8 latent_rm.py --preset sd21 --model MODEL --data 'encoded/*.tar' \\
        --heldout 'encoded-heldout/*.tar' --text-tower HPS_v2.1_compressed.pt

train.py --latent-rm then distils through it.

To resume, run the same command.
"""
import contextlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip.transformer import TextTransformer
from torch import nn

import data
from support import cli, processes, runs
from support.checkpoints import load_optimizer
from support.cli import POCKET, at_least, option, parse, positive, require, run
from support.kernels import fast_attention
from support.reward_weights import open_clip_weights
from support.tokenizer import Tokenizer, built_in
from support.weights import (
    InputError,
    find_component,
    load_component,
    load_strictly,
    local,
    save_component,
    whole_folder,
)
from vae import VAE


@dataclass(frozen=True)
class LatentRMConfig:
    latent_channels: int = 4
    latent_size: int = 64
    patch_size: int = 4
    width: int = 512
    layers: int = 12
    heads: int = 8
    embed_dim: int = 1024
    text_width: int = 1024  # the ViT-H/14 text tower
    text_layers: int = 24
    text_heads: int = 16
    context_length: int = 77
    vocab_size: int = 49408

    ignored: ClassVar = set()
    inert: ClassVar = {}


class LatentViT(nn.Module):
    """Unscaled latents [B,4,s,s] -> features [B,embed_dim]: a pre-norm ViT with mean pooling."""

    def __init__(self, config):
        super().__init__()
        width, patch = config.width, config.patch_size
        tokens = (config.latent_size // patch) ** 2
        self.patch = nn.Conv2d(config.latent_channels, width, patch, stride=patch)
        self.position = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, config.heads, 4 * width, dropout=0.0, activation="gelu",
                batch_first=True, norm_first=True)
            for _ in range(config.layers))
        self.norm = nn.LayerNorm(width)
        self.proj = nn.Linear(width, config.embed_dim, bias=False)

    def forward(self, latents):
        x = self.patch(latents).flatten(2).transpose(1, 2)  # [B, tokens, width]
        x = x + self.position
        for block in self.blocks:
            x = block(x)
        return self.proj(self.norm(x.mean(dim=1)))


class LatentRM(nn.Module):
    """latent_rm(unscaled latents [B,C,s,s], B prompts) -> [B] cosine similarities, float32.

    tokenizer: a support.tokenizer.Tokenizer. logit_scale: the log of CLIP's inverse temperature,
    which only the pre-training uses."""

    Config = LatentRMConfig

    def __init__(self, config=LatentRMConfig(), tokenizer=None):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.visual = LatentViT(config)
        self.text = TextTransformer(
            config.context_length, config.vocab_size, config.text_width, config.text_heads,
            config.text_layers, output_dim=config.embed_dim)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @classmethod
    def from_pretrained(cls, path, dtype=None, device=None):
        """path: a folder with config.json, the weights, and tokenizer/ in it or beside it; or a
        run folder with latent_rm/ in it. Raises InputError on anything but an exact fit."""
        latent_rm = load_component(cls, path, "latent_rm", dtype, device)
        mask = latent_rm.text.build_causal_mask()  # not in the file
        latent_rm.text.attn_mask = mask.to(device)

        folder = find_component(path, "latent_rm").folder
        places = folder / "tokenizer", folder.parent / "tokenizer"
        words = next((place for place in places if place.is_dir()), places[0])
        latent_rm.tokenizer = Tokenizer.from_pretrained(words)
        require(len(latent_rm.tokenizer) == latent_rm.config.vocab_size,
                f"{words}: {len(latent_rm.tokenizer)} tokens, but {folder}/config.json says "
                f"vocab_size {latent_rm.config.vocab_size}: do they belong together?")
        require(latent_rm.tokenizer.model_max_length == latent_rm.config.context_length,
                f"{words}: model_max_length {latent_rm.tokenizer.model_max_length}, but "
                f"{folder}/config.json says context_length {latent_rm.config.context_length}")
        return latent_rm

    def save_pretrained(self, folder, dtype=None):
        """Write config.json, the weights and tokenizer/ into `folder`, which appears whole or not
        at all."""
        with whole_folder(folder) as new:
            save_component(self, new, "LatentRM", dtype)
            self.tokenizer.save_pretrained(new / "tokenizer")

    def read_text_tower(self, file):
        """Take the text tower of a CLIP: a file of open_clip's layout or of transformers'
        CLIPModel, such as HPS_v2.1_compressed.pt. Raises InputError on anything but an exact
        fit."""
        component = open_clip_weights(
            file, r"^visual\.|^logit_(scale|bias)$|position_ids$|attn_mask$")
        load_strictly(self.text, component, device=self.logit_scale.device)

    def image_features(self, latents):
        """Unscaled latents [B,C,s,s] -> unit vectors [B,D], float32."""
        self.check_shape(latents)
        return F.normalize(self.visual(latents).float(), dim=-1)

    def check_shape(self, latents):
        side = self.config.latent_size
        shape = (self.config.latent_channels, side, side)
        require(latents.shape[1:] == shape,
                f"latents {tuple(latents.shape)}: "
                f"this LRM reads [B, {', '.join(map(str, shape))}]")

    def text_features(self, prompts):
        """B prompts -> unit vectors [B,D], float32. A prompt is cut at the tower's
        context_length."""
        ids = self.tokenizer(prompts).to(self.logit_scale.device, non_blocking=True)
        return F.normalize(self.text(ids).float(), dim=-1)

    def forward(self, latents, prompts):
        require(len(latents) == len(prompts),
                f"{len(latents)} latents for {len(prompts)} prompts; "
                f"expected one prompt a latent")
        return (self.image_features(latents) * self.text_features(prompts)).sum(dim=-1)

    def compile(self, **options):
        self.visual.compile(**options)
        self.text.compile(**options)

    def train_top(self, image_layers, text_layers):
        """Make the last so many blocks of the two towers trainable, and nothing else.
        -> these parameters"""
        self.requires_grad_(False)
        towers = (self.visual.blocks, image_layers), (self.text.transformer.resblocks, text_layers)
        for blocks, count in towers:
            blocks[max(0, len(blocks) - count):].requires_grad_(True)
        return [p for p in self.parameters() if p.requires_grad]


@contextlib.contextmanager
def frozen(module):
    """Inside, gradients pass through the module and stay out of its weights."""
    trained = [p for p in module.parameters() if p.requires_grad]
    module.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)


# ------------------------------------------------------------------------------------ preferences

def in_pairs(expert_scores, lrm_scores):
    """Both [B, K], K candidates for the same prompt -> both [B, K(K-1)/2, 2], each two of them."""
    shape = expert_scores.shape
    require(shape == lrm_scores.shape and len(shape) == 2 and shape[1] >= 2,
            f"the expert's scores {tuple(shape)}, the LRM's {tuple(lrm_scores.shape)}: "
            f"expected the same [B, K] with K >= 2 candidates to compare")
    pairs = torch.triu_indices(shape[1], shape[1], 1, device=expert_scores.device).T
    return expert_scores[:, pairs], lrm_scores[:, pairs]


def preference_loss(
        expert_scores, lrm_scores, tau=1.0, tau_lrm=1.0, kind="kl", privileged=False):
    """How far the LRM's preference in each pair of candidates is from the expert's (eq. 11).

    expert_scores, lrm_scores: [B, K], K >= 2 candidates for the same prompt. For each of the
    K(K-1)/2 pairs:

        kl    KL( softmax(expert / tau) || softmax(lrm / tau_lrm) )
        ce    the cross-entropy on the candidate that the expert prefers, and on both alike where
              it prefers none

    privileged: the last candidate is a real picture, to which the LRM is not to learn to prefer
    another: where the expert does, kl takes both alike, and ce the real one. (The published code,
    train_lcm_distill_sd_wds.py: --smooth_gt_label for kl, always for cross_entropy.)

    Mean over the batch, summed over pairs; the gradient reaches lrm_scores only.
    """
    require(kind in ("kl", "ce"), f"kind {kind!r}: expected kl or ce")
    require(tau > 0 and tau_lrm > 0,
            f"tau {tau}, tau_lrm {tau_lrm}: expected temperatures of more than 0")
    expert, lrm = in_pairs(expert_scores.detach().float(), lrm_scores.float())  # [B, pairs, 2]
    log_q = F.log_softmax(lrm / tau_lrm, dim=-1)
    if kind == "ce":
        p = ((expert - expert.flip(-1)).sign() + 1) / 2  # 1 and 0, or 1/2 and 1/2
    else:
        p = F.softmax(expert / tau, dim=-1)
    if privileged:
        last = torch.triu_indices(*[expert_scores.shape[1]] * 2, 1)[1] == expert_scores.shape[1] - 1
        wrong = last.to(expert.device) & (expert[..., 0] >= expert[..., 1])  # [B, pairs]
        instead = expert.new_tensor([0.0, 1.0] if kind == "ce" else [0.5, 0.5])
        p = torch.where(wrong[..., None], instead, p)
    entropy = torch.special.entr(p) if kind == "kl" else torch.zeros_like(p)
    return -(p * log_q + entropy).sum(-1).mean(0).sum()


def preference_accuracy(expert_scores, lrm_scores):
    """Both [B, K], K candidates for the same prompt -> the share of the B K(K-1)/2 pairs that the
    LRM ranks as the expert does. One in which either prefers none counts half, so that guessing
    has 1/2 and the mean over parts of a batch is that of the batch."""
    pairs = in_pairs(expert_scores, lrm_scores)
    expert, lrm = (pair.diff(dim=-1).sign() for pair in pairs)  # -1, 0 or 1: which is preferred
    return ((expert * lrm).mean() + 1) / 2


# ----------------------------------------------------------------------------------- pre-training

SIZES = {
    "sd21": {},
    "pocket": {"patch_size": 2, "width": 192, "layers": 4, "heads": 6, "embed_dim": 192,
               "text_width": 192, "text_layers": 2, "text_heads": 6},
}


# Published are lr, batch and 32 epochs of CC12M, which are these steps with 8 processes; warm-up
# and decay are the defaults of the published trainer.
PUBLISHED = {"size": "sd21", "resolution": 512, "batch_size": 480, "steps": 90_000, "lr": 5e-4,
             "warmup": 10_000, "weight_decay": 0.2}
ANY_SIZE = {"data": None, "model": None, "workers": 8, "compile": torch.cuda.is_available()}
PRESETS = {
    "pocket": {},
    "sd21": PUBLISHED | ANY_SIZE | {"out": "runs/latent_rm21"},
    "sd21-768": PUBLISHED | ANY_SIZE | {"out": "runs/latent_rm21-768", "resolution": 768},
    "sd15": PUBLISHED | ANY_SIZE | {"out": "runs/latent_rm15"},
}


@dataclass
class Config(runs.RunConfig):
    preset: str = option(
        "pocket", "values of all options that are not given (PRESETS in this file)",
        choices=tuple(PRESETS), group=runs.TRAINING)
    backbone: str = option(
        "vit", "what reads the latents: a tower that begins with noise, or a small head on the "
               "frozen --model's UNet and text encoder (teacher_rm.py)",
        choices=("vit", "teacher"))
    size: str = option("pocket", "of the towers (SIZES in this file)", choices=tuple(SIZES))
    text_tower: str | None = option(
        None, "file of a CLIP whose text tower to begin with, "
              "such as HPS_v2.1_compressed.pt for sd21")
    train_text: bool = option(True, "train the text tower too")
    model: str | None = option(
        str(POCKET), "model folder, single file or hub id: its VAE encodes pictures, "
                     "and the pocket's LRM takes its tokenizer/ (sd21: CLIP's own)")
    data: str | None = option(
        str(POCKET / "data" / "train-*.tar"),
        "shards of pictures or of posteriors (data.py): tars, a folder of them or of pictures, "
        "a glob, or {00000..01099}.tar", several=True)
    heldout: str | None = option(
        None, "shards for the retrieval accuracy, which no training sees; "
              "may be left out with the pocket's data, for the pocket's")
    out: str = option("runs/latent_rm", "run folder; a run found there is resumed")
    resolution: int = option(64, "side of the training pictures in pixels")
    batch_size: int = option(64, "pairs per process; the loss compares those of all processes")
    steps: int = option(500, "optimizer steps")
    lr: float = option(1e-3, "peak learning rate")
    warmup: int = option(50, "steps of warm-up")
    weight_decay: float = option(0.1, "of AdamW, on matrices")
    grad_checkpoint: bool = option(
        False, "recompute the text tower's activations in the backward pass: "
               "less memory, more time", group=runs.MACHINE)
    log_every: int = option(20, "steps between lines of log.jsonl", group=runs.LOOKING)
    heldout_every: int = option(100, "steps between retrievals on the held-out pairs")


class Gather(torch.autograd.Function):
    """Features [B,D] of this process -> those of all, [world * B, D], in the order of ranks.

    Each process computes the whole loss from them, so the gradient of its own rows is complete;
    times world, because the parameters' gradients are averaged afterwards."""

    @staticmethod
    def forward(ctx, features, rank, world):
        ctx.rank, ctx.world = rank, world
        parts = [torch.empty_like(features) for _ in range(world)]
        dist.all_gather(parts, features.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        return grad.chunk(ctx.world)[ctx.rank] * ctx.world, None, None


def clip_loss(image, text, logit_scale):
    """CLIP's loss on the unit features of B pairs, [B,D] each: every picture is to find its text,
    every text its picture, among all (arXiv 2103.00020, figure 3). logit_scale: the log of the
    inverse temperature."""
    logits = logit_scale.exp() * image.float() @ text.float().T  # [B, B]
    own = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


@torch.no_grad()
def retrieval(latent_rm, latents, captions):
    """Unscaled latents [N,C,s,s] and their N captions -> the share whose nearest caption among
    all is their own."""
    image = [latent_rm.image_features(part) for part in latents.split(64)]
    text = [latent_rm.text_features(captions[i:i + 64]) for i in range(0, len(captions), 64)]
    nearest = (torch.cat(image) @ torch.cat(text).T).argmax(dim=1).tolist()
    hits = sum(captions[j] == caption for j, caption in zip(nearest, captions))
    return hits / len(captions)


def check(args):
    on_teacher = args.backbone == "teacher"
    runs.check_preset(args, "data", *(["model"] if args.size == "pocket" or on_teacher else []))
    require(not on_teacher or (args.text_tower is None and args.train_text),
            "--text-tower, --no-train-text: of a text tower, and --backbone teacher has none; "
            "leave them out")
    if args.heldout is None:
        require(args.data == Config.data,
                f"--data {args.data} without --heldout: "
                f"give shards of its kind, for the retrieval accuracy")
        args.heldout = str(POCKET / "data" / "heldout-*.tar")
    at_least(1, args, "batch_size", "steps", "resolution", "warmup", "checkpoint_every",
             "log_every", "heldout_every", "keep", "max_bad_steps")
    at_least(0, args, "workers", "weight_decay")
    require(0 <= args.max_bad <= 1, f"--max-bad {args.max_bad}: expected 0 to 1")
    positive(args, "lr", "max_grad_norm")
    require(0 <= args.seed < 2**63, f"--seed {args.seed}: expected 0 to 2^63 - 1")
    require(args.train_text or args.text_tower is not None,
            "--no-train-text keeps the text tower as it is, "
            "which without --text-tower is noise: give one")
    require(args.batch_size >= 2,
            f"--batch-size {args.batch_size}: "
            f"expected 2 or more, the loss tells pairs from each other")


def new_latent_rm(args, shape):
    """A new LatentRM for latents of that shape (C, s, s), the same on every process."""
    channels, side, _ = shape
    if args.size == "sd21":
        tokenizer = built_in("sd2")
    else:
        tokenizer = Tokenizer.from_pretrained(local(args.model, "tokenizer") / "tokenizer")
    config = LatentRMConfig(
        channels, side, context_length=tokenizer.model_max_length, vocab_size=len(tokenizer),
        **SIZES[args.size])
    require(side % config.patch_size == 0,
            f"--resolution {args.resolution}: latents of side {side}, "
            f"expected a multiple of the patch size {config.patch_size}")
    torch.manual_seed(args.seed)
    latent_rm = LatentRM(config, tokenizer)
    if args.text_tower is not None:
        try:
            latent_rm.read_text_tower(args.text_tower)
        except InputError as error:
            raise InputError(f"--text-tower {args.text_tower} does not fit "
                             f"--size {args.size}: {error}") from None
    return latent_rm


def on_teacher(args, shape, newest, device, dtype):
    """--backbone teacher: an LRM on the UNet of --model, new or that of a checkpoint."""
    from pipeline import Pipeline
    from teacher_rm import TeacherRM  # which stands on this file
    from unet import UNet
    model = Pipeline.from_pretrained(args.model, device, dtype)
    teacher = UNet.from_pretrained(args.model, device=device, dtype=dtype)
    model.check(teacher, args.model, student=False).requires_grad_(False)
    if newest:
        return TeacherRM.from_pretrained(newest / "latent_rm", teacher, model)
    return TeacherRM.new(teacher, model, shape, SIZES[args.size], args.seed)


@torch.no_grad()
def posterior(tensors, vae, device):
    """Pictures [B,3,R,R], uint8 or in [-1,1], or posteriors [B,2,C,s,s] -> mean and std of the
    unscaled latents, [B,C,s,s] each. vae: None if there are posteriors only."""
    means, stds = [], []
    for part in tensors.to(device, non_blocking=True).split(32):
        part = data.as_input(part)
        mean, std = part.unbind(1) if part.ndim == 5 else vae.posterior(part)
        means.append(mean)
        stds.append(std)
    return torch.cat(means).float(), torch.cat(stds).float()


def read_pairs(args, device, dtype):
    """-> the shards to train on, the VAE if any hold pictures, the unscaled latents [N,C,s,s] of up
    to 256 held-out samples, and their N captions."""
    shards = data.shards_of(args, args.data)
    heldout = data.shards_of(args, args.heldout, "--heldout")
    vae = None
    if not (shards.encoded and heldout.encoded):
        runs.check_preset(args, "model")
        vae = VAE.from_pretrained(args.model, dtype, device).requires_grad_(False)
    require(vae is None or args.resolution % vae.factor == 0,
            f"--resolution {args.resolution}: expected a multiple of {vae and vae.factor}")
    tensors, captions = zip(*heldout.first(256))
    latents = posterior(torch.stack(tensors), vae, device)[0]
    shape = tuple(posterior(shards.first(1)[0][0][None], vae, device)[0].shape[1:])
    require(latents.shape[1:] == shape,
            f"--heldout {args.heldout}: latents {tuple(latents.shape[1:])}, "
            f"those of --data are {shape}; encode both alike")
    return shards, vae, latents, captions


def new_optimizer(latent_rm, args, newest, device):
    """AdamW with weight decay on matrices only."""
    weights = [p for p in latent_rm.parameters() if p.requires_grad]
    matrices = [p for p in weights if p.ndim > 1]
    others = [p for p in weights if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": args.weight_decay},
         {"params": others, "weight_decay": 0.0}],
        lr=args.lr, betas=(0.9, 0.98), fused=True)
    load_optimizer(optimizer, newest, device)
    return weights, optimizer


class Towers(nn.Module):
    """Both towers in one forward, as DistributedDataParallel wants it."""

    def __init__(self, latent_rm, dtype):
        super().__init__()
        self.latent_rm, self.dtype = latent_rm, dtype

    def forward(self, latents, captions):
        with cli.autocast(latents.device, self.dtype):
            return self.latent_rm.image_features(latents), self.latent_rm.text_features(captions)


def optimizer_step(towers, latent_rm, weights, optimizer, latents, captions, step, args, rank,
                   world):
    """One step of CLIP's loss on B latents [B,C,s,s] and their captions -> loss, gradient norm, or
    None: they are not finite, and nothing has changed."""
    optimizer.zero_grad(set_to_none=True)
    with fast_attention(latents.device):
        image, text = towers(latents, captions)
        if world > 1:
            image, text = Gather.apply(image, rank, world), Gather.apply(text, rank, world)
        loss = clip_loss(image, text, latent_rm.logit_scale)
        loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(weights, args.max_grad_norm)
    if not processes.all_of((loss + norm).isfinite().item(), world):
        return None
    for group in optimizer.param_groups:
        group["lr"] = args.lr * runs.rate_factor(step, args)
    optimizer.step()
    with torch.no_grad():
        latent_rm.logit_scale.clamp_(max=math.log(100))  # as CLIP does: the training stays stable
    return {"loss": loss.detach(), "grad_norm": norm}


def train(run, latent_rm, towers, weights, optimizer, pairs, device, dtype, args, rank, world):
    """The loop. pairs: as read_pairs gives them. -> was it stopped before its last step?"""
    shards, vae, heldout_latents, heldout_captions = pairs
    shape = tuple(heldout_latents.shape[1:])  # (C, s, s)
    log = runs.Log(args, run.start, world * args.batch_size, rank, world)
    stream = data.batches(shards, args.seed, run.start, args.steps, args.batch_size, rank, world,
                          args.workers, log.broken)
    stopped = False
    with processes.Stop() as stop:
        for step, (tensors, captions) in zip(range(run.start, args.steps), stream):
            places = data.positions(step, args.batch_size, rank, world)
            noise = data.random_draws(args.seed, places, shape, device)[0]
            mean, std = posterior(tensors, vae, device)
            stats = optimizer_step(towers, latent_rm, weights, optimizer, mean + std * noise,
                                   captions, step, args, rank, world)
            done = step + 1
            if stats is not None:
                log.add(stats)
            else:
                names = data.names_of_step(shards, args.seed, step, args.batch_size, rank, world)
                log.skip(done, names, "lower --lr")

            stopped = stop.asked(world)
            last, saves = done == args.steps or stopped, done % args.checkpoint_every == 0
            look = last or done % args.heldout_every == 0
            if (look or saves or done % args.log_every == 0) and log.counts:
                line = {"step": done} | {k: v.item() for k, v in log.means(world).items()}
                line |= {"logit_scale": latent_rm.logit_scale.exp().item(),
                         "lr": optimizer.param_groups[0]["lr"]}
                if look and rank == 0:
                    with log.pause(), cli.autocast(device, dtype):
                        line["retrieval"] = retrieval(latent_rm, heldout_latents, heldout_captions)
                log(line, ("loss", "retrieval", "grad_norm"))
            with log.pause():
                if saves or last:
                    run.save(done, optimizer)
                run.poll()
            if stopped:
                break
        run.end()
    log.close()
    return stopped


def pretrain(run, args, rank, world, device, dtype):
    """Everything of a run, once its folder is there."""
    pairs = shards, _, heldout_latents, heldout_captions = read_pairs(args, device, dtype)
    runs.record_data(args, shards, run.start, rank)
    shape = tuple(heldout_latents.shape[1:])
    if args.backbone == "teacher":
        latent_rm = on_teacher(args, shape, run.newest, device, dtype)
    elif run.newest:
        latent_rm = LatentRM.from_pretrained(run.newest / "latent_rm")
    else:
        latent_rm = new_latent_rm(args, shape)
    latent_rm.to(device).train()
    if args.backbone == "vit":
        text = latent_rm.text.requires_grad_(args.train_text)
        text.set_grad_checkpointing(args.grad_checkpoint)
    run.know({"latent_rm": latent_rm})
    weights, optimizer = new_optimizer(latent_rm, args, run.newest, device)
    towers = processes.averaged(Towers(latent_rm, dtype), world)
    if args.compile:
        latent_rm.compile()
    if rank == 0:
        millions = sum(p.numel() for p in weights) / 1e6
        print(f"{millions:.1f} M parameters, {len(shards)} pairs, "
              f"{world} x {args.batch_size} a step, {device}, {str(dtype)[6:]}"
              + (f"; resumes at step {run.start}" if 0 < run.start < args.steps else ""))
        for note in shards.notes():
            print(note)
    stopped = train(run, latent_rm, towers, weights, optimizer, pairs, device, dtype, args, rank,
                    world)
    processes.end(world, device)
    if rank == 0 and not stopped:
        run.export()
        with cli.autocast(device, dtype):
            found = retrieval(latent_rm, heldout_latents, heldout_captions)
        print(f"held-out latents that find their caption among {len(heldout_latents)}: "
              f"{found:.1%}\n{Path(args.out) / 'latent_rm'}")


def main():
    args = parse(Config(), __doc__, presets=PRESETS, published=PUBLISHED)
    check(args)
    rank, world, device, dtype = processes.setup(args)
    with runs.open_run(args, rank, world) as run:
        pretrain(run, args, rank, world, device, dtype)


if __name__ == "__main__":
    run(main)
