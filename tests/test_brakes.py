"""What keeps a student from exploiting its reward (brakes.py): each option against its formula."""
import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import brakes
import train
from conftest import agree, launch, lines_of, log, rand, randomize
from data import Shards
from discriminator import Discriminator, teacher_features
from latent_rm import preference_loss
from lcm_solver import DDIMSolver
from lora import W_PROJECTION, LoRA, sharing
from pipeline import Pipeline
from reward import Mixture, Reward, load_reward
from support.weights import WEIGHTS
from unet import UNet


class Fixed(Reward):
    """Scores that are given, with gradient to the pictures; what it was shown is kept."""

    def __init__(self, name, *scores):
        super().__init__()
        self.name, self.scores, self.seen = name, list(scores), []

    def encode(self, prompts):
        return None

    def score(self, images, text):
        self.seen.append(images.detach())
        found = self.scores.pop(0) if self.scores else torch.zeros(len(images))
        return found + (images - images.detach()).mean(dim=(1, 2, 3))


def brightness(images, prompts):
    return images.mean(dim=(1, 2, 3))


def network(model_folder, seed, **more):
    return randomize(UNet.from_pretrained(model_folder, **more), seed)


@pytest.fixture
def scene(model_folder, shard):
    """All that one call of distillation_loss takes, for 4 rows, of which 3 are rewarded."""
    model = Pipeline.from_pretrained(model_folder, torch.device("cpu"), torch.float32)
    images, captions = zip(*(Shards(shard, 32)[i] for i in range(4)))
    draws = (rand(4, 4, 8, 8, seed=4), rand(4, 4, 8, 8, seed=5),
             torch.tensor([0.0, 0.3, 0.6, 0.9]), torch.tensor([0.0, 0.15, 0.61, 0.999]))
    return dict(
        model=model, teacher=network(model_folder, 1).requires_grad_(False),
        student=network(model_folder, 2, w_embed_dim=256),
        target=network(model_folder, 3, w_embed_dim=256).requires_grad_(False),
        reward=load_reward(f"pocket={model_folder}"), solver=DDIMSolver(model.schedule, 50),
        batch=(torch.stack(images), list(captions), draws),
        args=train.Config(ddim_steps=50, w_min=0.2, w_max=0.6, reward_scale=0.7, reward_batch=3))


def gradients(net, loss):
    net.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def same_gradients(ours, theirs):
    assert ours.keys() == theirs.keys()
    floor = 1e-2 * max(g.abs().max().item() for g in theirs.values())
    for name in theirs:
        agree(ours[name], theirs[name], floor=floor)


def resumed(fit, tmp_path, **options):
    """A run of 4 steps, and one that goes on from its second -> its folder. Both are equal bit for
    bit."""
    whole, out = tmp_path / "whole", tmp_path / "resumed"
    assert fit(whole, keep=3, **options) == 0
    shutil.copytree(whole, out)
    (out / "checkpoints/step-000004").rename(tmp_path / "moved-away")
    for folder in {file.parent for file in out.glob("*/*.safetensors")}:
        shutil.rmtree(folder)
    assert fit(out, keep=3, **options) == 0
    files = [file.relative_to(whole) for file in whole.glob("*/*.safetensors")]
    assert len(files) >= 2
    for file in files:  # not their bytes: the order of a file's metadata is anyone's
        one, two = load_file(out / file), load_file(whole / file)
        assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one), file
    assert log(out, "loss", "grad_norm") == log(whole, "loss", "grad_norm")
    return whole


# --------------------------------------------------------------------- the published proxy's letter

@pytest.mark.parametrize("kind", ["kl", "ce"])
def test_the_real_picture_is_privileged_if_it_is_asked_for(kind, proxied, monkeypatch):
    """The expert's scores are given: of the first row it prefers the prediction to the real one."""
    columns = torch.tensor([[0.9, 0.1], [0.2, 0.4], [0.5, 0.6]])  # prediction, EMA, real
    seen, of = [], train.proxy.preference_loss
    monkeypatch.setattr(train.proxy, "preference_loss", lambda *a: seen.append(a[1]) or of(*a))
    proxied["args"].rm_loss, losses = kind, {}
    for privileged in (False, True):
        proxied["args"].rm_privileged = privileged
        _, stats = train.distillation_loss(**proxied | {"reward": Fixed("fixed", *columns)})
        expected = preference_loss(columns.T, seen[-1], 0.3, 0.2, kind, privileged)
        losses[privileged] = stats["rm_loss"].item()
        assert losses[privileged] == pytest.approx(expected.item(), rel=1e-5)
    assert losses[False] != pytest.approx(losses[True], rel=1e-3)
    # of the four pairs of a generated and a real picture, one
    assert stats["expert/prefers_generated"].item() == 0.25


