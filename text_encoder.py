"""Prompts in, embeddings out: the CLIP text tower in front of the UNet. transformers does the work.

SD2.1 uses OpenCLIP's ViT-H/14 tower: 23 of its 24 layers (up to the penultimate), then the final
layer norm. The file holds exactly those 23, so the last hidden state is the one wanted.
"""
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from support import single_file
from support.weights import (
    InputError,
    find_component,
    load_strictly,
    load_tokenizer,
    state_to_save,
    whole_folder,
)


class TextEncoder(nn.Module):
    """text_encoder(list of B prompts) -> [B, L, D]. L is the tokenizer's `model_max_length` (77 in
    SD); a longer prompt is cut there. D is `dim` (1024 in SD2.1). The empty prompt "" gives the
    unconditional embedding."""

    def __init__(self, model, tokenizer):
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.dim = model.config.hidden_size

    @classmethod
    def from_pretrained(cls, path, dtype=None, device=None):
        """path: a model folder with text_encoder/ and tokenizer/, the text_encoder folder beside
        tokenizer/, a single-file checkpoint (the tokenizer is built in), or a hub id. dtype:
        float32 if None. Raises InputError on anything but an exact fit."""
        component = find_component(path, "text_encoder")
        if component.folder:
            words = component.folder.parent / "tokenizer"
            tokenizer = load_tokenizer(words)
        else:
            words = "the built-in tokenizer"
            tokenizer = single_file.tokenizer(component.kind, load_tokenizer)
        kind = component.config.get("model_type", "clip_text_model")
        if kind != "clip_text_model":
            raise InputError(f"{component.where}: model_type {kind!r}; "
                             "expected clip_text_model, as in SD 1.x and 2.x")
        # The token ids in text_encoder/config.json of published files are wrong; those of the
        # tokenizer's folder are right.
        fields = {k: v for k, v in component.config.items() if not k.endswith("_token_id")}
        config = CLIPTextConfig(
            **fields, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id)
        if tokenizer.model_max_length > config.max_position_embeddings:
            raise InputError(f"{words}: model_max_length {tokenizer.model_max_length} is more than "
                             f"the {config.max_position_embeddings} positions of {component.where}")
        if len(tokenizer) > config.vocab_size:
            raise InputError(f"{words}: {len(tokenizer)} tokens, but {component.where} says "
                             f"vocab_size {config.vocab_size}: do they belong together?")
        with torch.device("meta"):
            model = CLIPTextModel(config)
        if component.folder:
            # Some versions of transformers prefix every key and some do not. The file may be of
            # either kind, whichever is installed.
            prefixed = any(k.startswith("text_model.") for k in component.tensors.shapes)
            prefix = "text_model." if prefixed else ""
            component.source = lambda key: (prefix + key.removeprefix("text_model."), None)
            component.ignored = "position_ids$"
        load_strictly(model, component, dtype=dtype, device=device)
        for name, buffer in model.named_buffers():
            if buffer.is_meta:  # the position ids, which no file holds: [1, L]
                owner, _, attribute = name.rpartition(".")
                positions = torch.arange(config.max_position_embeddings, device=device)[None]
                model.get_submodule(owner).register_buffer(attribute, positions, persistent=False)
        return cls(model, tokenizer).eval()

    def save_pretrained(self, path, dtype=None):
        """Write path/text_encoder in the layout of transformers; `dtype` is for the floating-point
        tensors. The tokenizer never changes: copy its folder."""
        state = state_to_save(self.model, dtype)
        with whole_folder(Path(path) / "text_encoder") as new:
            (new / "config.json").write_text(self.model.config.to_json_string())
            save_file(state, new / "model.safetensors", metadata={"format": "pt"})

    def tokenize(self, prompts):
        """list of B prompts -> token ids [B, L], padded with the tokenizer's pad token."""
        batch = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, return_tensors="pt")
        return batch.input_ids

    def cut(self, prompts):
        """Of `prompts`, those that are longer than L tokens, each once -> {prompt: its tokens}."""
        ids = self.tokenizer(list(prompts), verbose=False).input_ids
        longest = self.tokenizer.model_max_length
        return {prompt: len(row) for prompt, row in zip(prompts, ids) if len(row) > longest}

    def forward(self, prompts):
        ids = self.tokenize(prompts).to(self.model.device, non_blocking=True)
        return self.model(input_ids=ids).last_hidden_state  # [B, 77, 1024] in SD2.1

