"""What was trained here, for other programs.

    # a run: its teacher with its student (EMA)
    python export.py --run runs/sd21 --out exported
    # the same from its parts
    python export.py --teacher MODEL --unet STUDENT --out exported
    # a teacher in one file, LDM names
    python export.py --teacher MODEL --single-file teacher.safetensors
    # the LoRA of a run (train.py --lora), for diffusers, and for A1111 and ComfyUI
    python export.py --run runs/lora --lora pytorch_lora_weights.safetensors
    python export.py --run runs/lora --lora for-comfyui.safetensors --layout kohya --dtype fp16
    # LoRA files merged into the teacher: any of the above forms
    python export.py --teacher MODEL --merge a.safetensors --merge b.safetensors --out exported

`diffusers.LatentConsistencyModelPipeline.from_pretrained("exported")` opens the folder. It draws
the pictures of sample.py, given guidance_scale = w + 1 and torch.Generator().manual_seed(seed).
Of a student without a guidance embedding it is StableDiffusionPipeline, and guidance_scale = 1.
sample.py opens both kinds with --model.
"""
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from lcm_solver import ScheduleConfig
from lora import W_PROJECTION, LoRA
from pipeline import merged
from support import lora_files, single_file
from support.cli import POCKET, make_folder, option, parse, require, run
from support.tokenizer import write_tokenizer
from support.weights import find_component, read_json, whole_file, whole_folder
from text_encoder import TextEncoder
from unet import UNet
from vae import VAE


@dataclass
class Config:
    run: str | None = option(
        None, "run folder of train.py: stands for --teacher and --unet", group="what to export")
    teacher: str = option(
        str(POCKET), "the model around the student: folder, single file or hub id")
    unet: str | None = option(None, "the student (default: TEACHER/student)")
    merge: list[str] = option(
        (), "a LoRA to merge into the teacher's UNet, which gives the student; may be given "
            "several times", list=True)
    lora_scale: list[str] = option(
        (), "how much of it: once for all, or once for each (default: 1)", list=True)
    out: str = option("exported", "the pipeline folder to write", group="how")
    single_file: str | None = option(None, "write the teacher into this .safetensors instead")
    lora: str | None = option(None, "write the run's LoRA into this .safetensors instead")
    layout: str = option(
        "diffusers", "names of its tensors; kohya's are those that A1111 and ComfyUI read",
        choices=("diffusers", "kohya"))
    dtype: str = option("fp32", "of the weights written", choices=("fp32", "fp16", "bf16"))


DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def scheduler_config(schedule, grid):
    """schedule: a ScheduleConfig; grid: N. -> scheduler_config.json of the LCMScheduler that takes
    the steps of lcm_solver.sample_lcm."""
    return {
        "_class_name": "LCMScheduler",
        "num_train_timesteps": schedule.num_train_timesteps,
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "beta_schedule": "scaled_linear",
        "prediction_type": schedule.prediction_type,
        "set_alpha_to_one": False,
        "clip_sample": False,
        "original_inference_steps": grid,
        "timestep_scaling": 10.0,
        "timestep_spacing": "leading",
        "steps_offset": 1,
    }


