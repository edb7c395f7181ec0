"""What was trained here, for other programs.

    # a run: its teacher with its student (EMA)
    python export.py --run runs/sd21 --out exported
    # the same from its parts
    python export.py --teacher MODEL --unet STUDENT --out exported
    # a teacher in one file, LDM names
    python export.py --teacher MODEL --single-file teacher.safetensors

`diffusers.LatentConsistencyModelPipeline.from_pretrained("exported")` opens the folder. It draws
the pictures of sample.py, given guidance_scale = w + 1 and torch.Generator().manual_seed(seed).
sample.py opens both kinds with --model.
"""
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from lcm_solver import ScheduleConfig
from support import single_file
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
    out: str = option("exported", "the pipeline folder to write", group="how")
    single_file: str | None = option(None, "write the teacher into this .safetensors instead")
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
        (new / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2) + "\n")


def export_single_file(teacher, file, dtype=torch.float32):
    """Write the teacher of model `teacher` in LDM names, as the published single files are. Of
    SD2's 24 text layers the folder layout keeps the 23 that are used, and so does the file."""
    unet = UNet.from_pretrained(teacher, dtype=dtype)
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
    with whole_file(file) as new:
        save_file(state, new, metadata=metadata)


def main():
    args = parse(Config(), __doc__)
    teacher, student, dtype = args.teacher, args.unet, DTYPES[args.dtype]
    if args.run:
        require(student is None, "--run brings its own student; leave --unet out")
        teacher = read_json(Path(args.run) / "config.json").get("teacher")
        student = str(Path(args.run) / "unet_target")
        require(teacher, f"{args.run}/config.json: names no teacher; "
                "expected a run folder of train.py")
    if args.single_file:
        file = Path(args.single_file)
        require(file.suffix == ".safetensors",
                f"--single-file {file}: expected a name that ends in .safetensors")
        make_folder(file.parent, "--single-file")
        export_single_file(teacher, file, dtype)
        print(file)
        return
    student = student or str(Path(teacher) / "student")
    unet = UNet.from_pretrained(student, dtype=dtype)
    require(unet.config.time_cond_proj_dim,
            f"{student}: a teacher (no guidance embedding); expected a student")
    out = Path(args.out)
    # whole_folder replaces what is there: allowed for an earlier export, or an empty folder
    index = out / "model_index.json"
    exported = (index.is_file()
                and read_json(index).get("_class_name") == MODEL_INDEX["_class_name"])
    empty = out.is_dir() and not any(out.iterdir())
    require(not out.exists() or exported or empty,
            f"--out {out}: exists and is no exported pipeline; "
            "it would be replaced, so give another name")
    require(out.resolve() != Path(teacher).resolve(),
            f"--out {out}: is the model to export; it would be replaced, so give another name")
    make_folder(out.parent)
    export_pipeline(teacher, unet, out, dtype)
    print(f"{out}: diffusers.LatentConsistencyModelPipeline.from_pretrained({args.out!r})")


if __name__ == "__main__":
    run(main)
