"""CLIP's tokenizer against transformers' CLIPTokenizer on the same folder."""
import json
import random
import shutil

import pytest
import torch
from transformers import CLIPTokenizer

from conftest import ROOT
from support.tokenizer import Tokenizer, write_tokenizer
from support.weights import InputError

POCKET = ROOT / "pocket" / "tokenizer"
PROMPTS = ["a red apple", "", "Don't  panic: 42 caf\u00e9s!!", "tabs\tand\nlines", "\u0130stanbul",
           "\u65e5\u672c\u8a9e", "\U0001f469\u200d\U0001f680 <|endoftext|> x", "<|startoftext|>",
           "!", "e\u0301 is two letters in one", "house, " * 60]


def strange_prompts(count):
    rng = random.Random(0)
    blocks = (32, 127), (0xA0, 0x2FFF), (0x1F300, 0x1F700)
    return ["".join(chr(rng.randrange(*rng.choice(blocks))) for _ in range(40))
            for _ in range(count)]


def ids_of(folder, prompts):
    words = CLIPTokenizer.from_pretrained(folder)(
        prompts, padding="max_length", truncation=True, return_tensors="pt")
    return words.input_ids


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_ids_equal_transformers_for_any_text(kind, tmp_path):
    write_tokenizer(tmp_path, kind)
    prompts = PROMPTS + strange_prompts(300)
    assert torch.equal(Tokenizer.from_pretrained(tmp_path)(prompts), ids_of(tmp_path, prompts))


def test_sd21s_padding_stands_in_its_special_tokens_map(tmp_path):
    write_tokenizer(tmp_path, "sd1")
    described = {"content": "!", "lstrip": False, "normalized": False, "rstrip": False,
                 "single_word": False}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": described}))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer(["moon"])[0, -1] == tokenizer.pad_token_id == 0
    assert torch.equal(tokenizer(PROMPTS), ids_of(tmp_path, PROMPTS))


def test_a_folder_with_tokenizer_json_alone_gives_the_same_ids(tmp_path):
    CLIPTokenizer.from_pretrained(POCKET).save_pretrained(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).unlink(missing_ok=True)
    ours = Tokenizer.from_pretrained(tmp_path)
    assert torch.equal(ours(PROMPTS), Tokenizer.from_pretrained(POCKET)(PROMPTS))
    assert len(ours) == 4096


def test_saving_writes_the_files_that_were_read(tmp_path):
    Tokenizer.from_pretrained(POCKET).save_pretrained(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {
        file.name: file.read_bytes() for file in POCKET.iterdir()}


BROKEN = {
    "no vocabulary": (lambda f: (f / "vocab.json").unlink(), "no tokenizer there"),
    "no merges": (lambda f: (f / "merges.txt").unlink(), "merges.txt"),
    "half a vocabulary": (lambda f: (f / "vocab.json").write_text('{"a": 0, '), "not a whole"),
    "a vocabulary without the end": (lambda f: (f / "vocab.json").write_text('{"a": 0}'), "whole"),
    "no length": (lambda f: (f / "tokenizer_config.json").unlink(), "model_max_length"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_refused_in_one_line(case, tmp_path):
    change, named = BROKEN[case]
    shutil.copytree(POCKET, tmp_path, dirs_exist_ok=True)
    change(tmp_path)
    with pytest.raises(InputError, match=named) as found:
        Tokenizer.from_pretrained(tmp_path)
    assert "\n" not in str(found.value)