MODEL_INDEX = {
    "_class_name": "LatentConsistencyModelPipeline",
    "requires_safety_checker": False,
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "LCMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def export_pipeline(teacher, unet, out, dtype=torch.float32):
    """Write the student `unet` (a UNet) and the other parts of model `teacher` as a folder of
    diffusers' LatentConsistencyModelPipeline. The folder `out` appears whole or not at all."""
    text_encoder = TextEncoder.from_pretrained(teacher, dtype)
    require(unet.config.cross_attention_dim == text_encoder.dim,
            f"the student's cross_attention_dim is {unet.config.cross_attention_dim}, "
            f"the text encoder of {teacher} gives {text_encoder.dim}: "
            "does the student belong to this teacher?")
    found = find_component(teacher, "text_encoder")  # its tokenizer lies beside it, or is built in
    with whole_folder(out) as new:
        text_encoder.save_pretrained(new, dtype)
        VAE.from_pretrained(teacher, dtype).save_pretrained(new / "vae", dtype)
        unet.save_pretrained(new / "unet", dtype)
        if found.folder:
            shutil.copytree(found.folder.parent / "tokenizer", new / "tokenizer")
        else:
            write_tokenizer(new / "tokenizer", found.kind)
        schedule = ScheduleConfig.from_pretrained(teacher)
        scheduler = scheduler_config(schedule, unet.config.lcm_grid or 50)
        (new / "scheduler").mkdir()
        (new / "scheduler" / "scheduler_config.json").write_text(
            json.dumps(scheduler, indent=2) + "\n")
        (new / "model_index.json").write_text(json.dumps(index_of(unet), indent=2) + "\n")


def index_of(unet):
    """-> model_index.json. A student that reads no w goes with the pipeline of all models."""
    if unet.config.time_cond_proj_dim:
        return MODEL_INDEX
    return MODEL_INDEX | {"_class_name": "StableDiffusionPipeline"}


def export_single_file(teacher, file, dtype=torch.float32, unet=None):
    """Write model `teacher`, with the UNet `unet` if it is given, in LDM names, as the published
    single files are. Of SD2's 24 text layers the folder layout keeps the 23 that are used, and so
    does the file."""
    unet = unet or UNet.from_pretrained(teacher, dtype=dtype)
    require(not unet.config.time_cond_proj_dim,
            f"{teacher}: a student; a single file in LDM names has no place for its guidance "
            "embedding, export it with --out")
    vae = VAE.from_pretrained(teacher, dtype)
    text_encoder = TextEncoder.from_pretrained(teacher, dtype)
    components = (
        ("unet", unet, vars(unet.config)),
        ("vae", vae, vars(vae.config)),
        ("text_encoder", text_encoder.model,
         {"hidden_act": text_encoder.model.config.hidden_act}))
    state = {}
    for name, module, config in components:
        stacked = {}  # q, k and v of one attention, which the file holds in one tensor
        for key, tensor in module.state_dict().items():
            ldm_key, third = single_file.KEYS[name](key, config)
            if third is not None:
                stacked.setdefault(ldm_key, {})[third] = tensor
            elif name == "vae" and ".attn_1." in ldm_key and tensor.ndim == 2:
                state[ldm_key] = tensor[:, :, None, None].contiguous()  # a 1x1 convolution there
            else:
                state[ldm_key] = tensor.contiguous()
        for ldm_key, thirds in stacked.items():
            state[ldm_key] = torch.cat([thirds[i] for i in range(3)])
    kind = ScheduleConfig.from_pretrained(teacher).prediction_type
    metadata = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.prediction_type": "v" if kind == "v_prediction" else "epsilon"}
    if unet.config.lcm_grid:
        metadata[single_file.GRID] = str(unet.config.lcm_grid)
    with whole_file(file) as new:
        save_file(state, new, metadata=metadata)


def export_lora(teacher, loras, scales, file, layout, dtype):
    """Write the one LoRA of `loras`, which is for model `teacher`, in the names of `layout`."""
    require(len(loras) == 1,
            f"--lora {file}: {len(loras)} LoRAs to write; expected one: --run with a run of "
            "train.py --lora, or one --merge")
    facts = lora_files.facts(loras)
    unet = UNet.from_pretrained(teacher, facts["time_cond_proj_dim"])
    lora = LoRA.from_pretrained(loras[0], unet).set_scale(scales[0])
    require(layout == "diffusers" or W_PROJECTION not in lora.updates,
            f"{loras[0]}: has a guidance embedding, for which A1111 and ComfyUI have no place; "
            "train with --no-w-embed, or leave --layout out")
    lora_files.write(lora, file, layout, dtype)


def parts_of(run):
    """A run folder of train.py -> its teacher, its student, and its LoRA in a list, or none."""
    config = read_json(run / "config.json")
    require(config.get("teacher"),
            f"{run}/config.json: names no teacher; expected a run folder of train.py")
    trained = run / ("lora_target" if config.get("lora") else "unet_target")
    require(trained.is_dir(), f"{trained}: not there yet; let the run end (repeat its command), or "
            f"give --teacher {config['teacher']} and the {trained.name} of one of its checkpoints "
            f"as {'--merge' if config.get('lora') else '--unet'}")
    return config["teacher"], str(run / "unet_target"), [str(trained)] if config.get("lora") else []


def output_file(name, option, sources=()):
    """-> the Path of a file to write, whose folder is there and which is none of the sources."""
    file = Path(name)
    require(file.resolve() not in [Path(source).resolve() for source in sources],
            f"{option} {file}: is the file to read; it would be replaced, so give another name")
    require(file.suffix == ".safetensors",
            f"{option} {file}: expected a name that ends in .safetensors")
    make_folder(file.parent, option)
    return file


def main():
    args = parse(Config(), __doc__)
    teacher, student, dtype = args.teacher, args.unet, DTYPES[args.dtype]
    loras, unet = list(args.merge), None
    if args.run:
        require(student is None and not loras,
                "--run brings its own student; leave --unet and --merge out")
        teacher, student, loras = parts_of(Path(args.run))
    scales = lora_files.scales_of(loras, args.lora_scale)
    require(not (args.lora and args.single_file),
            "--lora and --single-file: each writes one file; give one of them")
    require(args.lora or args.layout == "diffusers",
            f"--layout {args.layout}: of the file that --lora writes; give it too")
    if args.lora:
        file = output_file(args.lora, "--lora", loras)
        export_lora(teacher, loras, scales, file, args.layout, dtype)
        print(file)
        return
    if loras:
        student = " and ".join(loras)
        unet = merged(args.unet or teacher, loras, scales, dtype)
    if args.single_file:
        file = output_file(args.single_file, "--single-file")
        export_single_file(teacher, file, dtype, unet)
        print(file)
        return
    student = student or str(Path(teacher) / "student")
    unet = unet or UNet.from_pretrained(student, dtype=dtype)
    require(unet.config.distilled,
            f"{student}: a teacher (no guidance embedding); expected a student")
    out = Path(args.out)
    # whole_folder replaces what is there: allowed for an earlier export, or an empty folder
    index = out / "model_index.json"
    exported = index.is_file() and read_json(index).get("scheduler") == MODEL_INDEX["scheduler"]
    empty = out.is_dir() and not any(out.iterdir())
    require(not out.exists() or exported or empty,
            f"--out {out}: exists and is no exported pipeline; "
            "it would be replaced, so give another name")
    require(out.resolve() != Path(teacher).resolve(),
            f"--out {out}: is the model to export; it would be replaced, so give another name")
    make_folder(out.parent)
    export_pipeline(teacher, unet, out, dtype)
    print(f"{out}: diffusers.{index_of(unet)['_class_name']}.from_pretrained({args.out!r})")


if __name__ == "__main__":
    run(main)