def test_of_a_reward_no_more_than_the_cap_counts_and_beyond_it_gives_no_gradient(scene):
    """min(R, cap) of each picture and of each part of a sum, and its gradient; the log shows R."""
    args = scene["args"]
    args.reward_cap = 2.0
    one, two = torch.tensor([1.0, 3.0, 5.0]), torch.tensor([2.5, 0.0, -1.0])
    both = Mixture([Fixed("one", one), Fixed("two", two)], [0.5, 2.0])
    images = torch.full((3, 3, 8, 8), 0.5).requires_grad_()
    parts, plain = brakes.score(both, images, [""] * 3, args)
    assert parts["one"].tolist() == [1, 2, 2] and parts["two"].tolist() == [2, 0, -1]
    # -relu(2 - R), as published, is 2 less
    agree(parts["one"] - 2, -F.relu(2 - one))
    both.total(parts).sum().backward()
    slopes = images.grad.sum(dim=(1, 2, 3)).tolist()
    assert slopes == pytest.approx([0.5, 2.0, 2.0])  # of 1, of 2, of 2
    assert plain["one"].tolist() == [1, 3, 5]
    both = Mixture([Fixed("one", one), Fixed("two", two)], [0.5, 2.0])
    loss, stats = train.distillation_loss(**scene | {"reward": both})
    assert stats["reward"].item() == pytest.approx((0.5 * 9 + 2 * 1.5) / 3)
    capped = (0.5 * 5 + 2 * 1.0) / 3
    assert loss.item() == pytest.approx(stats["lcd"].item() - 0.7 * capped, rel=1e-5)


def test_beyond_the_cap_the_expert_prefers_none(proxied, monkeypatch):
    columns = torch.tensor([[0.9, 0.1], [0.5, 0.4], [0.7, 0.6]])
    proxied["args"].reward_cap = 0.45
    seen, of = [], train.proxy.preference_loss
    monkeypatch.setattr(train.proxy, "preference_loss", lambda *a: seen.append(a[0]) or of(*a))
    _, stats = train.distillation_loss(**proxied | {"reward": Fixed("fixed", *columns)})
    agree(seen[0], torch.tensor([[0.45, 0.45, 0.45], [0.1, 0.4, 0.45]]))
    assert stats["expert/real"].item() == pytest.approx(0.65)


def test_a_reward_may_read_at_another_resolution(scene, model_folder):
    """Antialiased, before all that the reward itself does with a picture; parts of a sum too."""
    spec = f"pocket={model_folder}"
    images = rand(3, 3, 32, 32).mul(0.3).add(0.5).clamp(0, 1)
    small = F.interpolate(images, (12, 12), mode="bicubic", antialias=True).clamp(0, 1)
    reward, plain = load_reward(spec, resolution=12), load_reward(spec)
    prompts = ["moon", "rocket", ""]
    agree(reward(images, prompts), plain(small, prompts), 1e-6)
    assert (reward(images, prompts) - plain(images, prompts)).abs().max() > 1e-3
    both = load_reward(f"jpeg+{spec}*2", resolution=12)
    agree(both(images, prompts), load_reward(f"jpeg+{spec}*2")(small, prompts), 1e-6)
    loaded = train.Networks.load(
        train.Config(teacher=str(model_folder), resolution=32, reward=spec, reward_resolution=12),
        None, torch.device("cpu"), torch.float32)
    agree(loaded.reward(images, prompts), plain(small, prompts), 1e-6)


# --------------------------------------------------------------------- the ratio of the gradients

def length(tensor):
    return tensor.square().sum().sqrt().item()


