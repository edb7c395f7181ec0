import dataclasses
import itertools
import os
import subprocess
import sys

import pytest
import torch

from conftest import ROOT
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


@dataclasses.dataclass
class Base:
    seed: int = cli.option(0, "seed", group="what")
    device: str = cli.option("auto", "where it runs", group="machine")


@dataclasses.dataclass
class Options(Base):
    preset: str = cli.option("small", "a preset", choices=("small", "sd21"), group="what")
    size: int = cli.option(1, "how large, in % of all")
    fast: bool = cli.option(False, "be quick", group="machine")
    words: list[str] = cli.option((), "words", list=True)


@dataclasses.dataclass
class Numbers:
    guidance: float = cli.option(3.0, "w")
    share: float | None = cli.option(None, "a share")


@pytest.mark.parametrize("text", ["nan", "NaN", "inf", "-inf", "1e999", "infinity"])
@pytest.mark.parametrize("name", ["--guidance", "--share"])
def test_a_number_that_is_not_finite_is_refused_for_every_option(name, text, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.parse(Numbers(), "doc", [f"{name}={text}"])
    assert stop.value.code == 2
    assert f"argument {name}: {text}: expected a finite number" in capsys.readouterr().err
    assert cli.parse(Numbers(), "doc", [f"{name}=-2.5e-3"])


@pytest.mark.parametrize("script, argument", [
    ("sample.py", [b"--prompt", b"caf\xe9"]), ("reward.py", [b"--reward", b"hpsv2.1=\xff.pt"])])
def test_an_argument_that_is_no_text_is_one_line_and_exit_code_2(script, argument):
    done = subprocess.run(
        [sys.executable, ROOT / script, *argument], capture_output=True, timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"})
    assert done.returncode == 2 and done.stderr.startswith(b"error: argument '")
    assert b"\\udc" in done.stderr and done.stderr.count(b"\n") == 1


def test_a_prompt_that_the_terminal_cannot_show_is_no_error():
    code = ("from support import cli; from tqdm import tqdm\n"
            "cli.run(lambda: (print('caf\u00e9 \u732b'), tqdm.write('\u732b')))")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and done.stdout.count(b"\\u732b") == 2, done.stderr


PRESETS = {"small": {}, "sd21": {"size": 9, "fast": True}}


def parse(*argv):
    return cli.parse(Options(), "doc", list(argv), PRESETS, published={"size": 9})


def test_a_preset_takes_the_place_of_the_defaults_and_options_win():
    assert parse() == Options()
    assert parse("--preset", "sd21") == Options(preset="sd21", size=9, fast=True)
    assert parse("--size", "2", "--preset=sd21", "--no-fast") == Options(preset="sd21", size=2)


def test_help_stands_in_groups_with_defaults_and_where_they_differ_published_values(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = capsys.readouterr().out
    what, machine = text.split("what:")[1].split("machine:")
    assert "--size" in what and "--seed" in what and "--device" not in what
    assert "--device" in machine and "--fast" in machine and "--words" in machine
    words = " ".join(text.split())
    assert "how large, in % of all (default: 1; published: 9)" in words
    assert "where it runs (default: auto)" in words


def test_a_published_value_that_is_the_default_is_not_said_again(capsys):
    with pytest.raises(SystemExit):
        parse("--preset", "sd21", "--help")
    assert "published" not in capsys.readouterr().out


def test_an_unknown_preset_is_refused(capsys):
    with pytest.raises(SystemExit):
        parse("--preset", "sd3")
    assert "sd3" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc")
@pytest.mark.parametrize("kept", [True, False])
def test_on_linux_a_tensor_takes_the_memory_that_another_has_freed(kept):
    """But for a user who has set malloc's variables himself."""
    script = """
import resource, torch
from support.cli import pick_device
pick_device("cpu")
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
taken = []
for _ in range(24):  # small blocks may lie in between, and then the heap grows once more
    before = faults()
    torch.ones(10_000_000)  # 40 MB: 9,766 pages
    taken.append(faults() - before)
print(sum(pages < 1000 for pages in taken))"""
    env = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    env |= {"THP_MEM_ALLOC_ENABLE": "0"} | ({} if kept else {"MALLOC_ARENA_TEST": "8"})
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True,
                          text=True, check=True)
    assert int(done.stdout) >= 12 if kept else int(done.stdout) == 0, done.stdout
