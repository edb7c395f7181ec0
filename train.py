"""Reward Guided Latent Consistency Distillation (arXiv 2403.11027), algorithm 1.

    python train.py                                       # the pocket, on a laptop, in minutes; ends with the table
    python train.py --reward none --out runs/plain        # the same without reward: plain LCD

    torchrun --nproc_per_node=8 train.py --teacher MODEL --data 'cc12m/*.tar' --out runs/sd21 --resolution 512 \\
        --batch-size 16 --steps 10000 --lr 1e-6 --lr-schedule constant --w-min 5 --w-max 15 --ddim-steps 50 \\
        --reward hpsv2.1 --reward-scale 1 --reward-batch 4 --grad-checkpoint --workers 8

    # the reward through a latent proxy (latent_rm.py)
    python train.py --latent-rm runs/latent_rm --rm-lr 1e-4 --rm-image-layers 4 --rm-text-layers 0 --out runs/latent

To resume, run the same command. All randomness is a function of the seed and of the sample's place in the stream of samples,
so a resumed run draws the same, and so does a run on another number of processes with as many pictures a step.
"""
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

import evaluate
from data import Shards, batches, positions, random_draws
from latent_rm import LatentRM, frozen, preference_accuracy, preference_loss
from lcm_solver import DDIMSolver, consistency_function, huber
from pipeline import Pipeline, grid, save_png
from reward import load_reward
from support.cli import (
    POCKET,
    at_least,
    autocast,
    fast_attention,
    make_folder,
    option,
    parse,
    positive,
    require,
    run,
)
from support.runs import (
    Log,
    RunConfig,
    average_over_processes,
    open_run,
    rate_factor,
    save_checkpoint,
    setup_processes,
)
from unet import UNet

try:  # the extra `tensorboard`: curves beside log.jsonl
    from torch.utils.tensorboard import SummaryWriter
except ImportError:
    SummaryWriter = None

W_DIM = 256  # width of the guidance embedding


@dataclass
class Config(RunConfig):
    teacher: str = option(str(POCKET), "model folder of the teacher")
    data: str = option(str(POCKET / "data" / "train-*.tar"), "shards: a tar, a folder, or a glob")
    out: str = option("runs/pocket", "run folder; a run found there is resumed")
    resolution: int = option(64, "side of the training pictures in pixels")
    batch_size: int = option(16, "pictures per process in one pass")
    grad_accum: int = option(1, "passes per optimizer step")
    steps: int = option(300, "optimizer steps")
    lr: float = option(1e-4, "learning rate (published SD2.1 recipe: 1e-6, constant)")
    warmup: int = option(20, "steps of warm-up")
    reward: str = option("pocket", "reward model or weighted sum of them (reward.py), or none for plain LCD")
    reward_scale: float = option(0.5, "beta: weight of the reward in the loss")
    reward_batch: int = option(16, "rows of a pass that are rewarded (and decoded, without --latent-rm)")
    latent_rm: str | None = option(None, "latent proxy reward model (LRM) to reward through; --reward is the expert that it follows")
    rm_lr: float = option(3.3e-6, "learning rate of the LRM (as published; the pocket needs 1e-4)")
    rm_batch: int = option(8, "rows of a pass that the expert compares for the LRM, three decoded pictures each: what that path costs")
    rm_image_layers: int = option(2, "last blocks of the LRM's image tower that train")
    rm_text_layers: int = option(5, "last blocks of the LRM's text tower that train")
    rm_loss: str = option("kl", "divergence of the two preferences, or cross-entropy on the expert's choice", choices=("kl", "ce"))
    rm_tau: float = option(0.05, "temperature of the expert's scores, in their unit: what counts as a clear difference")
    rm_tau_lrm: float = option(0.05, "temperature of the LRM's scores, which are cosines")
    ddim_steps: int = option(10, "N, points of the solver's grid; the skip is 1000 / N (published: 50)")
    solver_substeps: int = option(1, "teacher steps between two grid points")
    w_min: float = option(1.0, "smallest guidance weight (published: 5)")
    w_max: float = option(5.0, "largest guidance weight (published: 15)")
    ema: float = option(0.95, "decay of the target network")
    grad_checkpoint: bool = option(False, "recompute the student's, the decoder's and the reward's activations in the backward pass: less memory, 1.3x time")
    log_every: int = option(10, "steps between lines of log.jsonl")
    sample_every: int = option(200, "steps between sample grids")
    evaluate: bool = option(True, "end a run on the pocket with the comparison table")