@pytest.mark.parametrize("path", ["direct", "proxy"])
def test_the_gradients_at_the_students_latents_are_measured_apart(path, scene, proxied):
    """Against autograd's own, term by term; the sum of both reaches the student as before."""
    case, seen = (scene if path == "direct" else proxied), []
    of = train.consistency_function

    def keep(*inputs):
        seen.append(of(*inputs))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "consistency_function", keep)
        loss, stats = train.distillation_loss(**case)
        latents = seen[-1]  # the student's; the target's came before
        plain, bare = train.distillation_loss(**case | {"reward": None, "latent_rm": None})
        plain_latents = seen[-1]
    whole, = torch.autograd.grad(loss, latents, retain_graph=True)
    lcd, = torch.autograd.grad(plain, plain_latents, retain_graph=True)
    plain.backward(retain_graph=True)
    assert bare["latent_grad"].sqrt().tolist() == pytest.approx([length(lcd), 0, 0], rel=1e-4)
    stats["latent_grad"].zero_()
    loss.backward()
    found = stats["latent_grad"].sqrt().tolist()
    assert found == pytest.approx([length(lcd), length(whole - lcd), 0], rel=1e-4)
    assert found[1] > 1e-4


def test_the_log_shows_the_ratio_wherever_there_is_a_reward(fit, tmp_path, model_folder):
    reward = f"pocket={model_folder}"
    for scale in (1.0, 3.0):
        out = tmp_path / str(scale)
        assert fit(out, steps=1, reward=reward, reward_scale=scale, norms_every=0) == 0
    (one,), (three,) = (log(tmp_path / str(scale), "reward_ratio")[0] for scale in (1.0, 3.0))
    assert three == pytest.approx(3 * one, rel=1e-4) and one > 0
    assert fit(tmp_path / "plain", steps=1) == 0
    line = json.loads((tmp_path / "plain/log.jsonl").read_text())
    assert "reward_ratio" not in line and "latent_grad" not in line


# --------------------------------------------------------------------- a flatter reward

