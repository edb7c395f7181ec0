"""The published reward models, at reduced size with random weights, against second writings of
them; marked slow: at true size."""
import gzip
import hashlib
import itertools
import json
import math
import re
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import (
    BertTokenizer,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
)

import reward as rewards
from conftest import ROOT, agree, call, rand, randomize
from data import Shards
from pipeline import grid
from reward import load_reward
from support import single_file
from support.reward_weights import AsOpenClip, parameters_on_meta
from support.tokenizer import write_tokenizer
from support.weights import InputError

DATA = Path(__file__).parent / "data"
TINY = {
    "embed_dim": 16,
    "vision_cfg": {
        "image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {
        "context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}}
VISION = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
TEXT = {
    "vocab_size": 30524, "hidden_size": 32, "encoder_hidden_size": 48, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 48,
    "layer_norm_eps": 1e-12, "hidden_act": "gelu"}
PROMPTS = ["a red apple", "", "Two cats, café & 3 [DEC]s"]
FAMILIES = ["hpsv2.1", "pickscore", "imagereward", "clip:tiny", "aesthetic"]
SIZES = [(32, 32), (64, 40), (20, 51), (90, 97), (35, 32), (32, 131)]


def bicubic(images, *size):
    """The reference resize: Pillow's, which works on float pictures too, channel by channel."""
    planes = [
        Image.fromarray(plane.numpy()).resize(size[::-1], Image.Resampling.BICUBIC)
        for plane in images.flatten(0, 1)]
    pixels = torch.stack([TF.pil_to_tensor(plane)[0] for plane in planes])
    return pixels.unflatten(0, images.shape[:2])


def pictures(height=48, width=40, seed=0):
    coarse = torch.rand(3, 3, 9, 9, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, (height, width), mode="bilinear")


def normalized(images):
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return TF.normalize(images, mean, std)


# ---------------------------------------------------------------------------- the files, made small

def clip_state(seed=0):
    torch.manual_seed(seed)
    return randomize(open_clip.CLIP(**TINY), seed).state_dict()


def imagereward_state(seed=0):
    """Random tensors under the keys of the published file, not our module's."""
    width = VISION["embed_dim"]
    shrink = {1024: width, 3072: 3 * width, 4096: 4 * width, 197: 17, 16: 8, 224: 32}
    state = {}
    for i, (key, shape) in enumerate(published("imagereward", optional=True).items()):
        if re.search(r"\.(blocks|layer)\.([2-9]|1\d|2\d)\.", key):
            continue
        if "text_encoder" in key:
            shape = [{768: 32, 1024: 48, 3072: 64, 512: 48}.get(n, n) for n in shape]
        elif key.startswith("mlp"):
            shape = [32 if n == 768 else n for n in shape]
        else:
            shape = [shrink.get(n, n) for n in shape]
        is_norm = (
            key.endswith("norm.weight") or "Norm.weight" in key
            or re.search(r"norm\d\.weight", key))
        if "position_ids" in key:
            state[key] = torch.arange(shape[1])[None]
        else:
            mean = 1.0 if is_norm else 0.0
            state[key] = mean + 0.2 * rand(*shape, seed=1000 * seed + i)
    return state


def mlp(width=16):
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Linear(width, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2),
        nn.Linear(128, 64), nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1))
    return nn.ModuleDict({"layers": layers}).eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    (folder / "tiny.json").write_text(json.dumps(TINY))
    (folder / "tiny-quickgelu.json").write_text(json.dumps(TINY | {"quick_gelu": True}))
    open_clip.add_model_config(folder)
    state = clip_state()
    torch.save({"epoch": 3, "state_dict": state}, folder / "HPS_v2.1_compressed.pt")
    torch.save(state, folder / "clip.pt")
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "clip.safetensors")
    save_file(clip_model().state_dict(), folder / "pickscore.safetensors")
    torch.save(imagereward_state(), folder / "ImageReward.pt")
    torch.save(mlp().state_dict(), folder / "sac+logos+ava1-l14-linearMSE.pth")
    torch.save(nn.Linear(16, 1).state_dict(), folder / "linear.pth")
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch, files):
    monkeypatch.setattr(rewards, "VIT_H", "tiny")
    monkeypatch.setattr(rewards, "VIT_L", "tiny-quickgelu")
    monkeypatch.setattr(rewards.ImageReward, "VISION", VISION)
    monkeypatch.setattr(rewards.ImageReward, "TEXT", TEXT)


def spec(name, files):
    return {
        "hpsv2.1": f"hpsv2.1={files}/HPS_v2.1_compressed.pt",
        "pickscore": f"pickscore={files}/pickscore.safetensors",
        "imagereward": f"imagereward={files}/ImageReward.pt",
        "clip:tiny": f"clip:tiny={files}/clip.safetensors",
        "aesthetic": f"aesthetic={files}/sac+logos+ava1-l14-linearMSE.pth,{files}/clip.pt"}[name]


