"""Broken samples and damaged shards."""
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections import Counter

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import data
import train
from conftest import ROOT, call, launch, random_png, write_shard
from data import Shards, batches
from support import broken
from support.broken import Broken
from support.shards import BadSample
from support.weights import WEIGHTS, InputError


def jpeg(side=64):
    pixels = Image.open(io.BytesIO(random_png(0, (side, side))))
    pixels.save(buffer := io.BytesIO(), "JPEG")
    return buffer.getvalue()


def flipped(png):
    """One byte of the pixels is another."""
    place = png.index(b"IDAT") + 40
    return png[:place] + bytes([png[place] ^ 255]) + png[place + 1:]


PICTURES = {
    "empty picture": b"",
    "web page": b"\n<!DOCTYPE html><html>404</html>",
    "unknown picture": b"no picture at all",
    "truncated picture": jpeg()[:1000],
    "broken picture": flipped(random_png(0)),
    "huge picture": random_png(0, (300, 300)),
}
CAPTIONS = {
    "not UTF-8": (".txt", b"caf\xe9"),
    "no JSON": (".json", b"{"),
    "no caption in it": (".json", b'{"caption": null}'),
    "a list": (".json", b"[1]"),
}


@pytest.fixture(autouse=True)
def small_bombs(monkeypatch):
    """A picture of more than 40,000 pixels is a bomb."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)


@pytest.mark.parametrize("kind", PICTURES)
def test_a_broken_picture_is_named_with_its_kind(kind, tmp_path):
    members = [("deep/a.v1.jpg", PICTURES[kind]), ("deep/a.v1.txt", b"words")]
    file = write_shard(tmp_path / "one.tar", members)
    with pytest.raises(BadSample, match=f"one.tar: deep/a.v1.jpg: {kind}") as found:
        Shards(file, 8)[0]
    assert found.value.kind == kind


@pytest.mark.parametrize("case", CAPTIONS)
def test_an_unreadable_caption_is_named(case, tmp_path):
    suffix, content = CAPTIONS[case]
    file = write_shard(tmp_path / "one.tar", [("a.png", random_png(0)), ("a" + suffix, content)])
    with pytest.raises(BadSample, match=f"one.tar: a{suffix}: unreadable caption"):
        Shards(file, 8)[0]


BROKEN = {3: "empty picture", 7: "truncated picture", 8: "unreadable caption"}


@pytest.fixture
def mixed(tmp_path):
    """12 samples, three of them broken, and the same whole. -> two files"""
    parts = {"mixed": [], "whole": []}
    for i in range(12):
        picture, caption = random_png(i), f"caption {i}".encode()
        parts["whole"] += [(f"{i:02d}.png", picture), (f"{i:02d}.txt", caption)]
        if BROKEN.get(i) in PICTURES:
            picture = PICTURES[BROKEN[i]]
        elif i in BROKEN:
            caption = b"\xff"
        parts["mixed"] += [(f"{i:02d}.png", picture), (f"{i:02d}.txt", caption)]
    return [write_shard(tmp_path / f"{name}.tar", members) for name, members in parts.items()]


def drawn(file, steps=range(12), rows=4, **where):
    """-> [(tensor, caption)] of these steps, the counts of what was broken"""
    counted = Broken(rows, 1.0, {})
    stream = batches(Shards(file, 32), 0, steps[0], steps[-1] + 1, rows, broken=counted, **where)
    found = [pair for tensors, captions in stream for pair in zip(tensors, captions, strict=True)]
    return found, counted.gather().get("broken", {})


def same(first, second):
    return all(torch.equal(a[0], b[0]) and a[1] == b[1]
               for a, b in zip(first, second, strict=True))


def test_substitutes_are_a_function_of_seed_and_position(mixed):
    once, counts = drawn(mixed[0])
    again, counts_2 = drawn(mixed[0], workers=2)
    assert same(once, again) and counts == counts_2
    resumed, _ = drawn(mixed[0], range(5, 12))
    assert same(once[5 * 4:], resumed)
    halves = [drawn(mixed[0], rows=2, rank=rank, world=2) for rank in (0, 1)]
    rows = [half[0][2 * step:2 * step + 2] for step in range(12) for half in halves]
    assert same(once, sum(rows, []))
    assert Counter(counts) == Counter(halves[0][1]) + Counter(halves[1][1])


def test_only_broken_samples_are_replaced_and_each_time_anew(mixed, monkeypatch):
    whole, none = drawn(mixed[1])
    sample, kinds = Shards.sample, Counter()

    def counting(self, number, draw):
        kinds.update([BROKEN[number]] if number in BROKEN else [])
        return sample(self, number, draw)

    monkeypatch.setattr(Shards, "sample", counting)
    found, counts = drawn(mixed[0])
    bad = {f"caption {i}" for i in BROKEN}
    replaced = [pair for pair, wanted in zip(found, whole, strict=True) if wanted[1] in bad]
    kept = [wanted[1] in bad or same([pair], [wanted])
            for pair, wanted in zip(found, whole, strict=True)]
    assert none == {} and all(kept)
    captions = {caption for _, caption in replaced}
    assert len(replaced) == 12 and len(captions) > 4 and not captions & bad  # four epochs
    assert counts == kinds and sum(counts.values()) > 12


def test_nothing_but_broken_samples_is_an_error(tmp_path):
    members = [("a.png", PICTURES["web page"]), ("a.txt", b"words")]
    file = write_shard(tmp_path / "bad.tar", members)
    with pytest.raises(InputError, match="100 samples drawn .*bad.tar: a.png: web page .no kind"):
        drawn(file)


@pytest.mark.parametrize("share, step, bad, stops", [
    (0.01, 1, 10, False), (0.01, 1, 11, True),  # of 1,000 at least
    (0.01, 500, 80, False), (0.01, 500, 81, True),  # of 16 x 500, and those themselves
    (0.5, 100, 1599, False), (0.5, 100, 1601, True),
    (0, 1, 1, True), (0, 1, 0, False), (1, 10, 159, False)])
def test_a_run_stops_at_the_share_of_max_bad(share, step, bad, stops):
    counted = Broken(16, share, {})
    counted.add([("a.tar: x.png", "web page", "reason")] * bad)
    counted.gather()
    if stops:
        with pytest.raises(InputError, match=f"step {step}: {bad} samples were broken .*--max-bad"):
            counted.check(step)
    else:
        counted.check(step)


def test_the_first_few_are_named(capsys):
    counted = Broken(16, 1, {})
    for part in range(3):
        counted.add([(f"a.tar: {part}{i}.png", "web page", "reason") for i in range(3)])
        counted.gather()
    output = capsys.readouterr().out
    assert output.count("web page") == broken.NAMED == 5
    assert "a.tar: 00.png: web page (reason)" in output and "20.png" not in output


# ------------------------------------------------------------------------------------------- runs

def options(model_folder, file, out, *more):
    return [str(part) for part in (
        "--teacher", model_folder, "--data", file, "--out", out, "--resolution", 32, "--steps", 6,
        "--batch-size", 4, "--reward", "none", "--log-every", 1, "--checkpoint-every", 3, "--keep",
        9, "--device", "cpu", "--precision", "fp32", "--no-compile", "--max-bad", 1, *more)]


def log(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line.get("broken", {}) for line in lines]


def test_a_run_goes_on_past_broken_samples_and_a_resumed_one_counts_on(
        mixed, model_folder, tmp_path, capsys):
    one, two = tmp_path / "one", tmp_path / "two"
    assert call(train.main, *options(model_folder, mixed[0], one)) == 0
    output, counts = capsys.readouterr().out, log(one)
    assert counts[-1] == drawn(mixed[0], range(6))[1] and counts[2] != counts[-1]
    assert f"{sum(counts[-1].values())} samples were broken" in output
    assert "broken, another takes its place: " in output and "mixed.tar: " in output

    shutil.copytree(one, two)
    shutil.rmtree(two / "checkpoints" / "step-000006")
    assert call(train.main, *options(model_folder, mixed[0], two, "--workers", 1)) == 0
    assert log(two) == counts
    first, second = (load_file(out / "unet" / WEIGHTS) for out in (one, two))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_stops_with_the_reason_once_too_much_is_broken(
        mixed, model_folder, tmp_path, capsys):
    argv = options(model_folder, mixed[0], tmp_path / "run", "--max-bad", 0)
    assert call(train.main, *argv) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and "samples were broken" in error and "--max-bad 0" in error


def test_two_processes_count_together(mixed, model_folder, tmp_path):
    argv = options(model_folder, mixed[0], tmp_path / "two", "--batch-size", 2, "--workers", 1)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         ROOT / "train.py", *argv], capture_output=True, text=True, timeout=150,
        env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert log(tmp_path / "two")[-1] == drawn(mixed[0], range(6))[1]
    assert done.stdout.count("another takes its place") == min(
        broken.NAMED, sum(log(tmp_path / "two")[-1].values()))


@torch.no_grad()
def test_the_encoder_leaves_broken_samples_out_and_says_how_many(
        mixed, model_folder, tmp_path, capsys):
    assert call(data.main, "--data", mixed[0], "--out", tmp_path / "encoded", "--model",
                model_folder, "--resolution", 32, "--device", "cpu", "--batch", 4) == 0
    output = capsys.readouterr().out
    assert "3 broken samples left out (1 empty picture, 1 truncated picture, 1 unreadable" in output
    encoded = Shards(tmp_path / "encoded", 32)
    assert [encoded.caption(i) for i in range(len(encoded))] == [
        f"caption {i}" for i in range(12) if i not in BROKEN]


def test_a_broken_posterior_is_replaced(mixed, model_folder, tmp_path):
    assert call(data.main, "--data", mixed[1], "--out", tmp_path / "encoded", "--model",
                model_folder, "--resolution", 32, "--device", "cpu") == 0
    file = tmp_path / "encoded" / "whole.tar"
    places = [place for _, place, *_ in Shards(file, 32).samples]
    spoil(file, places[0], b"\0" * 8)
    content = file.read_bytes()
    spoil(file, content.index(b"(2, 4, 8, 8)", places[5]), b"(4, 2, 8, 8)")
    found, counts = drawn(file)
    assert set(counts) == {"unreadable posterior"} and counts["unreadable posterior"] >= 8
    assert not {"caption 0", "caption 5"} & {caption for _, caption in found}


# ----------------------------------------------------------------------------------- damaged tars

def spoil(file, place, content):
    with open(file, "r+b") as raw:
        raw.seek(place)
        raw.write(content)


DAMAGES = {
    "a damaged header": lambda file, header: spoil(file, header + 20, b"\xff"),
    "a hole of zeros": lambda file, header: spoil(file, header, bytes(512)),
    "tars joined": lambda file, header: file.write_bytes(file.read_bytes() * 2),
}


def damage(file, how):
    header = Shards(file, 8).samples[5][1] - 512  # of the sixth picture
    DAMAGES[how](file, int(header))
    return file


@pytest.mark.parametrize("how", DAMAGES)
def test_a_tar_that_goes_on_after_its_end_is_refused_by_name(how, mixed):
    with pytest.raises(InputError, match=f"whole.tar: not a whole tar file .*{how}"):
        Shards(damage(mixed[1], how), 8)


def test_zeros_after_its_end_are_part_of_a_tar(mixed):
    with open(mixed[1], "ab") as raw:
        raw.write(bytes(3 * 2**20 + 512))
    assert len(Shards(mixed[1], 8)) == 12


def test_a_run_may_go_without_a_damaged_shard_and_records_it(mixed, model_folder, tmp_path, capsys):
    damage(mixed[1], "a hole of zeros")
    both, out = f"{mixed[0]},{mixed[1]}", tmp_path / "run"
    argv = options(model_folder, both, out, "--steps", 2)
    assert call(train.main, *argv) == 2
    assert "whole.tar" in capsys.readouterr().err
    argv = options(model_folder, both, out, "--steps", 3, "--skip-bad-shards")
    argv += ["--lr-schedule", "constant"]
    assert call(train.main, *argv) == 0
    assert "shard left out: " in capsys.readouterr().out
    config = json.loads((out / "config.json").read_text())
    assert config["skipped_shards"] == [str(mixed[1])]
    argv += ["--steps", 4]
    assert call(train.main, *argv) == 0
    assert json.loads((out / "config.json").read_text())["skipped_shards"] == [str(mixed[1])]

    shutil.copy(mixed[0], mixed[1])  # repaired: then other samples would come
    assert call(train.main, *argv) == 2
    error = capsys.readouterr().err
    assert "whole.tar" in error and "without none now" in error


def pocket_with_faults(folder):
    """The pocket's pictures in four shards: a hundredth of them broken in three ways, and one shard
    with a damaged header."""
    samples = {}
    with tarfile.open(ROOT / "pocket/data/train-000.tar") as tar:
        for member in tar:
            stem = member.name.rpartition(".")[0]
            samples.setdefault(stem, []).append((member.name, tar.extractfile(member).read()))
    breaks = [lambda data: data[:200], lambda data: b"<html>not here</html>", lambda data: b""]
    for shard in range(4):
        members = []
        for i, files in list(enumerate(samples.values()))[shard::4]:
            if i % 100 == 37:
                (name, data), *rest = files
                files = [(name, breaks[i // 100 % 3](data)), *rest]
            members += files
        write_shard(folder / f"{shard}.tar", members)
    with tarfile.open(folder / "2.tar") as tar:
        offset = tar.getmembers()[300].offset
    raw = bytearray((folder / "2.tar").read_bytes())
    raw[offset:offset + 512] = b"\xff" * 512
    (folder / "2.tar").write_bytes(raw)


@pytest.mark.slow
def test_two_processes_with_workers_count_every_broken_sample_of_the_pocket(tmp_path):
    """The soak: nothing hangs, and the counts are those of the samples that were drawn."""
    folder, steps = tmp_path / "data", 500
    folder.mkdir()
    pocket_with_faults(folder)
    argv = ["--data", folder, "--skip-bad-shards", "--max-bad", 0.5, "--batch-size", 2,
            "--workers", 2, "--steps", steps, "--checkpoint-every", 50, "--no-evaluate",
            "--reward", "none", "--device", "cpu", "--seed", 4, "--out", tmp_path / "run"]
    launch(argv, world=2).succeed()
    shards, expected = Shards(folder, 64, skip_bad=True), Counter()
    for position in range(steps * 4):
        number, attempt = shards.number(4, position), 0
        while True:
            try:
                shards.sample(number, 0)
                break
            except BadSample as bad:
                expected[bad.kind] += 1
                number, attempt = shards.substitute(4, position, attempt), attempt + 1
    assert log(tmp_path / "run")[-1] == expected
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["skipped_shards"] == [str(folder / "2.tar")]
