import io
import json
import math
import re
import shutil

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

import data
import latent_rm as script
from conftest import CAPTIONS, LATENT_RM, agree, call, launch, rand, randomize, write_shard
from latent_rm import (
    LatentRM,
    LatentRMConfig,
    clip_loss,
    frozen,
    preference_accuracy,
    preference_loss,
    retrieval,
)
from support import cli
from support.tokenizer import Tokenizer
from support.weights import WEIGHTS, InputError

TINY = LatentRMConfig(**LATENT_RM)


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
    expert, lrm = torch.tensor([[0.2, 0.1]]), torch.tensor([[0.0, math.log(3)]])
    loss = preference_loss(expert, lrm, kind="ce")
    assert loss.item() == pytest.approx(math.log(4), rel=1e-5)


@pytest.mark.parametrize("kind", ["kl", "ce"])
def test_three_candidates_are_the_sum_over_three_pairs_and_the_mean_over_the_batch(kind):
    expert, lrm = [[0.3, -0.2, 1.1], [2.0, 0.0, -1.0]], [[0.5, 0.1, 0.4], [-0.3, 0.8, 0.0]]
    tau, tau_lrm = 0.5, 2.0
    total = 0.0
    for e, r in zip(expert, lrm):
        for i, j in ((0, 1), (0, 2), (1, 2)):
            q = softmax(r[i] / tau_lrm, r[j] / tau_lrm)
            if kind == "kl":
                total += kl(softmax(e[i] / tau, e[j] / tau), q)
            else:
                total += -math.log(q[0] if e[i] > e[j] else q[1])
    loss = preference_loss(torch.tensor(expert), torch.tensor(lrm), tau, tau_lrm, kind)
    assert loss.item() == pytest.approx(total / 2, rel=1e-5)


@pytest.mark.parametrize("kind", ["kl", "ce"])
@pytest.mark.parametrize("count", [2, 4, 5])
def test_any_number_of_candidates_is_the_sum_over_all_their_pairs(count, kind):
    expert, lrm = rand(3, count), rand(3, count, seed=1)
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
    total = sum(
        preference_loss(expert[:, [i, j]], lrm[:, [i, j]], 0.3, 0.4, kind) for i, j in pairs)
    loss = preference_loss(expert, lrm, 0.3, 0.4, kind)
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)


@pytest.mark.parametrize("privileged", [False, True])
@pytest.mark.parametrize("kind", ["kl", "ce"])
def test_the_loss_equals_the_published_loop_written_out(kind, privileged):
    """Candidates: prediction, EMA target, real. Published scores are cosines times CLIP's logit
    scale, which is 100: tau 0.01."""
    expert, lrm = 0.02 * rand(6, 3), 0.02 * rand(6, 3, seed=1)
    total = 0.0
    for i in range(2):
        for j in range(i + 1, 3):
            logits, expert_logits = 100 * lrm[:, [i, j]], 100 * expert[:, [i, j]]
            prefers_first = expert_logits.argmax(dim=1) == 0
            if kind == "ce":
                labels = (~prefers_first).long()
                if j == 2 and privileged:
                    labels = torch.ones_like(labels)
                total += torch.nn.functional.cross_entropy(logits, labels)
                continue
            p = expert_logits.softmax(dim=1)
            if j == 2 and privileged:
                p[prefers_first] = 0.5
            total += torch.nn.functional.kl_div(
                logits.log_softmax(dim=1), p, reduction="batchmean")
    assert (expert[:, 2] < expert[:, 0]).any() and (expert[:, 2] > expert[:, 0]).any()
    loss = preference_loss(expert, lrm, 0.01, 0.01, kind, privileged)
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)


def test_accuracy_is_the_share_of_pairs_ranked_alike():
    # of 3 > 2 > 1 the LRM has 2 > 3 wrong; of 1 < 2 < 3 all
    expert = torch.tensor([[3.0, 2, 1], [1, 2, 3]])
    lrm = torch.tensor([[0.2, 0.3, 0.1], [3, 2, 1]])
    assert preference_accuracy(expert, lrm).item() == pytest.approx(2 / 6)


