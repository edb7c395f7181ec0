"""Checkpoints, and how a run ends: support/checkpoints.py and processes.py, by whole runs."""
import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

import train
from conftest import ROOT, launch, lines_of, log
from support import checkpoints, processes
from support.weights import WEIGHTS, InputError


def step(out, number):
    return out / f"checkpoints/step-{number:06d}"


def same_result(one, two):
    return all((one / name / WEIGHTS).read_bytes() == (two / name / WEIGHTS).read_bytes()
               for name in ("unet", "unet_target"))


@pytest.mark.parametrize(
    "file", [f"unet/{WEIGHTS}", "unet_target/config.json", "optimizer.pt", "checksums.json"])
def test_a_damaged_checkpoint_is_named_and_set_aside_and_the_one_before_taken(
        file, fit, tmp_path, capsys):
    out, whole = tmp_path / "run", tmp_path / "whole"
    assert fit(whole, steps=4) == 0 and fit(out, steps=4, checkpoint_every=2, keep=3) == 0
    damaged = step(out, 4) / file
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 0x80
    damaged.write_bytes(content)
    capsys.readouterr()
    assert fit(out, steps=4, checkpoint_every=2, keep=3) == 0
    said = capsys.readouterr().out
    assert "step-000004" in said and file in said and "set aside as damaged-step-000004" in said
    assert "resumes at step 2" in said and same_result(out, whole)
    assert (out / "checkpoints/damaged-step-000004").is_dir()


def test_a_checkpoint_with_a_file_missing_is_set_aside(fit, tmp_path, capsys):
    assert fit(tmp_path, steps=2, checkpoint_every=1) == 0
    (step(tmp_path, 2) / "optimizer.pt").unlink()
    assert fit(tmp_path, steps=2, checkpoint_every=1) == 0
    assert "optimizer.pt" in capsys.readouterr().out


def full_disk(monkeypatch, calls_that_fail):
    save, calls = torch.save, []

    def fails(*args, **more):
        calls.append(1)
        if len(calls) in calls_that_fail:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(*args, **more)

    monkeypatch.setattr(checkpoints.torch, "save", fails)


def test_a_full_disk_leaves_the_old_checkpoints_whole_and_the_run_goes_on(
        fit, tmp_path, monkeypatch, capsys):
    full_disk(monkeypatch, {2})
    assert fit(tmp_path, steps=3, checkpoint_every=1, keep=3) == 0
    said = capsys.readouterr().out
    assert "step 2: no checkpoint could be written" in said and "No space left" in said
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["step-000001", "step-000003"]
    assert all(checkpoints.damaged(step(tmp_path, n)) is None for n in (1, 3))


def test_a_run_whose_last_checkpoint_finds_no_room_ends_with_what_to_do(
        fit, tmp_path, monkeypatch, capsys):
    full_disk(monkeypatch, {2})
    assert fit(tmp_path, steps=2, checkpoint_every=1) == 2
    message = capsys.readouterr().err
    assert "make room and run the same command" in message and "Traceback" not in message
    assert fit(tmp_path, steps=2, checkpoint_every=1) == 0


def test_a_checkpoint_holds_the_step_at_which_it_was_taken_though_training_goes_on(
        fit, tmp_path, monkeypatch):
    assert fit(tmp_path / "calm", steps=4, checkpoint_every=2, keep=3) == 0
    late, write = threading.Event(), checkpoints.Checkpoints.write

    def when_step_3_is_done(self, folder, states):
        if "000002" in folder.name:
            assert late.wait(60)
        return write(self, folder, states)

    move = train.optimizer_step

    def tell(*args):
        stats = move(*args)
        if args[4 - 1] == 2:  # the third step
            late.set()
        return stats

    monkeypatch.setattr(checkpoints.Checkpoints, "write", when_step_3_is_done)
    monkeypatch.setattr(train, "optimizer_step", tell)
    assert fit(tmp_path / "late", steps=4, checkpoint_every=2, keep=3) == 0
    for file in (f"unet/{WEIGHTS}", f"unet_target/{WEIGHTS}", "optimizer.pt"):
        one, two = (step(tmp_path / name, 2) / file for name in ("calm", "late"))
        assert one.read_bytes() == two.read_bytes()


def test_of_two_runs_in_one_folder_the_second_is_refused(fit, tmp_path, capsys):
    assert fit(tmp_path, steps=1) == 0
    held = checkpoints.lock(tmp_path)
    assert fit(tmp_path, steps=1) == 2
    assert "another run is at work there" in capsys.readouterr().err
    held.close()
    assert fit(tmp_path, steps=1) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_after_its_step_and_the_same_command_goes_on(
        number, fit, options, tmp_path):
    same = dict(steps=9, checkpoint_every=100, workers=1)
    out, whole = tmp_path / "run", tmp_path / "whole"
    assert fit(whole, **same) == 0
    process, file = launch(options(out, **same)), out / "log.jsonl"
    while process.alive() and not (file.is_file() and len(lines_of(out)) > 1):
        time.sleep(0.005)
    process.send(number, workers=True)  # as a terminal and torchrun do
    codes, said = process.wait(30)
    assert codes == [0], said
    assert "same command goes on from there" in said and not (out / "unet").exists()
    stopped = [checkpoints.step_of(path) for path in checkpoints.checkpoints(out)]
    assert len(stopped) == 1 and 1 < stopped[0] < 9
    launch(options(out, **same)).succeed()
    assert same_result(out, whole)
    assert log(out, "step", "loss") == log(whole, "step", "loss")