def test_jitter_shifts_resizes_and_adds_noise():
    images, still = rand(1, 3, 16, 16).mul(0.2).add(0.5).clamp(0, 1), torch.zeros(1, 3, 16, 16)
    seen = lambda u, noise, strength: brakes.jittered(images, torch.tensor([u]), noise, strength)
    agree(seen([0.5, 0.5, 0.5], still, 0.1), images, 1e-5)
    # to the left by 2 of 16 pixels, down by 1; the edge is repeated
    moved = seen([1.0, 0.25, 0.5], still, 0.125)
    agree(moved[..., 1:, :14], images[..., :15, 2:], 1e-5)
    agree(moved[..., 0, :14], images[..., 0, 2:], 1e-5)
    agree(moved[..., 14:], moved[..., 13:14].expand(-1, -1, -1, 2), 1e-5)
    # half as much of the picture, twice as large
    large = F.interpolate(images[..., 4:12, 4:12], scale_factor=2, mode="bilinear")
    agree(seen([0.5, 0.5, 0.0], still, 0.5)[..., 1:-1, 1:-1], large[..., 1:-1, 1:-1], 1e-5)
    noise = rand(1, 3, 16, 16, seed=1)
    agree(seen([0.5, 0.5, 0.5], noise, 0.3), (images + 0.3 * noise).clamp(0, 1), 1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = seen([0.9, 0.2, 0.7], noise, 0.1)
    agree(rounded, seen([0.9, 0.2, 0.7], noise, 0.1), 1e-6)


def test_what_jitter_draws_leaves_the_other_draws_as_they_were_and_hangs_on_the_place_alone():
    of = lambda places, side=None: train.data.random_draws(3, places, (4, 8, 8), "cpu", side)
    plain, more = of(range(4)), of(range(4), 16)
    assert all(torch.equal(one, two) for one, two in zip(plain, more)) and len(plain) == 4
    u, noise = more[4:]
    assert u.shape == (4, 3) and noise.shape == (4, 3, 16, 16) and 0 <= u.min() < u.max() < 1
    assert torch.equal(of([2], 16)[5][0], noise[2]) and not torch.equal(noise[0], noise[1])


@pytest.mark.parametrize("path", ["direct", "proxy"])
def test_the_reward_sees_each_picture_jittered_by_its_own_draw(path, scene, proxied):
    """Candidates that are compared are all seen alike."""
    case, rows = (scene, 3) if path == "direct" else (proxied, 2)
    view = torch.rand(4, 3), rand(4, 3, 32, 32, seed=8)
    images, captions, draws = case["batch"]
    case["args"].reward_jitter = 0.1
    plain, seen = Fixed("fixed"), Fixed("fixed")
    train.distillation_loss(**case | {"reward": plain})
    train.distillation_loss(**case | {"reward": seen, "batch": (images, captions, (*draws, *view))})
    assert len(seen.seen) == len(plain.seen) == (1 if path == "direct" else 3)
    for before, after in zip(plain.seen, seen.seen):
        agree(after, brakes.jittered(before, *(x[:rows] for x in view), 0.1), 1e-5)


def test_the_rewards_weights_are_shaken_within_a_step_alone(model_folder):
    reward = load_reward(f"pocket={model_folder}")
    args = train.Config(reward_weight_noise=0.1, seed=7)
    before = [p.clone() for p in reward.parameters()]

    def inside(step):
        with brakes.shaken(reward, args, step):
            return [p.clone() for p in reward.parameters()]

    generator = torch.Generator().manual_seed(7 * 1_000_003 + 5)
    expected = [p * (1 + 0.1 * torch.randn(p.shape, generator=generator)) for p in before]
    assert all(torch.equal(one, two) for one, two in zip(inside(5), expected))
    assert not torch.equal(inside(6)[-2], expected[-2])
    with pytest.raises(KeyError), brakes.shaken(reward, args, 5):
        raise KeyError
    assert all(torch.equal(one, two) for one, two in zip(before, reward.parameters()))
    assert not any(p.requires_grad for p in reward.parameters())
    with brakes.shaken(reward, train.Config(), 5):
        assert all(torch.equal(one, two) for one, two in zip(before, reward.parameters()))


# --------------------------------------------------------------------- several rewards, one length

def averages_of(*names):
    return brakes.Averages(brakes.AveragesConfig(names))


def test_several_rewards_count_in_deviations_from_their_running_means():
    """Weighted sums over all pictures before, those n steps ago 0.95^n times; a second writing of
    it in float64. Until eight pictures have been seen, no reward counts."""
    averages, args = averages_of("a", "b"), train.Config(reward_normalize=True, grad_accum=2)
    steps = [(100 + 3 * rand(4, seed=i), -0.2 + 0.01 * rand(4, seed=9 + i)) for i in range(3)]
    new = dict(zip("ab", (torch.tensor([103.0, 97]), torch.tensor([-0.2, -0.19]))))
    squares = torch.zeros(2)
    for i, step in enumerate(steps):
        if i < 2:  # 4 pictures, then 7.8
            assert all(part.tolist() == [0, 0] for part in averages.normalized(new).values())
        passes = [brakes.sums_of(dict(zip("ab", (part[p] for part in step))), args)
                  for p in (slice(2), slice(2, 4))]
        stats = {"scores": sum(passes) / 2, "latent_grad": squares}
        averages.learn(stats, args, 1)
        assert "scores" not in stats and not squares.any()
    weights = torch.tensor([0.95**2, 0.95, 1.0], dtype=torch.float64).repeat_interleave(4)
    for k, name in enumerate("ab"):
        x = torch.cat([step[k] for step in steps]).double()
        mean = (weights * x).sum() / weights.sum()
        deviation = ((weights * (x - mean) ** 2).sum() / weights.sum()).sqrt()
        agree(averages.normalized(new)[name].double(), (new[name] - mean) / deviation, 2e-2)


@pytest.mark.parametrize("path", ["direct", "proxy"])
def test_what_is_maximised_is_the_sum_of_the_normalised_parts(path, scene, proxied):
    case = scene if path == "direct" else proxied
    case["args"].reward_normalize = True
    averages = averages_of("one", "two")
    averages.scores.copy_(torch.tensor([[16.0, 16], [32, 80], [80, 464]]))
    # means 2 and 5, deviations 1 and 2
    one, two = torch.tensor([1.0, 3.0, 5.0]), torch.tensor([2.5, 0.0, -1.0])
    if path == "direct":
        both = Mixture([Fixed("one", one), Fixed("two", two)], [0.5, 2.0])
        loss, stats = train.distillation_loss(**case | {"reward": both, "averages": averages})
        total = (0.5 * (one - 2) + 2 * (two - 5) / 2).mean().item()
        assert loss.item() == pytest.approx(stats["lcd"].item() - 0.7 * total, rel=1e-5)
        agree(stats["scores"], torch.tensor([[3.0, 3], [9, 1.5], [35, 7.25]]), 1e-6)
        assert stats["reward"].item() == pytest.approx((0.5 * 9 + 2 * 1.5) / 3)
        return
    columns = [x.reshape(3, 1).repeat(1, 2) for x in (one, two)]
    seen, of = [], train.proxy.preference_loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.proxy, "preference_loss", lambda *a: seen.append(a[0]) or of(*a))
        both = Mixture([Fixed(n, *c) for n, c in zip(("one", "two"), columns)], [0.5, 2.0])
        _, stats = train.distillation_loss(**case | {"reward": both, "averages": averages})
    agree(seen[0][0], 0.5 * (one - 2) + 2 * (two - 5) / 2, 1e-6)
    agree(stats["scores"], torch.tensor([[6.0, 6], [18, 3], [70, 14.5]]), 1e-6)