def test_what_the_expert_does_not_tell_apart_is_no_preference():
    # of the pairs of 1 = 1 < 2 the first is tied; the LRM has (0, 2) right and (1, 2) right, then
    # wrong
    expert = torch.tensor([[1.0, 1, 2]])
    right, wrong = torch.tensor([[0.0, 1, 3]]), torch.tensor([[0.0, 5, 3]])
    assert preference_accuracy(expert, right).item() == pytest.approx(2.5 / 3)
    assert preference_accuracy(expert, wrong).item() == pytest.approx(1.5 / 3)
    assert preference_accuracy(torch.ones(2, 3), rand(2, 3)).item() == 0.5
    one, other = (
        preference_loss(torch.zeros(1, 2), torch.tensor([scores]), kind="ce").item()
        for scores in ((0.0, math.log(3)), (math.log(3), 0.0)))
    mean = (math.log(4) + math.log(4 / 3)) / 2
    assert one == pytest.approx(other) == pytest.approx(mean, rel=1e-5)


def test_accuracy_of_a_batch_is_the_mean_over_its_parts_ties_included():
    expert, lrm = torch.tensor([[1.0, 1, 1], [1, 2, 3]]), torch.tensor([[1.0, 2, 3], [1, 2, 3]])
    parts = [preference_accuracy(expert[i:i + 1], lrm[i:i + 1]).item() for i in range(2)]
    assert preference_accuracy(expert, lrm).item() == sum(parts) / 2


def test_kl_is_zero_where_the_preferences_agree():
    scores = rand(5, 3)
    assert preference_loss(scores, scores + 7).item() == pytest.approx(0, abs=1e-6)


def test_scores_that_do_not_belong_together_and_temperatures_of_nothing_are_refused():
    for function in (preference_loss, preference_accuracy):
        for expert, lrm in ((rand(4, 3), rand(4, 2)), (rand(4, 3), rand(1, 3)), (rand(3), rand(3))):
            shapes = f"{tuple(expert.shape)}, the LRM's {tuple(lrm.shape)}"
            with pytest.raises(InputError, match=re.escape(shapes)):
                function(expert, lrm)
    for taus in ((0, 1), (1, -1)):
        with pytest.raises(InputError, match=f"tau {taus[0]}, tau_lrm {taus[1]}"):
            preference_loss(rand(2, 3), rand(2, 3), *taus)


def test_latents_that_do_not_fit_the_prompts_or_the_lrm_are_refused(saved):
    latent_rm, size = saved[0], LATENT_RM["latent_size"]
    with pytest.raises(InputError, match="3 latents for 1 prompts"):
        latent_rm(rand(3, 4, size, size), ["a"])
    with pytest.raises(InputError, match=re.escape(f"[B, 4, {size}, {size}]")):
        latent_rm(rand(1, 4, size + 2, size + 2), ["a"])


def test_an_unknown_kind_and_a_lone_candidate_are_refused():
    with pytest.raises(InputError, match="expected kl or ce"):
        preference_loss(rand(2, 3), rand(2, 3), kind="KL")
    for function in (preference_loss, preference_accuracy):
        with pytest.raises(InputError, match="candidates to compare"):
            function(rand(2, 1), rand(2, 1))


@pytest.mark.parametrize("kind", ["kl", "ce"])
def test_gradient_reaches_the_lrm_scores_only(kind):
    expert, lrm = rand(4, 3).requires_grad_(), rand(4, 3, seed=1).requires_grad_()
    preference_loss(expert, lrm, kind=kind).backward()
    assert expert.grad is None and lrm.grad.abs().max() > 0


@pytest.fixture
def saved(model_folder, tmp_path):
    torch.manual_seed(0)
    latent_rm = randomize(LatentRM(TINY, Tokenizer.from_pretrained(model_folder / "tokenizer")))
    latent_rm.save_pretrained(tmp_path / "latent_rm")
    return latent_rm.eval(), tmp_path / "latent_rm"


@torch.no_grad()
def test_save_then_load_is_exact(saved):
    latent_rm, folder = saved
    latents, prompts = rand(3, 4, 8, 8), ["a red apple", "rocket", ""]
    for path in (folder, folder.parent):  # of the model, of a run
        again = LatentRM.from_pretrained(path)
        assert torch.equal(again(latents, prompts), latent_rm(latents, prompts))


def test_the_tokenizer_may_lie_beside_the_folder(saved, model_folder):
    latent_rm, folder = saved
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(InputError, match="tokenizer"):
        LatentRM.from_pretrained(folder)
    shutil.copytree(model_folder / "tokenizer", folder.parent / "tokenizer")
    again = LatentRM.from_pretrained(folder)
    assert torch.equal(again.text_features(["rocket"]), latent_rm.text_features(["rocket"]))


