import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from conftest import (
    UNET,
    agree,
    agree_by_name,
    cut,
    edit_json,
    norm_eps,
    rand,
    randomize,
    same_weights,
    shapes,
)
from lcm_solver import NoiseSchedule, ScheduleConfig, guidance_embedding
from support.weights import WEIGHTS, InputError
from unet import UNet, UNetConfig


def inputs(h=8, w=8, width=32):
    return rand(2, 4, h, w, seed=1), torch.tensor([3, 981]), rand(2, 7, width, seed=2)


def outputs_and_gradients(net, call, latents):
    """-> output, {name: gradient} of a fixed random projection of the output."""
    latents = latents.clone().requires_grad_()
    out = call(latents)
    (out * rand(*out.shape, seed=3)).sum().backward()
    gradients = {name: p.grad for name, p in net.named_parameters()}
    assert all(g is not None for g in gradients.values())
    return out.detach(), gradients | {"latents": latents.grad}


def assert_same(first, second):
    agree(first[0], second[0])
    agree_by_name(first[1], second[1])


FOUR_LEVELS = {
    "block_out_channels": (16, 32, 64, 64), "layers_per_block": 2,
    "attention_head_dim": (1, 2, 4, 4), "cross_attention_dim": 32,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
VARIANTS = {
    "2.1-base": FOUR_LEVELS,
    "2.1-768": FOUR_LEVELS | {"upcast_attention": True, "sample_size": 12},
    "1.5": FOUR_LEVELS | {
        "use_linear_projection": False, "attention_head_dim": 8, "cross_attention_dim": 24},
    "one layer a block": {},
    "text at low resolution only": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")},
}


@pytest.mark.parametrize("size", [(8, 8), (12, 20), (13, 21)], ids=str)
@pytest.mark.parametrize("student", [False, True], ids=["teacher", "student"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_and_backward_equal_diffusers(variant, student, size, tmp_path):
    torch.manual_seed(0)
    config = UNetConfig(**UNET | VARIANTS[variant], time_cond_proj_dim=256 if student else None)
    randomize(UNet(config)).save_pretrained(tmp_path / "unet")
    ours = UNet.from_pretrained(tmp_path / "unet")
    theirs = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    latents, t, context = inputs(*size, width=config.cross_attention_dim)
    w = guidance_embedding(torch.tensor([5.0, 14.0])) if student else None
    reference = lambda z: theirs(z, t, context, timestep_cond=w).sample
    assert_same(outputs_and_gradients(ours, lambda z: ours(z, t, context, w), latents),
                outputs_and_gradients(theirs, reference, latents))


def test_default_is_sd21_with_865_910_724_parameters_and_diffusers_keys():
    with torch.device("meta"):
        ours = UNet()
        theirs = UNet2DConditionModel(
            sample_size=64, cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20],
            use_linear_projection=True)
    assert sum(p.numel() for p in ours.parameters()) == 865_910_724
    assert shapes(ours) == shapes(theirs)


def test_every_norms_eps_equals_diffusers():
    with torch.device("meta"):
        ours, theirs = UNet(UNetConfig(**UNET)), UNet2DConditionModel(**UNET)
    eps = norm_eps(ours)
    assert eps == norm_eps(theirs)
    before_transformers = {name for name in eps if name.endswith(".norm")}
    assert len(before_transformers) == 7 and {eps[name] for name in before_transformers} == {1e-6}
    assert {eps[name] for name in eps.keys() - before_transformers} == {1e-5}


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("student", [False, True], ids=["teacher", "student"])
def test_forward_equals_diffusers_at_full_size(student, tmp_path):
    """865.9 M parameters, latents of 64x64, float32: a minute or two, and 10 GB."""
    torch.manual_seed(0)
    config = UNetConfig(time_cond_proj_dim=256 if student else None)
    UNet(config).save_pretrained(tmp_path / "unet")
    ours = UNet.from_pretrained(tmp_path / "unet")
    if student:
        torch.nn.init.normal_(ours.time_embedding.cond_proj.weight, std=0.05)
        ours.save_pretrained(tmp_path / "unet")
    latents, t, context = rand(1, 4, 64, 64, seed=1), torch.tensor([981]), rand(1, 77, 1024, seed=2)
    w = guidance_embedding(torch.tensor([7.5])) if student else None
    out = ours(latents, t, context, w)
    del ours
    theirs = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    agree(out, theirs(latents, t, context, timestep_cond=w).sample)


def test_student_equals_teacher_at_step_zero(model_folder):
    teacher = UNet.from_pretrained(model_folder)
    student = UNet.from_pretrained(model_folder, w_embed_dim=256)
    assert student.config.time_cond_proj_dim == 256
    assert not student.time_embedding.cond_proj.weight.any()
    latents, t, context = inputs()
    expected = teacher(latents, t, context)
    for w in (0.0, 5.0, 14.0):
        out = student(latents, t, context, guidance_embedding(torch.full((2,), w)))
        assert torch.equal(out, expected)
    schedule = NoiseSchedule(ScheduleConfig())
    assert torch.equal(schedule.to_x0(out, latents, t), schedule.to_x0(expected, latents, t))


def test_w_changes_a_trained_student(model_folder):
    student = UNet.from_pretrained(model_folder / "student")
    latents, t, context = inputs()
    a, b = (
        student(latents, t, context, guidance_embedding(torch.full((2,), w)))
        for w in (5.0, 14.0))
    assert (a - b).abs().max() > 1e-3 * a.abs().max()


def test_save_then_load_is_exact(model_folder, tmp_path):
    first = UNet.from_pretrained(model_folder / "student")
    first.save_pretrained(tmp_path / "again")
    second = UNet.from_pretrained(tmp_path / "again")
    assert second.config == first.config
    assert same_weights(first, second)
    assert [f.name for f in tmp_path.iterdir()] == ["again"]  # nothing left over


def test_half_precision_file_loads_at_the_dtype_asked_for(model_folder, tmp_path):
    UNet.from_pretrained(model_folder).save_pretrained(tmp_path / "unet", dtype=torch.float16)
    assert {v.dtype for v in load_file(tmp_path / "unet" / WEIGHTS).values()} == {torch.float16}
    unet = UNet.from_pretrained(tmp_path / "unet", dtype=torch.float32)
    assert {p.dtype for p in unet.parameters()} == {torch.float32}


def edit_weights(change):
    def apply(folder):
        state = load_file(folder / WEIGHTS)
        change(state)
        save_file(state, folder / WEIGHTS)
    return apply


def edit_config(**changes):
    return lambda folder: edit_json(folder / "config.json", **changes)


KEY, COND_PROJ = "down_blocks.0.attentions.0.proj_in.weight", "time_embedding.cond_proj.weight"
BROKEN = {
    "missing tensor": (edit_weights(lambda s: s.pop(KEY)), [WEIGHTS, KEY]),
    "surplus tensor": (edit_weights(lambda s: s.update(extra=torch.zeros(1))), [WEIGHTS, "extra"]),
    "renamed tensor": (edit_weights(lambda s: s.update(renamed=s.pop(KEY))), [WEIGHTS, KEY]),
    "misshapen tensor": (
        edit_weights(lambda s: s.update({KEY: torch.zeros(3)})), [WEIGHTS, KEY, "(3,)"]),
    "a student's cond_proj in a teacher": (
        edit_weights(lambda s: s.update({COND_PROJ: torch.zeros(16, 256)})), [WEIGHTS, COND_PROJ]),
    "truncated weights": (lambda folder: cut(folder / WEIGHTS, 10_000), [WEIGHTS]),
    "empty weights": (lambda folder: cut(folder / WEIGHTS, 0), [WEIGHTS]),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), [WEIGHTS]),
    "no config": (lambda folder: (folder / "config.json").unlink(), ["config.json"]),
    "truncated config": (lambda folder: cut(folder / "config.json", 50), ["config.json"]),
    "unknown config field": (
        edit_config(addition_embed_type="text"), ["config.json", "addition_embed_type"]),
    "a value we do not build": (edit_config(act_fn="gelu"), ["config.json", "act_fn"]),
    "unknown block": (edit_config(down_block_types=["AttnDownBlock2D"] * 3), ["AttnDownBlock2D"]),
    "another width": (edit_config(cross_attention_dim=48), [WEIGHTS, "attn2.to_k"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_folder_that_does_not_fit_is_refused_by_name(case, model_copy, tmp_path):
    spoil, named = BROKEN[case]
    folder = model_copy / "unet"
    spoil(folder)
    with pytest.raises(InputError) as error:
        UNet.from_pretrained(folder)
    named = [str(tmp_path)] * (case != "unknown block") + named
    assert all(name in str(error.value) for name in named)


def test_only_cond_proj_may_be_absent_from_a_student(model_copy):
    edit_weights(lambda s: s.pop(KEY))(model_copy / "unet")
    with pytest.raises(InputError, match=KEY):
        UNet.from_pretrained(model_copy / "unet", w_embed_dim=256)


def test_checkpointing_gives_the_same_gradients(model_folder):
    student = UNet.from_pretrained(model_folder / "student")
    latents, t, context = inputs()
    w = guidance_embedding(torch.tensor([5.0, 14.0]))
    run = lambda: outputs_and_gradients(student, lambda z: student(z, t, context, w), latents)
    plain = run()
    student.zero_grad()
    student.checkpointing = True
    assert_same(run(), plain)


def test_a_student_built_from_a_config_ignores_w_until_it_is_trained():
    net = UNet(UNetConfig(**UNET, time_cond_proj_dim=256))
    latents, t, context = inputs()
    with torch.no_grad():
        first, second = (
            net(latents, t, context, guidance_embedding(torch.full((2,), w))) for w in (1.0, 9.0))
    assert torch.equal(first, second)
