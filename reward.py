"""Reward models: images [B,3,H,W] in [0,1] and B prompts in, [B] float32 scores out.
Gradients reach the images. What load_reward(spec) and the option --reward take:

    hpsv2.1                 HPSv2.1, weights from the hub; likewise hpsv2, pickscore, imagereward
    hpsv2.1=FILE            the same from the published file, its tensors as safetensors,
                            or the folder of either
    hpsv2.1:aliased=FILE    the same, resizing as tensors were before torchvision 0.17, by which
                            numbers until 2023 were trained and printed; so of the four, and pocket
    clip:MODEL:TAG          any open_clip model (default ViT-H-14:laion2b_s32b_b79k)
    clip:MODEL:TAG=FILE     the same from a file; the tag says how it reads pictures
                            (without one: as CLIP does)
    aesthetic=HEAD,CLIP     CLIP L/14 with the LAION linear head,
                            or with the MLP of improved-aesthetic-predictor
    pocket=FOLDER           the small CLIP of pocket/reward, or one in its layout (pocket/judge)
    jpeg                    minus the kilobytes of the JPEG at quality 95: smooth images win;
                            no gradient
    torch:module.function   your own: function(images [B,3,H,W] in [0,1], prompts) -> tensor [B],
                            through which the gradient reaches the images
    python:module.function  your own black box: function(uint8 images [B,3,H,W] on the CPU, prompts)
                            -> B numbers; no gradient
    hpsv2.1*1.0+imagereward*0.1
                            a weighted sum

As a command it prints one score an image:

    python reward.py --reward hpsv2.1=HPS_v2.1_compressed.pt one.png two.png --prompt "a lighthouse"
"""
import argparse
import gzip
import importlib
import io
import json
import math
import re
import traceback
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from support.cli import autocast, pick_device, pick_precision, require, run
from support.pictures import decode
from support.reward_weights import (
    find_weights,
    open_clip_weights,
    open_weights,
    parameters_on_meta,
)
from support.tokenizer import Tokenizer, built_in
from support.weights import (
    WEIGHTS,
    InputError,
    find_component,
    first_line,
    load_strictly,
    state_to_save,
    whole_folder,
)

HERE = Path(__file__).parent
POCKET_REWARD = HERE / "pocket" / "reward"
BERT_VOCABULARY = HERE / "support" / "bert_vocab.txt.gz"  # google-bert/bert-base-uncased, vocab.txt
VIT_H, VIT_L = "ViT-H-14", "ViT-L-14-quickgelu"  # open_clip's names
# how CLIP normalizes pictures: one number a channel
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


# ----------------------------------------------------------------------------------------- pictures

def at_least_float32(x):
    """A tensor or a dtype (None: float32)."""
    if isinstance(x, torch.Tensor):
        return x.to(at_least_float32(x.dtype))
    return torch.promote_types(x or torch.float32, torch.float32)