@pytest.mark.parametrize("size", [100, 5000])
def test_the_tokenizer_of_another_tower_is_refused(size, model_folder, tmp_path):
    config = LatentRMConfig(**LATENT_RM | {"vocab_size": size})
    tokenizer = Tokenizer.from_pretrained(model_folder / "tokenizer")
    LatentRM(config, tokenizer).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"4096 tokens.*vocab_size {size}"):
        LatentRM.from_pretrained(tmp_path)


def test_the_default_config_is_sd21_with_the_text_tower_of_vit_h():
    with torch.device("meta"):
        latent_rm, clip = LatentRM(), open_clip.CLIP(**open_clip.get_model_config("ViT-H-14"))
    theirs = {
        name: p.shape for name, p in clip.named_parameters()
        if not name.startswith("visual.") and name != "logit_scale"}
    assert {name: p.shape for name, p in latent_rm.text.named_parameters()} == theirs
    assert latent_rm.visual(torch.empty(2, 4, 64, 64, device="meta")).shape == (2, 1024)
    assert len(latent_rm.visual.position) == 256


def text_of(latent_rm):
    return latent_rm.text_features(["a red apple", "rocket", ""])


@pytest.fixture
def clip_file(tmp_path):
    """clip_file(layers): open_clip's file of a CLIP with TINY's text tower. -> file, the CLIP"""
    def make(layers=TINY.text_layers, suffix=".safetensors"):
        text = dict(context_length=32, vocab_size=4096, width=32, heads=2, layers=layers)
        image = dict(image_size=32, layers=1, width=32, head_width=16, patch_size=8)
        clip = randomize(open_clip.CLIP(16, image, text), seed=9)
        file = tmp_path / f"clip{suffix}"
        if suffix == ".safetensors":
            save_file(clip.state_dict(), file)
        else:
            torch.save({"state_dict": clip.state_dict()}, file)
        return file, clip
    return make


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@torch.no_grad()
def test_the_text_tower_of_a_clip_file_is_taken_whole(suffix, saved, clip_file):
    latent_rm, (file, clip) = saved[0], clip_file(suffix=suffix)
    before = latent_rm.visual.state_dict()
    latent_rm.read_text_tower(file)
    ids = latent_rm.tokenizer(["a red apple", "rocket", ""])
    theirs = clip.eval().encode_text(ids, normalize=True)
    agree(text_of(latent_rm), theirs, 1e-5)
    after = latent_rm.visual.state_dict()
    assert all(torch.equal(before[key], value) for key, value in after.items())


def test_frozen_lets_gradients_through_and_keeps_them_out(saved):
    latent_rm, _ = saved
    latent_rm.train_top(1, 1)
    trained = [p for p in latent_rm.parameters() if p.requires_grad]
    latents = rand(2, 4, 8, 8).requires_grad_()
    with frozen(latent_rm):
        latent_rm(latents, ["moon", "rocket"]).sum().backward()
    assert latents.grad.abs().max() > 0 and all(p.grad is None for p in latent_rm.parameters())
    assert trained == [p for p in latent_rm.parameters() if p.requires_grad]


def test_scores_are_cosines_of_each_row_with_its_own_prompt(saved):
    latent_rm, _ = saved
    latents, prompts = rand(3, 4, 8, 8).requires_grad_(), ["a red apple", "rocket", "a red apple"]
    scores = latent_rm(latents, prompts)
    assert scores.shape == (3,) and scores.dtype == torch.float32 and scores.abs().max() <= 1
    agree(latent_rm(latents.flip(0), prompts[::-1]), scores.flip(0), 1e-5)
    scores[0].backward()
    assert latents.grad[0].abs().max() > 0 and not latents.grad[1:].any()


def test_text_is_read_causally(saved):
    mask = LatentRM.from_pretrained(saved[1]).text.attn_mask
    assert mask.device.type == "cpu"
    assert torch.isinf(mask.triu(1)[0, 1:]).all() and not mask.tril().any()


def test_a_save_that_is_cut_short_leaves_nothing(saved, tmp_path, monkeypatch):
    latent_rm, _ = saved
    monkeypatch.setattr(latent_rm, "tokenizer", None)  # fails after the weights are written
    with pytest.raises(AttributeError):
        latent_rm.save_pretrained(tmp_path / "other")
    assert [p.name for p in tmp_path.iterdir()] == ["latent_rm"]


