import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from conftest import (
    ROOT,
    UNET as TINY_UNET,
    agree,
    call,
    cut,
    edit_json,
    generators,
    make_text_encoder,
    teacher_pipeline,
)
from pipeline import Pipeline, save_png
from support.weights import WEIGHTS
from text_encoder import TextEncoder
from unet import UNet, UNetConfig
from vae import VAE

PROMPTS = ["a red apple", "rocket", "a fish"]


@pytest.fixture
def cli(model_folder, tmp_path):
    """sample.py on the tiny model: cli("--steps", 4, model=...) -> exit code."""
    def run(*argv, model=model_folder, out=tmp_path / "out"):
        return call(sample.main, "--model", model, "--out", out, "--device", "cpu",
                    "--precision", "fp32", *argv)
    return run


def prompts(*several):
    return [word for prompt in several for word in ("--prompt", prompt)]


@pytest.mark.parametrize("solver, steps, folder", [("lcm", 3, "student"), ("ddim", 3, "unet")])
def test_a_picture_does_not_depend_on_its_batch(solver, steps, folder, model_folder):
    model = Pipeline.from_pretrained(model_folder, torch.device("cpu"), torch.float32)
    unet = UNet.from_pretrained(model_folder / folder)
    together = model.draw(unet, PROMPTS, [5, 6, 7], steps, 4.0, solver)
    assert together.shape == (3, 3, 32, 32) and together.min() >= 0 and together.max() <= 1
    for i in range(3):
        alone = model.draw(unet, PROMPTS[i:i + 1], [5 + i], steps, 4.0, solver)
        agree(alone, together[i:i + 1])
    other = model.draw(unet, PROMPTS[:1], [6], steps, 4.0, solver)
    assert not torch.equal(together[0], other[0])


def test_pngs_hold_what_made_them_and_a_grid_is_written(cli, model_folder, tmp_path):
    options = ["--n", 2, "--seed", 40, "--steps", 4, "--batch", 3]
    assert cli(*prompts("a red apple", "lapin blånc 🐇"), *options) == 0
    files = sorted(f.name for f in (tmp_path / "out").iterdir())
    assert files == [f"{i:05d}.png" for i in range(4)] + ["grid.png"]
    pictures = [Image.open(tmp_path / "out" / name) for name in files]
    drawn = [p.text["prompt"] for p in pictures[:4]]
    assert drawn == ["a red apple"] * 2 + ["lapin blånc 🐇"] * 2
    assert [p.text["seed"] for p in pictures[:4]] == ["40", "41", "40", "41"]
    assert {p.text["steps"] for p in pictures} == {"4"} and pictures[4].size == (64, 64)
    assert {p.text["guidance"] for p in pictures} == {"3.0"}
    assert {p.text["model"] for p in pictures} == {str(model_folder)}
    whole = np.array(pictures[4])
    for i, (y, x) in enumerate([(0, 0), (0, 32), (32, 0), (32, 32)]):
        assert np.array_equal(whole[y:y + 32, x:x + 32], np.array(pictures[i]))


def test_the_same_command_draws_the_same_picture(cli, tmp_path):
    for name in ("a", "b"):
        assert cli(*prompts("rocket"), "--seed", 3, out=tmp_path / name) == 0
    assert (tmp_path / "a/00000.png").read_bytes() == (tmp_path / "b/00000.png").read_bytes()
    # one picture needs no grid
    assert [f.name for f in (tmp_path / "a").iterdir()] == ["00000.png"]


def test_prompts_file_and_size(cli, tmp_path):
    (tmp_path / "prompts.txt").write_text("rocket\n\na fish\n")
    assert cli("--prompts", tmp_path / "prompts.txt", "--size", "48x32") == 0
    pictures = [Image.open(tmp_path / "out" / f"{i:05d}.png") for i in range(2)]
    assert [p.text["prompt"] for p in pictures] == ["rocket", "a fish"]
    assert {p.size for p in pictures} == {(32, 48)}


def test_a_byte_order_mark_is_no_part_of_a_prompt(cli, tmp_path):
    (tmp_path / "prompts.txt").write_text("rocket\n", encoding="utf-8-sig")
    assert cli("--prompts", tmp_path / "prompts.txt") == 0
    assert Image.open(tmp_path / "out" / "00000.png").text["prompt"] == "rocket"