def test_the_weight_of_the_reward_follows_the_ratio_that_is_asked_for(scene):
    """R |grad L_LCD| / |grad R|: VQGAN's, from what the step before measured."""
    args, averages = scene["args"], averages_of("pocket")
    args.reward_ratio = 0.25
    scene["averages"] = averages
    lengths = []
    for _ in range(2):
        loss, stats = train.distillation_loss(**scene)
        loss.backward()
        lengths.append(stats["latent_grad"][:2].sqrt().tolist())
        averages.learn(stats, args, 1)
        scale = stats["reward_scale"].item()
        assert loss.item() == pytest.approx(
            (stats["lcd"] - scale * stats["reward"]).item(), rel=1e-5)
    (lcd, reward), (lcd_again, reward_again) = lengths  # of one and the same step
    assert reward / lcd != pytest.approx(0.25, rel=0.1)  # at --reward-scale
    assert lcd_again == pytest.approx(lcd, rel=1e-4)
    assert reward_again / lcd_again == pytest.approx(0.25, rel=1e-3)
    assert scale == pytest.approx(0.25 * lcd / (reward / 0.7), rel=1e-3)


def test_a_reward_whose_gradient_has_gone_gets_no_more_than_a_finite_weight():
    averages, args = averages_of("a"), train.Config(reward_ratio=0.5, reward_scale=3.0)
    assert averages.scale(args).item() == 3
    averages.squares.copy_(torch.tensor([1.0, 1e-20]))
    assert averages.scale(args).item() == pytest.approx(1e4)
    averages.squares.copy_(torch.tensor([4.0, 1.0]))
    assert averages.scale(args).item() == 1
    stats = {"scores": torch.zeros(3, 1), "latent_grad": torch.tensor([9.0, 0, 0])}
    averages.learn(stats, args, 1)  # a step whose reward gave no gradient says nothing of the ratio
    assert averages.scale(args).item() == pytest.approx(1)
    assert averages.scale(train.Config(reward_scale=0.3)).item() == pytest.approx(0.3)


# --------------------------------------------------------------------- the teacher's weights

def test_the_pull_is_the_gradient_of_half_the_squared_distance_from_the_teacher(model_folder):
    """In bf16 too, where the teacher beside the student is rounded."""
    student = network(model_folder, 2, w_embed_dim=256)
    teacher = UNet.from_pretrained(model_folder)
    theirs, names = dict(teacher.named_parameters()), dict(student.named_parameters())
    distance = sum((p - theirs[name].detach()).square().sum()
                   for name, p in names.items() if name in theirs)
    expected = torch.autograd.grad(0.3 / 2 * distance, [names[name] for name in theirs])
    args = train.Config(teacher=str(model_folder), teacher_pull=0.3)
    for frozen in (teacher, UNet.from_pretrained(model_folder, dtype=torch.bfloat16)):
        for p in student.parameters():
            p.grad = torch.ones_like(p)
        brakes.teacher_pull(student, frozen, args, torch.device("cpu"))()
        for name, gradient in zip(theirs, expected):
            agree(names[name].grad - 1, gradient, 1e-4)
        assert (names["time_embedding.cond_proj.weight"].grad == 1).all()
    assert brakes.teacher_pull(student, teacher, train.Config(), torch.device("cpu")) is None


