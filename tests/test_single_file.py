"""The original single file: names, configs, tokenizer, prediction type. diffusers' converters are
the second opinion."""
import re
import shutil

import open_clip
import pytest
import torch
from diffusers.loaders import single_file_utils as reference
from safetensors.torch import load, load_file, save_file

import export
import text_encoder
from conftest import (
    TEXT,
    UNET,
    VAE as TINY_VAE,
    agree,
    call,
    make_text_encoder,
    norm_eps,
    rand,
    randomize,
    same_weights,
    teacher_pipeline,
)
from lcm_solver import ScheduleConfig
from lora import LoRA, sharing
from pipeline import merged
from support import lora_files, single_file
from support.tokenizer import Tokenizer, built_in
from support.weights import InputError
from text_encoder import TextConfig, TextEncoder, TextTower
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig

SD1 = {"use_linear_projection": False, "attention_head_dim": 4}


@pytest.fixture(params=["sd1", "sd2"])
def kind(request):
    return request.param


@pytest.fixture
def teacher(kind, model_copy, monkeypatch):
    """A tiny model folder of that generation, whose sizes the single-file reader is told in place
    of SD's."""
    unet = UNET | (SD1 if kind == "sd1" else {"use_linear_projection": True})
    text = {"hidden_act": "quick_gelu" if kind == "sd1" else "gelu"}
    randomize(UNet(UNetConfig(**unet))).save_pretrained(model_copy / "unet")
    make_text_encoder(model_copy, **text)
    configs = {
        "unet": unet, "vae": TINY_VAE,
        "text_encoder": TEXT | text | {"model_type": "clip_text_model"},
    }
    monkeypatch.setattr(single_file, "CONFIGS", {kind: configs})
    monkeypatch.setattr(
        text_encoder, "built_in", lambda kind: Tokenizer.from_pretrained(model_copy / "tokenizer"))
    return model_copy


@pytest.fixture
def file(teacher, tmp_path):
    file = tmp_path / "tiny-512.safetensors"
    assert call(export.main, "--teacher", teacher, "--single-file", file) == 0
    return file


def test_a_teacher_goes_to_a_single_file_and_back_unchanged(teacher, file):
    assert same_weights(UNet.from_pretrained(file), UNet.from_pretrained(teacher))
    assert same_weights(VAE.from_pretrained(file), VAE.from_pretrained(teacher))
    first, second = TextEncoder.from_pretrained(file), TextEncoder.from_pretrained(teacher)
    assert same_weights(first, second)
    assert torch.equal(first(["a red apple"]), second(["a red apple"]))


def test_merged_updates_go_to_a_single_file_and_back_as_a_student(teacher, tmp_path):
    base = sharing(UNet.from_pretrained(teacher), lcm_grid=10)
    lora, update = LoRA.new(base, 2), tmp_path / "lora.safetensors"
    file = tmp_path / "512.safetensors"
    for one in lora.layers:
        one.B.data.normal_()
    lora_files.write(lora, update)
    assert call(export.main, "--teacher", teacher, "--merge", update, "--lora-scale", 0.5,
                "--single-file", file) == 0
    found = UNet.from_pretrained(file)
    assert found.config.lcm_grid == 10
    assert same_weights(found, merged(teacher, [update], [0.5]))
    assert not same_weights(found, base)


def test_diffusers_reads_the_names_we_write(kind, teacher, file):
    state = load_file(file)
    unet = UNet.from_pretrained(teacher)
    config = vars(unet.config) | {"class_embed_type": None, "addition_embed_type": None}
    converted = reference.convert_ldm_unet_checkpoint(dict(state), config)
    assert converted.keys() == unet.state_dict().keys()
    assert all(torch.equal(converted[k], v) for k, v in unet.state_dict().items())
    vae = VAE.from_pretrained(teacher)
    config = {"down_block_types": [0] * 3, "up_block_types": [0] * 3}
    converted = reference.convert_ldm_vae_checkpoint(dict(state), config)
    assert converted.keys() == vae.state_dict().keys()
    assert all(torch.equal(converted[k].reshape(v.shape), v) for k, v in vae.state_dict().items())
    model = TextEncoder.from_pretrained(teacher).model
    if kind == "sd2":
        converted = reference.convert_open_clip_checkpoint(
            model, dict(state), prefix="cond_stage_model.model.")
    else:
        converted = reference.convert_ldm_clip_checkpoint(dict(state))
    bare = {
        k.removeprefix("text_model."): v
        for k, v in converted.items() if "position_ids" not in k}
    ours = {k.removeprefix("text_model."): v for k, v in model.state_dict().items()}
    assert bare.keys() == ours.keys() and all(torch.equal(bare[k], v) for k, v in ours.items())