@pytest.mark.parametrize(("world", "sharded", "kills"), [
    (2, False, 2), *(pytest.param(*case, 20, marks=pytest.mark.slow)
                     for case in ((1, False), (2, False), (2, True)))])
def test_a_run_killed_at_random_moments_ends_as_if_nothing_had_been(
        world, sharded, kills, options, tmp_path):
    same = dict(steps=4 * kills + 4, checkpoint_every=2, batch_size=2, shard=sharded)
    out, whole, moment = tmp_path / "run", tmp_path / "whole", random.Random(kills)
    launch(options(whole, **same), world).succeed()
    for _ in range(kills):
        run, before = launch(options(out, **same), world), time.time()
        until = newest_step(out) + moment.randint(0, 4)
        while run.alive() and newest_step(out) < until and time.time() - before < 60:
            time.sleep(0.002)
        time.sleep(moment.random() * 0.3)  # in the middle of a step, or of a save
        run.send(signal.SIGKILL)
        run.wait()
    launch(options(out, **same), world).succeed()
    assert same_result(out, whole)
    assert log(out, "step", "loss") == log(whole, "step", "loss")


def newest_step(out):
    found = checkpoints.checkpoints(out) if out.is_dir() else []
    return checkpoints.step_of(found[-1]) if found else 0


@pytest.mark.slow
def test_torchrun_restarts_a_run_from_the_newest_checkpoint(options, tmp_path):
    same = dict(steps=30, checkpoint_every=2, batch_size=2)
    launch(options(tmp_path / "whole", **same), 2).succeed()
    out = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=1",
               "--nproc_per_node=2", str(ROOT / "train.py"), *map(str, options(out, **same))]
    torchrun = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while torchrun.poll() is None and newest_step(out) < 6:
        time.sleep(0.01)
    workers = subprocess.run(["pgrep", "-P", str(torchrun.pid)], capture_output=True, text=True)
    os.kill(int(workers.stdout.split()[-1]), signal.SIGKILL)
    said = torchrun.communicate(timeout=150)[0]
    assert torchrun.returncode == 0 and "resumes at step" in said, said
    assert same_result(out, tmp_path / "whole")


def test_a_killed_run_leaves_its_folder_free_at_once(options, tmp_path):
    same = dict(steps=60, checkpoint_every=100, workers=1)
    run, file = launch(options(tmp_path, **same)), tmp_path / "log.jsonl"
    while run.alive() and not (file.is_file() and len(lines_of(tmp_path)) > 1):
        time.sleep(0.005)
    run.send(signal.SIGKILL)
    run.wait()
    checkpoints.lock(tmp_path).close()  # though a data loading process may live for seconds


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_again(fit, tmp_path, capsys):
    assert fit(tmp_path, steps=2, checkpoint_every=2) == 0
    (step(tmp_path, 2) / "optimizer.pt").write_bytes(b"zeros")
    assert fit(tmp_path, steps=2, checkpoint_every=2) == 2
    assert "all checkpoints there are damaged" in capsys.readouterr().err


def test_an_error_in_a_run_does_not_lose_the_checkpoint_that_is_being_written(
        fit, tmp_path, monkeypatch):
    move, write = train.optimizer_step, checkpoints.Checkpoints.write

    def slow(self, folder, states):
        time.sleep(0.5)
        return write(self, folder, states)

    monkeypatch.setattr(checkpoints.Checkpoints, "write", slow)
    monkeypatch.setattr(train, "optimizer_step",
                        lambda *args: move(*args) if args[3] < 2 else None)
    assert fit(tmp_path, steps=4, checkpoint_every=2, max_bad_steps=1) == 2
    assert [path.name for path in checkpoints.checkpoints(tmp_path)] == ["step-000002"]


def test_a_second_signal_ends_at_once(monkeypatch):
    ends, before = [], signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(processes.os, "_exit", ends.append)
    with processes.Stop() as stop:
        stop.catch(signal.SIGINT, None)
        stop.catch(signal.SIGINT, None)  # the same one, passed on by torchrun
        assert stop.asked(world=1) and ends == []
        stop.since -= 10
        stop.catch(signal.SIGINT, None)
    assert ends == [130]
    assert signal.getsignal(signal.SIGINT) is before


def test_processes_with_different_weights_are_told_with_the_tensor(monkeypatch):
    network = torch.nn.Linear(2, 2)

    def reduce(tensor, kind):  # another process, whose bias has one other bit
        if kind == torch.distributed.ReduceOp.MAX:
            tensor[1] += 1

    monkeypatch.setattr(checkpoints.dist, "all_reduce", reduce)
    with pytest.raises(InputError, match="step 7.*unet: bias"):
        checkpoints.check_same({"unet": network}, 7)


def test_checksums_name_every_file_of_a_checkpoint(fit, tmp_path):
    assert fit(tmp_path, steps=1) == 0
    folder = step(tmp_path, 1)
    files = {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}
    assert files - {"checksums.json"} == set(json.loads((folder / "checksums.json").read_text()))