def test_updates_are_pulled_as_the_matrices_that_they_are(model_folder):
    student = sharing(UNet.from_pretrained(model_folder), time_cond_proj_dim=256)
    LoRA.new(student, 3, alpha=1.5).attach(student)
    updates = student.lora.updates
    for i, update in enumerate(updates.values()):
        update.B.data += 0.2 * rand(*update.B.shape, seed=i)
    distance = 0
    for name, update in updates.items():
        A, B = update.A, update.B
        matrix = 0.5 * torch.einsum("or,r...->o...", B.flatten(1), A)  # alpha / rank
        assert name == W_PROJECTION or torch.allclose(matrix, update.matrix(), atol=1e-5)
        distance += 0 if name == W_PROJECTION else matrix.square().sum()
        for p in (A, B):
            p.grad = torch.zeros_like(p)
    pulled = [p for name, u in updates.items() if name != W_PROJECTION for p in (u.A, u.B)]
    expected = torch.autograd.grad(0.3 / 2 * distance, pulled)
    args = train.Config(lora=3, teacher_pull=0.3)
    brakes.teacher_pull(student, None, args, torch.device("cpu"))()
    for p, gradient in zip(pulled, expected):
        agree(p.grad, gradient, 1e-4)
    assert not updates[W_PROJECTION].B.grad.any()


# --------------------------------------------------------------------- an anchor of real latents