def test_truncated_weights_are_refused_by_name(saved):
    file = saved[1] / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(InputError, match=str(file)):
        LatentRM.from_pretrained(saved[1])


# ------------------------------------------------------------------------------------- pre-training

def test_clip_loss_equals_the_hand_computed_number():
    # logits 2 I: each row and column has softmax(2, 0) on its own
    loss = clip_loss(torch.eye(2), torch.eye(2), torch.tensor(math.log(2.0)))
    assert loss.item() == pytest.approx(-math.log(softmax(2, 0)[0]), rel=1e-5)


@pytest.fixture
def pretrain(model_folder, shard, monkeypatch):
    """pretrain(out, ...): latent_rm.py in this process, with a tiny size -> exit code."""
    others = "latent_size", "context_length", "vocab_size"
    sizes = {key: value for key, value in LATENT_RM.items() if key not in others}
    monkeypatch.setitem(script.SIZES, "pocket", sizes)
    return lambda out, **changes: call(script.main, *options(model_folder, shard, out, **changes))


def options(model_folder, shard, out, **changes):
    """changes: None leaves an option out."""
    values = dict(
        model=model_folder, data=shard, heldout=shard, out=out, resolution=32, batch_size=4,
        steps=4, warmup=2, lr=1e-3, log_every=1, checkpoint_every=2, heldout_every=2,
        device="cpu", precision="fp32") | changes
    switches = {key: values.pop(key, False) for key in ("compile", "grad_checkpoint")}
    argv = []
    for key, value in values.items():
        if value is not None:
            argv += [f"--{key.replace('_', '-')}", str(value)]
    for key, on in switches.items():
        argv += [f"--{'' if on else 'no-'}{key.replace('_', '-')}"]
    return argv


def log(out, *keys):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [tuple(line.get(key) for key in keys) for line in lines]


def weights(out):
    return load_file(out / "latent_rm" / WEIGHTS)


def posteriors(file, shape=(4, 8, 8)):
    """A shard of eight random posteriors, narrow enough to be told apart."""
    members = []
    for i, caption in enumerate(CAPTIONS):
        posterior = torch.stack([rand(*shape, seed=i), torch.full(shape, 0.1)])
        np.save(buffer := io.BytesIO(), posterior.half().numpy())
        members += [(f"{i}.npy", buffer.getvalue()), (f"{i}.txt", caption.encode())]
    return write_shard(file, members)


def test_pre_training_finds_the_captions_of_what_it_saw(pretrain, tmp_path):
    data = posteriors(tmp_path / "latents.tar")
    assert pretrain(
        tmp_path, data=data, heldout=data, steps=30, batch_size=8, warmup=10,
        checkpoint_every=100) == 0
    assert log(tmp_path, "retrieval")[-1][0] >= 0.75  # chance: 1 in 8
    losses = [loss for loss, in log(tmp_path, "loss")]
    assert losses[0] > 1.5 and losses[-1] < 0.7


def test_retrieval_counts_the_latents_nearest_to_their_own_caption():
    class Sees:  # the features of latents are their numbers; of captions, unit vectors
        image_features = staticmethod(lambda latents: latents)
        text_features = staticmethod(lambda captions: torch.eye(3)[[int(c) for c in captions]])
    assert retrieval(Sees, torch.eye(3)[[0, 1, 2, 0]], ["0", "1", "0", "2"]) == 0.5


