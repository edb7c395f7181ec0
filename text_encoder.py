"""Prompts in, embeddings out: the CLIP text tower in front of the UNet (transformers'
CLIPTextModel).

Attribute names equal the keys of `text_encoder/model.safetensors`, but for the prefix `text_model.`
that most files have. The config's defaults are SD2.1's: OpenCLIP's ViT-H/14 tower, of whose 24
layers SD uses 23, then the final layer norm. The file holds exactly those 23, so the last hidden
state is the one wanted.
Source of the topology: Radford et al. 2021 (arXiv 2103.00020), section 2.4.
"""
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from support.tokenizer import Tokenizer, built_in
from support.weights import (
    InputError,
    find_component,
    load_strictly,
    state_to_save,
    whole_folder,
)


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu": F.gelu, "quick_gelu": quick_gelu}  # SD2, SD1


@dataclass(frozen=True)
class TextConfig:
    vocab_size: int = 49408
    max_position_embeddings: int = 77
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 23
    num_attention_heads: int = 16
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5

    @classmethod
    def of(cls, fields, where):
        """A config.json, whose other fields change nothing here. What it leaves out has the value
        that transformers gives it."""
        absent = cls(hidden_size=512, intermediate_size=2048, num_hidden_layers=12,
                     num_attention_heads=8, hidden_act="quick_gelu")
        known = {field.name for field in dataclasses.fields(cls)}
        config = dataclasses.replace(absent, **{k: v for k, v in fields.items() if k in known})
        if config.hidden_act not in ACTIVATIONS:
            raise InputError(f"{where}: hidden_act {config.hidden_act!r}; "
                             f"expected {' or '.join(ACTIVATIONS)}")
        if config.hidden_size % config.num_attention_heads:
            raise InputError(f"{where}: {config.num_attention_heads} heads do not divide "
                             f"hidden_size {config.hidden_size}")
        return config


class SelfAttention(nn.Module):
    """Causal: a token reads itself and those before it."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x):
        # [B, L, dim] -> [B, heads, L, dim / heads]
        q, k, v = (project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for project in (self.q_proj, self.k_proj, self.v_proj))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        dim = config.hidden_size
        self.layer_norm1, self.layer_norm2 = (
            nn.LayerNorm(dim, config.layer_norm_eps) for _ in range(2))
        self.self_attn = SelfAttention(dim, config.num_attention_heads)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, config.intermediate_size),
                                  "fc2": nn.Linear(config.intermediate_size, dim)})
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp.fc2(self.activation(self.mlp.fc1(self.layer_norm2(x))))


def embedding(count, dim):
    """nn.Embedding, drawn as CLIP's are; not on the meta device, where PyTorch would load its
    compiler for it: two seconds."""
    weight = torch.empty(count, dim)
    return nn.Embedding.from_pretrained(
        weight if weight.is_meta else weight.normal_(std=0.02), freeze=False)


class TextTower(nn.Module):
    """Token ids [B, L] -> the last hidden state [B, L, D]."""

    def __init__(self, config=TextConfig()):
        super().__init__()
        self.config = config
        self.embeddings = nn.ModuleDict({
            "token_embedding": embedding(config.vocab_size, config.hidden_size),
            "position_embedding": embedding(config.max_position_embeddings, config.hidden_size)})
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(
            Layer(config) for _ in range(config.num_hidden_layers))})
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, ids):
        positions = self.embeddings.position_embedding.weight[:ids.shape[1]]
        x = self.embeddings.token_embedding(ids) + positions
        for layer in self.encoder.layers:
            x = layer(x)
        return self.final_layer_norm(x)


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
        kind = component.config.get("model_type", "clip_text_model")
        if kind != "clip_text_model":
            raise InputError(f"{component.where}: model_type {kind!r}; "
                             "expected clip_text_model, as in SD 1.x and 2.x")
        if component.folder:
            words = component.folder.parent / "tokenizer"
            tokenizer = Tokenizer.from_pretrained(words)
            prefixed = any(key.startswith("text_model.") for key in component.tensors.shapes)
            component.source = lambda key: ("text_model." * prefixed + key, None)
            component.ignored = "position_ids$"
        else:
            words, tokenizer = "the built-in tokenizer", built_in(component.kind)
        config = TextConfig.of(component.config, component.where)
        if tokenizer.model_max_length > config.max_position_embeddings:
            raise InputError(f"{words}: model_max_length {tokenizer.model_max_length} is more than "
                             f"the {config.max_position_embeddings} positions of {component.where}")
        if len(tokenizer) > config.vocab_size:
            raise InputError(f"{words}: {len(tokenizer)} tokens, but {component.where} says "
                             f"vocab_size {config.vocab_size}: do they belong together?")
        with torch.device("meta"):
            model = TextTower(config)
        load_strictly(model, component, dtype=dtype, device=device)
        return cls(model, tokenizer).eval()

    def save_pretrained(self, path, dtype=None):
        """Write path/text_encoder in the layout of transformers; `dtype` is for the floating-point
        tensors. The tokenizer never changes: copy its folder."""
        state = {f"text_model.{key}": tensor
                 for key, tensor in state_to_save(self.model, dtype).items()}
        config = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}
        config |= dataclasses.asdict(self.model.config) | {
            "projection_dim": self.dim, "eos_token_id": self.tokenizer.eos_token_id,
            "pad_token_id": self.tokenizer.pad_token_id, "bos_token_id": None}
        with whole_folder(Path(path) / "text_encoder") as new:
            (new / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            save_file(state, new / "model.safetensors", metadata={"format": "pt"})

    def cut(self, prompts):
        """Of `prompts`, those that are longer than L tokens, each once -> {prompt: its tokens}."""
        longest, rows = self.tokenizer.model_max_length, self.tokenizer.encode(prompts)
        return {prompt: len(row) for prompt, row in zip(prompts, rows) if len(row) > longest}

    def forward(self, prompts):
        ids = self.tokenizer(prompts).to(self.model.final_layer_norm.weight.device,
                                         non_blocking=True)
        return self.model(ids)  # [B, 77, 1024] in SD2.1