# ------------------------------------------------------------------------------------------- the algorithm

def distillation_loss(model, teacher, student, target, reward, solver, batch, args, latent_rm=None):
    """RG-LCD, algorithm 1, for one pass. batch: (images [B,3,H,W] or posteriors [B,2,4,h,w], captions, draws).
    -> loss (with a latent_rm: the sum of the student's and the LRM's, which share no gradient), {name: detached scalar}"""
    tensors, captions, (posterior_noise, noise, index, u) = batch
    schedule = solver.schedule
    with torch.no_grad():
        mean, std = tensors.unbind(1) if tensors.ndim == 5 else model.vae.posterior(tensors)
        z = (mean + std * posterior_noise) * model.vae.config.scaling_factor
        context, uncond_context = model.text_encoder([*captions, ""]).split([len(captions), 1])
        w = args.w_min + (args.w_max - args.w_min) * u
        s = solver.timesteps[index]
        z_s = schedule.add_noise(z, noise, s)
        z_t, t = solver.solve(teacher, z_s, s, context, uncond_context, w, args.solver_substeps)
        goal = consistency_function(target, schedule, z_t, t, context, w)

    prediction = consistency_function(student, schedule, z_s, s, context, w)
    lcd = huber(prediction, goal)  # L_LCD
    score, rm_loss, stats = 0.0, 0.0, {}
    rewarded, compared = slice(args.reward_batch), slice(args.rm_batch)
    if latent_rm is not None:
        text = latent_rm.text_features(captions[:max(args.reward_batch, args.rm_batch)])
        score = latent_reward(model, latent_rm, prediction[rewarded], text[rewarded])
        candidates = {"prediction": prediction.detach()[compared], "target": goal[compared], "real": z[compared]}
        rm_loss, stats = proxy_loss(model, latent_rm, reward, candidates, captions[compared], text[compared], args)
        stats["rm_score"] = score.detach()
    elif reward is not None:
        score, stats = direct_reward(model, reward, prediction[rewarded], captions[rewarded], args)
    loss = lcd - args.reward_scale * score  # eq. 8
    return loss + rm_loss, {"lcd": lcd.detach()} | stats | {"loss": loss.detach()}


def direct_reward(model, reward, latents, captions, args):
    """The reward of the decoded pictures. Scaled latents [B,4,h,w] -> mean score with gradient to them, {name: detached scalar}"""
    if args.grad_checkpoint:  # one picture at a time: the backward pass then holds the activations of one
        images = torch.cat([checkpoint(model.decode, row, use_reentrant=False) for row in latents.split(1)])
    else:
        images = model.decode(latents)
    parts = {name: scores.mean() for name, scores in reward.parts(images, captions).items()}
    score = sum(reward.weights[name] * part for name, part in parts.items())
    return score, {"reward": score.detach()} | {f"reward/{name}": part.detach() for name, part in parts.items() if len(parts) > 1}


def latent_reward(model, latent_rm, latents, text):
    """The reward through the latent proxy (section 4.2): nothing is decoded. Scaled latents [B,4,h,w] and the proxy's features of their
    captions [B,D] -> mean score with gradient to the latents only"""
    with frozen(latent_rm):  # a compiled tower has a graph of its own for inputs that need gradients
        image = latent_rm.image_features(latents / model.vae.config.scaling_factor)
    return (image * text.detach()).sum(dim=1).mean()


def proxy_loss(model, latent_rm, reward, candidates, captions, text, args):
    """What the proxy learns: to prefer among decoded candidates what the expert prefers. candidates: {name: scaled latents [B,4,h,w]}
    without gradient; text: the proxy's features [B,D] of the B captions -> loss with gradient to the LRM only, {name: detached scalar}"""
    with torch.no_grad():
        expert = torch.stack([reward(model.decode(latents), captions) for latents in candidates.values()], dim=1)  # [B, K]
    latents = torch.cat(list(candidates.values())) / model.vae.config.scaling_factor
    image = latent_rm.image_features(latents).unflatten(0, (len(candidates), -1))  # [K, B, D]
    lrm = (image * text).sum(dim=-1).T  # [B, K]
    loss = preference_loss(expert, lrm, args.rm_tau, args.rm_tau_lrm, args.rm_loss)
    return loss, {"rm_loss": loss.detach(), "rm_accuracy": preference_accuracy(expert, lrm.detach()), "reward": expert[:, 0].mean()} | {
        f"expert/{name}": scores.mean() for name, scores in zip(candidates, expert.T)}


