import json
import shutil

import pytest
import torch
from diffusers import LatentConsistencyModelPipeline, LCMScheduler

import export
import sample
from conftest import UNET, agree, call, edit_json, generators, randomize, same_weights
from pipeline import Pipeline
from support.weights import WEIGHTS
from unet import UNet, UNetConfig

CPU = torch.device("cpu")


@pytest.fixture(params=["epsilon", "v_prediction"])
def teacher(request, model_copy):
    edit_json(model_copy / "scheduler/scheduler_config.json", prediction_type=request.param)
    return model_copy


@torch.no_grad()
@pytest.mark.parametrize("grid", [None, 10])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_diffusers_opens_the_export_and_draws_the_same_pictures(steps, grid, teacher, tmp_path):
    student = randomize(UNet(UNetConfig(**UNET, time_cond_proj_dim=256, lcm_grid=grid)), seed=1)
    student.save_pretrained(teacher / "student")
    assert call(export.main, "--teacher", teacher, "--out", tmp_path / "exported") == 0
    pipe = LatentConsistencyModelPipeline.from_pretrained(tmp_path / "exported")
    pipe.set_progress_bar_config(disable=True)
    prompts = ["a red apple", "rocket"]
    theirs = pipe(
        prompts, num_inference_steps=steps, guidance_scale=7.5, output_type="pt",
        height=32, width=32, generator=generators([3, 4])).images

    def draw(model, student):
        model = Pipeline.from_pretrained(model, CPU, torch.float32)
        return model.draw(UNet.from_pretrained(student), prompts, [3, 4], steps, 6.5)

    ours = draw(teacher, teacher / "student")
    agree(ours, theirs)
    # our own reader opens it as well
    assert torch.equal(draw(tmp_path / "exported", tmp_path / "exported"), ours)


@pytest.mark.parametrize("kind, grid", [("epsilon", None), ("v_prediction", 10)])
def test_the_exported_scheduler_has_the_constants_of_our_sampler(kind, grid, model_copy, tmp_path):
    edit_json(model_copy / "scheduler/scheduler_config.json", prediction_type=kind)
    edit_json(model_copy / "student/config.json", lcm_grid=grid)
    exported = tmp_path / "exported"
    assert call(export.main, "--teacher", model_copy, "--out", exported) == 0
    expected = {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": kind,
        "set_alpha_to_one": False,
        "clip_sample": False,
        "original_inference_steps": grid or 50,
        "timestep_scaling": 10.0,
        "timestep_spacing": "leading",
        "steps_offset": 1,
    }
    written = json.loads((exported / "scheduler/scheduler_config.json").read_text())
    assert written == expected | {"_class_name": "LCMScheduler"}
    read = LCMScheduler.from_pretrained(exported, subfolder="scheduler").config
    assert {key: read[key] for key in expected} == expected
    theirs = LCMScheduler().config
    changed = {key for key in expected if expected[key] != theirs[key]}
    asked_for = {"prediction_type", "original_inference_steps"}
    assert changed - asked_for == {"set_alpha_to_one", "steps_offset"}


def test_sample_draws_from_an_export_without_further_options(teacher, tmp_path):
    exported = tmp_path / "exported"
    assert call(export.main, "--teacher", teacher, "--out", exported, "--dtype", "fp16") == 0
    code = call(sample.main, "--model", exported, "--out", tmp_path / "out",
                "--device", "cpu", "--precision", "fp32")
    assert code == 0


def test_a_run_brings_its_teacher_and_its_ema_student(model_copy, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"teacher": str(model_copy)}))
    shutil.copytree(model_copy / "student", run / "unet_target")
    assert call(export.main, "--run", run, "--out", tmp_path / "exported") == 0
    exported = UNet.from_pretrained(tmp_path / "exported")
    assert same_weights(exported, UNet.from_pretrained(model_copy / "student"))


WRONG = {
    "a teacher as student": (["--unet", "MODEL/unet"], "expected a student"),
    "a folder that holds other things": (["--out", "MODEL"], "is no exported pipeline"),
    "a teacher's folder": (["--out", "TEACHER"], "is no exported pipeline"),
    "no run": (["--run", "MODEL/none"], "config.json"),
    "a run and a student": (["--run", "MODEL", "--unet", "MODEL/student"], "--unet"),
    "a single file of another kind": (["--single-file", "MODEL/x.ckpt"], ".safetensors"),
    "out under a file": (["--out", "MODEL/vae/config.json/x"], "config.json"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line_exit_code_2_and_harms_nothing(case, model_copy, tmp_path, capsys):
    argv, named = WRONG[case]
    (model_copy / "teacher").mkdir()
    (model_copy / "teacher/model_index.json").write_text(
        '{"_class_name": "StableDiffusionPipeline"}')
    before = sorted(model_copy.rglob("*"))
    argv = [a.replace("TEACHER", "MODEL/teacher").replace("MODEL", str(model_copy)) for a in argv]
    defaults = [] if "--run" in argv else ["--teacher", model_copy]
    assert call(export.main, *defaults, "--out", tmp_path / "exported", *argv) == 2
    assert named in capsys.readouterr().err and sorted(model_copy.rglob("*")) == before
    assert (model_copy / "vae" / WEIGHTS).is_file()