def fit(images, size, how, half=round, antialias=True):
    """[B,3,H,W] -> [B,3,size,size], resized in float32 with antialiased bicubic interpolation,
    as Pillow and today's torchvision do it; without, as torchvision before 0.17 did with tensors.
    `how` is open_clip's word:

        squash      both sides to `size`
        longest     the longer side to `size`, zeros (black) around: HPSv2
        shortest    the shorter side to `size`, the middle cut out; `half` rounds half a pixel

    Pillow would round to 8 bits after each of its two passes; we do not, the gradient must pass."""
    images, sides = at_least_float32(images), images.shape[-2:]
    if how == "squash":
        new = size, size
    elif how == "longest":
        new = [max(1, round(side * (size / max(sides)))) for side in sides]
    else:
        new = [int(size * side / min(sides)) for side in sides]
    if tuple(new) != tuple(sides):
        images = F.interpolate(images, tuple(new), mode="bicubic", antialias=antialias)
    if how == "shortest" and antialias:
        images = images.clamp(0, 1)  # as Pillow does with what bicubic throws over the edge
    # what to add before each side's first pixel; a negative pad cuts
    top, left = [(size - n) // 2 if n <= size else -half((n - size) / 2) for n in new]
    return F.pad(images, (left, size - new[1] - left, top, size - new[0] - top))


def normalize(images, mean=MEAN, std=STD):
    """(images [B,3,H,W] - mean) / std; of mean and std one number a channel."""
    channels = zip(images.unbind(1), mean, std)
    return torch.stack([(channel - m) / s for channel, m, s in channels], dim=1)


# -------------------------------------------------------------------------------------- the rewards

class Reward(nn.Module):
    """reward(images [B,3,H,W] in [0,1], B prompts) -> [B] float32 scores; higher is better.

    Images may have any size and aspect. A prompt longer than the model reads (77 tokens of CLIP,
    35 of ImageReward, end tokens included) is cut there, as the published code does. The empty
    prompt works. A family has two methods:

        encode(prompts)         whatever the score needs of them, without gradient
        score(images, text)     tensors only: the part that compile() compiles

    `weights` {name: factor} and parts(images, prompts) {name: [B]}: reward(...) is the sum of
    factor times part, which total(parts) gives too.
    `differentiable`: False for black boxes, which raise InputError where a gradient is asked of
    them.

    Images outside [0, 1] or with NaN are refused. On an accelerator to look is to wait for it, so
    there only the first batch is looked at: a wrong range is there from the start, and a NaN that
    comes later shows in the score."""
    name, differentiable, looked, antialias = "reward", True, False, True
    resolution = None  # side of the pictures that it reads; None: as they are

    def forward(self, images, prompts):
        require(images.ndim == 4 and images.shape[1] == 3 and images.is_floating_point(),
                f"images {tuple(images.shape)} of {images.dtype}; "
                "a reward needs floating [B,3,H,W]")
        require(len(images) == len(prompts),
                f"{len(images)} images for {len(prompts)} prompts; "
                "a reward needs one prompt an image")
        if images.device.type == "cpu" or not self.looked:
            low, high = (v.item() for v in torch.aminmax(images.detach()))
            require(low >= 0 and high <= 1,
                    f"images with values from {low:.4g} to {high:.4g}; "
                    "a reward needs numbers in [0, 1]")
            self.looked = True
        if self.resolution:  # Pillow too cuts off what bicubic throws over the edge
            images = fit(images, self.resolution, "squash").clamp(0, 1)
        with torch.no_grad():
            text = self.encode(prompts)
        return self.score(images, text).float()

    @property
    def weights(self):
        return {self.name: 1.0}

    def parts(self, images, prompts):
        return {self.name: self(images, prompts)}

    def total(self, parts):
        return sum(self.weights[name] * part for name, part in parts.items())

    def compile(self, **options):
        if self.differentiable:
            self.score = torch.compile(self.score, **options)


class ClipReward(Reward):
    """Cosine of the image's and the prompt's features in an open_clip model.

    clip: the model. tokenize: list of prompts -> ids.
    how, half, mean, std: how it reads pictures, see fit() and normalize()."""

    def __init__(self, clip, tokenize, how, half=round, mean=MEAN, std=STD):
        super().__init__()
        self.clip, self.tokenize = clip, tokenize
        size = clip.visual.image_size
        self.size = size if isinstance(size, int) else size[0]
        self.preprocess = lambda images: normalize(
            fit(images, self.size, how, half, self.antialias), mean, std)

    def image_features(self, images):
        """[B,3,H,W] in [0,1] -> unit vectors [B,D], at least float32."""
        features = self.clip.encode_image(self.preprocess(images).to(self.clip.logit_scale.dtype))
        return F.normalize(at_least_float32(features), dim=-1)

    def text_features(self, prompts):
        """B prompts -> unit vectors [B,D], at least float32."""
        ids = self.tokenize(prompts).to(self.clip.logit_scale.device, non_blocking=True)
        features = self.clip.encode_text(ids)
        return F.normalize(at_least_float32(features), dim=-1)

    encode = text_features

    def score(self, images, text):
        return (self.image_features(images) * text).sum(dim=-1)


class PocketReward(ClipReward):
    """A ClipReward whose sizes stand in config.json (embed_dim, vision_cfg, text_cfg).
    Pictures are squashed to its size."""

    def __init__(self, config, tokenizer):
        super().__init__(open_clip.CLIP(**config), tokenizer, "squash",
                         mean=(0.5,) * 3, std=(0.5,) * 3)
        self.config, self.tokenizer = config, tokenizer

    @classmethod
    def from_pretrained(cls, path):
        """path: a folder with config.json and weights, beside the tokenizer/ folder."""
        component = find_component(path, "reward")
        if component.config.keys() != {"embed_dim", "vision_cfg", "text_cfg"}:
            raise InputError(f"{component.where}: no CLIP there (embed_dim, vision_cfg, text_cfg); "
                             "expected a folder like pocket/reward")
        tokenizer = Tokenizer.from_pretrained(component.folder.parent / "tokenizer")
        reward = cls(component.config, tokenizer)
        load_strictly(reward.clip, component)
        return reward

    def save_pretrained(self, folder, dtype=None):
        """The weights and config.json into `folder`; `dtype` is for the floating-point ones."""
        with whole_folder(folder) as new:
            (new / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")
            save_file(state_to_save(self.clip, dtype), new / WEIGHTS, metadata={"format": "pt"})


class Head(nn.Module):
    """features [B,width] -> [B]: linear layers with nothing between them (dropout in training),
    in float32 whatever surrounds them.

    layers: {number in the published nn.Sequential: width of the output}; by default those of
    improved-aesthetic-predictor and ImageReward."""
    MLP = {0: 1024, 2: 128, 4: 64, 6: 16, 7: 1}

    def __init__(self, width, layers=MLP):
        super().__init__()
        self.layers = nn.ModuleDict()
        for number, output in layers.items():
            self.layers[str(number)] = nn.Linear(width, output)
            width = output

    def forward(self, features):
        with torch.autocast(features.device.type, enabled=False):
            for layer in self.layers.values():
                features = layer(features.to(layer.weight.dtype))
        return features.squeeze(-1)


class AestheticReward(Reward):
    """A head on the unit image features of CLIP L/14: about 1 to 10, how much people like the
    looks. It reads no prompt.

    Sources: LAION-AI/aesthetic-predictor; christophschuhmann/improved-aesthetic-predictor."""

    def __init__(self, clip_reward, head):
        super().__init__()
        self.clip_reward, self.head = clip_reward, head
        # no prompt, no text tower
        clip_reward.clip.transformer = clip_reward.clip.token_embedding = None

    def encode(self, prompts):
        return None

    def score(self, images, text):
        return self.head(self.clip_reward.image_features(images))


class ImageReward(Reward):
    """ImageReward 1.0 (arXiv 2304.05977). BLIP's ViT-L/16 reads the picture. BERT reads the prompt
    and, in every layer, the picture by cross-attention. Five linear layers score the first token.
    Attribute names are the keys of ImageReward.pt.

    tokenize: list of prompts -> (ids, mask), both [B,35]."""
    VISION = {"img_size": 224, "patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16}
    TEXT = {"vocab_size": 30524, "hidden_size": 768, "encoder_hidden_size": 1024,
            "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
            "max_position_embeddings": 512, "layer_norm_eps": 1e-12, "hidden_act": "gelu"}
    # prompt tokens; mean and deviation of the raw scores: THUDM/ImageReward, ImageReward.py
    LENGTH, MEAN, STD = 35, 0.16717362830052426, 1.0333394966054072

    def __init__(self, tokenize):
        super().__init__()
        from timm.models.vision_transformer import VisionTransformer
        from transformers import BlipTextConfig, BlipTextModel
        # is_decoder: has cross-attention
        text = BlipTextModel(BlipTextConfig(**self.TEXT, is_decoder=True), add_pooling_layer=False)
        vision = VisionTransformer(**self.VISION, num_classes=0)
        self.blip = nn.ModuleDict({"visual_encoder": vision, "text_encoder": text})
        self.mlp = Head(self.TEXT["hidden_size"])
        self.tokenize = tokenize

    def encode(self, prompts):
        device = self.mlp.layers["0"].weight.device
        return [t.to(device, non_blocking=True) for t in self.tokenize(prompts)]

    def score(self, images, text):
        ids, mask = text
        vision, bert = self.blip["visual_encoder"], self.blip["text_encoder"]
        images = fit(images, self.VISION["img_size"], "shortest", antialias=self.antialias)
        images = normalize(images)
        patches = vision.forward_features(images.to(vision.cls_token.dtype))  # [B, 197, 1024]
        outputs = bert(input_ids=ids, attention_mask=mask, encoder_hidden_states=patches)
        tokens = outputs.last_hidden_state  # [B, 35, 768]
        return (self.mlp(at_least_float32(tokens[:, 0])) - self.MEAN) / self.STD


class Function(Reward):
    """A function(images [B,3,H,W] in [0,1], list of prompts) -> tensor [B], whose gradient reaches
    the images."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def encode(self, prompts):
        return list(prompts)

    def call(self, images, prompts):
        """What the function gives; InputError with the place in the user's file if it raises."""
        try:
            found = self.function(images, prompts)
            return list(found) if isinstance(found, Iterator) else found
        except Exception as error:  # whatever the user's function may raise
            frames = traceback.extract_tb(error.__traceback__)
            code = getattr(self.function, "__code__", None)
            own = [frame for frame in frames if code and frame.filename == code.co_filename]
            place = (own or frames)[-1]  # not a line of PyTorch's that it called
            kind = "uint8 images" if images.dtype == torch.uint8 else "images"
            raise InputError(
                f"{self.name}: raised {type(error).__name__}: {error} "
                f"({place.filename}, line {place.lineno}); "
                f"it was given {kind} {tuple(images.shape)} "
                f"and a list of {len(prompts)} prompts"
            ) from error

    def score(self, images, text):
        scores = self.call(images, text)
        found = tuple(getattr(scores, "shape", (type(scores).__name__,)))
        require(isinstance(scores, torch.Tensor) and found == (len(text),),
                f"{self.name}: gave {found}; expected a tensor [{len(text)}], one number an image")
        asked = torch.is_grad_enabled() and images.requires_grad
        require(scores.requires_grad or not asked,
                f"{self.name}: its scores have no gradient to the images; use torch operations on "
                "them all the way, or give it as python:, a black box for --latent-rm")
        return scores

    def compile(self, **options):
        """Left as it is: not every function compiles."""


class BlackBox(Function):
    """A function(uint8 images [B,3,H,W] on the CPU, list of prompts) -> B numbers."""
    differentiable = False

    def score(self, images, text):
        require(not (torch.is_grad_enabled() and images.requires_grad),
                f"{self.name}: a black box, gives no gradient to the images; "
                "train through a latent proxy reward model (--latent-rm)")
        require(images.isfinite().all(),
                f"{self.name}: images with NaN or infinity; a reward needs numbers in [0, 1]")
        pictures = (images.detach() * 255).round().byte().cpu()
        found = self.call(pictures, text)
        try:
            scores = torch.tensor([float(score) for score in found])
        except (TypeError, ValueError) as error:
            raise InputError(f"{self.name}: gave no sequence of numbers ({error}); "
                             f"expected {len(text)}, one an image") from None
        require(scores.isfinite().all(),
                f"{self.name}: gave NaN or infinity; expected finite numbers")
        require(len(scores) == len(text),
                f"{self.name}: gave {len(scores)} numbers for {len(text)} images; "
                "expected one an image")
        return scores.to(images.device)


class Mixture(Reward):
    """The weighted sum of `rewards`, whose names differ."""

    def __init__(self, rewards, factors):
        super().__init__()
        self.rewards, self.factors = nn.ModuleList(rewards), factors
        self.differentiable = all(reward.differentiable for reward in rewards)

    @property
    def weights(self):
        return {reward.name: factor for reward, factor in zip(self.rewards, self.factors)}

    def parts(self, images, prompts):
        return {reward.name: reward(images, prompts) for reward in self.rewards}

    def forward(self, images, prompts):
        return self.total(self.parts(images, prompts))

    def compile(self, **options):
        for reward in self.rewards:
            reward.compile(**options)


def jpeg_kilobytes(images, prompts):
    """Minus the size of each picture as JPEG at quality 95, in 1,000 bytes
    (arXiv 2305.13301, DDPO)."""
    sizes = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=95)
        sizes.append(-buffer.tell() / 1000)
    return sizes


# -------------------------------------------------------------------------------------------- words

def bert_tokenizer(length):
    """BERT's uncased WordPiece with BLIP's two tokens added, as a function: list of B prompts ->
    (ids, mask), both [B,length]."""
    from tokenizers import BertWordPieceTokenizer
    words = gzip.decompress(BERT_VOCABULARY.read_bytes()).decode().split("\n")[:-1]
    tokenizer = BertWordPieceTokenizer({word: i for i, word in enumerate(words)}, lowercase=True)
    tokenizer.add_special_tokens(["[DEC]", "[ENC]"])  # 30522, 30523
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)

    def tokenize(prompts):
        rows = tokenizer.encode_batch(list(prompts))
        ids = torch.tensor([row.ids for row in rows])
        mask = torch.tensor([row.attention_mask for row in rows])
        return ids, mask
    return tokenize


# ------------------------------------------------------------------------------------------ loading

def load_clip(model, file, dtype, device, tag=None, tokenize=None, how=None, half=round):
    """open_clip's `model` with the weights of `file`, or of its pre-training `tag` -> ClipReward.

    tokenize, how: instead of the model's own tokenizer and its way to resize, see fit()."""
    config = open_clip.get_model_config(model)
    tags = open_clip.list_pretrained_tags_by_model(model)
    require(config is not None,
            f"clip:{model}: open_clip knows no such model; see open_clip.list_models()")
    require(tag in tags if tag else file,
            f"clip:{model}:{tag or ''}: names no weights; "
            f"open_clip has {', '.join(tags) or 'none'} for this model, "
            f"and clip:{model}=FILE takes a file")
    trained = open_clip.get_pretrained_cfg(model, tag) if tag else {}
    config["quick_gelu"] = config.get("quick_gelu", False) or trained.get("quick_gelu", False)
    custom = config.pop("custom_text", False) or "hf_model_name" in config["text_cfg"]
    if "hf_model_name" in config["text_cfg"]:
        config["text_cfg"]["hf_model_pretrained"] = False
    if "multimodal_cfg" in config:
        kind = open_clip.CoCa
    elif custom:
        kind = open_clip.CustomTextCLIP
    else:
        kind = open_clip.CLIP
    try:
        file = file or open_clip.download_pretrained(trained)
        tokenize = tokenize or open_clip.get_tokenizer(model)
        with parameters_on_meta():
            clip = kind(**config)
    except Exception as error:
        spec = f"clip:{model}:{tag}" if tag else f"clip:{model}"
        raise InputError(
            f"{spec}: could not be fetched from the hub and is not in its cache "
            f"({first_line(error)}); "
            f"give the weights of {trained.get('hf_hub', model).strip('/')}, "
            f"as {spec}=/path/to/file"
        ) from None
    # these are buffers, which some versions saved
    component = open_clip_weights(file, ignored=r"position_ids$|attn_mask$")
    load_strictly(clip, component, dtype=dtype, device=device)
    return ClipReward(clip, tokenize, how or trained.get("resize_mode", "shortest"), half,
                      trained.get("mean", MEAN), trained.get("std", STD))


def load_hpsv2(name, option, path, dtype, device):
    return load_clip(VIT_H, find_weights(name, path), dtype, device, how="longest")


def load_pickscore(name, option, path, dtype, device):
    # trained and published with transformers: its words, its crop
    return load_clip(VIT_H, find_weights(name, path), dtype, device,
                     tokenize=built_in("sd1"), half=math.floor)


def load_any_clip(name, option, path, dtype, device):
    if not option:
        option = VIT_H if path else f"{VIT_H}:laion2b_s32b_b79k"
    model, _, tag = option.partition(":")
    return load_clip(model, path, dtype, device, tag or None)


def load_aesthetic(name, option, path, dtype, device):
    head_path, _, clip_path = (path or "").partition(",")
    component = open_weights(find_weights(name, head_path))
    clip = load_clip(VIT_L, clip_path or None, dtype, device, tag=None if clip_path else "openai")
    layers = Head.MLP
    if "weight" in component.tensors.shapes:  # LAION's linear head: one layer, saved by itself
        layers = {0: 1}
        component.source = lambda key: (key.removeprefix("layers.0."), None)
    with parameters_on_meta():
        head = Head(clip.clip.visual.output_dim, layers)
    load_strictly(head, component, dtype=at_least_float32(dtype), device=device)
    return AestheticReward(clip, head)


def load_imagereward(name, option, path, dtype, device):
    with parameters_on_meta():
        reward = ImageReward(bert_tokenizer(ImageReward.LENGTH))
    # the two projections are left over from BLIP's pre-training
    component = open_weights(find_weights(name, path),
                             ignored=r"^blip\.(vision|text)_proj\.|position_ids$")
    load_strictly(reward, component, dtype=at_least_float32(dtype), device=device)
    reward.blip.to(dtype=dtype)
    return reward


def load_pocket(name, option, path, dtype, device):
    return PocketReward.from_pretrained(path or POCKET_REWARD).to(device=device, dtype=dtype)


def load_jpeg(name, option, path, dtype, device):
    return BlackBox(jpeg_kilobytes)


def load_function(name, option, path, dtype, device):
    require(option, f"names no function; expected {name}:module.function")
    module, _, attribute = option.rpartition(".")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except Exception as error:
        raise InputError(f"cannot be imported ({first_line(error)}); "
                         "expected module.function on Python's path") from None
    require(callable(function),
            f"{option} is {type(function).__name__}, not callable; "
            "expected function(images, prompts) -> scores")
    return Function(function) if name == "torch" else BlackBox(function)


# A reward's name in a spec -> loader(name, option, path, dtype, device) -> Reward, where the spec
# is name:option=path. A new one is a function above and a row here; where its published weights
# lie stands in support/reward_weights.py.
REWARDS = {
    "hpsv2.1": load_hpsv2,
    "hpsv2": load_hpsv2,
    "pickscore": load_pickscore,
    "imagereward": load_imagereward,
    "aesthetic": load_aesthetic,
    "clip": load_any_clip,
    "pocket": load_pocket,
    "jpeg": load_jpeg,
    "torch": load_function,
    "python": load_function,
}
TAKE_OPTION = {"clip", "torch", "python"}
RESIZE = {"hpsv2.1", "hpsv2", "pickscore", "imagereward", "pocket"}
TAKE_NO_FILE = {"jpeg", "torch", "python"}


def load_part(name, option, path, dtype, device):
    """One part of a sum, as parse_spec() gives it -> Reward."""
    aliased = option == "aliased" and name in RESIZE
    option = None if aliased else option
    require(not option or name in TAKE_OPTION, f":{option} means nothing to {name}")
    require(not path or name not in TAKE_NO_FILE, f"={path} means nothing to {name}")
    reward = REWARDS[name](name, option, path, dtype, device)
    reward.antialias = not aliased
    return reward


def parse_spec(spec):
    """A spec such as "hpsv2.1=FILE*1.0+jpeg" -> [(name, option, path, factor), ...].

    A + divides only where a known name follows, because file names have it too."""
    names = "|".join(map(re.escape, REWARDS))
    parts = []
    for part in re.split(rf"\+(?=(?:{names})(?:[:=*+]|$))", spec):
        text, _, factor = part.rpartition("*") if "*" in part else (part, "", "1")
        fields = re.fullmatch(r"([^:=]*)(?::([^=]*))?(?:=(.*))?", text, re.DOTALL)
        name, option, path = fields.groups()
        require(name in REWARDS,
                f"reward {spec}: {name or 'nothing'} is not a reward; "
                f"expected none, or {', '.join(REWARDS)}, "
                "or a sum of them such as hpsv2.1*1.0+imagereward*0.1")
        try:
            factor = float(factor)
        except ValueError:
            factor = math.nan
        require(math.isfinite(factor),
                f"reward {spec}: the weight of {name} is not a number; expected {name}*NUMBER")
        parts.append((name, option, path, factor))
    return parts


def load_reward(spec, device=None, dtype=None, grad_checkpoint=False, resolution=None):
    """spec: see the top of this file -> Reward, frozen, in eval mode, differentiable with respect
    to the images.

    dtype (float32 if None) is that of the networks' weights. Resizing, features' cosine, heads and
    scores stay in float32.
    grad_checkpoint: recompute the image tower's activations in the backward pass: less memory,
    more time.
    resolution: pictures are brought to this side, antialiased, before a reward reads them.
    A missing file is fetched from the hub. Without one, InputError names the file, its size and
    its sha256 where known.

    Scores are cosines for the CLIPs. PickScore's own paper prints 100 times that (its logit
    scale): pickscore*100. HPSv2's package resizes a tensor with whatever torchvision is installed,
    before 0.17 without antialiasing. Ours is antialiased, as there since. So for pictures larger
    than 224 it equals the package on a current torchvision; hpsv2.1:aliased, the numbers printed
    before."""
    rewards, factors, given = [], [], []
    for name, option, path, factor in parse_spec(spec):
        title = name + (f":{option}" if option else "")
        try:
            reward = load_part(name, option, path, dtype, device)
        except InputError as error:
            raise InputError(f"reward {title}: {error}") from None
        require((title, path) not in given,
                f"reward {spec}: {title} stands there twice; "
                "give it once, with the sum of the weights")
        given.append((title, path))
        count = [one for one, _ in given].count(title)  # of another file
        reward.name, reward.resolution = title + (f"-{count}" if count > 1 else ""), resolution
        rewards.append(reward)
        factors.append(factor)
    reward = rewards[0] if factors == [1.0] else Mixture(rewards, factors)
    if grad_checkpoint:
        recompute_activations(reward)
    return reward.to(device=device).eval().requires_grad_(False)


def recompute_activations(reward):
    """Have the image towers recompute their activations in the backward pass."""
    for module in reward.modules():
        if hasattr(module, "grad_checkpointing"):  # the blocks of open_clip and timm
            module.grad_checkpointing = True


# -------------------------------------------------------------------------------------- the command

def read_picture(file):
    """A picture file -> [1,3,H,W] in [0,1], as people see it. Most published rewards' own code
    does otherwise with some files: see support/pictures.py."""
    try:
        picture = decode(Path(file).read_bytes())
    except Exception as error:
        raise InputError(f"{file}: not a readable picture ({first_line(error)})") from None
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    what = parser.add_argument_group("what to score")
    what.add_argument("images", nargs="+", metavar="IMAGE", help="picture files")
    what.add_argument("--reward", default="pocket",
                      help="reward model, see above (default: pocket)")
    what.add_argument("--prompt", action="append", required=True,
                      help="one for all pictures, or repeated, one a picture")
    machine = parser.add_argument_group("the machine")
    machine.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    machine.add_argument("--precision", default="fp32", choices=("auto", "bf16", "fp32"),
                         help="arithmetic of the networks (default: fp32)")
    args = parser.parse_intermixed_args()
    require(len(args.prompt) in (1, len(args.images)),
            f"{len(args.images)} images for {len(args.prompt)} prompts; "
            "give one, or one an image")
    device = pick_device(args.device)
    reward = load_reward(args.reward, device)
    several = isinstance(reward, Mixture)
    if several:
        print("\t".join(("sum", *reward.weights, "image")))
    prompts = args.prompt * len(args.images) if len(args.prompt) == 1 else args.prompt
    for file, prompt in zip(args.images, prompts):
        with autocast(device, pick_precision(args.precision, device)):
            parts = reward.parts(read_picture(file).to(device), [prompt])
        scores = {name: part.item() for name, part in parts.items()}
        total = sum(reward.weights[name] * score for name, score in scores.items())
        shown = (total, *scores.values()) if several else (total,)
        print("\t".join([*(f"{score:.4f}" for score in shown), str(file)]))


if __name__ == "__main__":
    run(main)
