import itertools

import pytest
import torch

from support import cli

CPU = torch.device("cpu")


@pytest.fixture
def on_a_cpu(monkeypatch):
    """on_a_cpu(bf16 units, seconds of a matrix product in bf16, in float32)"""
    def pretend(units, bf16, fp32):
        for unit in ("amx_tile", "avx512_bf16"):
            monkeypatch.setattr(torch.cpu, f"_is_{unit}_supported", lambda: units, raising=False)
        clock = itertools.accumulate(itertools.cycle([0, bf16, 0, fp32]))
        monkeypatch.setattr(cli.time, "perf_counter", lambda: next(clock))
    cli.cpu_is_faster_in_bf16.cache_clear()
    yield pretend
    cli.cpu_is_faster_in_bf16.cache_clear()


@pytest.mark.parametrize("units, bf16, fp32, expected", [
    (True, 1, 2, torch.bfloat16),
    (True, 2, 1, torch.float32),  # has the instructions, and is slower with them
    (True, 0.99, 1, torch.float32),  # not worth the digits
    (False, 1, 2, torch.float32),
])
def test_auto_precision_is_bf16_only_where_it_is_faster(units, bf16, fp32, expected, on_a_cpu):
    on_a_cpu(units, bf16, fp32)
    assert cli.pick_precision("auto", CPU) == expected


def test_a_precision_that_is_asked_for_is_taken_without_a_look_at_the_hardware(on_a_cpu):
    on_a_cpu(False, 0, 0)
    assert cli.pick_precision("bf16", CPU) == torch.bfloat16
    assert cli.pick_precision("fp32", CPU) == torch.float32
