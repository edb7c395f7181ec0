import pytest
import torch
from diffusers import AutoencoderKL

from conftest import VAE as TINY, agree, agree_by_name, cut, norm_eps, rand, randomize, shapes
from support.weights import WEIGHTS, InputError
from vae import VAE, VAEConfig


@pytest.fixture(
    params=[{}, {"layers_per_block": 2, "block_out_channels": (16, 32)}],
    ids=["tiny", "two levels"])
def pair(request, tmp_path):
    torch.manual_seed(0)
    randomize(VAE(VAEConfig(**TINY | request.param))).save_pretrained(tmp_path / "vae")
    return VAE.from_pretrained(tmp_path / "vae"), AutoencoderKL.from_pretrained(tmp_path / "vae")


def gradients(net, *outputs):
    sum((out * rand(*out.shape, seed=9)).sum() for out in outputs).backward()
    found = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    return found


def test_posterior_and_its_gradients_equal_diffusers(pair):
    ours, theirs = pair
    images = rand(2, 3, 32, 24).clamp(-1, 1)
    mean, std = ours.posterior(images)
    posterior = theirs.encode(images).latent_dist
    agree(mean, posterior.mean)
    agree(std, posterior.std)
    expected = gradients(theirs, posterior.mean, posterior.std)
    agree_by_name(gradients(ours, mean, std), expected)


def test_decode_and_its_gradients_equal_diffusers(pair):
    ours, theirs = pair
    latents = rand(2, 4, 8, 6)
    mine, reference = latents.clone().requires_grad_(), latents.clone().requires_grad_()
    out, expected = ours.decode(mine), theirs.decode(reference / 0.18215).sample
    agree(out, expected)
    agree_by_name(gradients(ours, out), gradients(theirs, expected))
    agree(mine.grad, reference.grad)


def test_every_norms_eps_equals_diffusers(pair):
    ours, theirs = map(norm_eps, pair)
    assert ours == theirs and set(ours.values()) == {1e-6}


def test_default_is_sd21_with_83_653_863_parameters_and_diffusers_keys():
    with torch.device("meta"):
        ours = VAE()
        theirs = AutoencoderKL(
            block_out_channels=[128, 256, 512, 512], layers_per_block=2, latent_channels=4,
            down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)
    assert sum(p.numel() for p in ours.parameters()) == 83_653_863
    assert shapes(ours) == shapes(theirs)
    assert ours.factor == 8


@torch.no_grad()
def test_encode_is_a_scaled_draw_from_the_posterior(model_folder):
    vae, images = VAE.from_pretrained(model_folder), rand(2, 3, 32, 32).clamp(-1, 1)
    mean, std = vae.posterior(images)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(4))
    latents = vae.encode(images, torch.Generator().manual_seed(4))
    agree(latents, (mean + std * noise) * 0.18215, 1e-6)


@torch.no_grad()
def test_encode_is_reproducible_from_a_generator(model_folder):
    vae, images = VAE.from_pretrained(model_folder), rand(2, 3, 32, 32).clamp(-1, 1)
    first, again, other = (
        vae.encode(images, torch.Generator().manual_seed(seed)) for seed in (4, 4, 5))
    assert torch.equal(first, again) and not torch.equal(first, other)


@torch.no_grad()
def test_encode_and_decode_do_not_change_their_input(model_folder):
    vae, images, latents = VAE.from_pretrained(model_folder), rand(1, 3, 32, 32), rand(1, 4, 8, 8)
    vae.encode(images)
    vae.decode(latents)
    assert torch.equal(images, rand(1, 3, 32, 32)) and torch.equal(latents, rand(1, 4, 8, 8))


@pytest.mark.parametrize("size", [(30, 32), (32, 34), (31, 33)], ids=str)
def test_a_size_that_is_not_a_multiple_of_f_is_refused(size, model_folder):
    with pytest.raises(InputError, match=f"{size[0]}x{size[1]}.* 4"):
        VAE.from_pretrained(model_folder).encode(rand(1, 3, *size))


def test_truncated_weights_are_refused_by_name(model_copy):
    file = model_copy / "vae" / WEIGHTS
    cut(file, -100)
    with pytest.raises(InputError, match=str(file)):
        VAE.from_pretrained(model_copy)
