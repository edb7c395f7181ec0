"""The options of train.py: what each means, the presets, what is refused before a run begins."""
from dataclasses import dataclass, replace

import torch

import brakes
from lora import LAYERS
from support import optimizers, runs, watch
from support.cli import POCKET, at_least, option, positive, require

# The published recipe, where it differs from the pocket's defaults below.
PUBLISHED = {"resolution": 512, "steps": 10_000, "lr": 1e-6, "lr_schedule": "constant", "warmup": 1,
             "ddim_steps": 50, "w_min": 5.0, "w_max": 15.0, "reward": "hpsv2.1",
             "reward_scale": 1.0, "rm_batch": 16, "rm_tau": 0.01, "rm_tau_lrm": 0.01}
ANY_SIZE = {"teacher": None, "data": None, "judge": None, "judge_prompts": None,
            "grad_checkpoint": True, "workers": 8, "compile": torch.cuda.is_available()}
PRESETS = {
    "pocket": {},
    "sd21": PUBLISHED | ANY_SIZE | {"out": "runs/sd21"},
    "sd21-768": PUBLISHED | ANY_SIZE | {"out": "runs/sd21-768", "resolution": 768},
    "sd15": PUBLISHED | ANY_SIZE | {"out": "runs/sd15"},  # for which none was published
}


@dataclass
class Config(brakes.Options, runs.RunConfig):
    preset: str = option(
        "pocket", "values of all options that are not given (PRESETS in options.py)",
        choices=tuple(PRESETS), group=runs.TRAINING)
    teacher: str | None = option(str(POCKET), "model folder of the teacher")
    data: str | None = option(
        str(POCKET / "data" / "train-*.tar"),
        "shards: tars, a folder of them or of pictures, a glob, or {00000..01099}.tar",
        several=True)
    out: str = option("runs/pocket", "run folder; a run found there is resumed")
    resolution: int = option(64, "side of the training pictures in pixels")
    batch_size: int = option(16, "pictures per process in one pass")
    grad_accum: int = option(1, "passes per optimizer step")
    steps: int = option(300, "optimizer steps")
    lr: float = option(1e-4, "peak learning rate")
    warmup: int = option(20, "steps of warm-up")
    ema: float = option(0.95, "decay of the target network")

    ddim_steps: int = option(
        10, "N, points of the solver's grid; the skip is 1000 / N", group="the method")
    solver_substeps: int = option(1, "teacher steps between two grid points")
    w_min: float = option(1.0, "smallest guidance weight: cond + w (cond - uncond)")
    w_max: float = option(5.0, "largest guidance weight")
    w_embed: bool = option(
        True, "the student is told w; without, w is drawn for the solver alone, and the student "
              "is one for any LCM pipeline")

    lora: int | None = option(
        None, "rank: train low-rank updates of the frozen teacher, not a copy of it",
        group="LoRA students")
    lora_alpha: float | None = option(
        None, "updates are scaled by this over the rank; left out: the rank")
    lora_layers: str = option(
        "all", "all linear layers and convolutions of the blocks, or the attention's alone",
        choices=tuple(LAYERS))

    reward: str = option(
        "pocket", "reward model or weighted sum of them (reward.py), or none for plain LCD",
        group="the reward")
    reward_scale: float = option(0.5, "beta: weight of the reward in the loss")
    reward_batch: int = option(
        16, "rows of a pass that are rewarded (and decoded, without --latent-rm)")

    latent_rm: str | None = option(
        None, "latent proxy reward model (LRM) to reward through; "
              "--reward is the expert that it follows", group="the latent proxy")
    rm_lr: float = option(3.3e-6, "learning rate of the LRM (as published; the pocket needs 1e-4)")
    rm_batch: int = option(
        8, "rows of a pass that the expert compares for the LRM, "
           "three decoded pictures each: what that path costs")
    rm_image_layers: int = option(2, "last blocks of the LRM's image tower that train")
    rm_text_layers: int = option(5, "last blocks of the LRM's text tower that train")
    rm_loss: str = option(
        "kl", "divergence of the two preferences, or cross-entropy on the expert's choice",
        choices=("kl", "ce"))
    rm_privileged: bool = option(
        False, "the LRM does not learn to prefer a generated picture to the real one, whatever the "
               "expert says (--smooth_gt_label of the published code)")
    rm_tau: float = option(
        0.05, "temperature of the expert's scores, in their unit: "
              "what counts as a clear difference")
    rm_tau_lrm: float = option(0.05, "temperature of the LRM's scores, which are cosines")

    optimizer: str = option(
        "adamw", "adamw8bit: moments of 8 bits, which takes the extra `8bit`",
        choices=tuple(optimizers.KINDS), group=runs.MACHINE)
    target_dtype: str = option(
        "fp32", "numbers that hold the target network; bf16 is rounded at random, to the right "
                "mean", choices=("fp32", "bf16"))
    shard: bool = option(
        False, "share out the student's and target's float32 weights, gradients and Adam's moments "
               "over the processes (FSDP2)")
    grad_checkpoint: bool = option(
        False, "recompute the student's, the decoder's and the reward's activations "
               "in the backward pass: less memory, 1.3x time")
    log_every: int = option(10, "steps between lines of log.jsonl", group=runs.LOOKING)
    norms_every: int = option(
        100, "steps between measurements of the gradient of the distillation and of the reward "
             "apart, each of which costs a pass without reward; 0: never")
    sample_every: int = option(200, "steps between sample grids")
    judge_every: int = option(
        0, f"steps between looks for over-optimisation: the EMA student draws {watch.PROMPTS} "
           "held-out prompts, reward and judge score them, and a line warns when the reward rises "
           "while the judge falls; 0: never")
    judge: str | None = option(
        str(POCKET / "judge"), "the judge for that, of which training must not know: a folder of a "
                               "CLIP like pocket/judge, or a reward (reward.py)")
    judge_prompts: str | None = option(
        str(POCKET / "data" / "heldout-*.tar"), "the prompts for that: shards or a file of prompts "
                                                "(.txt, .tsv, .json, .jsonl)")
    evaluate: bool = option(True, "end a run on the pocket with the comparison table")


