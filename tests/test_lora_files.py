import json

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

import export
import sample
from conftest import UNET, agree, call, generators, randomize
from lora import LoRA, sharing
from pipeline import Pipeline, merged
from support import lora_files
from support.lora_files import NAME
from test_lora import random_lora
from unet import UNet, UNetConfig

CPU = torch.device("cpu")
PROMPTS = ["a red apple", "rocket"]
LINEAR, CONVOLUTIONS = "linear", "convolutions"  # as in SD2 and in SD1


@pytest.fixture(params=[LINEAR, CONVOLUTIONS])
def teacher(request, model_copy):
    """A model folder; its projections around the transformers."""
    linear = request.param == LINEAR
    net = randomize(UNet(UNetConfig(**UNET, use_linear_projection=linear)))
    net.save_pretrained(model_copy / "unet")
    return model_copy


def student_of(teacher, w_embed, **options):
    """The teacher with random updates, as a run has it: grid of 10 points."""
    base = UNet.from_pretrained(teacher)
    unet = sharing(base, time_cond_proj_dim=256 if w_embed else None, lcm_grid=10)
    return random_lora(unet, **{"rank": 3, "alpha": 4.5} | options).attach(unet)


def ours(teacher, unet, steps=2):
    model = Pipeline.from_pretrained(teacher, CPU, torch.float32)
    return model.draw(model.check(unet, "", student=True), PROMPTS, [3, 4], steps, 6.5)