def clip_model(seed=0):
    text, vision = TINY["text_cfg"], TINY["vision_cfg"]
    both = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": "gelu"}
    config = CLIPConfig(
        projection_dim=TINY["embed_dim"],
        text_config=both | {
            "hidden_size": text["width"], "intermediate_size": 4 * text["width"],
            "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407},
        vision_config=both | {
            "hidden_size": vision["width"], "intermediate_size": 4 * vision["width"],
            "patch_size": 8, "image_size": 32})
    torch.manual_seed(seed)
    return randomize(CLIPModel(config), seed).eval()


# ------------------------------------------------------------------------------------------- scores

@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.no_grad()
def test_hpsv2_equals_open_clip_behind_the_published_preprocessing(size, files):
    clip = open_clip.CLIP(**TINY).eval()
    clip.load_state_dict(clip_state())
    images = pictures(*size)
    new = [round(side * 32 / max(size)) for side in size]
    canvas = torch.zeros(3, 3, 32, 32)
    top, left = (32 - new[0]) // 2, (32 - new[1]) // 2
    resized = bicubic(images, *new) if new != list(size) else images
    canvas[:, :, top:top + new[0], left:left + new[1]] = resized
    image = clip.encode_image(normalized(canvas))
    text = clip.encode_text(open_clip.get_tokenizer("ViT-H-14")(PROMPTS))
    scores = load_reward(spec("hpsv2.1", files))(images, PROMPTS)
    agree(scores, F.cosine_similarity(image, text), 2e-5)
    assert scores.dtype == torch.float32 and scores.shape == (3,)


@pytest.mark.parametrize("size", [(32, 32), (32, 35), (47, 32), (300, 180), (29, 40)], ids=str)
@torch.no_grad()
def test_pickscore_equals_transformers_on_png_files(size, files, tmp_path):
    shards = Shards(ROOT / "pocket/data/heldout-000.tar", 64)
    sheet = grid(torch.stack([shards[i][0] for i in range(60)]) / 2 + 0.5, 12)
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for i, path in enumerate(paths):
        sheet.crop((7 + 60 * i, 5, 7 + 60 * i + size[1], 5 + size[0])).save(path)
    write_tokenizer(tmp_path, "sd1")
    pixels = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = CLIPProcessor(pixels, CLIPTokenizer.from_pretrained(tmp_path))
    inputs = processor(
        text=PROMPTS, images=[Image.open(p) for p in paths], padding="max_length",
        truncation=True, max_length=77, return_tensors="pt")
    theirs = clip_model()(**inputs)
    score = load_reward(spec("pickscore", files))
    images = torch.cat([rewards.read_picture(path) for path in paths])
    # where there is something to resize, transformers rounds and clips the pixels to 8 bits, after
    # each of two passes
    cosines = (theirs.image_embeds * theirs.text_embeds).sum(dim=-1)
    agree(score(images, PROMPTS), cosines, 1e-5 if 32 in size else 2e-2)
    difference = (score.preprocess(images) - inputs.pixel_values).abs()
    assert difference.max() < (1e-5 if 32 in size else 0.15)
    assert difference.mean() < 0.5 / 255 / 0.26


def attention(x, context, state, prefix, heads, mask=0.0):
    def project(name, source):
        weight, bias = state[f"{prefix}.self.{name}.weight"], state[f"{prefix}.self.{name}.bias"]
        return F.linear(source, weight, bias).unflatten(-1, (heads, -1)).transpose(1, 2)

    q, k, v = project("query", x), project("key", context), project("value", context)
    shares = (q @ k.mT / math.sqrt(q.shape[-1]) + mask).softmax(dim=-1)
    out = (shares @ v).transpose(1, 2).flatten(2)
    return residual(out, x, state, f"{prefix}.output")


def residual(out, x, state, prefix):
    x = x + F.linear(out, state[f"{prefix}.dense.weight"], state[f"{prefix}.dense.bias"])
    norm = f"{prefix}.LayerNorm"
    return F.layer_norm(x, x.shape[-1:], state[f"{norm}.weight"], state[f"{norm}.bias"], 1e-12)


def imagereward_again(state, images, ids, mask, sizes=VISION, heads=2):
    """ImageReward, written a second time, from the BLIP paper and the keys: transformers' vision
    tower, plain tensors for the rest."""
    config = BlipVisionConfig(
        hidden_size=sizes["embed_dim"], intermediate_size=4 * sizes["embed_dim"],
        num_hidden_layers=sizes["depth"], num_attention_heads=sizes["num_heads"],
        image_size=sizes["img_size"], patch_size=sizes["patch_size"],
        hidden_act="gelu", layer_norm_eps=1e-6)
    vision = BlipVisionModel(config).eval()
    names = {
        "cls_token": "embeddings.class_embedding",
        "pos_embed": "embeddings.position_embedding",
        "patch_embed.proj": "embeddings.patch_embedding",
        "blocks": "encoder.layers",
        "norm": "post_layernorm",
        "norm1": "layer_norm1",
        "norm2": "layer_norm2",
        "attn": "self_attn",
        "self_attn.proj": "self_attn.projection"}
    prefix = "blip.visual_encoder."
    tower = {
        single_file.replace_all(k.removeprefix(prefix), names): v
        for k, v in state.items() if k.startswith(prefix)}
    vision.load_state_dict(tower, strict=True)
    patches = vision(pixel_values=images).last_hidden_state
    text = {k.removeprefix("blip.text_encoder."): v for k, v in state.items()}
    places = text["embeddings.position_embeddings.weight"][:ids.shape[1]]
    x = text["embeddings.word_embeddings.weight"][ids] + places
    norm = "embeddings.LayerNorm"
    x = F.layer_norm(x, x.shape[-1:], text[f"{norm}.weight"], text[f"{norm}.bias"], 1e-12)
    hidden = torch.where(mask[:, None, None, :] == 1, 0.0, -math.inf)
    for layer in range(len({k for k in text if k.endswith("crossattention.self.query.weight")})):
        layer = f"encoder.layer.{layer}"
        x = attention(x, x, text, f"{layer}.attention", heads, hidden)
        x = attention(x, patches, text, f"{layer}.crossattention", heads)
        dense = f"{layer}.intermediate.dense"
        inner = F.gelu(F.linear(x, text[f"{dense}.weight"], text[f"{dense}.bias"]))
        x = residual(inner, x, text, f"{layer}.output")
    x = x[:, 0]
    for i in (0, 2, 4, 6, 7):
        x = F.linear(x, state[f"mlp.layers.{i}.weight"], state[f"mlp.layers.{i}.bias"])
    return (x[:, 0] - 0.16717362830052426) / 1.0333394966054072


def bert_words(tmp_path):
    file = tmp_path / "vocab.txt"
    file.write_bytes(gzip.decompress((ROOT / "support" / "bert_vocab.txt.gz").read_bytes()))
    return file


def bert_ids(tmp_path, prompts):
    tokenizer = BertTokenizer(str(bert_words(tmp_path)))
    tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
    rows = tokenizer(
        prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    return rows.input_ids, rows.attention_mask


@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.no_grad()
def test_imagereward_equals_a_second_writing(size, files, tmp_path):
    images, short = pictures(*size), min(size)
    new = [32 if side == short else int(side * 32 / short) for side in size]
    resized = bicubic(images, *new).clamp(0, 1) if new != list(size) else images
    cropped = normalized(TF.center_crop(resized, 32))
    theirs = imagereward_again(imagereward_state(), cropped, *bert_ids(tmp_path, PROMPTS))
    agree(load_reward(spec("imagereward", files))(images, PROMPTS), theirs, 2e-5)


def test_the_vocabulary_is_berts_and_its_words_are_transformers(tmp_path):
    assert hashlib.sha256(bert_words(tmp_path).read_bytes()).hexdigest() == (
        "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3")
    prompts = [
        *PROMPTS, "Ünïcode 東京 e=mc² [ENC][DEC][SEP]", "x " * 100, "a" * 300, "\t\n",
        "it's   'quoted'--twice!?"]
    ours, theirs = rewards.bert_tokenizer(35)(prompts), bert_ids(tmp_path, prompts)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


@pytest.mark.parametrize("head", ["sac+logos+ava1-l14-linearMSE.pth", "linear.pth"])
@torch.no_grad()
def test_aesthetic_heads_equal_their_published_form(head, files):
    clip = open_clip.CLIP(**TINY, quick_gelu=True).eval()
    clip.load_state_dict(clip_state())
    images = pictures(32, 32)
    features = F.normalize(clip.encode_image(normalized(images)), dim=-1)
    state = torch.load(files / head, weights_only=True)
    module = mlp() if len(state) > 2 else nn.Linear(16, 1)
    module.load_state_dict(state)
    theirs = (module["layers"] if len(state) > 2 else module)(features)[:, 0]
    ours = load_reward(f"aesthetic={files / head},{files}/clip.safetensors")
    agree(ours(images, PROMPTS), theirs, 1e-5)


@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.no_grad()
def test_clip_equals_open_clip(size, files):
    clip = open_clip.CLIP(**TINY).eval()
    clip.load_state_dict(clip_state())
    images = pictures(*size)
    resized = TF.resize(images, 32, TF.InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
    image = clip.encode_image(normalized(TF.center_crop(resized, 32)))
    text = clip.encode_text(open_clip.get_tokenizer("ViT-H-14")(PROMPTS))
    scores = load_reward(spec("clip:tiny", files))(images, PROMPTS)
    agree(scores, F.cosine_similarity(image, text), 2e-5)


@torch.no_grad()
def test_a_tag_brings_its_own_preprocessing_and_activation(files, monkeypatch):
    tag = {
        "hf_hub": "some/where/", "mean": (0.5,) * 3, "std": (0.5,) * 3, "resize_mode": "squash",
        "quick_gelu": True}
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda model, name: tag)
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda model: ["mine"])
    monkeypatch.setattr(open_clip, "download_pretrained", lambda config: str(files / "clip.pt"))
    clip = open_clip.CLIP(**TINY, quick_gelu=True).eval()
    clip.load_state_dict(clip_state())
    images = pictures(32, 32)
    reward = load_reward("clip:tiny:mine")
    theirs = F.normalize(clip.encode_image(images * 2 - 1), dim=-1)
    agree(reward.image_features(images), theirs, 1e-5)
    squashed = bicubic(pictures(50, 20), 32, 32).clamp(0, 1)
    agree(reward.image_features(pictures(50, 20)), reward.image_features(squashed), 1e-3)
    assert reward.name == "clip:tiny:mine"
    from_file = load_reward(f"clip:tiny:mine={files}/clip.safetensors")
    agree(from_file.image_features(pictures(50, 20)), reward.image_features(pictures(50, 20)), 1e-6)


@torch.no_grad()
def test_both_layouts_of_a_clip_give_the_same_score(files):
    ours, theirs = load_reward(f"clip:tiny={files}/pickscore.safetensors"), clip_model()
    images = pictures(32, 32)
    features = theirs.get_image_features(pixel_values=normalized(images))
    features = getattr(features, "pooler_output", features)
    agree(ours.image_features(images), F.normalize(features, dim=-1), 1e-5)


@torch.no_grad()
def test_pickle_safetensors_and_folder_give_the_same_score(files, tmp_path):
    images = pictures()
    one = load_reward(spec("hpsv2.1", files))(images, PROMPTS)
    assert torch.equal(load_reward(f"hpsv2.1={files}/clip.safetensors")(images, PROMPTS), one)
    assert torch.equal(load_reward(f"hpsv2.1={files}")(images, PROMPTS), one)
    old = {f"module.{k}": v for k, v in clip_state().items()}
    torch.save(old, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(load_reward(f"hpsv2.1={tmp_path}/old.pt")(images, PROMPTS), one)


# ---------------------------------------------------------------------- gradients, precision, speed

@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_to_the_image_equals_finite_differences(name, files):
    reward = load_reward(spec(name, files), dtype=torch.float64)
    text, h = reward.encode(PROMPTS), 1e-5
    images = pictures(45, 40).double().mul(0.8).add(0.1).requires_grad_()
    direction = rand(3, 3, 45, 40, seed=1).double()
    reward.score(images, text).sum().backward()
    with torch.no_grad():
        above = reward.score(images + h * direction, text).sum()
        below = reward.score(images - h * direction, text).sum()
        slope = (above - below) / (2 * h)
    assert abs(slope) > 1e-6
    assert (images.grad * direction).sum().item() == pytest.approx(slope.item(), rel=1e-4)
    again = images.detach().requires_grad_()
    reward(again, PROMPTS).sum().backward()
    agree(again.grad, images.grad, 1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_are_frozen_and_text_makes_no_graph(name, files):
    reward = load_reward(spec(name, files))
    images = pictures().requires_grad_()
    reward(images, PROMPTS).sum().backward()
    assert images.grad.abs().max() > 0
    assert not any(m.training for m in reward.modules())
    assert not any(p.requires_grad or p.grad is not None for p in reward.parameters())
    for p in reward.requires_grad_(True).parameters():
        p.grad = None
    reward(images, PROMPTS).sum().backward()
    words = [p.grad for k, p in reward.named_parameters() if k == "clip.token_embedding.weight"]
    assert words == [None] * ("clip" in dir(reward))
    assert sum(p.grad is not None for p in reward.parameters()) > 20


@pytest.mark.parametrize("name", FAMILIES)
def test_bf16_weights_or_autocast_give_float32_scores_near_the_exact_ones(name, files):
    images, exact = pictures(), load_reward(spec(name, files))
    half = load_reward(spec(name, files), dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        cast = exact(images, PROMPTS)
    for scores in (half(images.bfloat16(), PROMPTS), cast):
        assert scores.dtype == torch.float32
        agree(scores, exact(images, PROMPTS), 0.05, floor=0.2)
    heads = [p for k, p in half.named_parameters() if k.startswith(("mlp.", "head."))]
    others = set(half.parameters()) - set(heads)
    assert all(p.dtype == torch.float32 for p in heads)
    assert all(p.dtype == torch.bfloat16 for p in others)


@pytest.mark.parametrize("layers", [{0: 1}, {0: 1024, 2: 128, 4: 64, 6: 16, 7: 1}], ids=len)
@torch.no_grad()
def test_heads_compute_in_float32_under_autocast(layers):
    head, features = rewards.Head(16, layers), rand(5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        cast = head(features)
    assert torch.equal(cast, head(features))


@pytest.mark.parametrize("name", FAMILIES)
def test_checkpointing_recomputes_the_blocks_and_changes_no_gradient(name, files):
    gradients, calls = [], []
    for grad_checkpoint in (False, True):
        reward = load_reward(spec(name, files), grad_checkpoint=grad_checkpoint)
        blocks = [
            m for k, m in reward.named_modules()
            if re.search(r"visual.*(resblocks|blocks)\.\d+$", k)]
        assert len(blocks) == 2
        count = []
        for block in blocks:
            block.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        images = pictures().requires_grad_()
        reward(images, PROMPTS).sum().backward()
        gradients.append(images.grad)
        calls.append(len(count))
    agree(gradients[1], gradients[0], 1e-5)
    assert calls == [2, 4]


# of each class one: compiling takes seconds
@pytest.mark.parametrize("name", ["hpsv2.1", "imagereward", "aesthetic"])
def test_compiles_in_one_graph(name, files):
    reward, results = load_reward(spec(name, files)), []
    for compiled in (False, True):
        if compiled:
            reward.compile(fullgraph=True, backend="aot_eager")
        images = pictures().requires_grad_()
        scores = reward(images, PROMPTS)
        scores.sum().backward()
        results += [(scores.detach(), images.grad)]
    agree(results[1][0], results[0][0], 1e-5)
    agree(results[1][1], results[0][1], 1e-4)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (200, 3)], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_any_size_and_aspect(name, size, files):
    images = torch.rand(1, 3, *size).requires_grad_()
    score = load_reward(spec(name, files))(images, ["a fish"])
    score.sum().backward()
    assert score.isfinite().all() and images.grad.isfinite().all()


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_long_prompt_is_cut_where_the_model_cuts_it(name, files):
    reward, words = load_reward(spec(name, files)), ["fish"] * 1000
    kept = 33 if name == "imagereward" else 75
    images = pictures()[:1]
    long = reward(images, [" ".join(words)])
    assert torch.equal(long, reward(images, [" ".join(words[:kept])]))
    shorter = [" ".join(words[:kept - 1])]
    assert name == "aesthetic" or not torch.equal(long, reward(images, shorter))


# ------------------------------------------------------------------------- mixtures and black boxes

@torch.no_grad()
def test_a_mixture_is_the_weighted_sum_of_its_parts(files):
    images, names = pictures(), ["hpsv2.1", "aesthetic", "imagereward"]
    one, two, three = (spec(name, files) for name in names)
    mixture = load_reward(f"{one}*2+{two}+{three}*-0.5")
    parts = mixture.parts(images, PROMPTS)
    assert list(parts) == names
    assert mixture.weights == dict(zip(names, (2.0, 1.0, -0.5))) and mixture.differentiable
    for name in names:
        assert torch.equal(parts[name], load_reward(spec(name, files))(images, PROMPTS))
    total = 2 * parts[names[0]] + parts[names[1]] - 0.5 * parts[names[2]]
    agree(mixture(images, PROMPTS), total, 1e-6)
    single = load_reward(spec("hpsv2.1", files))
    assert single.weights == {"hpsv2.1": 1.0} and list(single.parts(images, PROMPTS)) == ["hpsv2.1"]


def test_jpeg_is_minus_the_kilobytes(tmp_path):
    images = torch.stack([torch.full((3, 40, 48), 0.5), torch.rand(3, 40, 48)])
    TF.to_pil_image((images[1] * 255).round().byte()).save(tmp_path / "noise.jpg", quality=95)
    smooth, noise = load_reward("jpeg")(images, ["", ""]).tolist()
    size = (tmp_path / "noise.jpg").stat().st_size
    assert noise == pytest.approx(-size / 1000) and smooth > noise


def brightness(images, prompts):
    assert images.dtype == torch.uint8 and images.device.type == "cpu" and isinstance(prompts, list)
    return images.float().mean(dim=(1, 2, 3)) / 255


def test_any_function_can_be_the_reward():
    reward = load_reward(f"python:{__name__}.brightness")
    agree(reward(pictures(), PROMPTS), pictures().mean(dim=(1, 2, 3)), 1e-2)
    assert not reward.differentiable
    assert not load_reward(f"jpeg+python:{__name__}.brightness*3").differentiable


def saturation(images, prompts):
    """Differentiable: the spread of the three colours of a pixel."""
    return images.std(dim=1).mean(dim=(1, 2))


def test_two_files_of_one_kind_make_an_ensemble(model_folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(model_folder, other)
    spec = f"pocket={model_folder}*0.5+pocket={other}*0.5"
    images, prompts = torch.rand(2, 3, 32, 32), ["a red apple", "rocket"]
    both, one = load_reward(spec, "cpu"), load_reward(f"pocket={model_folder}", "cpu")
    agree(both(images, prompts), one(images, prompts), 1e-6)
    assert [*both.parts(images, prompts)] == ["pocket", "pocket-2"]
    with pytest.raises(InputError, match="stands there twice"):
        load_reward(f"pocket={other}+pocket={other}", "cpu")


def test_ones_own_differentiable_function_can_be_the_reward_alone_and_in_sums():
    own, images = f"torch:{__name__}.saturation", pictures().requires_grad_()
    reward = load_reward(own)
    assert reward.differentiable
    reward(images, PROMPTS).sum().backward()
    expected, = torch.autograd.grad(saturation(images, PROMPTS).sum(), images)
    assert expected.any() and torch.equal(images.grad, expected)

    both = load_reward(f"pocket+{own}*3")
    assert both.differentiable and both.weights == {"pocket": 1.0, own: 3.0}
    parts = both.parts(images, PROMPTS)
    agree(parts[own], saturation(images, PROMPTS))
    agree(both(images, PROMPTS), parts["pocket"] + 3 * parts[own])
    score = reward.score
    reward.compile()  # leaves it as it is: not every function compiles
    assert reward.score == score


def a_number(images, prompts):
    return images.mean()


def without_gradient(images, prompts):
    return images.detach().mean(dim=(1, 2, 3))


def test_a_function_that_is_to_be_differentiated_must_give_scores_with_a_gradient():
    with pytest.raises(InputError, match=r"a_number: gave \(\); expected a tensor \[3\]"):
        load_reward(f"torch:{__name__}.a_number")(pictures(), PROMPTS)
    with pytest.raises(InputError, match=r"no_scores: gave \('NoneType',\)"):
        load_reward(f"torch:{__name__}.no_scores")(pictures(), PROMPTS)
    reward = load_reward(f"torch:{__name__}.without_gradient")
    with pytest.raises(InputError, match="no gradient to the images.*python:"):
        reward(pictures().requires_grad_(), PROMPTS)
    assert reward(pictures(), PROMPTS).shape == (3,)  # to score is possible
    line = raises.__code__.co_firstlineno + 1
    with pytest.raises(InputError, match=rf"raised KeyError: .*line {line}\); it was given images"):
        load_reward(f"torch:{__name__}.raises")(pictures(), PROMPTS)


def test_the_head_of_the_file_which_is_its_help_names_every_reward():
    for name in rewards.REWARDS:
        assert name in rewards.__doc__, name


def test_a_black_box_refuses_to_be_differentiated(files):
    for name in ("jpeg", f"{spec('hpsv2.1', files)}+jpeg*0.1"):
        reward = load_reward(name)
        with pytest.raises(InputError, match="jpeg: a black box.*--latent-rm"):
            reward(pictures().requires_grad_(), PROMPTS)
        with torch.no_grad():
            assert reward(pictures().requires_grad_(), PROMPTS).shape == (3,)


# --------------------------------------------------------------------------------------------- keys

def published(section, optional=False):
    """{key: shape} of a section of data/reward_keys.txt."""
    keys = {}
    text = (DATA / "reward_keys.txt").read_text().split(f"\n[{section}]")[-1].split("\n\n")[0]
    for line in text.splitlines()[1:]:
        if line.startswith("? ") and not optional:
            continue
        pattern, *shape = line.removeprefix("? ").split()
        pieces = re.split(r"\{(.*?)\}", pattern)
        for i in range(1, len(pieces), 2):
            first, dots, last = pieces[i].partition("..")
            pieces[i] = list(range(int(first), int(last) + 1)) if dots else pieces[i].split(",")
        choices = (piece if isinstance(piece, list) else [piece] for piece in pieces)
        for choice in itertools.product(*choices):
            keys["".join(map(str, choice))] = tuple(map(int, shape))
    return keys


def shapes(module):
    return {k: tuple(v.shape) for k, v in module.state_dict().items()}


class Listed:
    """A file of which only the keys are known."""
    where = "list"

    def __init__(self, keys):
        self.shapes, self.dtypes = keys, {}


def vit_h():
    text, vision = (
        {"hidden_size": n, "intermediate_size": 4 * n, "num_hidden_layers": layers,
         "num_attention_heads": 16, "hidden_act": "gelu"}
        for n, layers in ((1024, 24), (1280, 32)))
    vision |= {"patch_size": 14, "image_size": 224}
    return CLIPConfig(projection_dim=1024, text_config=text, vision_config=vision)


def test_keys_and_shapes_are_those_of_the_published_files(monkeypatch):
    monkeypatch.undo()
    with parameters_on_meta():
        clip = open_clip.CLIP(**open_clip.get_model_config(rewards.VIT_H))
        theirs = CLIPModel(vit_h())
        image_reward = rewards.ImageReward(None)
    assert shapes(clip) == published("hpsv2")
    assert shapes(theirs) == published("pickscore")
    assert AsOpenClip(Listed(published("pickscore"))).shapes == published("hpsv2")
    assert shapes(image_reward) == published("imagereward")
    assert shapes(rewards.Head(768)) == published("aesthetic-mlp")
    head = shapes(rewards.Head(768, {0: 1}))
    linear = {k.removeprefix("layers.0."): v for k, v in head.items()}
    assert linear == published("aesthetic-linear")
    assert open_clip.get_model_config(rewards.VIT_L)["embed_dim"] == 768


def test_the_lists_make_files_of_the_published_size():
    def count(section, optional=False):
        return sum(math.prod(shape) for shape in published(section, optional).values())

    # 500 bytes: a name, a place, a checksum for every tensor
    assert 0 < 1_972_490_005 - 2 * count("hpsv2") < 500 * len(published("hpsv2"))
    tensors = len(published("imagereward", True))
    assert 0 < 1_786_880_927 - 4 * count("imagereward", True) < 500 * tensors
    assert 0 < 3_714_759 - 4 * count("aesthetic-mlp") < 500 * len(published("aesthetic-mlp"))


# ---------------------------------------------------------------------------------------- bad input

def test_images_that_are_none_are_refused(files):
    reward, good = load_reward(spec("hpsv2.1", files)), pictures()
    for images, said in (
            (good * 2 - 1, "values from -"),
            (good * 255, "needs numbers in"),
            (good.where(good > 0.5, math.nan), "from nan to nan"),
            ((good * 255).byte(), "uint8"),
            (good[:, :1], r"\(3, 1, 48, 40\)"),
            (good[0], r"\(3, 48, 40\)")):
        with pytest.raises(InputError, match=said):
            reward(images, PROMPTS)
    for prompts in ([], PROMPTS[:2]):
        with pytest.raises(InputError, match=f"3 images for {len(prompts)} prompts"):
            reward(good, prompts)


class Sum(rewards.Reward):
    def encode(self, prompts):
        return None

    def score(self, images, text):
        return images.sum(dim=(1, 2, 3))


def test_an_accelerator_is_read_back_for_the_first_batch_only():
    images, reward = torch.empty(3, 3, 8, 8, device="meta"), Sum()  # meta tensors cannot be read
    with pytest.raises(RuntimeError, match="meta"):
        reward(images, PROMPTS)
    reward.looked = True
    assert reward(images, PROMPTS).shape == (3,)
    reward = Sum()
    reward(pictures(), PROMPTS)
    assert reward.looked
    with pytest.raises(InputError):  # the CPU is looked at every time
        reward(pictures() + 1, PROMPTS)


BAD_SPECS = {
    "beauty": "beauty is not a reward; expected none, or hpsv2.1, hpsv2, pickscore",
    "hpsv2.1+beauty": r"hpsv2.1\+beauty is not a reward",
    "": "nothing is not a reward",
    "jpeg*x": "the weight of jpeg is not a number",
    "jpeg*": "the weight of jpeg is not a number",
    "jpeg*nan": "the weight of jpeg is not a number",
    "jpeg+jpeg*2": "jpeg stands there twice",
    "jpeg=file": "means nothing to jpeg",
    "hpsv2.1:large": "means nothing to hpsv2.1",
    "clip:ViT-Z": "no such model",
    "clip:tiny:laion9b": "names no weights; open_clip has none for this model",
    "clip:tiny": "names no weights",
    "clip:tiny={files}/nothing.pt": "nothing.pt: no such file",
    "hpsv2.1={files}/nothing.pt": (
        "HPS_v2.1_compressed.pt of the hub's xswu/HPSv2 .1,972,490,005 bytes, sha256 c57a38fb"),
    "hpsv2={files}/HPS_v2.1_compressed.pt": "by its name the file of hpsv2.1",
    "hpsv2.1={files}/ImageReward.pt": "by its name the file of imagereward",
    "pickscore={files}/linear.pth": r"linear.pth: lacks positional_embedding \(77, 32\)",
    "imagereward={files}/clip.pt": r"clip.pt: lacks blip.visual_encoder.cls_token \(1, 1, 48\)",
    "hpsv2.1={files}/tiny.json": "tiny.json: not a whole torch pickle",
    "aesthetic={files}/clip.pt,{files}/clip.pt": "clip.pt: lacks layers.0.weight",
    "aesthetic={files}/linear.pth,{files}/linear.pth": "lacks positional_embedding",
    "python:nothing": "cannot be imported",
    "python:no.such.module": "cannot be imported",
    "python:math.nothing": "cannot be imported",
    "python:math.pi": "float, not callable",
    "python:": "names no function; expected python:module.function",
    "python": "names no function; expected python:module.function",
    "torch": "names no function; expected torch:module.function",
    "torch:math.nothing": "cannot be imported",
    "torch:math.pi=file": "=file means nothing to torch",
}


@pytest.mark.parametrize("bad", BAD_SPECS)
def test_bad_specs_are_refused_in_one_line(bad, files):
    with pytest.raises(InputError, match=BAD_SPECS[bad]) as caught:
        load_reward(bad.format(files=files))
    assert "\n" not in str(caught.value) and bad.split("=")[0].split("*")[0] in str(caught.value)


def test_a_file_with_a_tensor_too_many_or_damaged_is_refused(files, tmp_path):
    state = clip_state()
    for change, said in (
            ({"visual.extra": torch.zeros(3)}, "has unknown visual.extra"),
            ({"visual.proj": torch.zeros(2, 2)}, r"has misshapen visual.proj \(2, 2\)"),
            ({"ln_final.bias": torch.full((32,), math.nan)}, "ln_final.bias holds NaN")):
        torch.save(state | change, tmp_path / "bad.pt")
        with pytest.raises(InputError, match=f"hpsv2.1: .*bad.pt.*{said}"):
            load_reward(f"hpsv2.1={tmp_path}/bad.pt")
    whole = (files / "clip.pt").read_bytes()
    (tmp_path / "bad.pt").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(InputError, match="bad.pt: not a whole torch pickle"):
        load_reward(f"hpsv2.1={tmp_path}/bad.pt")


class Code:
    def __reduce__(self):
        return print, ("this must not run",)


def test_a_pickle_that_holds_code_runs_none(tmp_path, capsys):
    torch.save({"state_dict": Code()}, tmp_path / "evil.pt")
    with pytest.raises(InputError, match="evil.pt: not a whole torch pickle of plain tensors"):
        load_reward(f"hpsv2.1={tmp_path}/evil.pt")
    assert "must not" not in capsys.readouterr().out


def two_scores(images, prompts):
    return [1.0, 2.0]


def no_scores(images, prompts):
    return None


def broken_scores(images, prompts):
    return [0.5, float("nan"), 0.5]


def raises(images, prompts):
    raise KeyError("none")


def test_a_function_that_raises_is_named_with_its_line_and_what_it_was_given():
    line = raises.__code__.co_firstlineno + 1
    said = (rf"raises: raised KeyError: .*test_reward_models.py, line {line}\); "
            r".*\(3, 3, \d+, \d+\)")
    with pytest.raises(InputError, match=said):
        load_reward(f"python:{__name__}.raises")(pictures(), PROMPTS)


def yields(images, prompts):
    for _ in prompts:
        yield {}["nothing"]


def test_the_line_named_is_the_users_own_also_in_a_generator_or_where_pytorch_raises():
    line = yields.__code__.co_firstlineno + 2
    with pytest.raises(InputError, match=rf"raised KeyError: .*test_reward_models.py, line {line}"):
        load_reward(f"python:{__name__}.yields")(pictures(), PROMPTS)
    line = misshapen.__code__.co_firstlineno + 1
    with pytest.raises(InputError, match=rf"test_reward_models.py, line {line}"):
        load_reward(f"torch:{__name__}.misshapen")(pictures(), PROMPTS)


def misshapen(images, prompts):
    return F.interpolate(images, (2, 2, 2))


def test_a_function_must_give_one_number_an_image():
    with pytest.raises(InputError, match="two_scores: gave 2 numbers for 3 images"):
        load_reward(f"python:{__name__}.two_scores")(pictures(), PROMPTS)
    with pytest.raises(InputError, match="no_scores: gave no sequence of numbers"):
        load_reward(f"python:{__name__}.no_scores")(pictures(), PROMPTS)
    with pytest.raises(InputError, match="broken_scores: gave NaN or infinity"):
        load_reward(f"python:{__name__}.broken_scores")(pictures(), PROMPTS)


def test_without_a_path_the_hub_is_asked_and_its_absence_explained(files, monkeypatch):
    import huggingface_hub
    asked = []

    def download(repo, file):
        asked.append((repo, file))
        return str(files / "clip.pt")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert load_reward("hpsv2.1")(pictures(), PROMPTS).shape == (3,)
    assert asked == [("xswu/HPSv2", "HPS_v2.1_compressed.pt")]

    def offline(*_):
        raise OSError("no network\nand more")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    said = (r"hpsv2.1: could not be fetched .*\(no network\).*1,972,490,005 bytes, "
            r"sha256 c57a38fb4a2f7e7c15bf00da2ea377cdf165448b4dd1052a484c215a998c9837"
            r".*as hpsv2.1=/path/to/HPS_v2.1_compressed.pt")
    with pytest.raises(InputError, match=said):
        load_reward("hpsv2.1")
    monkeypatch.undo()
    monkeypatch.setattr(open_clip, "download_pretrained", offline)
    said = ("clip: clip:ViT-H-14:laion2b_s32b_b79k: could not be fetched"
            ".*laion/CLIP-ViT-H-14-laion2B-s32B-b79K.*clip:ViT-H-14:laion2b_s32b_b79k=/path")
    with pytest.raises(InputError, match=said):
        load_reward("clip")


# -------------------------------------------------------------------------------------- the command

def test_the_command_prints_a_score_an_image(files, tmp_path, capsys):
    paths = [tmp_path / "one.png", tmp_path / "two.png"]
    for path, picture in zip(paths, pictures()):
        TF.to_pil_image(picture).save(path)
    hps = spec("hpsv2.1", files)
    assert call(
        rewards.main, "--reward", hps, *paths, "--prompt", "a fish", "--device", "cpu") == 0
    scores = [load_reward(hps)(rewards.read_picture(path), ["a fish"]).item() for path in paths]
    lines = [f"{score:.4f}\t{path}\n" for score, path in zip(scores, paths)]
    assert capsys.readouterr().out == "".join(lines)
    assert call(
        rewards.main, "--reward", f"{hps}*2+jpeg", *paths, "--prompt", "a fish", "--prompt", "",
        "--device", "cpu") == 0
    head, one, two = capsys.readouterr().out.splitlines()
    assert head.split("\t") == ["sum", "hpsv2.1", "jpeg", "image"]
    total, first, second = map(float, one.split("\t")[:3])
    assert first == pytest.approx(scores[0], abs=1e-4)
    assert total == pytest.approx(2 * first + second, abs=1e-3)


def test_the_command_explains_bad_input(tmp_path, capsys):
    (tmp_path / "bad.png").write_text("no picture")
    for argv, said in (
            ((tmp_path / "bad.png", "--prompt", ""), "bad.png: not a readable picture"),
            (("no.png", "--prompt", ""), "no.png: not a readable"),
            (("a.png", "b.png", "c.png", "--prompt", "x", "--prompt", "y"),
             "3 images for 2 prompts"),
            (("a.png", "--prompt", "x", "--reward", "beauty"), "beauty is not a reward")):
        reward = [] if "--reward" in argv else ["--reward", "jpeg"]
        assert call(rewards.main, *argv, *reward, "--device", "cpu") == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


# ---------------------------------------------------------------------------------------- true size

@pytest.mark.slow
@torch.no_grad()
def test_vit_h_of_open_clip_and_of_transformers_agree_at_true_size(monkeypatch, tmp_path):
    monkeypatch.undo()
    torch.manual_seed(0)
    theirs = CLIPModel(vit_h()).eval()
    theirs.config.text_config.eos_token_id = 49407
    save_file({k: v.half() for k, v in theirs.state_dict().items()}, tmp_path / "model.safetensors")
    theirs.load_state_dict({k: v.half().float() for k, v in theirs.state_dict().items()})
    ours = load_reward(f"pickscore={tmp_path}/model.safetensors")
    images = pictures(224, 227)[:1]
    inputs = {
        "pixel_values": normalized(images[..., 1:225]),
        "input_ids": ours.tokenize(["a red apple"])}
    result = theirs(**inputs)
    cosines = (result.image_embeds * result.text_embeds).sum(dim=-1)
    agree(ours(images, ["a red apple"]), cosines, 1e-4, floor=0.1)
    agree(ours.image_features(images), result.image_embeds, 1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_hpsv2_at_true_size_equals_plain_open_clip(monkeypatch, tmp_path):
    monkeypatch.undo()
    state = {}
    for i, (key, shape) in enumerate(published("hpsv2").items()):
        value = ("ln_" in key and key.endswith("weight")) + 0.03 * rand(*shape or (1,), seed=i)
        state[key] = value.half().reshape(shape)
    file = tmp_path / "HPS_v2.1_compressed.pt"
    torch.save({"state_dict": state}, file)
    assert abs(file.stat().st_size - 1_972_490_005) < 100_000
    with parameters_on_meta():
        clip = open_clip.CLIP(**open_clip.get_model_config("ViT-H-14"))
    clip.load_state_dict({k: v.float() for k, v in state.items()}, assign=True)
    clip.eval()
    images = pictures(224, 100)[:1]
    canvas = F.pad(images, (62, 62))
    image = clip.encode_image(normalized(canvas))
    text = clip.encode_text(open_clip.get_tokenizer("ViT-H-14")(["a red apple"]))
    scores = load_reward(f"hpsv2.1={file}")(images, ["a red apple"])
    agree(scores, F.cosine_similarity(image, text), 1e-4, floor=0.1)


@pytest.mark.slow
@torch.no_grad()
def test_imagereward_at_true_size_equals_a_second_writing(monkeypatch, tmp_path):
    monkeypatch.undo()
    state = {}
    for i, (key, shape) in enumerate(published("imagereward").items()):
        state[key] = ("orm" in key and key.endswith("weight")) + 0.03 * rand(*shape, seed=i)
    torch.save(state, tmp_path / "ImageReward.pt")
    images = pictures(224, 227)[:1]
    cropped, words = normalized(TF.center_crop(images, 224)), bert_ids(tmp_path, ["a red apple"])
    theirs = imagereward_again(state, cropped, *words, rewards.ImageReward.VISION, 12)
    agree(load_reward(f"imagereward={tmp_path}")(images, ["a red apple"]), theirs, 1e-4)