def check(args):
    runs.check_preset(args, "teacher", "data")
    brakes.check(args)
    optimizers.check(args.optimizer)
    at_least(1, args, "batch_size", "grad_accum", "steps", "warmup", "reward_batch", "rm_batch",
             "solver_substeps", "resolution", "checkpoint_every", "log_every", "sample_every",
             "keep", "max_bad_steps")
    at_least(0, args, "workers", "norms_every", "judge_every", "rm_image_layers",
             "rm_text_layers")
    require(args.judge_every == 0 or (args.judge and args.judge_prompts),
            "--judge-every needs --judge and --judge-prompts, which training must not know")
    require(args.ddim_steps >= 2,
            f"--ddim-steps {args.ddim_steps}: expected 2 or more, the student's steps")
    require(0 <= args.max_bad <= 1, f"--max-bad {args.max_bad}: expected 0 to 1")
    positive(args, "lr", "max_grad_norm", "rm_lr", "rm_tau", "rm_tau_lrm")
    if args.lora is not None:
        at_least(1, args, "lora")
        if args.lr < 1e-5:
            print(f"note: --lr {args.lr:g} is a rate for full students; low-rank updates hardly "
                  "move at it: published LCM-LoRAs were trained at 1e-4")
        require(args.target_dtype == "fp32",
                "--target-dtype bf16 with --lora: the target is a few megabytes; leave it out")
    if args.lora_alpha is not None:
        positive(args, "lora_alpha")
    require(args.lora is not None or (args.lora_alpha is None and args.lora_layers == "all"),
            "--lora-alpha, --lora-layers: of low-rank updates, and there are none; "
            "give --lora RANK too")
    require(0 <= args.ema < 1, f"--ema {args.ema}: expected 0 <= decay < 1")
    require(args.w_min <= args.w_max, f"--w-min {args.w_min} is more than --w-max {args.w_max}")
    require(args.optimizer == "adamw" or not args.shard,
            f"--optimizer {args.optimizer} with --shard: its moments cannot be shared out; "
            f"leave out one of the two")
    given = replace(Config(), **PRESETS[args.preset])
    idle = [f"--{name.replace('_', '-')}" for name, value in vars(args).items()
            if name.startswith("rm_") and value != getattr(given, name)]
    require(args.latent_rm is not None or not idle,
            f"{', '.join(idle)}: of the latent proxy reward model, and there is none; "
            f"give --latent-rm too")
    require(args.latent_rm is None or args.reward != "none",
            f"--latent-rm {args.latent_rm} with --reward none: "
            f"a proxy needs an expert to follow; give one")