def pipe_of(teacher, w_embed, folder):
    """diffusers' pipeline around the teacher, with the LCMScheduler of our export."""
    UNet.from_pretrained(teacher, 256 if w_embed else None).save_pretrained(folder)
    config = json.loads((teacher / "scheduler/scheduler_config.json").read_text())
    schedule = Pipeline.from_pretrained(teacher, CPU, torch.float32).schedule.config
    assert schedule.prediction_type == config["prediction_type"]
    kind = LatentConsistencyModelPipeline if w_embed else StableDiffusionPipeline
    pipe = kind(
        vae=AutoencoderKL.from_pretrained(teacher / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(teacher / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(teacher / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(folder),
        scheduler=LCMScheduler.from_config(export.scheduler_config(schedule, 10)),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def theirs(pipe, w_embed, steps=2):
    # without an embedding, guidance_scale 1 is none
    return pipe(PROMPTS, num_inference_steps=steps, guidance_scale=7.5 if w_embed else 1.0,
                output_type="pt", height=32, width=32, generator=generators([3, 4])).images


@pytest.mark.parametrize("scale", [0.5, 1.0])
@pytest.mark.parametrize("w_embed, layout", [
    (False, "diffusers"), (False, "kohya"), (True, "diffusers")])
def test_diffusers_loads_our_file_and_draws_our_pictures(
        w_embed, layout, scale, teacher, tmp_path):
    student = student_of(teacher, w_embed)
    lora_files.write(student.lora, tmp_path / NAME, layout)
    pipe = pipe_of(teacher, w_embed, tmp_path / "base")
    plain = theirs(pipe, w_embed)
    pipe.load_lora_weights(tmp_path, weight_name=NAME, adapter_name="ours")
    pipe.set_adapters("ours", scale)
    drawn = theirs(pipe, w_embed)
    student.lora.set_scale(scale)
    agree(ours(teacher, student), drawn)
    agree(ours(teacher, merged(teacher, [tmp_path / NAME], [scale])), drawn)
    assert (drawn - plain).abs().max() > 0.01


def test_the_scheduler_that_the_docs_put_into_diffusers_draws_our_pictures(teacher, tmp_path):
    """docs/lora.md, Files."""
    student = student_of(teacher, False)
    lora_files.write(student.lora, tmp_path / NAME)
    pipe = pipe_of(teacher, False, tmp_path / "base")
    pipe.scheduler = DDIMScheduler.from_pretrained(teacher / "scheduler")
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config, original_inference_steps=10)
    pipe.load_lora_weights(tmp_path)
    agree(ours(teacher, student), theirs(pipe, False))


def test_a_file_of_diffusers_save_lora_weights_draws_the_same_in_ours(teacher, tmp_path):
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict
    pipe = pipe_of(teacher, False, tmp_path / "base")
    torch.manual_seed(0)
    pipe.unet.add_adapter(LoraConfig(
        r=4, lora_alpha=6, init_lora_weights="gaussian",
        target_modules=["to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.2", "conv1",
                        "time_emb_proj", "downsamplers.0.conv"]))
    for name, p in pipe.unet.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.1)
    drawn = theirs(pipe, False)
    state = get_peft_model_state_dict(pipe.unet)
    config = pipe.unet.peft_config["default"].to_dict()
    pipe.save_lora_weights(tmp_path, unet_lora_layers=state, unet_lora_adapter_metadata=config)
    mine = merged(teacher, [tmp_path], [1.0])
    mine = UNet(UNetConfig(**vars(mine.config) | {"lcm_grid": 10})).eval().requires_grad_(False)
    mine.load_state_dict(merged(teacher, [tmp_path], [1.0]).state_dict())
    agree(ours(teacher, mine), drawn)
    # without metadata alpha is the rank
    pipe.save_lora_weights(tmp_path / "bare", unet_lora_layers=state)
    bare = LoRA.from_pretrained(tmp_path / "bare", mine)
    assert {update.alpha for _, update in bare.updates.items()} == {4}


@pytest.mark.parametrize("stabilized", [False, True])
def test_a_folder_of_peft_is_read_with_its_alphas(stabilized, teacher, tmp_path):
    """One for all layers, one for those whose names end in to_q, and rank-stabilized ones."""
    from peft import LoraConfig, get_peft_model
    torch.manual_seed(0)
    peft = get_peft_model(UNet2DConditionModel.from_pretrained(teacher / "unet"), LoraConfig(
        r=4, lora_alpha=6, alpha_pattern={"to_q": 16, "attn2.to_v": 1}, use_rslora=stabilized,
        target_modules=["to_q", "to_v", "conv1"], init_lora_weights=False))
    peft.save_pretrained(tmp_path / "peft")
    expected = peft.merge_and_unload().state_dict()
    unet = UNet.from_pretrained(teacher)
    found = LoRA.from_pretrained(tmp_path / "peft", unet).merge(unet).state_dict()
    for name, tensor in expected.items():
        agree(found[name], tensor, 1e-5)
    (tmp_path / "peft/adapter_config.json").unlink()
    bare = LoRA.from_pretrained(tmp_path / "peft", unet)
    assert {update.alpha for update in bare.updates.values()} == {4}


OLD = {"to_q": "processor.to_q_lora", "to_k": "processor.to_k_lora",
       "to_v": "processor.to_v_lora", "to_out.0": "processor.to_out_lora"}


def renamed(state, how):
    """Our diffusers file under the other names that files have."""
    found = {}
    for key, tensor in state.items():
        name, part = key.removesuffix(".weight").rsplit(".lora_", 1)
        part = {"A": "down", "B": "up"}[part]
        if how == "old diffusers":
            for new, old in OLD.items():
                if name.endswith("." + new):
                    name = name.removesuffix(new) + old
            joint = "." if "_lora" in name else ".lora."
            found[f"{name}{joint}{part}.weight"] = tensor
        elif how == "peft":
            found["base_model.model." + key.removeprefix("unet.")] = tensor
        elif how == "no prefix":
            found[key.removeprefix("unet.")] = tensor
        elif how == "kohya with LDM's names":
            from support.single_file import unet_key
            ldm = unet_key(name.removeprefix("unet.") + ".weight", UNET)[0]
            ldm = ldm.removeprefix("model.diffusion_model.").removesuffix(".weight")
            found[f"lora_unet_{ldm.replace('.', '_')}.lora_{part}.weight"] = tensor
    return found


@pytest.mark.parametrize("how", ["old diffusers", "peft", "no prefix", "kohya with LDM's names"])
def test_files_of_other_programs_read_the_same(how, teacher, tmp_path):
    student = student_of(teacher, False, alpha=None)
    lora_files.write(student.lora, tmp_path / "ours.safetensors")
    state = renamed(load_file(tmp_path / "ours.safetensors"), how)
    assert len(state) == 2 * len(student.lora.updates)
    save_file(state, tmp_path / "theirs.safetensors")
    found = LoRA.from_pretrained(tmp_path / "theirs.safetensors", UNet.from_pretrained(teacher))
    assert [*found.updates] == [*student.lora.updates]
    for one, two in zip(found.layers, student.lora.layers):
        assert torch.equal(one.A, two.A) and torch.equal(one.B, two.B) and one.alpha == two.alpha


def test_kohyas_keys_are_complete_and_none_extra(teacher, tmp_path):
    """As get_module_kohya_state_dict of diffusers' LCM-LoRA script names them, of the layers that
    peft finds by that script's targets."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    targets = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj",
               "ff.net.2", "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv",
               "upsamplers.0.conv", "time_emb_proj"]
    net = UNet2DConditionModel.from_pretrained(teacher / "unet")
    peft = get_peft_model(net, LoraConfig(r=3, target_modules=targets))
    expected = {}
    for key, tensor in get_peft_model_state_dict(peft).items():
        layer, part = key.removeprefix("base_model.model.").rsplit(".lora_", 1)
        layer = "lora_unet_" + layer.replace(".", "_")
        part = {"A.weight": "lora_down", "B.weight": "lora_up"}[part]
        expected[f"{layer}.{part}.weight"] = tensor.shape
        expected[f"{layer}.alpha"] = torch.Size([])
    student = student_of(teacher, False)
    lora_files.write(student.lora, tmp_path / "kohya.safetensors", "kohya", torch.float16)
    state = load_file(tmp_path / "kohya.safetensors")
    assert {key: tensor.shape for key, tensor in state.items()} == expected
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    assert {tensor.item() for key, tensor in state.items() if key.endswith("alpha")} == {4.5}


def test_several_loras_add_up_each_at_its_scale(teacher, tmp_path):
    files, base = [], UNet.from_pretrained(teacher)
    expected = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    for i, scale in enumerate((0.5, -1.5)):
        lora = random_lora(sharing(base), seed=100 * i + 1, rank=2 + i)
        files.append(tmp_path / f"{i}.safetensors")
        lora_files.write(lora, files[-1])
        for name, update in lora.updates.items():
            expected[name + ".weight"] += scale * update.matrix().detach()
    both = merged(teacher, files, [0.5, -1.5]).state_dict()
    for name in expected:
        agree(both[name], expected[name], 1e-6)


# ---------------------------------------------------------------------------------- the commands

def draw(*argv):
    return call(sample.main, "--device", "cpu", "--precision", "fp32", "--prompt", "a red apple",
                *argv)


def pixels(folder):
    import numpy as np
    from PIL import Image
    return torch.tensor(np.asarray(Image.open(folder / "00000.png"))).float() / 255


def test_sample_draws_between_teacher_and_student(teacher, tmp_path):
    """Scale 0 draws what a student that equals the teacher draws."""
    lora_files.write(student_of(teacher, True).lora, tmp_path / "lora.safetensors")
    UNet.from_pretrained(teacher, 256, lcm_grid=10).save_pretrained(tmp_path / "zero")
    merged(teacher, [tmp_path / "lora.safetensors"], [0.5]).save_pretrained(tmp_path / "half")
    file, one = ("--model", teacher, "--lora", tmp_path / "lora.safetensors"), {}
    for name, argv in {
            "0": (*file, "--lora-scale", 0), "0.5": (*file, "--lora-scale", 0.5), "1": file,
            "zero": ("--model", teacher, "--unet", tmp_path / "zero"),
            "half": ("--model", teacher, "--unet", tmp_path / "half")}.items():
        assert draw(*argv, "--out", tmp_path / name) == 0
        one[name] = pixels(tmp_path / name)
    assert torch.equal(one["0"], one["zero"]) and torch.equal(one["0.5"], one["half"])
    assert (one["1"] - one["0.5"]).abs().max() > 0.01


def test_sample_draws_with_several_loras_each_at_its_scale(teacher, tmp_path):
    """One by this project, and one in kohya's names, which says nothing of a student."""
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    lora_files.write(student_of(teacher, True).lora, first)
    random = random_lora(UNet.from_pretrained(teacher), seed=9, rank=2)
    lora_files.write(random, second, "kohya")
    merged(teacher, [first, second], [1.0, 0.7]).save_pretrained(tmp_path / "merged")
    assert draw("--model", teacher, "--lora", first, "--lora", second, "--lora-scale", 1,
                "--lora-scale", 0.7, "--out", tmp_path / "two") == 0
    assert draw("--model", teacher, "--unet", tmp_path / "merged", "--out", tmp_path / "one") == 0
    assert draw("--model", teacher, "--lora", first, "--out", tmp_path / "without") == 0
    assert torch.equal(pixels(tmp_path / "two"), pixels(tmp_path / "one"))
    assert (pixels(tmp_path / "two") - pixels(tmp_path / "without")).abs().max() > 0.01


def test_a_lora_that_says_nothing_is_taken_for_an_lcm_lora_and_that_is_said(
        model_folder, tmp_path, capsys):
    style = tmp_path / "style.safetensors"
    lora_files.write(random_lora(UNet.from_pretrained(model_folder)), style, "kohya")
    assert draw("--model", model_folder, "--lora", style, "--out", tmp_path / "out") == 0
    assert "taken for an LCM-LoRA of 50 points" in capsys.readouterr().out
    assert draw("--model", model_folder, "--lora", style, "--solver", "ddim", "--steps", 2,
                "--out", tmp_path / "out") == 0
    assert "taken for" not in capsys.readouterr().out


def test_a_run_with_updates_is_drawn_and_exported_in_every_form(fit, tmp_path, model_folder):
    run = tmp_path / "run"
    for w_embed in (True, False):
        run = tmp_path / str(w_embed)
        assert fit(run, lora=3, w_embed=w_embed) == 0
        assert draw("--model", model_folder, "--lora", run / "lora_target",
                    "--out", tmp_path / "drawn") == 0
        assert call(export.main, "--run", run, "--out", run / "exported") == 0
        assert draw("--model", run / "exported", "--out", tmp_path / "again") == 0
        assert torch.equal(pixels(tmp_path / "drawn"), pixels(tmp_path / "again"))
        kind = LatentConsistencyModelPipeline if w_embed else StableDiffusionPipeline
        pipe = kind.from_pretrained(run / "exported")
        pipe.set_progress_bar_config(disable=True)
        unet = merged(model_folder, [run / "lora_target"], [1.0])
        agree(ours(model_folder, unet), theirs(pipe, w_embed))
        assert call(export.main, "--run", run, "--lora", run / "x.safetensors",
                    "--dtype", "fp16") == 0
        with safe_open(run / "x.safetensors", "pt") as file:
            key = "unet.mid_block.resnets.0.conv1.lora_A.weight"
            assert file.get_tensor(key).dtype == torch.float16
    assert call(export.main, "--run", run, "--single-file", run / "x.safetensors") == 0
    with safe_open(run / "x.safetensors", "pt") as file:
        assert file.metadata()["rg_lcd.lcm_grid"] == "10"


WRONG = {
    "no such file": (["--lora", "TMP/none.safetensors"], "no such file"),
    "a scale too many": (["--lora", "FILE", "--lora-scale", "1", "--lora-scale", "2"],
                         "--lora-scale: 2 of them for 1"),
    "no number": (["--lora", "FILE", "--lora-scale", "half"], "expected a number"),
    "a scale of nothing": (["--lora-scale", "0.5"], "give one too"),
    "a pickle": (["--lora", "TMP/x.bin"], "a pickle"),
    "no LoRA": (["--lora", "MODEL/vae/diffusion_pytorch_model.safetensors"], "no layers of this"),
    "distilled, to a teacher's sampler": (["--lora", "FILE", "--solver", "ddim"], "a student"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line_and_exit_code_2(case, model_folder, tmp_path, capsys):
    lora_files.write(student_of(model_folder, False).lora, tmp_path / "lora.safetensors")
    (tmp_path / "x.bin").write_bytes(b"")
    argv, named = WRONG[case]
    places = {"TMP": tmp_path, "FILE": tmp_path / "lora.safetensors", "MODEL": model_folder}
    for short, path in places.items():
        argv = [text.replace(short, str(path)) for text in argv]
    assert draw("--model", model_folder, "--out", tmp_path / "out", *argv) == 2
    message = capsys.readouterr().err
    assert named in message and "Traceback" not in message


def test_an_exported_lora_holds_its_scale(teacher, tmp_path):
    """And an export is a converter: kohya's names in, diffusers' out."""
    half, whole = tmp_path / "half.safetensors", tmp_path / "whole.safetensors"
    lora_files.write(student_of(teacher, False).lora, whole, "kohya")
    assert call(export.main, "--teacher", teacher, "--merge", whole, "--lora-scale", 0.5,
                "--lora", half) == 0
    once, again = merged(teacher, [whole], [0.5]), merged(teacher, [half], [1.0])
    for name, tensor in once.state_dict().items():
        agree(again.state_dict()[name], tensor, 1e-6)


def test_a_run_that_has_not_ended_is_told_from_one_without_a_lora(fit, tmp_path, capsys):
    assert fit(tmp_path / "run", lora=3, steps=2, checkpoint_every=1) == 0
    (tmp_path / "run/lora_target").rename(tmp_path / "moved-away")
    for argv in (["--out", tmp_path / "out"], ["--lora", tmp_path / "x.safetensors"]):
        assert call(export.main, "--run", tmp_path / "run", *argv) == 2
        assert "lora_target: not there yet" in capsys.readouterr().err
    assert fit(tmp_path / "full", steps=2) == 0
    assert call(export.main, "--run", tmp_path / "full", "--lora", tmp_path / "x.safetensors") == 2
    assert "0 LoRAs to write" in capsys.readouterr().err


EXPORTS = {
    "over what it reads": (["--merge", "FILE", "--lora", "FILE"], "it would be replaced"),
    "two files": (["--merge", "FILE", "--single-file", "TMP/y.safetensors"], "give one of them"),
    "kohya with a guidance embedding": (["--merge", "FILE", "--layout", "kohya"], "no place"),
    "nothing to write": ([], "0 LoRAs to write"),
    "two": (["--merge", "FILE", "--merge", "FILE"], "2 LoRAs to write"),
    "another name": (["--merge", "FILE", "--lora", "TMP/x.bin"], ".safetensors"),
    "a student and its run": (["--run", "MODEL", "--merge", "FILE"], "leave --unet and --merge"),
}


@pytest.mark.parametrize("case", EXPORTS)
def test_wrong_exports_are_one_line_and_leave_no_file(case, model_folder, tmp_path, capsys):
    lora_files.write(student_of(model_folder, True).lora, tmp_path / "lora.safetensors")
    argv, named = EXPORTS[case]
    places = {"TMP": tmp_path, "FILE": tmp_path / "lora.safetensors", "MODEL": model_folder}
    for short, path in places.items():
        argv = [text.replace(short, str(path)) for text in argv]
    before = sorted(tmp_path.iterdir())
    assert call(export.main, "--teacher", model_folder, "--lora", tmp_path / "x.safetensors",
                *argv) == 2
    assert named in capsys.readouterr().err and sorted(tmp_path.iterdir()) == before
    assert call(export.main, "--teacher", model_folder, "--out", tmp_path / "out",
                "--layout", "kohya") == 2
    assert "give it too" in capsys.readouterr().err


def test_a_lora_of_another_architecture_is_refused_by_name(model_folder, tmp_path, capsys):
    def refused(state, *named):
        save_file(state, tmp_path / "x.safetensors")
        assert draw("--model", model_folder, "--lora", tmp_path / "x.safetensors",
                    "--out", tmp_path / "out") == 2
        message = capsys.readouterr().err
        assert all(word in message for word in named), message

    attention = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    pair = lambda name, width: {f"{name}.lora_down.weight": torch.ones(4, width),
                                f"{name}.lora_up.weight": torch.ones(16, 4)}
    for width, kind in ((768, "SD1.x"), (1024, "SD2.x"), (40, "a model whose text is 40 wide")):
        refused(pair(attention, width), f"a LoRA for {kind}", "text is 32 wide")
    deeper = attention.replace("blocks_0_attn2", "blocks_1_attn2")
    refused(pair(deeper, 2048), "a LoRA for SDXL", deeper)
    flux = "transformer.single_transformer_blocks.0.attn.to_k"
    refused({f"{flux}.lora_A.weight": torch.ones(4, 8)}, "SD3 or Flux")
    refused({attention + ".hada_w1_a": torch.ones(4, 8)}, "LoHa")
    refused({attention + ".dora_scale": torch.ones(4)} | pair(attention, 32), "DoRA")
    half = pair(attention, 32)
    half.pop(f"{attention}.lora_up.weight")
    refused(half, "only one of its two matrices")
    refused({f"{attention}.lora_down.weight": torch.full((4, 32), float("nan")),
             f"{attention}.lora_up.weight": torch.ones(16, 4)}, "NaN")
    refused({f"{attention}.lora_down.weight": torch.ones(0, 32),
             f"{attention}.lora_up.weight": torch.ones(16, 0)}, "a rank of 0")
    refused({name: tensor.to(torch.float8_e4m3fn) for name, tensor in pair(attention, 32).items()},
            "quantized")
    refused({f"{attention}.lora_down.weight": torch.ones(4, 32),
             f"{attention}.lora_up.weight": torch.ones(16, 5)}, "(16, 5)", "is the file whole")


@pytest.mark.parametrize("key", [
    "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
    "lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha",
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"])
def test_what_a_file_has_for_the_text_encoder_is_left_out_and_said(
        key, model_folder, tmp_path, capsys):
    lora = student_of(model_folder, False).lora
    lora_files.write(lora, tmp_path / "ours.safetensors")
    state = load_file(tmp_path / "ours.safetensors") | {key: torch.ones(4, 8)}
    save_file(state, tmp_path / "x.safetensors")
    found = LoRA.from_pretrained(tmp_path / "x.safetensors", UNet.from_pretrained(model_folder))
    assert [*found.updates] == [*lora.updates]
    assert "1 tensors for the text encoder are left out" in capsys.readouterr().out


def test_rank_alpha_and_facts_survive_the_file(teacher, tmp_path):
    lora = student_of(teacher, True, alpha=7).lora
    for layout in ("diffusers", "kohya"):
        lora_files.write(lora.set_scale(1.0), tmp_path / f"{layout}.safetensors", layout)
        found = LoRA.from_pretrained(
            tmp_path / f"{layout}.safetensors", UNet.from_pretrained(teacher, 256))
        assert found.facts == lora.facts and found.facts["lcm_grid"] == 10
        assert [*found.updates] == [*lora.updates]
        for one, two in zip(lora.layers, found.layers):
            assert one.alpha == two.alpha
            assert torch.equal(one.A, two.A) and torch.equal(one.B, two.B)
    assert found.updates["time_embedding.cond_proj"].alpha == 256
