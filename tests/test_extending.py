"""docs/extending.md: every change that it shows, applied to a copy of the repository and run."""
import importlib
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

import data
import lcm_solver
from conftest import ROOT, call

PAGE = (ROOT / "docs" / "extending.md").read_text()
SECTIONS = dict(
    re.fullmatch(r"(.*?)\n(.*)", section, re.DOTALL).groups()
    for section in PAGE.split("\n## ")[1:])
BLOCK = re.compile(r"^```(diff|python) (\S+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def apply(block, file):
    """Lines that begin with a space or a minus must stand in the file, together and once; those
    with a space or a plus take their place."""
    before = "".join(line[1:] + "\n" for line in block.splitlines() if line[0] in " -")
    after = "".join(line[1:] + "\n" for line in block.splitlines() if line[0] in " +")
    text = file.read_text()
    assert text.count(before) == 1, f"{file.name}: {text.count(before)} times\n{before}"
    file.write_text(text.replace(before, after))


@pytest.fixture
def changed(tmp_path):
    """changed(section) -> a copy of the repository in which the section's changes are made."""
    def make(section):
        copy = tmp_path / "copy"
        shutil.copytree(ROOT / "support", copy / "support")
        for file in ROOT.glob("*.py"):
            shutil.copy(file, copy)
        (copy / "pocket").symlink_to(ROOT / "pocket")
        blocks = BLOCK.findall(SECTIONS[section])
        assert blocks
        for kind, name, text in blocks:
            if kind == "python":
                (copy / name).write_text(text)
            else:
                apply(text, copy / name)
        return copy
    return make


def own_modules():
    """The names of the modules of this repository that are imported."""
    places = ROOT, ROOT / "support"
    files = {name: getattr(module, "__file__", None) for name, module in sys.modules.items()}
    return [name for name, file in files.items() if file and Path(file).parent in places]


@pytest.fixture
def load(monkeypatch):
    """load(copy, "train") -> that module of that copy, which imports the others of the copy."""
    def make(folder, name):
        for own in own_modules():
            monkeypatch.delitem(sys.modules, own)
        monkeypatch.syspath_prepend(folder)
        module = importlib.import_module(name)
        assert Path(module.__file__).parent == folder
        return module
    yield make
    for name, module in list(sys.modules.items()):
        if "copy" in Path(getattr(module, "__file__", None) or "").parts:
            del sys.modules[name]


@pytest.fixture
def fit(load, model_folder, shard, tmp_path):
    """fit(copy, reward, steps) -> the lines of log.jsonl of a small run of that copy's train.py."""
    def train(folder, reward="none", steps=1):
        out = tmp_path / "runs" / folder.name
        assert call(
            load(folder, "train").main, "--teacher", model_folder, "--data", shard, "--out", out,
            "--resolution", 32, "--batch-size", 8, "--steps", steps, "--warmup", 1, "--reward",
            reward, "--log-every", 1, "--device", "cpu", "--precision", "fp32", "--no-compile") == 0
        return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return train


def test_another_reward(changed, fit, model_folder):
    folder = changed("Another reward")
    pocket, own = f"pocket={model_folder}", "torch:my_rewards.redness"
    line, _ = fit(folder, f"{pocket}+{own}*0.2+redness*2", steps=2)
    red = line[f"reward/{own}"]
    assert -1 < red < 1 and line["reward/redness"] == pytest.approx(red, rel=1e-5)
    assert line["reward"] == pytest.approx(line["reward/pocket"] + 2.2 * red, rel=1e-4)
    assert f'train.py --reward "pocket+{own}*0.2"' in SECTIONS["Another reward"]


def test_another_distance(changed, fit):
    """sqrt(d^2 + c^2) - c lies between |d| - c and |d|."""
    (before,), (after,) = fit(ROOT), fit(changed("Another distance than Huber"))
    before, after = before["lcd"], after["lcd"]
    assert before < after <= before + 0.001


def test_another_law_of_timesteps(changed, fit):
    (line,) = fit(changed("Another law of timesteps"))
    *_, u_s = data.random_draws(0, range(8), (4, 8, 8), "cpu")
    uniform, noisier = (
        {str(100 * int(10 * u) + 99) for u in law.tolist()} for law in (u_s, u_s.sqrt()))
    assert set(line["lcd_at"]) == noisier != uniform


def error_of(solver):
    """Of one step of the module `solver` between neighbours of a grid of ten, where the data are
    normal with variance 1/4: then the noise and the flow are known, z_t = z_s std_t / std_s."""
    schedule = solver.NoiseSchedule()
    ab = schedule.alphas_cumprod.view(-1, 1, 1, 1)
    variance = 0.25 * ab + 1 - ab
    teacher = lambda z, t, context: z * (1 - ab[t]).sqrt() / variance[t]
    z, context = torch.ones(9, 4, 1, 1), torch.zeros(9, 1, 1)
    grid = solver.DDIMSolver(schedule, 10)
    s = grid.timesteps[1:]
    z_t, t = grid.solve(teacher, z, s, context, context[:1], 0.0)
    return (z_t - z * (variance[t] / variance[s]).sqrt()).abs().max().item()


def test_another_solver(changed, load):
    euler = error_of(lcm_solver)
    heun = error_of(load(changed("Another solver"), "lcm_solver"))
    assert 0 < heun < euler / 2


def test_another_sampling_schedule(changed, load, tmp_path):
    folder = changed("Another sampling schedule")
    solver = load(folder, "lcm_solver")
    steps = lambda n: solver.lcm_timesteps(solver.NoiseSchedule(), n)
    assert steps(4) == [999, 939, 759, 439]
    assert [len(set(steps(n))) for n in (7, 8)] == [7, 7]
    assert call(importlib.import_module("sample").main, "--steps", 3, "--prompt", "moon", "--out",
                tmp_path / "out", "--device", "cpu") == 0
    assert (tmp_path / "out/00000.png").is_file()


def test_every_section_that_shows_a_change_is_tested():
    shown = {title for title, text in SECTIONS.items() if BLOCK.search(text)}
    assert len(shown) == 5 == sum(name.startswith("test_another") for name in globals())