def full_size_keys(kind):
    """The keys of the published files, from our full-size modules on the meta device."""
    configs = single_file.CONFIGS[kind]
    fix = lambda c: {k: tuple(v) if isinstance(v, list) else v for k, v in c.items()}
    with torch.device("meta"):
        modules = {
            "unet": UNet(UNetConfig(**fix(configs["unet"]))),
            "vae": VAE(VAEConfig(**fix(configs["vae"]))),
            "text_encoder": TextTower(TextConfig.of(configs["text_encoder"], kind)),
        }
    keys = set()
    for name, module in modules.items():
        keys |= {single_file.KEYS[name](key, configs[name])[0] for key in module.state_dict()}
    return keys


def test_known_names_of_the_published_files_are_met(kind):
    """Facts about v1-5-pruned.safetensors and v2-1_512-ema-pruned.safetensors: names, and 686
    tensors of the UNet, 248 of the VAE."""
    keys = full_size_keys(kind)
    count = lambda prefix: sum(key.startswith(prefix) for key in keys)
    assert count("model.diffusion_model.") == 686 and count("first_stage_model.") == 248
    assert count("cond_stage_model.") == (196 if kind == "sd1" else 23 * 12 + 4)
    names = [
        "input_blocks.0.0.weight", "input_blocks.3.0.op.weight",
        "input_blocks.4.0.skip_connection.weight", "input_blocks.11.0.out_layers.3.bias",
        "input_blocks.8.1.transformer_blocks.0.attn2.to_k.weight",
        "middle_block.1.proj_in.weight", "middle_block.2.emb_layers.1.weight",
        "output_blocks.2.1.conv.weight", "output_blocks.5.2.conv.weight",
        "output_blocks.8.2.conv.bias", "output_blocks.11.1.norm.weight",
        "time_embed.2.bias", "out.0.weight", "out.2.weight",
    ]
    assert {f"model.diffusion_model.{name}" for name in names} <= keys
    names = [
        "encoder.down.2.downsample.conv.weight", "encoder.down.1.block.0.nin_shortcut.weight",
        "encoder.mid.attn_1.proj_out.weight", "decoder.up.3.block.2.conv1.weight",
        "decoder.up.1.upsample.conv.bias", "decoder.up.0.block.0.nin_shortcut.weight",
        "decoder.norm_out.weight", "encoder.mid.block_2.norm2.bias", "post_quant_conv.weight",
    ]
    assert {f"first_stage_model.{name}" for name in names} <= keys
    names = {
        "sd1": ["transformer.text_model.encoder.layers.11.self_attn.q_proj.weight",
                "transformer.text_model.embeddings.position_embedding.weight"],
        "sd2": ["model.transformer.resblocks.22.attn.in_proj_weight", "model.positional_embedding",
                "model.token_embedding.weight", "model.ln_final.bias"],
    }[kind]
    assert {f"cond_stage_model.{name}" for name in names} <= keys


def test_the_text_towers_norms_have_clips_eps(kind, model_folder):
    with torch.device("meta"):
        tower = TextTower(TextConfig.of(single_file.CONFIGS[kind]["text_encoder"], kind))
    for model in (tower, TextEncoder.from_pretrained(model_folder).model):
        assert set(norm_eps(model).values()) == {1e-5}


def test_what_published_files_hold_besides_is_passed_over(kind, teacher, file):
    extra = {
        "alphas_cumprod": 1000,
        "model_ema.decay": 1,
        "cond_stage_model.model.transformer.resblocks.23.ln_1.weight": 32,
        "first_stage_model.loss.logvar": 1,
        "cond_stage_model.model.text_projection": 8,
        "cond_stage_model.model.logit_scale": 1,
        "cond_stage_model.transformer.text_model.embeddings.position_ids": 32,
    }
    save_file(load_file(file) | {key: torch.zeros(size) for key, size in extra.items()}, file)
    assert same_weights(UNet.from_pretrained(file), UNet.from_pretrained(teacher))
    TextEncoder.from_pretrained(file)
    VAE.from_pretrained(file)


