import argparse
import gc
import json

import pytest
import torch

import bench
import train
from conftest import call
from support import memory


def networks(model_folder, **options):
    argv = dict(teacher=str(model_folder), resolution=32, reward=f"pocket={model_folder}") | options
    return train.Networks.load(train.Config(**argv), None, torch.device("cpu"), torch.float32)


def peak_of_allocations(run):
    """What PyTorch's own profiler says that its CPU allocator has given out at most."""
    with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.fixture
def no_collection():
    """When the collector runs is chance, and it takes tensors with it."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize(("path", "lora", "grad_checkpoint"), [
    ("none", None, False), ("none", 4, True), ("direct", 4, False), ("direct", None, True),
    ("latent", None, True), ("latent", 4, True)])
def test_the_count_is_what_pytorch_allocates(
        path, lora, grad_checkpoint, model_folder, no_collection):
    """Of real networks on the CPU, in float32: all but the operators' own work space, which for
    these tiny networks is up to 0.7 MB."""
    args = argparse.Namespace(resolution=32)
    more = {} if path != "latent" else {"latent_rm": str(model_folder / "latent_rm")}
    n = networks(model_folder, lora=lora, **more)
    if path == "none":
        n.reward = None
    if n.latent_rm is not None:
        n.latent_rm.train_top(1, 1)
    one = bench.one_pass(n, args, 8, grad_checkpoint)
    one()  # what the first pass makes and keeps, it has made
    for module in (n.student, n.latent_rm):
        if module is not None:
            module.zero_grad(set_to_none=True)
    measured = peak_of_allocations(one)

    for module in (n.model.vae, n.model.text_encoder.model, n.teacher, n.student, n.target,
                   n.reward, n.latent_rm):
        if module is not None:
            module.to("meta")
    counted = bench.count_of(n, args, [(8, grad_checkpoint)])[8, grad_checkpoint]
    counted = 1e9 * (counted["activations"] + counted["gradients"])
    assert 0.95 * counted <= measured <= 1.05 * counted + 0.7e6


def test_what_stays_is_counted_as_train_py_counts_it(model_folder):
    """tell_memory's line of a run, and shared weights once."""
    for lora in (None, 4):
        n = networks(model_folder, lora=lora)
        optimizer = train.new_optimizer(n, train.Config(lora=lora), None, torch.device("cpu"))
        bench.one_pass(n, argparse.Namespace(resolution=32), 1, False)()
        optimizer.step()
        held = train.processes.bytes_held(
            [*n.trained().values()], [n.teacher, n.model.vae, n.model.text_encoder, n.reward],
            optimizer)
        trained, target = n.trained().values()
        frozen = [n.teacher, n.model.vae, n.model.text_encoder.model, n.reward, n.student, n.target]
        found = memory.count([trained], [target], frozen, lambda: None)
        fixed = sum(p.numel() * 4 for p in trained.parameters() if not p.requires_grad)
        assert 1e9 * (found["weights"] + found["target"]) + fixed == pytest.approx(held["trained"])
        assert 1e9 * found["frozen"] - fixed == pytest.approx(held["frozen"], rel=0.01)
        assert 1e9 * found["gradients"] == pytest.approx(held["gradients"])
        # and a step number for each tensor
        assert 1e9 * found["optimizer"] == pytest.approx(held["optimizer"], rel=0.02)


def test_on_a_card_norms_are_in_float32_and_attention_keeps_no_matrix():
    norm, x = torch.nn.LayerNorm(64), torch.zeros(2, 4096, 64)
    with memory.fake_card(), torch.autocast("cpu", torch.bfloat16):
        memory.faked(norm.to("meta"))
        x = torch.zeros(2, 4096, 64, dtype=torch.bfloat16, requires_grad=True)
        with memory.Peak([x]) as peak:
            assert norm(x).dtype == torch.float32
            y = torch.nn.functional.scaled_dot_product_attention(x, x, x)
        assert y.shape == x.shape and y.dtype == torch.bfloat16
        assert peak.peak < 4096 * 4096


@pytest.mark.parametrize("total, card", [(6.4, 8), (6.6, 12), (22.4, 24), (22.6, 40), (79, None)])
def test_the_smallest_card_that_holds_it_keeps_some_free(total, card):
    assert memory.smallest_card(total) == card


def test_the_table_of_memory_ends_with_one_json_document(monkeypatch, capsys):
    monkeypatch.setattr(bench, "PATHS", {"none": "none"})
    monkeypatch.setattr(bench, "PASSES", [(1, True)])
    assert call(bench.main, "--rows", "memory", "--lora", 4, "--device", "cpu") == 0
    lines = capsys.readouterr().out.splitlines()
    rows = json.loads(lines[-1])["rows"]
    assert len(rows) == 3 and len(lines) == len(rows) + 4
    for row in rows:
        assert row["sum"] == pytest.approx(sum(row["gb"].values())) and row["card"] == 8
    full, small = (row["gb"] for row in rows[:2])
    assert small["optimizer"] < 0.26 * full["optimizer"] and small["target"] == full["target"] / 2
    assert call(bench.main, "--rows", "memory,unet") == 2
