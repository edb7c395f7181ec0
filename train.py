"""Reward Guided Latent Consistency Distillation (arXiv 2403.11027), algorithm 1.

    python train.py                                    # the pocket, on a laptop, in minutes
    python train.py --reward none --out runs/plain     # the same without reward: plain LCD
    python train.py --lora 16 --lr 1e-3 --out runs/lora   # low-rank updates (lora.py)

    # Stable Diffusion 2.1, the published recipe
    torchrun --nproc_per_node=8 train.py --preset sd21 --teacher MODEL --data 'cc12m/*.tar'

    # the reward through a latent proxy (latent_rm.py)
    python train.py --latent-rm runs/latent_rm --rm-lr 1e-4 --rm-image-layers 4 \\
        --rm-text-layers 0 --out runs/latent

To resume, run the same command. All randomness is a function of the seed and of the sample's place
in the stream of samples, so a resumed run draws the same, and so does a run on another number of
processes with as many pictures a step.
"""
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import brakes
import data
import evaluate
import latent_rm as proxy
import teacher_rm
from discriminator import Discriminator
from lcm_solver import DDIMSolver, consistency_function, huber
from lora import LoRA, Update, sharing
from options import PRESETS, PUBLISHED, Config, check
from pipeline import Pipeline, grid, merged, save_png
from reward import Reward, load_reward
from support import cli, flops, optimizers, processes, protocols, runs, watch
from support.checkpoints import load_optimizer
from support.cli import POCKET, parse, require, run
from support.kernels import compile_blocks, fast_attention
from unet import ResnetBlock, Transformer, UNet

W_DIM = 256  # width of the guidance embedding

# ---------------------------------------------------------------------------------- the algorithm

def distillation_loss(
        model, teacher, student, target, reward, solver, batch, args, latent_rm=None,
        averages=None, discriminator=None):
    """Algorithm 1 for one pass over B samples: L = L_LCD - beta * mean reward.

    The networks: `model` holds the VAE, the text encoder and the schedule; `student` is trained;
    `target` is its exponential moving average; `reward` is None or scores decoded pictures;
    `latent_rm`, if given, scores latents in its place and learns to follow it. `averages`: of the
    reward in the steps before, if an option asks for them (brakes.Averages); `discriminator`: of
    the student's latents, if it is to be anchored to real ones (discriminator.py).

    batch: (tensors, captions, draws).
        tensors     images [B,3,H,W] in [-1,1], or posteriors [B,2,4,h,w] as data.py encodes them
        captions    B strings
        draws       all that is random (data.random_draws):
                        posterior_noise, noise    [B,4,h,w], unit normal
                        u_w, u_s                  [B], uniform in [0,1), for w and for s
                        two more with --reward-jitter (brakes.jittered)

    -> loss (the sum of the student's, the LRM's and the discriminator's, which share no gradient),
       {name: detached scalar}: "loss", the student's; "reward", what the reward model gives to the
       student's pictures (with a latent_rm: to those that it compares; what is maximised is then
       "rm_score"); "lcd_at" [2, N], L_LCD by_grid_point; "latent_grad" [3], which the backward
       pass fills (brakes.apart)
    """
    tensors, captions, (posterior_noise, noise, u_w, u_s, *view) = batch
    schedule = solver.schedule
    with torch.no_grad():
        # z = VAE(x), drawn from its posterior; c = text(prompt), and the empty prompt for guidance
        mean, std = tensors.unbind(1) if tensors.ndim == 5 else model.vae.posterior(tensors)
        z = (mean + std * posterior_noise) * model.vae.config.scaling_factor  # [B, 4, h, w]
        context, uncond_context = model.text_encoder([*captions, ""]).split([len(captions), 1])

        # w ~ U[w_min, w_max];  s uniform over the N points of the solver's grid
        w = args.w_min + (args.w_max - args.w_min) * u_w
        index = (u_s * len(solver.timesteps)).long()
        s = solver.timesteps[index]

        # z_s = sqrt(ab_s) z + sqrt(1 - ab_s) noise
        z_s = schedule.add_noise(z, noise, s)

        # s = t_{n+k} -> t = t_n, k = 1000 / N: the teacher walks its ODE one grid step down
        # (LCM, eq. 13)
        z_t, t = solver.solve(teacher, z_s, s, context, uncond_context, w, args.solver_substeps)

        # f(z, w, c, t) is the clean latent at the end of the trajectory through z at t; at t = 0 it
        # is z itself. f_ema(z_t, w, c, t): what the student's is to agree with
        goal = consistency_function(target, schedule, z_t, t, context, w)

    latents = consistency_function(student, schedule, z_s, s, context, w)  # f(z_s, w, c, s)
    # the gradients of the losses to it are measured apart
    prediction, rated, anchored, latent_grad = brakes.apart(latents)
    # L_LCD of each sample, the consistency of two neighbours on one trajectory
    distance = huber(prediction, goal, dim=(1, 2, 3))  # [B]
    lcd = distance.mean()

    # R: of the decoded pictures, or through the proxy, which meanwhile learns from the expert
    score = rm_loss = anchor_loss = 0.0
    stats = {}
    if latent_rm is not None:
        candidates = {"prediction": prediction.detach(), "ema": goal, "real": z}
        score, rm_loss, stats = proxy_reward(
            model, latent_rm, reward, rated, candidates, captions, args, view, averages)
    elif reward is not None:
        score, stats = direct_reward(model, reward, rated, captions, args, view, averages)

    beta = args.reward_scale if averages is None else averages.scale(args)
    loss = lcd - beta * score  # L = L_LCD - beta R (RG-LCD, eq. 8)
    if discriminator is not None:  # not in the paper: --anchor
        anchor, anchor_loss = discriminator.losses(
            teacher, solver, anchored, z, noise, u_s, context)
        loss = loss + args.anchor * anchor
        stats |= {"anchor": anchor.detach(), "anchor_loss": anchor_loss.detach()}
    stats |= {"lcd": lcd.detach(), "loss": loss.detach(), "latent_grad": latent_grad,
              "lcd_at": by_grid_point(distance.detach(), index, len(solver.timesteps))}
    return loss + rm_loss + anchor_loss, stats


