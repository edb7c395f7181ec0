"""CLIP's byte-level BPE on the `tokenizers` library. transformers' CLIPTokenizer gives the same ids
(a test compares them), but to import it takes longer than to draw a picture."""
import gzip
import importlib.util
import json
import tempfile
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer as Backend, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import RobertaProcessing

from support.weights import InputError

END = "<|endoftext|>"
SPECIAL = {"bos_token": "<|startoftext|>", "eos_token": END, "unk_token": END, "pad_token": END}
FILES = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json",
         "special_tokens_map.json")
# openai/CLIP, clip/simple_tokenizer.py
WORDS = (r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|"
         r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")


class Tokenizer:
    """tokenizer(list of B prompts) -> token ids [B, L], each row begun, ended, cut and padded at
    L = `model_max_length`. len(tokenizer) is the number of its tokens."""

    def __init__(self, files):
        """files: {name: bytes} of those of FILES that a tokenizer/ folder holds."""
        read = lambda name: json.loads(files.get(name, "{}"))
        config = read("tokenizer_config.json")
        if "added_tokens_decoder" not in config:  # as SD2.1's, which pads with "!" by this file
            config |= read("special_tokens_map.json")
        if "vocab.json" in files:
            vocabulary = read("vocab.json")
            merges = files["merges.txt"].decode().split("\n")[1:]  # the first line is a header
        else:
            model = read("tokenizer.json")["model"]
            vocabulary, merges = model["vocab"], model["merges"]
        merges = [tuple(merge.split() if isinstance(merge, str) else merge)
                  for merge in merges if merge]
        special = {key: as_token(config.get(key) or SPECIAL[key]) for key in SPECIAL}
        backend = Backend(BPE(vocabulary, merges, continuing_subword_prefix="",
                              end_of_word_suffix="</w>", unk_token=special["unk_token"].content))
        backend.normalizer = normalizers.Sequence([
            normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
        backend.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(WORDS), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False)])
        backend.add_special_tokens(list(special.values()))
        ids = {key: backend.token_to_id(token.content) for key, token in special.items()}
        start, end = ((special[key].content, ids[key]) for key in ("bos_token", "eos_token"))
        backend.post_processor = RobertaProcessing(end, start, False, False)
        self.files, self.backend = files, backend
        self.eos_token_id, self.pad_token_id = ids["eos_token"], ids["pad_token"]
        self.model_max_length = config.get("model_max_length")

    @classmethod
    def from_pretrained(cls, folder):
        """folder: vocab.json and merges.txt, or tokenizer.json; tokenizer_config.json says the
        length. Raises InputError if it is no whole tokenizer."""
        folder = Path(folder)
        if not any((folder / name).is_file() for name in ("vocab.json", "tokenizer.json")):
            raise InputError(f"{folder}: no tokenizer there; expected vocab.json and merges.txt")
        try:
            tokenizer = cls({name: (folder / name).read_bytes() for name in FILES
                             if (folder / name).is_file()})
        except Exception as error:  # the tokenizers library raises bare Exceptions for broken files
            raise InputError(f"{folder}: not a whole tokenizer ({type(error).__name__}: {error}); "
                             "copy the folder again") from None
        if not isinstance(tokenizer.model_max_length, int):
            raise InputError(f"{folder}: says no model_max_length, the tokens that a prompt is cut "
                             "to; copy tokenizer_config.json there")
        return tokenizer

    def save_pretrained(self, folder):
        """Write the same files into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in self.files.items():
            (folder / name).write_bytes(data)

    def __len__(self):
        return self.backend.get_vocab_size()

    def encode(self, prompts):
        """-> B lists of ids, each begun and ended, of any length."""
        return [row.ids for row in self.backend.encode_batch(list(prompts))]

    def __call__(self, prompts):
        length, rows = self.model_max_length, self.encode(prompts)
        rows = [row if len(row) <= length else [*row[:length - 1], self.eos_token_id]
                for row in rows]
        return torch.tensor([row + [self.pad_token_id] * (length - len(row)) for row in rows])


def as_token(token):
    """A special token as the files give it: its text, or a dict of what it is."""
    flags = {"content": token} if isinstance(token, str) else {
        key: value for key, value in token.items() if key not in ("__type", "id", "special")}
    return AddedToken(**flags, special=True)

def write_tokenizer(folder, kind, entries=49408, length=77):
    """Write CLIP's BPE, which open_clip ships, or its first `entries`, as the tokenizer/ folder of
    that generation ("sd1", "sd2"); `length` is the number of tokens that a prompt is cut to.

    SD1 pads with the end token, SD2 with id 0, the token "!". So transformers reads a "!" in a
    prompt of SD2 as padding; diffusers does so too."""
    # its file alone, since to import it takes seconds
    package = Path(importlib.util.find_spec("open_clip").origin).parent
    with gzip.open(package / "bpe_simple_vocab_16e6.txt.gz", "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")
    merges = lines[1:1 + entries - 512 - 2]  # the first line is a header; see `tokens` for the rest
    symbols = byte_symbols()
    tokens = symbols + [s + "</w>" for s in symbols] + [m.replace(" ", "") for m in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": length,
        "do_lower_case": True,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "!" if kind == "sd2" else "<|endoftext|>"}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def byte_symbols():
    """The letters that stand for the 256 bytes, in the order of CLIP's vocabulary: printable ones
    for themselves, those from U+0100 on for the others (openai/CLIP, clip/simple_tokenizer.py)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in plain] + [chr(256 + i) for i in range(256 - len(plain))]


def built_in(kind):
    """The Tokenizer of that generation: a single-file checkpoint has none."""
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(folder, kind)
        return Tokenizer.from_pretrained(folder)
