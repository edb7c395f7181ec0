"""With no GPU at hand: the step, the rewards and a picture run on fake CUDA tensors, which hold a
device, a dtype and a shape but no numbers. A tensor on the wrong device, one of the wrong dtype, or
a number that is read back to the CPU (which on a GPU waits for all work before it) is an error."""
import open_clip
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import brakes
import reward as rewards
import train
from conftest import CLIP, LATENT_RM, ROOT, TEXT, UNET, VAE as TINY_VAE
from discriminator import Discriminator, DiscriminatorConfig
from latent_rm import LatentRM, LatentRMConfig
from lcm_solver import DDIMSolver, NoiseSchedule
from pipeline import Pipeline
from support import cli
from support.tokenizer import Tokenizer
from teacher_rm import TeacherRM, TeacherRMConfig
from text_encoder import TextConfig, TextEncoder, TextTower
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig

PROMPTS = ["a red apple", "rocket"]
CUDA = torch.device("cuda")


@pytest.fixture
def fake():
    with FakeTensorMode(allow_non_fake_inputs=False) as mode, torch.device(CUDA):
        yield mode


@pytest.fixture
def words():
    return Tokenizer.from_pretrained(ROOT / "pocket" / "tokenizer")


def frozen(dtype, build, *inputs):
    """build(*inputs), a network, with weights of that dtype. (Fake weights cannot be converted.)"""
    torch.set_default_dtype(dtype)
    try:
        return build(*inputs).requires_grad_(False).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def pipeline(words, dtype):
    vae = frozen(dtype, VAE, VAEConfig(**TINY_VAE))
    text_encoder = TextEncoder(frozen(dtype, TextTower, TextConfig(**TEXT)), words)
    return Pipeline(vae, text_encoder, NoiseSchedule(device=CUDA), CUDA, dtype)


STUDENT = UNetConfig(**UNET, time_cond_proj_dim=256)


def pocket(words, dtype):
    reward = frozen(dtype, rewards.PocketReward, CLIP, words)
    reward.looked = True  # the first batch is looked at, and waited for: see Reward
    return reward


def run_step(words, reward, latent_rm, dtype, more=(), **options):
    model, teacher = pipeline(words, dtype), frozen(dtype, UNet, UNetConfig(**UNET))
    if isinstance(latent_rm, TeacherRM):
        latent_rm.stand_on(teacher, model)
    student, target = UNet(STUDENT), frozen(torch.float32, UNet, STUDENT)
    args = train.Config(ddim_steps=10, **options)
    solver = DDIMSolver(model.schedule, args.ddim_steps)
    pictures = torch.empty(2, 3, 32, 32)
    draws = [torch.empty(2, 4, 8, 8), torch.empty(2, 4, 8, 8), torch.empty(2), torch.empty(2)]
    if args.reward_jitter:
        draws += [torch.empty(2, 3), torch.empty(2, 3, 32, 32)]
    with cli.autocast(CUDA, dtype):
        loss, stats = train.distillation_loss(
            model, teacher, student, target, reward, solver, (pictures, PROMPTS, draws), args,
            latent_rm, **dict(more))
    assert loss.dtype == torch.float32 and loss.requires_grad  # to go back takes a real card
    return stats


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", ["none", "direct", "direct, recomputed", "proxy"])
def test_a_step_reads_nothing_back(fake, words, path, dtype):
    reward = latent_rm = None
    if path != "none":
        reward = pocket(words, dtype)
    if path == "proxy":
        latent_rm = LatentRM(LatentRMConfig(**LATENT_RM), words)
        latent_rm.text.attn_mask = latent_rm.text.build_causal_mask()
        latent_rm.train_top(1, 1)
    stats = run_step(words, reward, latent_rm, dtype, grad_checkpoint="recomputed" in path)
    assert {value.device.type for value in stats.values()} == {"cuda"}


@pytest.mark.parametrize("path", ["direct", "proxy"])
def test_nor_does_one_with_every_brake(fake, words, path):
    """What a step learns of its reward included."""
    reward, latent_rm = pocket(words, torch.bfloat16), None
    reward.resolution = 24
    if path == "proxy":
        latent_rm = TeacherRM(TeacherRMConfig(
            latent_size=8, channels=112, side=2, text_width=32, width=32, heads=2, embed_dim=16))
        latent_rm.train_top(1, 1)
    averages = brakes.Averages(brakes.AveragesConfig(("reward",)))
    more = {"averages": averages, "discriminator": Discriminator(DiscriminatorConfig(112))}
    stats = run_step(words, rewards.Mixture([reward], [2.0]), latent_rm, torch.bfloat16, more,
                     reward_cap=0.5, reward_jitter=0.1, reward_normalize=True, reward_ratio=0.5,
                     rm_privileged=path == "proxy", anchor=0.1)
    assert {value.device.type for value in stats.values()} == {"cuda"}
    averages.learn(stats, train.Config(), 1)
    assert averages.scores.device.type == "cuda"


def tiny_imagereward(monkeypatch):
    # numbers that timm reads back while it builds a network
    monkeypatch.setattr("timm.models.vision_transformer.calculate_drop_path_rates",
                        lambda rate, depth: [0.0] * depth, raising=False)
    monkeypatch.setattr(rewards.ImageReward, "VISION", {
        "img_size": 32, "patch_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 2})
    monkeypatch.setattr(rewards.ImageReward, "TEXT", rewards.ImageReward.TEXT | {
        "hidden_size": 16, "encoder_hidden_size": 16, "intermediate_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 2})
    return rewards.ImageReward(rewards.bert_tokenizer(rewards.ImageReward.LENGTH))


@pytest.mark.parametrize("family", ["longest", "shortest", "squash", "aesthetic", "imagereward"])
def test_a_reward_reads_nothing_back(fake, words, family, monkeypatch):
    if family == "imagereward":
        reward = tiny_imagereward(monkeypatch)
    else:
        how = "shortest" if family == "aesthetic" else family
        reward = rewards.ClipReward(open_clip.CLIP(**CLIP), words, how)
    if family == "aesthetic":
        reward = rewards.AestheticReward(reward, rewards.Head(16))
    reward.requires_grad_(False).looked = True
    images = torch.empty(2, 3, 40, 56, requires_grad=True)
    scores = rewards.Mixture([reward], [2.0])(images, PROMPTS)
    assert scores.shape == (2,) and scores.requires_grad and scores.device.type == "cuda"


@pytest.mark.parametrize("solver, steps", [("lcm", 2), ("ddim", 3)])
def test_a_picture_reads_nothing_back(fake, words, solver, steps):
    model = pipeline(words, torch.bfloat16)
    unet = frozen(torch.bfloat16, UNet, STUDENT if solver == "lcm" else UNetConfig(**UNET))
    images = model.draw(unet, PROMPTS, [0, 1], steps, 3.0, solver)
    assert images.device.type == "cuda" and images.shape == (2, 3, 32, 32)


def test_what_reads_back_is_caught(fake):
    with pytest.raises(DataDependentOutputException):
        torch.empty(2).sum().item()
