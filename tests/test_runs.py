"""support/runs.py, apart from what test_train.py and test_latent_rm.py show of whole runs."""
import json
from dataclasses import dataclass

import pytest
import torch

from support import runs


@dataclass
class Config(runs.RunConfig):
    out: str = ""
    steps: int = 10
    warmup: int = 1


@pytest.fixture
def code(monkeypatch):
    """code(sources): from now on the sources are these."""
    def become(sources):
        state = {"commit": f"commit of {sources}", "sources": sources}
        monkeypatch.setattr(runs, "state_of_code", lambda: state)
    return become


def start(out, checkpoint=None, **options):
    """Start a run, which has come to that step."""
    if checkpoint is not None:
        (out / "checkpoints" / f"step-{checkpoint:06d}").mkdir(parents=True)
    return runs.open_run(Config(out=str(out), **options), 0, 1)


def record(out):
    entries = json.loads((out / "config.json").read_text())["code"]
    return [(entry["from_step"], entry["sources"]) for entry in entries]


def test_a_run_remembers_each_state_of_the_sources_that_trained_it(code, tmp_path, capsys):
    code("a")
    start(tmp_path)
    start(tmp_path, 2)
    assert record(tmp_path) == [(0, "a")] and "changed" not in capsys.readouterr().out
    code("b")
    start(tmp_path, 4)
    said = capsys.readouterr().out
    assert "the code has changed since step 0 (commit commit of a, now commit of b)" in said
    assert record(tmp_path) == [(0, "a"), (4, "b")]
    code("c")
    start(tmp_path, 10)  # finished: c trains nothing
    said = capsys.readouterr().out
    assert "the code has changed" in said and "nothing was trained" in said
    assert record(tmp_path) == [(0, "a"), (4, "b")]


def test_the_hash_of_the_sources_changes_with_any_of_them(tmp_path, monkeypatch):
    (tmp_path / "support").mkdir()
    for name in ("train.py", "support/cli.py"):
        (tmp_path / name).write_text("x = 1\n")
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    seen = {runs.state_of_code()["sources"]}
    for name in ("train.py", "support/cli.py"):
        (tmp_path / name).write_text("x = 2\n")
        seen.add(runs.state_of_code()["sources"])
    (tmp_path / "README.md").write_text("words")
    seen.add(runs.state_of_code()["sources"])
    assert len(seen) == 3
    assert runs.state_of_code()["commit"] is None  # no repository there


def test_the_commit_is_that_of_the_repository():
    commit = runs.state_of_code()["commit"]
    assert commit is None or len(commit.removesuffix("-dirty")) >= 7


def test_means_are_of_all_that_was_added_since_the_last(tmp_path):
    log = runs.Log(tmp_path, 0, 4, 1, rank=0)
    for value in (1.0, 3.0):
        log.add({"a": torch.tensor(value), "at": torch.tensor([value, 1.0])})
    log.add({"b": torch.tensor(5.0)})
    means = log.means(world=1)
    assert (means["a"].item(), means["at"].tolist(), means["b"].item()) == (2.0, [2.0, 1.0], 5.0)
    assert log.means(world=1) == {}
    log.close()


def test_numbers_by_name_are_logged_as_they_are_and_flat_in_tensorboard():
    line = {"step": 3, "lcd": 0.5, "lcd_at": {"99": 0.25}}
    assert runs.flat(line) == {"step": 3, "lcd": 0.5, "lcd_at/99": 0.25}
