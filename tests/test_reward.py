import shutil

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

import data
from conftest import CLIP, agree, cut, rand
from reward import load_reward, read_picture
from support.weights import WEIGHTS, InputError

PROMPTS = ["a red apple", "rocket", "a fish"]


@pytest.fixture(scope="module")
def reward(model_folder):
    return load_reward(f"pocket={model_folder}")


def pictures(*size):
    return rand(3, 3, *size).mul(0.3).add(0.5).clamp(0, 1)


@torch.no_grad()
def test_scores_equal_open_clip(reward, model_folder):
    clip = open_clip.CLIP(**CLIP).eval()
    clip.load_state_dict(load_file(model_folder / "reward" / WEIGHTS))
    images = pictures(32, 32)
    image, text = clip.encode_image(images * 2 - 1), clip.encode_text(reward.tokenize(PROMPTS))
    scores = reward(images, PROMPTS)
    agree(scores, F.cosine_similarity(image, text))
    assert scores.dtype == torch.float32 and scores.shape == (3,)


@pytest.mark.parametrize("size", [(48, 48), (64, 40), (16, 16)], ids=str)
@torch.no_grad()
def test_other_sizes_are_resized_antialiased(size, reward):
    images = pictures(*size)
    resized = F.interpolate(images, (32, 32), mode="bicubic", antialias=True)
    agree(reward(images, PROMPTS), reward.score(resized, reward.encode(PROMPTS)), 1e-5)


@torch.no_grad()
def test_aliased_resizes_as_tensors_were_before_torchvision_017(model_folder, reward):
    from torchvision.transforms.functional import InterpolationMode, resize
    images = pictures(96, 96)
    aliased = load_reward(f"pocket:aliased={model_folder}")
    small = resize(images, [32, 32], InterpolationMode.BICUBIC, antialias=False)
    assert aliased.name == "pocket:aliased"
    agree(aliased(images, PROMPTS), reward.score(small, reward.encode(PROMPTS)), 1e-5)
    assert (aliased(images, PROMPTS) - reward(images, PROMPTS)).abs().max() > 1e-3
    with pytest.raises(InputError, match=":aliased means nothing to jpeg"):
        load_reward("jpeg:aliased")


def test_gradient_to_the_image_equals_finite_differences(model_folder):
    reward = load_reward(f"pocket={model_folder}", dtype=torch.float64)
    text = reward.text_features(PROMPTS)
    score = lambda x: (reward.image_features(x) * text).sum()
    images, h = pictures(32, 32).double().requires_grad_(), 1e-5
    direction = rand(3, 3, 32, 32, seed=1).double()
    score(images).backward()
    with torch.no_grad():
        slope = (score(images + h * direction) - score(images - h * direction)) / (2 * h)
    assert (images.grad * direction).sum().item() == pytest.approx(slope.item(), rel=1e-4)
    again = pictures(32, 32).double().requires_grad_()
    reward(again, PROMPTS).sum().backward()
    agree(again.grad, images.grad)


def test_weights_are_frozen_and_get_no_gradient(reward):
    images = pictures(32, 32).requires_grad_()
    reward(images, PROMPTS).sum().backward()
    assert images.grad.abs().max() > 0
    assert not reward.training
    assert all(p.grad is None and not p.requires_grad for p in reward.parameters())


def test_pictures_are_read_as_training_reads_them(tmp_path):
    """Turned by EXIF, 16-bit grey scaled, transparency on white."""
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[:4] = 255, 0, 0, 255
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    grey = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    for file in tmp_path.iterdir():
        image = read_picture(file)
        agree(image[0], data.load_picture(file.read_bytes(), 16) / 2 + 0.5, 1e-6)
    turned = read_picture(tmp_path / "turned.png")[0]
    assert (turned[:, 0] == 1).all() and turned[:, -1].mean().item() == pytest.approx(1 / 3)
    assert read_picture(tmp_path / "grey.png").mean().item() == pytest.approx(0.5, abs=0.01)


@torch.no_grad()
def test_save_then_load_is_exact(reward, model_folder, tmp_path):
    reward.save_pretrained(tmp_path / "reward")
    shutil.copytree(model_folder / "tokenizer", tmp_path / "tokenizer")
    images, again = pictures(32, 32), load_reward(f"pocket={tmp_path}")
    assert torch.equal(again(images, PROMPTS), reward(images, PROMPTS))


def test_a_half_precision_file_scores_in_float32(reward, model_folder, tmp_path):
    reward.save_pretrained(tmp_path / "reward", dtype=torch.float16)
    shutil.copytree(model_folder / "tokenizer", tmp_path / "tokenizer")
    images, again = pictures(32, 32), load_reward(f"pocket={tmp_path}")
    agree(again(images, PROMPTS), reward(images, PROMPTS), 1e-2)


@pytest.mark.parametrize("spec", ["beauty", "none", "pocket=/no/such/folder"])
def test_unknown_reward_is_refused(spec):
    with pytest.raises(InputError, match=spec.removeprefix("pocket=")):
        load_reward(spec)


def test_one_prompt_an_image_is_required(reward):
    with pytest.raises(InputError, match="3 images for 2 prompts"):
        reward(pictures(32, 32), PROMPTS[:2])


@pytest.mark.parametrize("name, size, named", [
    (WEIGHTS, 1000, WEIGHTS), ("config.json", 30, "config.json")])
def test_truncated_files_are_refused_by_name(name, size, named, model_copy):
    cut(model_copy / "reward" / name, size)
    with pytest.raises(InputError, match=named):
        load_reward(f"pocket={model_copy}")
