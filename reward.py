"""Reward models: images [B,3,H,W] in [0,1] and B prompts in, [B] float32 scores out; gradients reach the images.

    load_reward("pocket")                   the small CLIP of pocket/reward
    load_reward("pocket=some/folder")       another CLIP in the same layout, such as pocket/judge
"""
import json
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from weights import WEIGHTS, InputError, find_component, load_strictly, load_tokenizer, whole_folder

POCKET_REWARD = Path(__file__).parent / "pocket" / "reward"


class PocketReward(nn.Module):
    """Cosine similarity of an open_clip CLIP whose sizes stand in config.json (embed_dim, vision_cfg, text_cfg)."""

    def __init__(self, config, tokenizer):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.clip = open_clip.CLIP(**config)
        self.size = config["vision_cfg"]["image_size"]

    @classmethod
    def from_pretrained(cls, path):
        """path: a folder with config.json and weights, beside the tokenizer/ folder."""
        component = find_component(path, "reward")
        if component.config.keys() != {"embed_dim", "vision_cfg", "text_cfg"}:
            raise InputError(f"{component.where}: no CLIP there (embed_dim, vision_cfg, text_cfg); expected a folder like pocket/reward")
        reward = cls(component.config, load_tokenizer(component.folder.parent / "tokenizer"))
        load_strictly(reward.clip, component)
        return reward

    def save_pretrained(self, folder, dtype=None):
        state = {k: v.detach().to("cpu", dtype if v.is_floating_point() else None).contiguous()
                 for k, v in self.clip.state_dict().items()}
        with whole_folder(folder) as new:
            (new / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")
            save_file(state, new / WEIGHTS, metadata={"format": "pt"})

    def tokenize(self, prompts):
        return self.tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt").input_ids

    def image_features(self, images):
        """[B,3,H,W] in [0,1] -> unit vectors [B,D]. Other sizes are resized, antialiased bicubic."""
        if images.shape[-2:] != (self.size, self.size):
            images = F.interpolate(images, (self.size, self.size), mode="bicubic", antialias=True)
        return self.clip.encode_image(images * 2 - 1, normalize=True)

    def text_features(self, prompts):
        device = self.clip.logit_scale.device
        return self.clip.encode_text(self.tokenize(prompts).to(device), normalize=True)

    def forward(self, images, prompts):
        if len(images) != len(prompts):
            raise InputError(f"{len(images)} images for {len(prompts)} prompts; a reward needs one prompt an image")
        with torch.no_grad():
            text = self.text_features(prompts)
        return (self.image_features(images).float() * text.float()).sum(dim=-1)


def load_reward(spec, device=None, dtype=None):
    """spec: see the top of this file -> callable (images [B,3,H,W] in [0,1], list of B prompts) -> [B] float32, frozen, in
    eval mode, differentiable with respect to the images."""
    name, _, path = spec.partition("=")
    if name != "pocket":
        raise InputError(f"--reward {spec}: not a reward this version builds; expected none, pocket or pocket=FOLDER")
    reward = PocketReward.from_pretrained(path or POCKET_REWARD)
    return reward.to(device=device, dtype=dtype).eval().requires_grad_(False)