# ------------------------------------------------------------------------------------------- the loop

def check(args):
    at_least(1, args, "batch_size", "grad_accum", "steps", "warmup", "reward_batch", "rm_batch", "solver_substeps", "resolution", "checkpoint_every", "log_every", "sample_every", "keep")
    at_least(0, args, "workers", "rm_image_layers", "rm_text_layers")
    require(args.ddim_steps >= 2, f"--ddim-steps {args.ddim_steps}: expected 2 or more, the student's steps")
    positive(args, "lr", "rm_lr", "rm_tau", "rm_tau_lrm")
    require(0 <= args.ema < 1, f"--ema {args.ema}: expected 0 <= decay < 1")
    require(args.w_min <= args.w_max, f"--w-min {args.w_min} is more than --w-max {args.w_max}")
    idle = [f"--{name.replace('_', '-')}" for name, value in vars(args).items() if name.startswith("rm_") and value != getattr(Config, name)]
    require(args.latent_rm is not None or not idle, f"{', '.join(idle)}: of the latent proxy reward model, and there is none; give --latent-rm too")
    require(args.latent_rm is None or args.reward != "none", f"--latent-rm {args.latent_rm} with --reward none: a proxy needs an expert to follow; give one")


def main():
    args = parse(Config(), __doc__)
    check(args)
    rank, world, device, dtype = setup_processes(args)
    main_process, out = rank == 0, Path(args.out)
    newest, start = open_run(args, rank, world)

    # Frozen: VAE, text encoder, teacher, reward. Trained in float32: the student, whose EMA is the target, and the top of the LRM.
    model = Pipeline.from_pretrained(args.teacher, device, dtype)
    teacher = model.check(UNet.from_pretrained(args.teacher, device=device, dtype=dtype), args.teacher, student=False).requires_grad_(False)
    reward = None if args.reward == "none" else load_reward(args.reward, device, dtype, args.grad_checkpoint)
    require(reward is None or reward.differentiable or args.latent_rm is not None, f"--reward {args.reward}: a black box, which gives no "
            f"gradient to maximise; it needs a latent proxy reward model (--latent-rm)")
    shards = Shards(args.data, args.resolution)
    solver = DDIMSolver(model.schedule, args.ddim_steps)
    require(args.resolution % model.vae.factor == 0, f"--resolution {args.resolution}: expected a multiple of {model.vae.factor}")
    side = args.resolution // model.vae.factor
    trained = dict(w_embed_dim=W_DIM, device=device, lcm_grid=args.ddim_steps, sample_size=side)
    student = UNet.from_pretrained(newest / "unet" if newest else args.teacher, **trained).train()
    target = UNet.from_pretrained(newest / "unet_target" if newest else args.teacher, **trained).requires_grad_(False)
    student.checkpointing = args.grad_checkpoint
    weights, target_weights = list(student.parameters()), list(target.parameters())
    networks, latent_rm, rm_weights = {"unet": student, "unet_target": target}, None, []
    if args.latent_rm is not None:
        networks["latent_rm"] = latent_rm = LatentRM.from_pretrained(newest / "latent_rm" if newest else args.latent_rm, device=device).train()
        rm_weights = latent_rm.train_top(args.rm_image_layers, args.rm_text_layers)
    optimizer = torch.optim.AdamW([{"params": weights}, {"params": rm_weights}], lr=args.lr, betas=(0.9, 0.999), weight_decay=0.0, fused=True)
    if newest:
        optimizer.load_state_dict(torch.load(newest / "optimizer.pt", map_location=device, weights_only=True))
    if args.compile:
        for network in (student, target, teacher, model.vae.encoder, model.vae.decoder):
            network.compile()
        for rewarder in (reward, latent_rm):
            if rewarder is not None:
                rewarder.compile()

    rows = args.batch_size * args.grad_accum
    stream = batches(shards, args.seed, start, args.steps, rows, rank, world, args.workers)
    shape = (model.vae.config.latent_channels, side, side)
    require(not shards.encoded or shards[0][0].shape == (2, *shape),
            f"--resolution {args.resolution} takes posteriors {(2, *shape)}, the shards hold {tuple(shards[0][0].shape)}: encode them at this resolution")
    reads = latent_rm and (latent_rm.config.latent_channels, latent_rm.config.latent_size, latent_rm.config.latent_size)
    require(reads in (None, shape), f"--latent-rm {args.latent_rm} reads latents {reads}, --resolution {args.resolution} of this model gives {shape}: "
                                    f"pre-train one for them (latent_rm.py)")
    prompts = [shards.caption(i) for i in range(min(8, len(shards)))]
    if main_process:
        make_folder(out / "samples")
        print(f"{sum(p.numel() for p in weights) / 1e6:.1f} M parameters, {len(shards)} pictures, {world} x {rows} a step, "
              f"reward {args.reward}, {device}, {str(dtype)[6:]}" + (f"; resumes at step {start}" if start else ""))
    board = SummaryWriter(out / "tensorboard", purge_step=start + 1) if SummaryWriter and main_process else None
    log = Log(out, start, args.steps, world * rows, rank)

    for step, (tensors, captions) in zip(range(start, args.steps), stream):
        draws = random_draws(args.seed, positions(step, rows, rank, world), shape, len(solver.timesteps), device)
        optimizer.zero_grad(set_to_none=True)
        totals = {}
        for first in range(0, rows, args.batch_size):
            part = slice(first, first + args.batch_size)
            batch = tensors[part].to(device, non_blocking=True), captions[part], [d[part] for d in draws]
            with fast_attention(device):
                with autocast(device, dtype):
                    loss, stats = distillation_loss(model, teacher, student, target, reward, solver, batch, args, latent_rm)
                (loss / args.grad_accum).backward()
            for key, value in stats.items():
                totals[key] = totals.get(key, 0) + value / args.grad_accum
        average_over_processes([p.grad for p in weights + rm_weights], world)
        norms = {"grad_norm": torch.nn.utils.clip_grad_norm_(weights, 1.0)}
        if latent_rm:
            norms["rm_grad_norm"] = torch.nn.utils.clip_grad_norm_(rm_weights, 1.0)
        for group, lr in zip(optimizer.param_groups, (args.lr, args.rm_lr)):
            group["lr"] = lr * rate_factor(step, args)
        optimizer.step()
        torch._foreach_lerp_(target_weights, [p.detach() for p in weights], 1 - args.ema)  # EMA target

        done = step + 1
        log.progress.update()
        if done % args.log_every == 0 or done % args.checkpoint_every == 0 or done == args.steps:
            average_over_processes(list(totals.values()), world)
            line = {"step": done} | {k: v.item() for k, v in (totals | norms).items()} | {"lr": optimizer.param_groups[0]["lr"]}
            for key, value in log(line, ("lcd", "reward"), "lower --lr or --reward-scale").items():
                if board:
                    board.add_scalar(key, value, done)
        if main_process and (done % args.sample_every == 0 or done == args.steps):
            with log.pause():
                w = (args.w_min + args.w_max) / 2
                images = model.draw(target, prompts, range(len(prompts)), 2, w)
                save_png(grid(images, 4), out / "samples" / f"step-{done:06d}.png", prompts=" | ".join(prompts), steps=2, guidance=w)
        if main_process and (done % args.checkpoint_every == 0 or done == args.steps):
            with log.pause():
                save_checkpoint(out, done, networks, optimizer, args.keep)
    log.progress.close()
    if board:
        board.close()
    if main_process:
        for name, network in networks.items():
            network.save_pretrained(out / name)
        print("  ".join(str(out / name) for name in networks))
        if args.evaluate and Path(args.teacher).resolve() == POCKET:
            compared = evaluate.Config(unet=str(out / "unet_target"), out=str(out), guidance=(args.w_min + args.w_max) / 2, device=str(device), precision=args.precision)
            evaluate.compare(compared, device, dtype)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