@pytest.mark.parametrize("component", [UNet, VAE, TextEncoder])
def test_a_missing_or_surplus_tensor_is_named(component, file):
    name = {UNet: "unet", VAE: "vae", TextEncoder: "text_encoder"}[component]
    # not mapped: safetensors before 0.8 writes into the file that is there
    state = load(file.read_bytes())
    keys = sorted(key for key in state if key.startswith(single_file.PREFIX[name]))
    final = [key for key in keys if "final_layer_norm" in key or "ln_final" in key]
    for key in (keys[0], keys[-1], *final):
        save_file({k: v for k, v in state.items() if k != key}, file)
        with pytest.raises(InputError, match=re.escape(key)):
            component.from_pretrained(file)
    save_file(state | {single_file.PREFIX[name] + "extra.weight": torch.zeros(1)}, file)
    with pytest.raises(InputError, match="extra.weight"):
        component.from_pretrained(file)


@pytest.mark.parametrize("component", [UNet, VAE, TextEncoder])
def test_a_quantized_single_file_is_refused(component, file):
    state = load(file.read_bytes())
    save_file({k: v.to(torch.float8_e4m3fn) for k, v in state.items()}, file)
    with pytest.raises(InputError, match="tiny-512.* holds F8_E4M3 numbers.*not quantized"):
        component.from_pretrained(file)


def test_a_student_has_no_place_in_a_single_file(model_copy, tmp_path):
    shutil.rmtree(model_copy / "unet")
    (model_copy / "student").rename(model_copy / "unet")
    file = tmp_path / "x.safetensors"
    assert call(export.main, "--teacher", model_copy, "--single-file", file) == 2
    assert not file.exists()


@pytest.mark.parametrize("name, metadata, expected", [
    ("v2-1_512-ema-pruned.safetensors", None, "epsilon"),
    ("v2-1_768-ema-pruned.safetensors", None, "v_prediction"),
    ("512-base-ema.safetensors", None, "epsilon"),
    ("mine.safetensors", {"modelspec.prediction_type": "v"}, "v_prediction"),
    ("mine-768.safetensors", {"modelspec.prediction_type": "epsilon"}, "epsilon"),
    ("mine.safetensors", None, None),
    # words of the name, not parts of words
    ("database.safetensors", None, None),
    ("mine_7680.safetensors", None, None),
    ("very.safetensors", None, None),
    ("stable-diffusion-v-2-1.safetensors", None, None),
    ("mine_base.safetensors", None, "epsilon"),
    ("mine-eps.safetensors", None, "epsilon"),
    ("mine_v.safetensors", None, "v_prediction"),
    ("768-v-ema.safetensors", None, "v_prediction"),
    ("mine_vpred.safetensors", None, "v_prediction"),
    ("Mine V-Pred.safetensors", None, "v_prediction"),
    ("mine-v_prediction.safetensors", None, "v_prediction"),
    ("mine-512-vpred.safetensors", None, "v_prediction"),
    ("mine768px.safetensors", None, "v_prediction"),
    ("mine_512_to_768.safetensors", None, None),
    ("mine_vpred_or_eps.safetensors", None, None),
    # metadata in other spellings, before the name
    *[("mine-512.safetensors", {key: word}, "v_prediction") for key, word in (
        ("modelspec.prediction_type", "v_prediction"), ("modelspec.prediction_type", "vpred"),
        ("modelspec.prediction_type", "V-Prediction"), ("prediction_type", "v"),
        ("ss_v_parameterization", "True"), ("ss_v_parameterization", "true"),
        ("modelspec.architecture", "stable-diffusion-v2-768-v"))],
    *[("mine-768.safetensors", {key: word}, "epsilon") for key, word in (
        ("modelspec.prediction_type", "eps"), ("prediction_type", " Epsilon"),
        ("ss_v_parameterization", "False"))],
    ("mine-768.safetensors", {"modelspec.prediction_type": "", "format": "pt"}, "v_prediction"),
])
def test_the_prediction_type_comes_from_metadata_then_from_the_name_or_is_asked_for(
        name, metadata, expected, tmp_path):
    state = {
        "model.diffusion_model.out.2.bias": torch.zeros(4),
        "cond_stage_model.model.ln_final.weight": torch.zeros(1),
    }
    save_file(state, tmp_path / name, metadata=metadata)
    if expected is None:
        with pytest.raises(InputError, match="512 or 768"):
            ScheduleConfig.from_pretrained(tmp_path / name)
    else:
        assert ScheduleConfig.from_pretrained(tmp_path / name).prediction_type == expected


