import math
import shutil

import pytest
import torch

from conftest import agree, rand, randomize
from latent_rm import LatentRM, LatentRMConfig, preference_loss
from transformers import CLIPTokenizer
from weights import InputError

TINY = LatentRMConfig(latent_size=8, patch_size=2, width=32, layers=2, heads=2, embed_dim=16, text_width=32, text_layers=2,
                      text_heads=2, context_length=32, vocab_size=4096)


def softmax(*scores):
    return [math.exp(s) / sum(map(math.exp, scores)) for s in scores]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q))


def test_kl_of_one_pair_equals_the_hand_computed_number():
    # softmax(ln 3, 0) = 3/4, 1/4 and softmax(0, 0) = 1/2, 1/2: KL = 3/4 ln(3/2) + 1/4 ln(1/2)
    loss = preference_loss(torch.tensor([[math.log(3), 0.0]]), torch.zeros(1, 2))
    assert loss.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-5)


def test_cross_entropy_of_one_pair_equals_the_hand_computed_number():
    # the expert prefers the first; the LRM gives it softmax(0, ln 3) = 1/4
    loss = preference_loss(torch.tensor([[0.2, 0.1]]), torch.tensor([[0.0, math.log(3)]]), kind="ce")
    assert loss.item() == pytest.approx(math.log(4), rel=1e-5)


@pytest.mark.parametrize("kind", ["kl", "ce"])
def test_three_candidates_are_the_sum_over_three_pairs_and_the_mean_over_the_batch(kind):
    expert, lrm = [[0.3, -0.2, 1.1], [2.0, 0.0, -1.0]], [[0.5, 0.1, 0.4], [-0.3, 0.8, 0.0]]
    tau, tau_lrm = 0.5, 2.0
    total = 0.0
    for e, r in zip(expert, lrm):
        for i, j in ((0, 1), (0, 2), (1, 2)):
            q = softmax(r[i] / tau_lrm, r[j] / tau_lrm)
            total += kl(softmax(e[i] / tau, e[j] / tau), q) if kind == "kl" else -math.log(q[0] if e[i] > e[j] else q[1])
    assert preference_loss(torch.tensor(expert), torch.tensor(lrm), tau, tau_lrm, kind).item() == pytest.approx(total / 2, rel=1e-5)


def test_kl_is_zero_where_the_preferences_agree():
    scores = rand(5, 3)
    assert preference_loss(scores, scores + 7).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", ["kl", "ce"])
def test_gradient_reaches_the_lrm_scores_only(kind):
    expert, lrm = rand(4, 3).requires_grad_(), rand(4, 3, seed=1).requires_grad_()
    preference_loss(expert, lrm, kind=kind).backward()
    assert expert.grad is None and lrm.grad.abs().max() > 0


@pytest.fixture
def saved(model_folder, tmp_path):
    torch.manual_seed(0)
    latent_rm = randomize(LatentRM(TINY))
    latent_rm.tokenizer = CLIPTokenizer.from_pretrained(model_folder / "tokenizer")
    latent_rm.save_pretrained(tmp_path / "latent_rm")
    shutil.copytree(model_folder / "tokenizer", tmp_path / "tokenizer")
    return latent_rm.eval(), tmp_path / "latent_rm"


@torch.no_grad()
def test_save_then_load_is_exact(saved):
    latent_rm, folder = saved
    latents, prompts = rand(3, 4, 8, 8), ["a red apple", "rocket", ""]
    assert torch.equal(LatentRM.from_pretrained(folder)(latents, prompts), latent_rm(latents, prompts))


def test_scores_are_cosines_of_each_row_with_its_own_prompt(saved):
    latent_rm, _ = saved
    latents, prompts = rand(3, 4, 8, 8).requires_grad_(), ["a red apple", "rocket", "a red apple"]
    scores = latent_rm(latents, prompts)
    assert scores.shape == (3,) and scores.dtype == torch.float32 and scores.abs().max() <= 1
    agree(latent_rm(latents.flip(0), prompts[::-1]), scores.flip(0), 1e-5)
    scores[0].backward()
    assert latents.grad[0].abs().max() > 0 and not latents.grad[1:].any()


def test_text_is_read_causally(saved):
    text = LatentRM.from_pretrained(saved[1]).text
    assert text.attn_mask.device.type == "cpu" and torch.isinf(text.attn_mask.triu(1)[0, 1:]).all() and not text.attn_mask.tril().any()


def test_truncated_weights_are_refused_by_name(saved):
    file = saved[1] / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(InputError, match=str(file)):
        LatentRM.from_pretrained(saved[1])