def test_prompts_that_are_cut_are_told_once_in_words(cli, capsys):
    long = "house, " * 40
    options = ["--n", 2, "--batch", 1]
    assert cli(*prompts("rocket", long, long, "a fish, " * 20), *options) == 0
    said, err = capsys.readouterr()
    notes = [line for line in said.splitlines() if line.startswith("note: ")]
    assert notes == ['note: 2 of 3 prompts cut at 32 tokens, the rest is not read: '
                     '"house, house, house, house, house,..." has 82']
    assert "longer than" not in err  # no warning of transformers' beside it


def test_a_prompt_that_fits_exactly_is_not_told(cli, capsys):
    assert cli(*prompts("house " * 30)) == 0  # and the tokens for its begin and end
    assert "note" not in capsys.readouterr().out
    assert cli(*prompts("rocket"), "--negative", "fish " * 31, "--solver", "ddim") == 0
    assert "note: 1 of 2 prompts cut at 32 tokens" in capsys.readouterr().out


def test_pictures_of_two_processes_do_not_meet_under_one_temporary_name(tmp_path, monkeypatch):
    names, picture = [], Image.new("RGB", (2, 2))
    monkeypatch.setattr(picture, "save", lambda new, *_, **__: (names.append(new), new.touch()))
    for pid in (11, 12):
        monkeypatch.setattr(os, "getpid", lambda pid=pid: pid)
        save_png(picture, tmp_path / "a.png")
    assert len(set(names)) == 2 and [f.name for f in tmp_path.iterdir()] == ["a.png"]


def test_the_teacher_is_sampled_with_ddim_and_a_negative_prompt_changes_the_picture(cli, tmp_path):
    teacher = ["--solver", "ddim", "--steps", 3]
    for name, negative in (("a", []), ("b", ["--negative", ""]), ("c", ["--negative", "a fish"])):
        assert cli(*prompts("rocket"), *teacher, *negative, out=tmp_path / name) == 0
    a, b, c = (np.array(Image.open(tmp_path / name / "00000.png")) for name in "abc")
    assert np.array_equal(a, b) and not np.array_equal(a, c)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("negative", ["", "a fish, cold"])
@torch.no_grad()
def test_the_teachers_pictures_equal_diffusers_pipeline(kind, negative, model_copy):
    edit_json(model_copy / "scheduler/scheduler_config.json", prediction_type=kind)
    model = Pipeline.from_pretrained(model_copy, torch.device("cpu"), torch.float32)
    unet = UNet.from_pretrained(model_copy)
    ours = model.draw(
        unet, PROMPTS, [5, 6, 7], 5, 6.5, "ddim", size=(24, 40), negative=negative)
    theirs = teacher_pipeline(model_copy)(
        PROMPTS, negative_prompt=[negative] * 3, num_inference_steps=5, guidance_scale=7.5,
        height=24, width=40, output_type="pt", generator=generators([5, 6, 7])).images
    agree(ours, theirs)


def test_peak_memory_and_seconds_are_printed(cli, capsys):
    assert cli(*prompts("rocket")) == 0
    said = (r"s to load, .* s for 1 pictures in 2 steps \(cpu, float32\), "
            r"peak memory \d+\.\d\d GiB")
    assert re.search(said, capsys.readouterr().out)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_folder_in_half_precision_gives_the_same_picture(
        precision, cli, model_copy, tmp_path):
    assert cli(*prompts("rocket"), out=tmp_path / "full") == 0
    student = model_copy / "student"
    VAE.from_pretrained(model_copy).save_pretrained(model_copy / "vae", dtype=torch.float16)
    TextEncoder.from_pretrained(model_copy).save_pretrained(model_copy, dtype=torch.float16)
    UNet.from_pretrained(student).save_pretrained(student, dtype=torch.float16)
    assert cli(*prompts("rocket"), "--precision", precision, model=model_copy,
               out=tmp_path / "half") == 0
    full, half = (
        np.array(Image.open(tmp_path / name / "00000.png")).astype(int)
        for name in ("full", "half"))
    assert np.abs(full - half).mean() < 4  # of 255