def by_grid_point(values, index, points):
    """B values and their places [B] in a grid of so many points -> [2, points]: at each point the
    sum of its values, and how many there are."""
    each = torch.stack([values, torch.ones_like(values)])  # [2, B]
    return torch.zeros(2, points, device=values.device).index_add(1, index, each)


def direct_reward(model, reward, latents, captions, args, view=(), averages=None):
    """R(decode(f), prompt): the reward of the decoded pictures (view, averages: brakes.score), of
    the first --reward-batch alone, since each costs a decode.

    Scaled latents [B,4,h,w] -> mean score with gradient to them, {name: detached scalar}

    Pictures are clamped to [0, 1] before they are scored (Pipeline.decode), as a reward model has
    only seen such. What is clamped gives no gradient: on the pocket's held-out prompts 24% of the
    pixels.
    """
    rows = slice(args.reward_batch)
    latents, captions, view = latents[rows], captions[rows], [draw[rows] for draw in view]
    if args.grad_checkpoint:  # picture by picture: the backward pass holds the activations of one
        images = torch.cat([
            checkpoint(model.decode, one, use_reentrant=False) for one in latents.split(1)])
    else:
        images = model.decode(latents)
    parts, plain = brakes.score(reward, images, captions, args, view, averages)
    score = reward.total({name: part.mean() for name, part in parts.items()})
    means = {name: part.mean().detach() for name, part in plain.items()}
    stats = {"reward": reward.total(means)}
    if len(parts) > 1:
        stats |= {f"reward/{name}": mean for name, mean in means.items()}
    if averages is not None:
        stats["scores"] = brakes.sums_of(plain, args)
    return score, stats


def proxy_reward(
        model, latent_rm, reward, latents, candidates, captions, args, view=(), averages=None):
    """R_latent of the first --reward-batch latents [B,4,h,w], and what the proxy learns from the
    first --rm-batch of the candidates (proxy_loss): each of those costs three decodes.
    -> mean score, loss, {name: detached scalar}"""
    rewarded, compared = slice(args.reward_batch), slice(args.rm_batch)
    text = latent_rm.text_features(captions[:max(args.reward_batch, args.rm_batch)])
    score = latent_reward(model, latent_rm, latents[rewarded], text[rewarded])
    loss, stats = proxy_loss(
        model, latent_rm, reward, {name: some[compared] for name, some in candidates.items()},
        captions[compared], text[compared], args, [draw[compared] for draw in view], averages)
    return score, loss, stats | {"rm_score": score.detach()}