def test_stopped_and_resumed_pre_training_equals_one_run_bit_for_bit(pretrain, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "stopped"
    assert pretrain(whole, steps=6) == 0 and pretrain(out, steps=6, keep=3) == 0
    checkpoints = out / "checkpoints"
    for later in ("step-000004", "step-000006"):  # killed while it wrote the first of them
        (checkpoints / later).rename(checkpoints / f".{later}.77.new")
    assert pretrain(out, steps=6, keep=3) == 0
    stopped, unstopped = (folder / "latent_rm" / WEIGHTS for folder in (out, whole))
    assert stopped.read_bytes() == unstopped.read_bytes()
    keys = "step", "loss", "grad_norm", "logit_scale", "retrieval", "lr"
    assert log(out, *keys) == log(whole, *keys) and len(log(out)) == 6


def test_weight_decay_is_on_matrices_alone(pretrain, tmp_path):
    for decay in (0, 50):  # times lr: matrices shrink by 5% a step
        assert pretrain(tmp_path / str(decay), steps=1, warmup=1, weight_decay=decay) == 0
    without, decayed = weights(tmp_path / "0"), weights(tmp_path / "50")
    assert all(
        torch.equal(without[name], decayed[name]) == (without[name].ndim < 2) for name in without)


def follow_float32(pretrain, out, **more):
    assert pretrain(out / "fp32") == 0
    assert pretrain(out / "bf16", precision="bf16", grad_checkpoint=True, **more) == 0
    for (one,), (two,) in zip(log(out / "fp32", "loss"), log(out / "bf16", "loss"), strict=True):
        assert two == pytest.approx(one, rel=0.05) and two != pytest.approx(one, rel=1e-6)
    assert {value.dtype for value in weights(out / "bf16").values()} == {torch.float32}


def test_bf16_follows_float32(pretrain, tmp_path):
    follow_float32(pretrain, tmp_path)


@pytest.mark.cuda
def test_bf16_and_compile_on_cuda_follow_float32(pretrain, tmp_path):
    follow_float32(pretrain, tmp_path, device="cuda", compile=True)


def test_the_scale_of_the_logits_stops_at_100_and_may_come_down_again(
        pretrain, tmp_path, monkeypatch):
    made = script.new_latent_rm

    def sharp(*args):
        latent_rm = made(*args)
        latent_rm.logit_scale.data.fill_(math.log(1000))
        return latent_rm

    monkeypatch.setattr(script, "new_latent_rm", sharp)
    assert pretrain(tmp_path, steps=2) == 0
    assert [scale for scale, in log(tmp_path, "logit_scale")] == pytest.approx([100, 100], rel=1e-2)
    image, text = torch.eye(2), torch.eye(2).flip(0)
    scale = torch.tensor(math.log(100.0)).requires_grad_()
    clip_loss(image, text, scale).backward()
    assert scale.grad > 0


def test_two_processes_compare_the_pairs_of_both(model_folder, shard, tmp_path):
    """The gradient too, logit_scale's included: the loss is over the global batch."""
    for name, world, rows in (("two", 2, 4), ("one", 1, 8)):
        argv = options(
            model_folder, shard, tmp_path / name, steps=3, lr=3e-5, batch_size=rows)
        launch(argv, world, "latent_rm").succeed()
    keys = "loss", "grad_norm", "logit_scale"
    for first, second in zip(
            log(tmp_path / "one", *keys), log(tmp_path / "two", *keys), strict=True):
        assert second == pytest.approx(first, rel=1e-4)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert max((one[key] - two[key]).abs().max().item() for key in one) <= 1e-5


def test_pictures_and_their_posteriors_train_alike(pretrain, model_folder, shard, tmp_path):
    encoded = tmp_path / "encoded"
    assert call(
        data.main, "--data", shard, "--out", encoded, "--model", model_folder,
        "--resolution", 32, "--device", "cpu", "--precision", "fp32") == 0
    assert pretrain(tmp_path / "pictures") == 0
    assert pretrain(tmp_path / "latents", data=encoded, heldout=encoded) == 0
    for (one,), (two,) in zip(
            log(tmp_path / "pictures", "loss"), log(tmp_path / "latents", "loss"), strict=True):
        assert two == pytest.approx(one, rel=1e-2)  # float16 on disk


@pytest.mark.parametrize("train_text", [True, False])
def test_a_given_text_tower_is_begun_with_and_trains_if_it_may(
        train_text, pretrain, model_folder, shard, tmp_path, clip_file):
    file, clip = clip_file()
    argv = options(model_folder, shard, tmp_path / "run", text_tower=file)
    argv += ["--train-text" if train_text else "--no-train-text"]
    assert call(script.main, *argv) == 0
    projection = weights(tmp_path / "run")["text.text_projection"]
    moved = (projection - clip.text_projection).abs().max().item()
    assert 0 < moved < 0.1 if train_text else moved == 0


def test_grad_checkpoint_recomputes_the_text_tower_and_changes_no_number(
        pretrain, tmp_path, monkeypatch):
    seen, ours = [], script.TextTransformer.set_grad_checkpointing

    def seen_switch(text, on):
        seen.append(on)
        return ours(text, on)

    monkeypatch.setattr(script.TextTransformer, "set_grad_checkpointing", seen_switch)
    kept, recomputed = tmp_path / "kept", tmp_path / "recomputed"
    assert pretrain(kept) == 0 and pretrain(recomputed, grad_checkpoint=True) == 0
    assert seen == [False, True]
    assert log(kept, "loss", "grad_norm") == log(recomputed, "loss", "grad_norm")


def test_a_tokenizer_that_says_no_length_is_refused(pretrain, model_folder, tmp_path, capsys):
    shutil.copytree(model_folder, tmp_path / "model")
    (tmp_path / "model/tokenizer/tokenizer_config.json").unlink()
    assert pretrain(tmp_path / "run", model=tmp_path / "model") == 2
    message = capsys.readouterr().err
    assert "model_max_length" in message and message.count("\n") == 1


@pytest.mark.parametrize("changes, named", [
    ({"text_tower": "/none/clip.pt"}, "/none/clip.pt"),
    ({"data": "/none/*.tar"}, "/none"),
    ({"heldout": "/none/*.tar"}, "--heldout /none"),
    ({"text_tower": ""}, "--text-tower"),
    ({"weight_decay": -1}, "--weight-decay -1"),
    ({"seed": 2**64}, "--seed"),
    ({"heldout": None}, "--heldout"),
    ({"resolution": 30}, "--resolution 30"),
    ({"resolution": 36}, "patch size 2"),
    ({"lr": 0}, "--lr"),
    ({"steps": 0}, "--steps 0"),
    ({"model": "/none/model"}, "/none/model"),
    ({"out": "/dev/null/run"}, "/dev/null/run")])
def test_wrong_options_are_one_line_and_exit_code_2(changes, named, pretrain, tmp_path, capsys):
    assert pretrain(**{"out": tmp_path} | changes) == 2
    message = capsys.readouterr().err
    assert named in message and message.count("\n") == 1


def test_the_pockets_pictures_are_held_out_from_the_pockets_training():
    args = script.Config()
    script.check(args)
    assert args.heldout == str(script.POCKET / "data" / "heldout-*.tar")


def test_an_unfinished_pre_training_says_so(pretrain, tmp_path):
    assert pretrain(tmp_path) == 0
    shutil.rmtree(tmp_path / "latent_rm")
    named = f"{tmp_path}: a run that has no latent_rm/ yet"
    with pytest.raises(InputError, match=re.escape(named)):
        LatentRM.from_pretrained(tmp_path)
    LatentRM.from_pretrained(tmp_path / "checkpoints/step-000004")


def test_keeping_a_text_tower_that_is_not_given_is_refused(model_folder, shard, tmp_path, capsys):
    assert call(script.main, *options(model_folder, shard, tmp_path), "--no-train-text") == 2
    assert "--text-tower" in capsys.readouterr().err


def test_a_text_tower_that_does_not_fit_is_refused(pretrain, tmp_path, clip_file, capsys):
    for layers, named in (
            (TINY.text_layers + 1, "has unknown transformer.resblocks.4"),
            (TINY.text_layers - 1, "lacks transformer.resblocks.3")):
        file, _ = clip_file(layers)
        assert pretrain(tmp_path / "run", text_tower=file) == 2
        message = capsys.readouterr().err
        assert named in message and str(file) in message and message.count("\n") == 1


def test_heldout_latents_of_another_size_are_refused(pretrain, tmp_path, capsys):
    assert pretrain(tmp_path / "run", heldout=posteriors(tmp_path / "other.tar", (4, 16, 16))) == 2
    assert "(4, 16, 16)" in capsys.readouterr().err


def test_the_preset_is_the_published_pre_training_and_asks_for_what_it_leaves_open(
        shard, tmp_path, capsys):
    args = cli.parse(script.Config(), "", ["--preset", "sd21", "--steps", "7"], script.PRESETS)
    assert (args.size, args.batch_size, args.lr, args.resolution) == ("sd21", 480, 5e-4, 512)
    assert (args.warmup, args.weight_decay, args.steps) == (10_000, 0.2, 7)
    pictures = ["--data", shard, "--heldout", shard]  # which a VAE has to encode
    for given, asked in (([], "data"), (pictures, "model")):
        argv = ["--preset", "sd21-768", *given, "--out", tmp_path]
        assert call(script.main, *argv) == 2
        assert f"--preset sd21-768 needs --{asked}" in capsys.readouterr().err