def inpaint(model):
    UNet(UNetConfig(**TINY_UNET, in_channels=9)).save_pretrained(model / "student")


WRONG = {
    "no steps": (["--steps", 0], None, "0"),
    "more steps than the grid": (["--steps", 51], None, "51"),
    "unknown solver": (["--solver", "euler"], None, "euler"),
    "no steps of ddim": (["--solver", "ddim", "--steps", 0], None, "0"),
    "student as teacher": (["--solver", "ddim", "--unet", "MODEL/student"], None, "a student"),
    "negative prompt for a student": (["--negative", "a fish"], None, "--negative"),
    "teacher as student": (["--unet", "MODEL/unet"], None, "teacher"),
    "size that does not divide": (["--size", "33x32"], None, "33x32"),
    "size that is no size": (["--size", "big"], None, "big"),
    "no size at all": (["--size", "0x32"], None, "0x32"),
    "no such prompts file": (["--prompts", "MODEL/none.txt"], None, "none.txt"),
    "prompts file that is no text": (["--prompts", "MODEL/vae/" + WEIGHTS], None, WEIGHTS),
    "prompts file without a prompt": (
        ["--prompts", "MODEL/empty.txt"], lambda m: (m / "empty.txt").write_text(" \n\n"),
        "empty.txt: no prompt"),
    "no such device": (["--device", "warp"], None, "warp"),
    "no pictures": (["--n", 0], None, "--n 0"),
    "no pictures at a time": (["--batch", 0], None, "--batch 0"),
    "a seed too large": (["--seed", 2**64], None, f"--seed {2**64}"),
    "out is a file": (["--out", "MODEL/vae/config.json"], None, "config.json"),
    "out under a file": (["--out", "MODEL/vae/config.json/x"], None, "config.json"),
    "no such model": (["--model", "MODEL/none"], None, "none"),
    "no such student": (["--unet", "MODEL/none"], None, "none"),
    "no tokenizer": ([], lambda m: shutil.rmtree(m / "tokenizer"), "tokenizer"),
    "no student": ([], lambda m: shutil.rmtree(m / "student"), "a teacher"),
    "half a VAE": ([], lambda m: cut(m / "vae" / WEIGHTS, 5000), WEIGHTS),
    "half a student": ([], lambda m: cut(m / "student" / WEIGHTS, 5000), WEIGHTS),
    "half a VAE config": ([], lambda m: cut(m / "vae/config.json", 20), "config.json"),
    "half a text encoder config": (
        [], lambda m: cut(m / "text_encoder/config.json", 20), "config.json"),
    "half a scheduler config": (
        [], lambda m: cut(m / "scheduler/scheduler_config.json", 20), "scheduler_config.json"),
    "half a vocabulary": ([], lambda m: cut(m / "tokenizer/vocab.json", 2000), "tokenizer"),
    "UNet of an inpainting model": ([], inpaint, "9 to 4 channels"),
    "text encoder of another width": (
        [], lambda m: make_text_encoder(m, hidden_size=48), "cross_attention_dim 32"),
    "text encoder with another vocabulary": (
        [], lambda m: make_text_encoder(m, vocab_size=1000), "1000"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line_and_exit_code_2(case, cli, model_copy, capsys):
    argv, spoil, named = WRONG[case]
    if spoil:
        spoil(model_copy)
    argv = [str(a).replace("MODEL", str(model_copy)) for a in argv]
    code = cli(*prompts("rocket"), *argv, model=model_copy)
    message = capsys.readouterr().err
    assert code == 2 and named in message and "Traceback" not in message


def test_the_script_itself_exits_with_2_and_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "sample.py", "--model", tmp_path / "none", "--out", tmp_path],
        cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_drawing_loads_no_library_that_takes_seconds(model_folder, tmp_path):
    code = ("import sys, sample; sample.main(); "
            "print(sorted({'transformers', 'open_clip', 'torch._dynamo', 'sympy', 'matplotlib'}"
            " & set(sys.modules)))")
    done = subprocess.run(
        [sys.executable, "-c", code, "--model", model_folder, "--prompt", "moon", "--device", "cpu",
         "--precision", "fp32", "--out", tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