def latent_reward(model, latent_rm, latents, text):
    """R_latent(f, prompt): the reward through the latent proxy (section 4.2); nothing is decoded.

    Scaled latents [B,4,h,w], the proxy's features of their captions [B,D]
    -> mean score with gradient to the latents only
    """
    # frozen: this score trains the student. It must not train the proxy, which would learn to
    # give every picture a high one.
    with proxy.frozen(latent_rm):
        image = latent_rm.image_features(latents / model.vae.config.scaling_factor)  # [B, D]
    return (image * text.detach()).sum(dim=1).mean()


def proxy_loss(
        model, latent_rm, reward, candidates, captions, text, args, view=(), averages=None):
    """What the proxy learns: to prefer among candidates what the expert prefers (eq. 11).

    candidates: {name: scaled latents [B,4,h,w]} without gradient, for the same B captions, whose
    features by the proxy are `text` [B,D]
    -> loss with gradient to the LRM only, {name: detached scalar}
    """
    with torch.no_grad():
        scores = [brakes.score(reward, model.decode(latents), captions, args, view, averages)
                  for latents in candidates.values()]
        # [B, K]: as the LRM is to prefer, and as they are
        expert, plain = (torch.stack([reward.total(parts) for parts in column], dim=1)
                         for column in zip(*scores))
    latents = torch.cat(list(candidates.values())) / model.vae.config.scaling_factor  # [K*B,4,h,w]
    image = latent_rm.image_features(latents).unflatten(0, (len(candidates), -1))  # [K, B, D]
    lrm = (image * text).sum(dim=-1).T  # [B, K]
    loss = proxy.preference_loss(
        expert, lrm, args.rm_tau, args.rm_tau_lrm, args.rm_loss, args.rm_privileged)
    stats = {
        "rm_loss": loss.detach(),
        "rm_accuracy": proxy.preference_accuracy(expert, lrm.detach()),
        "reward": plain[:, 0].mean(),
        # how often the expert prefers a generated picture to the real one, which is the last
        "expert/prefers_generated": (plain[:, :-1] > plain[:, -1:]).float().mean(),
    }
    stats |= {f"expert/{name}": column.mean() for name, column in zip(candidates, plain.T)}
    if averages is not None:
        stats["scores"] = sum(brakes.sums_of(parts, args) for _, parts in scores)
    return loss, stats


# --------------------------------------------------------------------------------------- networks

