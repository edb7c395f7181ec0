"""Prompts in, embeddings out: the CLIP text tower in front of the UNet. transformers does the work.

SD2.1 uses OpenCLIP's ViT-H/14 tower with 23 of its 24 layers (the penultimate) and the final layer norm; the file holds
exactly those 23, so the last hidden state is the one wanted.
"""
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from weights import InputError, find_component, load_strictly, load_tokenizer, read_json, whole_folder


class TextEncoder(nn.Module):
    """text_encoder(list of B prompts) -> [B, L, D]. L is the tokenizer's `model_max_length` (77 in SD); a longer prompt
    is cut there. The empty prompt "" gives the unconditional embedding."""

    def __init__(self, model, tokenizer):
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.dim = model.config.hidden_size

    @classmethod
    def from_pretrained(cls, path, dtype=None, device=None):
        """path: a model folder with text_encoder/ and tokenizer/, or the text_encoder folder beside tokenizer/."""
        folder = find_component(path, "text_encoder")
        words = folder.parent / "tokenizer"
        # The token ids in text_encoder/config.json of published files are wrong; the tokenizer's folder is right.
        tokenizer = load_tokenizer(words)
        raw = read_json(folder / "config.json")
        config = CLIPTextConfig(**{k: v for k, v in raw.items() if not k.endswith("_token_id")},
                                bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
        if tokenizer.model_max_length > config.max_position_embeddings:
            raise InputError(f"{words}: model_max_length {tokenizer.model_max_length} is more than the "
                             f"{config.max_position_embeddings} positions of {folder}")
        if len(tokenizer) > config.vocab_size:
            raise InputError(f"{words}: {len(tokenizer)} tokens, but {folder}/config.json says vocab_size {config.vocab_size}: "
                             f"do they belong together?")
        model = CLIPTextModel(config)
        load_strictly(model, folder / "model.safetensors", ignore=("position_ids",), rename=text_key(model))
        return cls(model, tokenizer).to(dtype=dtype or torch.float32, device=device).eval()

    def save_pretrained(self, path, dtype=None):
        """Write path/text_encoder in the layout of transformers. The tokenizer never changes: copy its folder."""
        state = {k: v.detach().to("cpu", dtype).contiguous() for k, v in self.model.state_dict().items()}
        with whole_folder(Path(path) / "text_encoder") as new:
            (new / "config.json").write_text(self.model.config.to_json_string())
            save_file(state, new / "model.safetensors", metadata={"format": "pt"})

    def tokenize(self, prompts):
        """list of B prompts -> token ids [B, L], padded with the tokenizer's pad token."""
        return self.tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt").input_ids

    def forward(self, prompts):
        return self.model(input_ids=self.tokenize(prompts).to(self.model.device)).last_hidden_state


def text_key(model):
    """transformers has dropped the "text_model." prefix of older files in some versions: name whichever the model uses."""
    prefixed = any(k.startswith("text_model.") for k in model.state_dict())
    bare = lambda key: key.removeprefix("text_model.")
    return (lambda key: "text_model." + bare(key)) if prefixed else bare
