"""support/runs.py, apart from what test_train.py and test_latent_rm.py show of whole runs."""
import json
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from support import runs
from support.weights import InputError


@dataclass
class Config(runs.RunConfig):
    out: str = ""
    steps: int = 10
    warmup: int = 1


@pytest.fixture
def code(monkeypatch):
    """code(sources): from now on the sources are these."""
    def become(sources):
        state = {"commit": "0123456789ab-dirty", "sources": sources}  # while editing: the same
        monkeypatch.setattr(runs, "state_of_code", lambda: state)
    return become


def start(out, checkpoint=None, **options):
    """Start a run, which has come to that step."""
    if checkpoint is not None:
        (out / "checkpoints" / f"step-{checkpoint:06d}").mkdir(parents=True)
    with runs.open_run(Config(out=str(out), **options), 0, 1) as run:
        return run


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
    assert "the code has changed since step 0: sources a (commit" in said
    assert record(tmp_path) == [(0, "a"), (4, "b")]
    code("a")
    start(tmp_path)  # nothing that b trained was kept
    assert record(tmp_path) == [(0, "a")] and "changed" not in capsys.readouterr().out
    code("b")
    start(tmp_path, 6)
    assert record(tmp_path) == [(0, "a"), (6, "b")]
    capsys.readouterr()
    code("c")
    start(tmp_path, 10)  # finished: c trains nothing
    said = capsys.readouterr().out
    assert "the code has changed" in said and "nothing was trained" in said
    assert record(tmp_path) == [(0, "a"), (6, "b")]


def test_a_run_from_before_the_record_is_told_apart(code, tmp_path, capsys):
    code("b")
    start(tmp_path)
    file = tmp_path / "config.json"
    old = json.loads(file.read_text())
    del old["code"]
    file.write_text(json.dumps(old))
    start(tmp_path, 2)
    assert "begun with other code" in capsys.readouterr().out and record(tmp_path) == [(2, "b")]


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


def test_the_commit_is_that_of_the_repository_and_says_if_files_differ(tmp_path, monkeypatch):
    def git(*words):
        who = ["-c", "user.name=x", "-c", "user.email=x@x"]
        command = ["git", "-C", str(tmp_path), *who, *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    (tmp_path / "train.py").write_text("x = 1\n")
    git("init"), git("add", "."), git("commit", "-m", "one"), git("tag", "-a", "v1", "-m", "v1")
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    commit = git("rev-parse", "--short=12", "HEAD")
    assert runs.state_of_code()["commit"] == commit
    (tmp_path / "train.py").write_text("x = 2\n")
    assert runs.state_of_code()["commit"] == f"{commit}-dirty"


def test_every_line_is_a_point_of_each_curve_in_tensorboard(tmp_path, monkeypatch):
    points = []

    class Writer:
        def __init__(self, folder, purge_step):
            points.append((folder.name, purge_step))

        def add_scalar(self, name, value, step):
            points.append((name, value, step))

        def close(self):
            points.append("closed")

    monkeypatch.setattr(runs, "SummaryWriter", Writer)
    args = Config(out=str(tmp_path), steps=4)
    log = runs.Log(args, 2, 1, rank=0)
    log({"step": 3, "lcd": 0.5, "lcd_at": {"99": 0.25}, "lr": 1e-3}, ())
    log.close()
    other = runs.Log(args, 2, 1, rank=1)  # another process: writes nothing
    assert other.board is None
    assert points[0] == ("tensorboard", 3) and points[-1] == "closed"
    assert ("lcd", 0.5, 3) in points and ("lcd_at/99", 0.25, 3) in points


def test_means_are_of_all_that_was_added_since_the_last(tmp_path):
    log = runs.Log(Config(out=str(tmp_path), steps=4), 0, 1, rank=0)
    for value in (1.0, 3.0):
        log.add({"a": torch.tensor(value), "at": torch.tensor([value, 1.0])})
    log.add({"b": torch.tensor(5.0)})
    means = log.means(world=1)
    assert (means["a"].item(), means["at"].tolist(), means["b"].item()) == (2.0, [2.0, 1.0], 5.0)
    assert log.means(world=1) == {}
    log.close()


def test_weights_and_biases_get_every_line_and_go_on_in_the_same_run(tmp_path, monkeypatch):
    calls = []
    ids = iter(["first", "second"])
    wandb = SimpleNamespace(
        util=SimpleNamespace(generate_id=lambda: next(ids)),
        init=lambda **options: calls.append(options) or SimpleNamespace(
            log=lambda line, step: calls.append((line, step)), finish=lambda: calls.append("end")))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    args = Config(out=str(tmp_path), steps=4, wandb="mine")
    for step in (1, 2):
        log = runs.Log(args, step - 1, 1, rank=0)
        log({"step": step, "lcd_at": {"99": 0.25}, "lr": 1e-3}, ())
        log.close()
    first, second = (call for call in calls if isinstance(call, dict))
    assert first["project"] == "mine" and first["id"] == second["id"] == "first"
    assert second["resume"] == "allow" and first["config"]["steps"] == 4
    assert (calls[1][0]["lcd_at/99"], calls[1][1], calls[2]) == (0.25, 1, "end")


def test_without_the_package_wandb_the_option_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"pip install 'rg-lcd\[wandb\]'"):
        runs.Log(Config(out=str(tmp_path), wandb="mine"), 0, 1, rank=0)


def test_a_skipped_step_does_not_hide_the_count_of_broken_samples(tmp_path):
    lines = [{"step": 1, "broken": {"web page": 3}}, {"step": 2, "skipped": ["a"]}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    log = runs.Log(Config(out=str(tmp_path), steps=4), 2, 1, rank=0)
    assert log.broken.counts["web page"] == 3
    log.close()


def test_numbers_by_name_are_logged_as_they_are_and_flat_in_tensorboard():
    line = {"step": 3, "lcd": 0.5, "lcd_at": {"99": 0.25}}
    assert runs.flat(line) == {"step": 3, "lcd": 0.5, "lcd_at/99": 0.25}