SD2_KEYS = ("model.diffusion_model.out.2.bias", "cond_stage_model.model.ln_final.weight")


@pytest.mark.parametrize("metadata, mark, said", [
    ({"modelspec.prediction_type": "sample"}, [], "modelspec.prediction_type = sample"),
    ({"modelspec.prediction_type": "v", "ss_v_parameterization": "False"}, [],
     "modelspec.prediction_type = v, ss_v_parameterization = false"),
    ({"prediction_type": "epsilon"}, ["v_pred"], "epsilon, a tensor v_pred"),
])
def test_a_file_that_says_both_or_neither_of_epsilon_and_v_is_refused(
        metadata, mark, said, tmp_path):
    file = tmp_path / "mine-512.safetensors"
    save_file({key: torch.zeros(1) for key in (*SD2_KEYS, *mark)}, file, metadata=metadata)
    with pytest.raises(InputError, match=f"says .*{said}.*expected one of epsilon and v"):
        ScheduleConfig.from_pretrained(file)


def test_the_tensor_v_pred_marks_a_file_as_v(tmp_path):
    file = tmp_path / "mine-512.safetensors"
    save_file({key: torch.zeros(0) for key in (*SD2_KEYS, "v_pred")}, file)
    assert ScheduleConfig.from_pretrained(file).prediction_type == "v_prediction"


@pytest.mark.parametrize("name, expected", [
    ("mine", "epsilon"), ("mine-768", "epsilon"), ("mine_v", "epsilon"), ("v-1", "epsilon"),
    ("mine_vpred", "v_prediction")])
def test_sd1_predicts_epsilon_unless_its_name_has_the_word_vpred(name, expected, tmp_path):
    state = {
        "model.diffusion_model.out.2.bias": torch.zeros(4),
        "cond_stage_model.transformer.text_model.final_layer_norm.weight": torch.zeros(1),
    }
    file = tmp_path / f"{name}.safetensors"
    save_file(state, file)
    assert ScheduleConfig.from_pretrained(file).prediction_type == expected


@pytest.mark.parametrize("pad, kind", [(0, "sd2"), (49407, "sd1")])
def test_the_built_in_tokenizer_gives_clips_ids(pad, kind):
    tokenizer = built_in(kind)
    clip = open_clip.get_tokenizer("ViT-H-14")
    prompts = ["a red apple", "Don't  panic: 42 caf\u00e9s.",
               "a photo of an astronaut riding a horse on mars, 8k", ""]
    ours, theirs = tokenizer(prompts), clip(prompts)  # theirs is padded with 0
    end = (theirs == 49407).int().argmax(dim=1)
    for mine, reference_ids, n in zip(ours, theirs, end):
        assert torch.equal(mine[:n + 1], reference_ids[:n + 1]) and (mine[n + 1:] == pad).all()
    assert len(tokenizer) == 49408 and tokenizer.model_max_length == 77


@torch.no_grad()
def test_the_picture_from_a_single_file_equals_diffusers(kind, teacher, file):
    from pipeline import Pipeline
    pipe = teacher_pipeline(teacher)
    model = Pipeline.from_pretrained(file, torch.device("cpu"), torch.float32)
    ours = model.draw(
        UNet.from_pretrained(file), ["a red apple"], [3], 4, 6.5, "ddim", size=(32, 32),
        negative="rocket")
    theirs = pipe(
        "a red apple", negative_prompt="rocket", num_inference_steps=4, guidance_scale=7.5,
        height=32, width=32, output_type="pt", generator=torch.Generator().manual_seed(3)).images
    agree(ours, theirs)


def test_latents_keep_their_shape_through_a_single_file_vae(kind, file):
    assert VAE.from_pretrained(file).decode(rand(1, 4, 4, 4)).shape == (1, 3, 16, 16)
