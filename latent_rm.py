"""The latent proxy reward model (LRM): a CLIP whose image tower reads latents (RG-LCD, section 4.2).

The student maximises the LRM's score without decoding anything; meanwhile the LRM learns to rank like the expert reward
model, which is only ever asked to compare and so may be a black box.
"""
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from open_clip.transformer import TextTransformer
from torch import nn

from weights import load_component, load_tokenizer, save_component


@dataclass(frozen=True)
class LatentRMConfig:
    latent_channels: int = 4
    latent_size: int = 64
    patch_size: int = 4
    width: int = 512
    layers: int = 12
    heads: int = 8
    embed_dim: int = 1024
    text_width: int = 1024  # the ViT-H/14 text tower
    text_layers: int = 24
    text_heads: int = 16
    context_length: int = 77
    vocab_size: int = 49408

    ignored: ClassVar = set()
    inert: ClassVar = {}


class LatentViT(nn.Module):
    """Unscaled latents [B,4,s,s] -> features [B,embed_dim]: a pre-norm ViT with mean pooling."""

    def __init__(self, config):
        super().__init__()
        tokens = (config.latent_size // config.patch_size) ** 2
        self.patch = nn.Conv2d(config.latent_channels, config.width, config.patch_size, stride=config.patch_size)
        self.position = nn.Parameter(0.02 * torch.randn(tokens, config.width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(config.width, config.heads, 4 * config.width, dropout=0.0, activation="gelu",
                                       batch_first=True, norm_first=True) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.proj = nn.Linear(config.width, config.embed_dim, bias=False)

    def forward(self, latents):
        x = self.patch(latents).flatten(2).transpose(1, 2) + self.position  # [B, tokens, width]
        for block in self.blocks:
            x = block(x)
        return self.proj(self.norm(x.mean(dim=1)))


class LatentRM(nn.Module):
    """latent_rm(unscaled latents [B,4,s,s], B prompts) -> [B] cosine similarities."""

    Config = LatentRMConfig

    def __init__(self, config=LatentRMConfig()):
        super().__init__()
        self.config = config
        self.tokenizer = None
        self.visual = LatentViT(config)
        self.text = TextTransformer(config.context_length, config.vocab_size, config.text_width, config.text_heads,
                                    config.text_layers, output_dim=config.embed_dim)

    @classmethod
    def from_pretrained(cls, path, dtype=None, device=None):
        """path: a folder with config.json, the weights, and tokenizer/ in it or beside it."""
        latent_rm = load_component(cls, path, "latent_rm", dtype, device)
        latent_rm.text.attn_mask = latent_rm.text.build_causal_mask().to(device)  # not in the file
        beside = [folder / "tokenizer" for folder in (Path(path), Path(path).parent)]
        latent_rm.tokenizer = load_tokenizer(next((f for f in beside if f.is_dir()), beside[0]))
        return latent_rm

    def save_pretrained(self, folder, dtype=None):
        save_component(self, folder, "LatentRM", dtype)

    def forward(self, latents, prompts):
        ids = self.tokenizer(list(prompts), padding="max_length", truncation=True, max_length=self.config.context_length,
                             return_tensors="pt").input_ids.to(latents.device)
        image, text = F.normalize(self.visual(latents), dim=-1), F.normalize(self.text(ids), dim=-1)
        return (image.float() * text.float()).sum(dim=-1)


def preference_loss(expert_scores, lrm_scores, tau=1.0, tau_lrm=1.0, kind="kl"):
    """How far the LRM's preference in each pair of candidates is from the expert's (RG-LCD, eq. 11).

    expert_scores, lrm_scores: [B, K], K >= 2 candidates for the same prompt. For each of the K(K-1)/2 pairs: "kl" is
    KL(softmax(expert / tau) || softmax(lrm / tau_lrm)); "ce" is the cross-entropy on the candidate that the expert
    prefers. Mean over the batch, summed over pairs; the gradient reaches lrm_scores only.
    """
    pairs = torch.combinations(torch.arange(expert_scores.shape[1], device=expert_scores.device))  # [P, 2]
    expert, lrm = expert_scores.detach().float()[:, pairs], lrm_scores.float()[:, pairs]  # [B, P, 2]
    log_q = F.log_softmax(lrm / tau_lrm, dim=-1)
    if kind == "ce":
        return -log_q.gather(-1, expert.argmax(-1, keepdim=True)).mean(0).sum()
    log_p = F.log_softmax(expert / tau, dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean(0).sum()