def test_features_are_the_ends_of_the_levels_and_the_middle(model_folder):
    unet = network(model_folder, 1)
    seen = []
    modules = (unet.down_blocks[0].attentions[-1], unet.down_blocks[1].attentions[-1],
               unet.down_blocks[2].resnets[-1], unet.mid_block.resnets[1])
    for module in modules:
        module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    features = teacher_features(
        unet, rand(2, 4, 8, 8), torch.tensor([99, 299]), rand(2, 6, 32, seed=2))
    small = [F.avg_pool2d(x, x.shape[-1] // 2) for x in seen]
    assert len(small) == 4 and features.shape == (2, 16 + 32 + 32 + 32, 2, 2)
    agree(features, torch.cat(small, dim=1), 1e-5)


@pytest.fixture
def anchored(scene):
    scene["args"].anchor = 0.3
    judge = Discriminator.load(scene["teacher"], 0, None, torch.device("cpu"))
    return scene | {"discriminator": randomize(judge)}


def test_the_anchors_two_losses_equal_the_hinge_written_out(anchored, monkeypatch):
    """LADD's: D learns relu(1 + D(fake)) + relu(1 - D(real)), the student -D(fake), row by row."""
    seen, of = [], train.consistency_function
    monkeypatch.setattr(train, "consistency_function", lambda *a: seen.append(of(*a)) or seen[-1])
    loss, stats = train.distillation_loss(**anchored)
    latents = seen[-1]
    leaf = latents.detach().requires_grad_()
    model, teacher, judge = (anchored[k] for k in ("model", "teacher", "discriminator"))
    images, captions, (posterior_noise, noise, _, u_s) = anchored["batch"]
    ab, pulls, hinges = model.schedule.alphas_cumprod, [], []
    for i in range(4):
        mean, std = model.vae.posterior(images[i:i + 1])
        z = (mean + std * posterior_noise[i]) * 0.18215
        share = u_s[i].item() * 50 - int(u_s[i].item() * 50)
        t = (int(share * 50) + 1) * 20 - 1
        c, n = model.text_encoder([captions[i]]), noise[i:i + 1].flip(3).flip(2)
        fake, real = (judge.head(teacher_features(
            teacher, ab[t]**0.5 * x + (1 - ab[t])**0.5 * n, torch.tensor([t]), c))
            for x in (leaf[i:i + 1], z))
        pulls.append(-fake.mean())
        hinges.append((1 + fake).relu().mean() + (1 - real).relu().mean())
    pull, hinge = sum(pulls) / 4, sum(hinges) / 4
    assert stats["anchor"].item() == pytest.approx(pull.item(), rel=1e-4)
    assert stats["anchor_loss"].item() == pytest.approx(hinge.item(), rel=1e-4)
    total = stats["lcd"] - 0.7 * stats["reward"] + 0.3 * stats["anchor"]
    assert stats["loss"].item() == pytest.approx(total.item(), rel=1e-5)

    latents.retain_grad()
    (direction,) = torch.autograd.grad(pull, leaf, retain_graph=True)
    theirs = gradients(judge.head, hinge)
    ours = gradients(judge.head, loss)
    same_gradients(ours, theirs)  # D learns from its own loss alone
    bare = anchored | {"discriminator": None}
    again, _ = train.distillation_loss(**bare)
    (without,) = torch.autograd.grad(again, seen[-1])
    agree(latents.grad - without, 0.3 * direction, 1e-3)  # and the student from the other alone
    assert all(p.grad is None for p in teacher.parameters())


# --------------------------------------------------------------------- whole runs

def every(model_folder, case):
    """Options of a run for each of these brakes."""
    spec = f"pocket={model_folder}"
    proxied = dict(latent_rm=model_folder / "latent_rm", rm_image_layers=1, rm_text_layers=2)
    several = dict(reward=f"{spec}*0.7+pocket:aliased={model_folder}*0.3", reward_normalize=True)
    return {
        "shown otherwise": dict(reward=spec, reward_jitter=0.05, reward_weight_noise=0.05,
                                reward_cap=0.9, reward_resolution=16, teacher_pull=1e3),
        "balanced": several | dict(reward_ratio=0.5),
        "anchored": dict(reward=spec, anchor=0.1),
        "proxied": several | proxied | dict(reward_jitter=0.05, rm_privileged=True, anchor=0.1),
        "updates": dict(reward=spec, lora=4, teacher_pull=1e3, anchor=0.1, reward_ratio=0.5),
        "shared out": dict(reward=spec, teacher_pull=1e3, anchor=0.1, reward_ratio=0.5),
    }[case]


def rows_of(options):
    """Of a step: with 8 a reward's deviation is known from the second step on."""
    return 8 if "reward_normalize" in options else 4


CASES = ["shown otherwise", "balanced", "anchored", "proxied", "updates"]


@pytest.mark.parametrize("case", [
    case if case in ("balanced", "proxied") else pytest.param(case, marks=pytest.mark.slow)
    for case in CASES])
def test_stopped_and_resumed_equals_one_run_bit_for_bit(case, fit, tmp_path, model_folder):
    options = every(model_folder, case)
    out = resumed(fit, tmp_path, batch_size=rows_of(options), **options)
    kept = {"balanced": ["averages"], "anchored": ["discriminator"], "updates": ["averages"],
            "proxied": ["averages", "discriminator"]}.get(case, [])
    assert lines_of(out)[-1]["reward_ratio"] > 0
    assert all((out / name / WEIGHTS).is_file() for name in kept)
    if "reward_ratio" in options:
        scales = [scale for scale, in log(out, "reward_scale")]
        assert scales[0] == 1 != scales[-1]


@pytest.mark.slow
@pytest.mark.parametrize("case", [*CASES, "shared out"])
def test_two_processes_equal_one_with_the_doubled_batch(
        case, fit, options, tmp_path, model_folder):
    same = dict(steps=3, lr=3e-5) | every(model_folder, case)
    rows = rows_of(same)
    launch(options(tmp_path / "two", batch_size=rows // 4, grad_accum=2,
                   shard=case == "shared out", **same), 2).succeed()
    assert fit(tmp_path / "one", batch_size=rows, **same) == 0
    keys = [key for key in ("loss", "reward", "grad_norm", "reward_ratio", "anchor_loss",
                            "reward_scale", "rm_loss") if key in lines_of(tmp_path / "one")[0]]
    ones, twos = (log(tmp_path / name, *keys) for name in ("one", "two"))
    for one, two in zip(ones, twos, strict=True):
        assert two == pytest.approx(one, rel=2e-3)
    if "lora" not in same:  # of what began elsewhere than at zero, how far did it go?
        start = UNet.from_pretrained(model_folder, 256).state_dict()
        one, two = (load_file(tmp_path / name / "unet" / WEIGHTS) for name in ("one", "two"))
        length = lambda x, y: sum((x[key] - y[key]).square().sum().item() for key in x) ** 0.5
        assert length(one, two) <= 0.05 * length(one, start)
    files = [file.relative_to(tmp_path / "one") for file in tmp_path.glob("one/*/*.safetensors")]
    assert len(files) >= 2
    for file in files:
        one, two = (load_file(tmp_path / name / file) for name in ("one", "two"))
        assert all(torch.allclose(one[key], two[key], rtol=1e-3, atol=2e-5) for key in one), file


REACHES = [
    {"reward_jitter": 0.2}, {"reward_weight_noise": 0.5}, {"reward_resolution": 8},
    {"reward_cap": -2.0}, {"reward_ratio": 50.0}, {"teacher_pull": 1e4}, {"anchor": 1.0},
    {"anchor": 1.0, "anchor_lr": 1e-2}]


@pytest.mark.parametrize("option", REACHES, ids=lambda option: " ".join(option))
def test_each_brake_reaches_the_training(option, fit, tmp_path, model_folder):
    """All else is a function of the seed, so one bit shows it."""
    same = dict(steps=2, reward=f"pocket={model_folder}", norms_every=0, log_every=1)
    bare = {"anchor": 1.0} if "anchor_lr" in option else {}
    folder = "discriminator" if "anchor_lr" in option else "unet"
    assert fit(tmp_path / "with", **same, **option) == 0
    assert fit(tmp_path / "without", **same, **bare) == 0
    one, two = (load_file(tmp_path / name / folder / WEIGHTS) for name in ("with", "without"))
    assert any(not torch.equal(one[key], two[key]) for key in one)
    anchored = [json.loads(line).get("anchor_ratio", 0) > 0
                for line in (tmp_path / "with/log.jsonl").read_text().splitlines()]
    assert anchored == ["anchor" in option] * 2


# --------------------------------------------------------------------- bad input

WRONG = {
    "a cap of no reward": ({"reward_cap": 2}, "--reward-cap: of the reward, and there is none"),
    "a resolution of 0": ({"reward_resolution": 0, "reward": "pocket"}, "--reward-resolution 0"),
    "half of the picture": ({"reward_jitter": 0.5, "reward": "pocket"}, "--reward-jitter 0.5"),
    "weights off by less than nothing": (
        {"reward_weight_noise": -1, "reward": "pocket"}, "--reward-weight-noise -1"),
    "weights of an expert": (
        {"reward_weight_noise": 0.1, "reward": "pocket", "latent_rm": "x"}, "with --latent-rm"),
    "weights of a function": (
        {"reward_weight_noise": 0.1, "reward": "torch:test_brakes.brightness", "norms_every": 0},
        "torch:test_brakes.brightness has no weights"),
    "a ratio of nothing": ({"reward_ratio": 0, "reward": "pocket"}, "--reward-ratio 0"),
    "a ratio of a scale of nothing": (
        {"reward_ratio": 0.5, "reward_scale": 0, "reward": "pocket"}, "--reward-scale 0"),
    "a pull away": ({"teacher_pull": -1}, "--teacher-pull -1"),
    "a pull of updates that are shared out": (
        {"teacher_pull": 1, "lora": 2, "shard": True}, "--teacher-pull with --lora and --shard"),
    "an anchor that pushes": ({"anchor": -1}, "--anchor -1"),
    "a rate of no anchor": ({"anchor_lr": 1e-3}, "give --anchor too"),
    "privileged without a proxy": (
        {"rm_privileged": True, "reward": "pocket"}, "--rm-privileged: of the latent proxy"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options_are_one_line_and_exit_code_2(case, fit, tmp_path, capsys):
    changes, named = WRONG[case]
    assert fit(tmp_path, **changes) == 2
    message = capsys.readouterr().err
    assert named in message and message.count("\n") == 1
