import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer

from conftest import agree, cut, edit_json, make_text_encoder
from pipeline import Pipeline
from support.weights import InputError
from text_encoder import TextEncoder
from unet import UNet

PROMPTS = ["a red apple", "", "house, " * 60]


@torch.no_grad()
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])  # SD2, SD1
def test_equals_transformers_last_hidden_state(activation, model_copy):
    make_text_encoder(model_copy, hidden_act=activation)
    tokenizer = CLIPTokenizer.from_pretrained(model_copy / "tokenizer")
    model = CLIPTextModel.from_pretrained(model_copy / "text_encoder").eval()
    words = tokenizer(
        PROMPTS, padding="max_length", truncation=True, max_length=32, return_tensors="pt")
    theirs = model(input_ids=words.input_ids).last_hidden_state
    agree(TextEncoder.from_pretrained(model_copy)(PROMPTS), theirs)


def test_prompts_are_padded_and_cut_to_the_tokenizers_length(model_folder):
    encoder = TextEncoder.from_pretrained(model_folder)
    end = encoder.tokenizer.eos_token_id
    short, empty, long = encoder.tokenizer(PROMPTS).tolist()
    assert len(short) == len(empty) == len(long) == 32
    assert empty[1:] == [end] * 31 and short[-1] == end and long.count(end) == 1 and long[-1] == end
    assert encoder(PROMPTS).shape == (3, 32, 32)


@torch.no_grad()
def test_a_prompts_embedding_does_not_depend_on_its_batch(model_folder):
    encoder = TextEncoder.from_pretrained(model_folder)
    agree(encoder(PROMPTS)[:1], encoder(PROMPTS[:1]), 1e-5)


@torch.no_grad()
def test_save_then_load_is_exact(model_folder, tmp_path):
    encoder = TextEncoder.from_pretrained(model_folder)
    encoder.save_pretrained(tmp_path)
    shutil.copytree(model_folder / "tokenizer", tmp_path / "tokenizer")
    assert torch.equal(TextEncoder.from_pretrained(tmp_path)(PROMPTS), encoder(PROMPTS))


def test_saving_in_half_precision_leaves_integers_alone(model_folder, tmp_path):
    encoder = TextEncoder.from_pretrained(model_folder)
    encoder.model.register_buffer("position_ids", torch.arange(3000))  # as older files have them
    encoder.save_pretrained(tmp_path, dtype=torch.float16)
    state = load_file(tmp_path / "text_encoder" / "model.safetensors")
    assert state.pop("text_model.position_ids").tolist() == list(range(3000))
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}


@torch.no_grad()
def test_wrong_token_ids_in_the_config_file_do_no_harm(model_folder, model_copy):
    file = model_copy / "text_encoder" / "config.json"
    edit_json(file, eos_token_id=2, bos_token_id=0, pad_token_id=1)
    encoder, expected = map(TextEncoder.from_pretrained, (model_copy, model_folder))
    assert torch.equal(encoder(PROMPTS), expected(PROMPTS))


def test_width_that_does_not_match_the_unet_is_reported(model_copy):
    make_text_encoder(model_copy, hidden_size=48)
    model = Pipeline.from_pretrained(model_copy, torch.device("cpu"), torch.float32)
    with pytest.raises(InputError, match="cross_attention_dim 32.* 48"):
        model.check(UNet.from_pretrained(model_copy), model_copy / "unet", student=False)


CONFIG, STATE = "text_encoder/config.json", "text_encoder/model.safetensors"
BROKEN = {
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "tokenizer"),
    "no weights": (lambda f: (f / STATE).unlink(), "model.safetensors"),
    "truncated weights": (lambda f: cut(f / STATE, -10), "model.safetensors"),
    "truncated config": (lambda f: cut(f / CONFIG, 30), "config.json"),
    "another architecture": (lambda f: edit_json(f / CONFIG, model_type="t5"), "model_type 't5'"),
    "too few positions": (lambda f: edit_json(f / CONFIG, max_position_embeddings=16), "32"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_folder_that_does_not_fit_is_refused_by_name(case, model_copy):
    change, named = BROKEN[case]
    change(model_copy)
    with pytest.raises(InputError, match=named):
        TextEncoder.from_pretrained(model_copy)