@dataclass
class Networks:
    """All networks of a run. Frozen: model, teacher, reward, in the run's arithmetic. Trained in
    float32: the student, whose EMA is the target, and the top of the latent proxy."""
    model: Pipeline
    teacher: UNet
    reward: Reward | None
    student: UNet
    target: UNet
    latent_rm: proxy.LatentRM | None
    averages: brakes.Averages | None = None
    discriminator: Discriminator | None = None
    pull: Callable | None = None  # to the teacher's weights (brakes.teacher_pull)

    @classmethod
    def load(cls, args, newest, device, dtype):
        """newest: the checkpoint to go on from, or None: then the student begins as the teacher."""
        model = Pipeline.from_pretrained(args.teacher, device, dtype)
        teacher = UNet.from_pretrained(args.teacher, device=device, dtype=dtype)
        model.check(teacher, args.teacher, student=False).requires_grad_(False)
        teacher.checkpointing = args.grad_checkpoint  # an anchor's gradient passes through it
        reward = None
        if args.reward != "none":
            reward = load_reward(
                args.reward, device, dtype, args.grad_checkpoint, args.reward_resolution)
            brakes.check_reward(reward, args)
            require(
                reward.differentiable or args.latent_rm is not None,
                f"--reward {args.reward}: a black box, which gives no gradient to maximise; "
                f"it needs a latent proxy reward model (--latent-rm)")
        require(args.resolution % model.vae.factor == 0,
                f"--resolution {args.resolution}: expected a multiple of {model.vae.factor}")

        make = cls.updates if args.lora else cls.copies
        student, target = make(args, teacher, newest, device, {
            "lcm_grid": args.ddim_steps, "sample_size": args.resolution // model.vae.factor})
        student.train().checkpointing = args.grad_checkpoint
        latent_rm = None
        if args.latent_rm is not None:
            latent_rm = teacher_rm.load(
                newest / "latent_rm" if newest else args.latent_rm, teacher, model, device).train()
        averages = brakes.Averages.of(reward, args, newest, device)
        discriminator = None
        if args.anchor:
            discriminator = Discriminator.load(teacher, args.seed, newest, device)
        return cls(model, teacher, reward, student, target, latent_rm, averages, discriminator)

    @staticmethod
    def copies(args, teacher, newest, device, more):
        """-> student and target with weights of their own. more: fields of their config."""
        more |= {"w_embed_dim": W_DIM if args.w_embed else None, "device": device}
        dtype = cli.PRECISIONS[args.target_dtype]
        student = UNet.from_pretrained(newest / "unet" if newest else args.teacher, **more)
        target = UNet.from_pretrained(
            newest / "unet_target" if newest else args.teacher, dtype=dtype, **more)
        return student, target.requires_grad_(False)

    @staticmethod
    def updates(args, teacher, newest, device, more):
        """-> student and target that share the teacher's weights, with updates of their own."""
        more |= {"time_cond_proj_dim": W_DIM if args.w_embed else None}
        made = []
        for name in ("lora", "lora_target"):
            unet = sharing(teacher, **more)
            if newest:
                lora = LoRA.from_pretrained(newest / name, unet)
            else:
                lora = LoRA.new(unet, args.lora, args.lora_alpha, args.lora_layers, args.seed)
            made.append(lora.attach(unet))
        made[1].requires_grad_(False)
        return made

    @property
    def pair(self):
        """What trains of the student, all of it or its updates, and the moving average of that."""
        if hasattr(self.student, "lora"):
            return self.student.lora, self.target.lora
        return self.student, self.target

    def trained(self):
        """{name of its folder: network} of what a checkpoint holds: the pair, and what else there
        is."""
        name = "lora" if hasattr(self.student, "lora") else "unet"
        found = dict(zip((name, f"{name}_target"), self.pair))
        more = {"latent_rm": self.latent_rm, "averages": self.averages,
                "discriminator": self.discriminator}
        return found | {name: network for name, network in more.items() if network is not None}

    def compile(self, sharded):
        # FSDP2's hooks would cut the graphs of what is shared out to pieces
        trained = () if sharded else (self.student, self.target)
        for unet in (*trained, self.teacher):
            compile_blocks(unet, (ResnetBlock, Transformer))
        for network in (self.model.vae.encoder, self.model.vae.decoder):
            network.compile()
        for rewarder in (self.reward, self.latent_rm):
            if rewarder is not None:
                rewarder.compile()


def new_optimizer(networks, args, newest, device):
    """AdamW over groups of parameters: the student's, those of the LRM that train, and the
    discriminator's if there is one."""
    weights, rm_weights = [p for p in networks.student.parameters() if p.requires_grad], []
    if networks.latent_rm is not None:
        rm_weights = networks.latent_rm.train_top(args.rm_image_layers, args.rm_text_layers)
    groups = [{"params": weights}, {"params": rm_weights}]
    if networks.discriminator is not None:
        groups.append({"params": list(networks.discriminator.parameters())})
    optimizer = optimizers.KINDS[args.optimizer](
        groups, lr=args.lr, betas=(0.9, 0.999), weight_decay=0.0)
    load_optimizer(optimizer, newest, device)
    return optimizer


# --------------------------------------------------------------------------------------- the loop

class Pass(torch.nn.Module):
    """distillation_loss by the networks of a run, in its arithmetic. A module that holds what
    trains and whose forward is the loss: so DistributedDataParallel wants it."""

    def __init__(self, networks, solver, args):
        super().__init__()
        self.student, self.latent_rm = networks.student, networks.latent_rm
        self.discriminator = networks.discriminator
        self.networks, self.solver, self.args = networks, solver, args

    def forward(self, batch, with_reward=True):
        n, reward, latent_rm = self.networks, None, None
        if with_reward:
            reward, latent_rm = n.reward, n.latent_rm
        with cli.autocast(n.model.device, n.model.dtype):
            return distillation_loss(n.model, n.teacher, n.student, n.target, reward,
                                     self.solver, batch, self.args, latent_rm,
                                     averages=n.averages, discriminator=n.discriminator)


def add_gradients(one_pass, tensors, captions, draws, args, with_reward=True):
    """Add the mean gradient over the passes of a step to the weights'. -> {name: tensor} of what is
    logged"""
    totals, device = {}, draws[0].device
    for first in range(0, len(captions), args.batch_size):
        part = slice(first, first + args.batch_size)
        images = data.as_input(tensors[part].to(device, non_blocking=True))
        batch = images, captions[part], [draw[part] for draw in draws]
        waits = part.stop < len(captions) and isinstance(one_pass, DistributedDataParallel)
        with one_pass.no_sync() if waits else contextlib.nullcontext(), fast_attention(device):
            loss, stats = one_pass(batch, with_reward)
            (loss / args.grad_accum).backward()
        for key, value in stats.items():
            totals[key] = totals.get(key, 0) + value / args.grad_accum
    return totals


def lcd_gradient(one_pass, optimizer, tensors, captions, draws, args, world):
    """The gradient without the reward's, which is what it lacks of the whole: of L_LCD (and of an
    anchor)."""
    add_gradients(one_pass, tensors, captions, draws, args, with_reward=False)
    gradient = [p.grad.clone() for p in optimizer.param_groups[0]["params"]]
    if not args.shard:
        processes.average(gradient, world)
    optimizer.zero_grad(set_to_none=True)
    return gradient


def norm_of(tensors):
    return processes.whole(torch.nn.utils.get_total_norm(tensors))


def optimizer_step(networks, one_pass, optimizer, step, tensors, captions, draws, args, world):
    """One optimizer step: the mean gradient over its rows, AdamW, the EMA. -> {name: tensor} of
    what is logged, or None: its loss or gradient is not finite, and nothing has changed."""
    # of the student, of the LRM, and of the discriminator if there is one
    weights, *others = groups = [group["params"] for group in optimizer.param_groups]
    optimizer.zero_grad(set_to_none=True)
    lcd, due = None, args.norms_every > 0 and step % args.norms_every == 0
    if due and networks.reward is not None:
        alone = getattr(one_pass, "module", one_pass)
        lcd = lcd_gradient(alone, optimizer, tensors, captions, draws, args, world)
    with brakes.shaken(networks.reward, args, step):
        totals = add_gradients(one_pass, tensors, captions, draws, args)
    if args.shard:
        processes.average([p.grad for group in others for p in group], world)
        processes.reshard(networks.pair[1])
    if lcd is not None:
        totals["grad_norm/lcd"] = norm_of(lcd)
        torch._foreach_sub_(lcd, [p.grad for p in weights])
        totals["grad_norm/reward"] = norm_of(lcd)
    if networks.pull is not None:
        networks.pull()

    # Norms are 1.6 to 12 on the pocket, so this always shortens: every step enters AdamW's moments
    # with the same length, and one long gradient does not drown the others.
    norms = dict(zip(("grad_norm", "rm_grad_norm", "anchor_grad_norm"), groups))
    for name, group in norms.items():
        if group:
            norm = torch.nn.utils.clip_grad_norm_(group, args.max_grad_norm)
            totals[name] = processes.whole(norm)
    found = torch.stack([totals[name] for name in ("loss", *norms) if name in totals])
    if not processes.all_of(found.isfinite().all().item(), world):
        return None

    if networks.averages is not None:
        networks.averages.learn(totals, args, world)
    for group, lr in zip(optimizer.param_groups, (args.lr, args.rm_lr, args.anchor_lr)):
        group["lr"] = lr * runs.rate_factor(step, args)
    optimizer.step()
    # target <- mu * target + (1 - mu) * student
    student, target = (processes.parts_here([p.detach() for p in network.parameters()])
                       for network in networks.pair)
    if args.target_dtype == "bf16":
        optimizers.lerp_rounded(target, student, 1 - args.ema, args.seed * 1_000_003 + step)
    else:
        torch._foreach_lerp_(target, student, 1 - args.ema)
    return totals


def check_latents(args, shards, latent_rm, shape):
    """The latents of encoded shards and of the LRM must be those of this run: shape (4, h, w)."""
    require(not shards.encoded or shards.shape == (2, *shape),
            f"--resolution {args.resolution} takes posteriors {(2, *shape)}, the shards hold "
            f"{tuple(shards.shape or ())}: encode them at this resolution")
    if latent_rm is not None:
        config = latent_rm.config
        reads = (config.latent_channels, config.latent_size, config.latent_size)
        require(reads == shape,
                f"--latent-rm {args.latent_rm} reads latents {reads}, --resolution "
                f"{args.resolution} of this model gives {shape}: "
                f"pre-train one for them (latent_rm.py)")


def means_by_name(means, timesteps):
    """What log.jsonl shows of the means of all steps since the last line: numbers, under "lcd_at"
    L_LCD by timestep, and under "reward_ratio" and "anchor_ratio" how long their gradients to the
    student's latents were for one of L_LCD."""
    sums, counts = means.pop("lcd_at").tolist()
    lcd, *others = means.pop("latent_grad").tolist()
    line = {name: value.item() for name, value in means.items()}
    for name, square in zip(("reward_ratio", "anchor_ratio"), others):
        if lcd > 0 and square > 0:
            line[name] = (square / lcd) ** 0.5
    points = zip(timesteps, sums, counts)
    line["lcd_at"] = {str(t): total / count for t, total, count in points if count > 0}
    return line


def save_samples(networks, prompts, done, args, rank):
    """Pictures of the target network, samples/step-NNNNNN.png. The same seeds each time. A sharded
    network draws on all processes at once."""
    if rank > 0 and not args.shard:
        return
    w = (args.w_min + args.w_max) / 2
    parts = []
    for first in range(0, len(prompts), args.batch_size):  # no more at a time than in training
        seeds = range(first, min(first + args.batch_size, len(prompts)))
        some = [prompts[seed] for seed in seeds]
        parts.append(networks.model.draw(networks.target, some, seeds, 2, w))
    images = torch.cat(parts)
    file = Path(args.out) / "samples" / f"step-{done:06d}.png"
    if rank == 0:
        save_png(grid(images, 4), file, prompts=" | ".join(prompts), steps=2, guidance=w)


def new_watch(args, reward, start, device):
    """--judge-every: what looks for over-optimisation, or None."""
    if not args.judge_every:
        return None
    if protocols.is_prompts(args.judge_prompts):
        prompts = protocols.read_prompts(args.judge_prompts)
    else:
        held_out = data.Shards(args.judge_prompts, args.resolution, "--judge-prompts")
        prompts = [caption for _, caption in held_out.first(watch.PROMPTS)]
    judge = load_reward(evaluate.as_spec(args.judge), device)
    return watch.Watch(Path(args.out) / "held_out.json", prompts, reward, judge, start)


def tell_memory(networks, optimizer):
    """What this process holds between two steps; the activations of a pass come on top."""
    n = networks
    held = processes.bytes_held(
        [*n.trained().values()], [n.teacher, n.model.vae, n.model.text_encoder, n.reward],
        optimizer)
    parts = ", ".join(f"{name} {count / 1e9:.3f}" for name, count in held.items())
    tqdm.write(f"tensors of a process: {sum(held.values()) / 1e9:.3f} GB ({parts})")


def finish(run, args, device, dtype):
    """Put the networks of the last checkpoint into the run folder; on the pocket, compare the
    student with the teacher."""
    out = Path(args.out)
    run.export()
    print("  ".join(str(out / name) for name in run.networks))
    if args.evaluate and Path(args.teacher).resolve() == POCKET:
        if args.lora:  # the comparison reads a whole UNet
            merged(args.teacher, [out / "lora_target"], [1.0]).save_pretrained(out / "unet_target")
        comparison = evaluate.Config(
            unet=str(out / "unet_target"), out=str(out), guidance=(args.w_min + args.w_max) / 2,
            reward="pocket" if args.reward == "none" else args.reward,
            device=str(device), precision=args.precision)
        evaluate.compare(comparison, device, dtype)


def train(run, networks, one_pass, optimizer, shards, shape, args, rank, world, peak_step):
    """The loop. shape: of a latent; peak_step: seconds that a step would take at the card's peak,
    or None. -> was it stopped before its last step?"""
    rows, device = args.batch_size * args.grad_accum, networks.model.device
    timesteps = DDIMSolver(networks.model.schedule, args.ddim_steps).timesteps.tolist()
    prompts = [caption for _, caption in shards.first(8)]
    watching = new_watch(args, networks.reward, run.start, device)
    log = runs.Log(args, run.start, world * rows, rank, world, peak_step)
    stream = data.batches(
        shards, args.seed, run.start, args.steps, rows, rank, world, args.workers, log.broken)
    stopped = False
    with processes.Stop() as stop:
        for step, (tensors, captions) in zip(range(run.start, args.steps), stream):
            places = data.positions(step, rows, rank, world)  # of these rows in the stream
            draws = data.random_draws(args.seed, places, shape, device,
                                      args.resolution if args.reward_jitter else None)
            stats = optimizer_step(networks, one_pass, optimizer, step, tensors, captions, draws,
                                   args, world)
            done = step + 1
            if step == run.start and rank == 0:
                tell_memory(networks, optimizer)
            if stats is not None:
                log.add(stats)
            else:
                names = data.names_of_step(shards, args.seed, step, rows, rank, world)
                log.skip(done, names, "lower --lr or --reward-scale")

            stopped = stop.asked(world)
            last, saves = done == args.steps or stopped, done % args.checkpoint_every == 0
            looks = watching is not None and done % args.judge_every == 0
            if (done % args.log_every == 0 or saves or last or looks) and log.counts:
                line = {"step": done} | means_by_name(log.means(world), timesteps)
                line["lr"] = optimizer.param_groups[0]["lr"]
                if looks and (rank == 0 or args.shard):  # a sharded student draws on all processes
                    with log.pause():
                        line["held_out"] = watching(done, networks.model, networks.target,
                                                    (args.w_min + args.w_max) / 2, rank == 0)
                log(line, ("lcd", "reward", "rm_loss", "grad_norm"))
            if done % args.sample_every == 0 or last:
                with log.pause():
                    save_samples(networks, prompts, done, args, rank)
            with log.pause():
                if saves or last:
                    run.save(done, optimizer)
                run.poll()
            if stopped:
                break
        run.end()
    log.close()
    return stopped


def distil(run, args, rank, world, device, dtype):
    """Everything of a run, once its folder is there."""
    shards = data.shards_of(args, args.data)
    runs.record_data(args, shards, run.start, rank)
    networks = Networks.load(args, run.newest, device, dtype)
    side = networks.student.config.sample_size
    shape = (networks.model.vae.config.latent_channels, side, side)
    check_latents(args, shards, networks.latent_rm, shape)
    run.know(networks.trained())
    if args.shard:
        for network in networks.pair:
            processes.shard(network, (ResnetBlock, Transformer, Update), device, world)
    networks.pull = brakes.teacher_pull(networks.student, networks.teacher, args, device)
    optimizer = new_optimizer(networks, args, run.newest, device)
    solver = DDIMSolver(networks.model.schedule, args.ddim_steps)
    one_pass, peak_step = Pass(networks, solver, args), None
    if flops.peak(device):
        peak_step = flops.of_step(
            one_pass, shape, shards.encoded, args, device) / flops.peak(device)
    if not args.shard:  # else FSDP2 averages the gradients
        one_pass = processes.averaged(one_pass, world, args.grad_checkpoint)
    if args.compile:
        networks.compile(args.shard)

    if rank == 0:
        cli.make_folder(Path(args.out) / "samples")
        weights = optimizer.param_groups[0]["params"]
        millions = sum(p.numel() for p in weights) / 1e6
        print(f"{millions:.1f} M parameters, {len(shards)} pictures, {world} x "
              f"{args.batch_size * args.grad_accum} a step, "
              f"reward {args.reward}, {device}, {str(dtype)[6:]}"
              + (f"; resumes at step {run.start}" if 0 < run.start < args.steps else ""))
        for note in shards.notes():
            print(note)
    stopped = train(run, networks, one_pass, optimizer, shards, shape, args, rank, world,
                    peak_step)
    processes.end(world, device)
    if rank == 0 and not stopped:
        finish(run, args, device, dtype)


def main():
    args = parse(Config(), __doc__, presets=PRESETS, published=PUBLISHED)
    check(args)
    rank, world, device, dtype = processes.setup(args)
    require(world > 1 or not args.shard,
            "--shard shares weights out over processes, and there is one; start it by torchrun")
    with runs.open_run(args, rank, world) as run:
        distil(run, args, rank, world, device, dtype)


if __name__ == "__main__":
    run(main)
