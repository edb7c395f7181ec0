"""Shards on a server: one of our own, on this machine, which stalls, breaks off and refuses."""
import re
import shutil
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import data
import train
from conftest import call, random_png, write_shard
from data import Shards, Windows, batches
from support import remote
from support.broken import Broken
from support.shards import changed
from support.weights import WEIGHTS, InputError


class Server(ThreadingHTTPServer):
    """Files by ranges, as a bucket gives them. faults: {name: what goes wrong at the next requests
    of that file}: "503", "stall", "drop", or "" for nothing; log: (method, name, bytes)"""
    daemon_threads = True

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.log, self.ranges = files, {}, [], True
        self.stop = threading.Event()

    def url(self, name):
        return f"http://127.0.0.1:{self.server_port}/{name}"

    def count(self, method, name=None):
        return sum(1 for m, n, _ in self.log if m == method and name in (None, n))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.answer()

    do_HEAD = do_GET

    def answer(self):
        server, name = self.server, self.path.partition("?")[0].lstrip("/")
        content = server.files.get(name)
        ends = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        part, status = content or b"", 200 if content is not None else 404
        if ends and server.ranges:
            part, status = content[int(ends[1]):int(ends[2]) + 1], 206
        server.log.append((self.command, name, len(part)))
        faults = server.faults.get(name, [])
        fault = faults.pop(0) if faults else ""
        if fault == "503":
            part, status = b"", 503
        self.send_response(status)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("ETag", f'"{hash(content)}"')
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault in ("stall", "drop"):
            self.wfile.write(part[:len(part) // 2])
            self.close_connection = True
            if fault == "stall":
                server.stop.wait(60)
            return
        self.wfile.write(part)

    def log_message(self, *_):
        pass


def noise(seed, side=40):
    """A picture that does not compress."""
    return random_png(seed, (side, side))


def shard(*numbers, side=40, picture=noise):
    """The bytes of a tar with these samples."""
    members = []
    for i in numbers:
        members += [(f"{i:03d}.png", picture(i, side)), (f"{i:03d}.txt", f"caption {i}".encode())]
    return write_bytes(members)


def write_bytes(members):
    write_shard(Path("members.tar"), members)
    return Path("members.tar").read_bytes()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Five shards of four samples each: 0.tar to 4.tar. Waits are short."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(remote, "WAITS", (0.01, 0.02, 0.04))
    monkeypatch.setattr(remote, "STALL", 0.3)
    server = Server({f"{i}.tar": shard(*range(4 * i, 4 * i + 4)) for i in range(5)})
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield server
    server.stop.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def small_windows(monkeypatch):
    monkeypatch.setattr(data, "WINDOW", 2)


def on_disk(server, folder="disk"):
    Path(folder).mkdir()
    for name, content in server.files.items():
        Path(folder, name).write_bytes(content)
    return folder


def equal(first, second):
    assert len(first) == len(second)
    for i in range(len(first)):
        assert torch.equal(first[i][0], second[i][0]) and first[i][1] == second[i][1]


def test_remote_shards_give_what_the_same_files_give(server):
    far, here = Shards(server.url("{0..4}.tar"), 8), Shards(on_disk(server), 8)
    equal(far, here)
    assert [place[1:] for place in far.samples] == [place[1:] for place in here.samples]
    assert far.record()["files"] == here.record()["files"]
    assert "windows of 8 shards" in changed(here.record(), far.record())[0]


def test_the_index_is_read_by_headers_and_once(server, monkeypatch):
    monkeypatch.setattr(remote, "AHEAD", 1024)
    server.files["0.tar"] = shard(*range(5), side=300)
    first = Shards(server.url("0.tar"), 8)
    asked = sum(size for method, _, size in server.log if method == "GET")
    assert len(first) == 5 and asked < len(server.files["0.tar"]) / 10
    gets = server.count("GET")
    assert len(Shards(server.url("0.tar?token=2"), 8)) == 5  # a token makes no other file
    assert server.count("GET") == gets
    server.files["0.tar"] = shard(*range(7), side=300)
    assert len(Shards(server.url("0.tar"), 8)) == 7
    server.files["0.tar"] = shard(*range(8, 15), side=300)  # another ETag tells, or the size
    assert Shards(server.url("0.tar"), 8).caption(0) == "caption 8"


@pytest.mark.parametrize("fault", ["503", "drop", "stall"])
def test_what_a_server_fails_to_give_is_asked_for_again(fault, server):
    start = time.monotonic()
    server.faults = {"0.tar": ["", fault, fault], "1.tar": [fault]}  # the first request is a HEAD
    far = Shards(server.url("{0..1}.tar"), 8)
    assert server.faults == {"0.tar": [], "1.tar": []}
    server.faults = {"0.tar": [fault], "1.tar": [fault, fault]}
    assert [far[i][1] for i in (0, 7)] == ["caption 0", "caption 7"]
    assert server.faults == {"0.tar": [], "1.tar": []}
    equal(far, Shards(f"{on_disk(server)}/{{0..1}}.tar", 8))
    assert time.monotonic() - start < 30  # a stalled connection is given up, not waited for


@pytest.mark.parametrize("fault", ["503", "drop", "stall"])
def test_in_the_end_one_error_names_the_shard(fault, server, capsys):
    far = Shards(server.url("{0..1}.tar"), 8)
    server.faults["1.tar"] = [fault] * 4
    error = server.url("1.tar") + ": cannot be read, after 4 tries .*the same command goes on"
    with pytest.raises(InputError, match=error):
        far[4]
    assert len(server.faults["1.tar"]) == 0 and far[4][1] == "caption 4"
    server.faults["0.tar"] = [""] + [fault] * 4
    server.files["0.tar"] = server.files["0.tar"] + bytes(512)
    assert call(lambda: Shards(server.url("0.tar"), 8, skip_bad=True)) == 2  # it is no bad shard
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: http")


def test_a_data_loading_process_names_it_too(server, capsys):
    far = Shards(server.url("0.tar"), 8)
    server.faults["0.tar"] = ["503"] * 99
    assert call(lambda: list(batches(far, 0, 0, 2, 4, workers=1))) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {server.url('0.tar')}: cannot be read") and len(error) < 300


def test_a_shard_that_is_not_there_is_refused_at_once(server, monkeypatch):
    monkeypatch.setattr(remote, "WAITS", (60,))
    with pytest.raises(InputError, match="/5.tar: cannot be read .HTTP status 404"):
        Shards(server.url("{3..5}.tar"), 8)
    with pytest.raises(InputError, match="only tars"):
        Shards(server.url("a.jpg"), 8)


def test_a_server_without_ranges_is_refused(server):
    server.ranges = False
    server.files["0.tar"] = shard(0, 1, side=500)
    with pytest.raises(InputError, match="0.tar: .*range requests.*Copy the shards to a disk"):
        Shards(server.url("0.tar"), 8)


def test_damaged_and_packed_remote_shards_are_refused_by_name(server):
    server.files["1.tar"] = server.files["1.tar"][:5000]
    with pytest.raises(InputError, match="/1.tar: not a whole tar"):
        Shards(server.url("{0..1}.tar"), 8)
    assert len(Shards(server.url("{0..1}.tar"), 8, skip_bad=True)) == 4
    server.files["0.tar"] = b"\x1f\x8b" + bytes(1000)
    with pytest.raises(InputError, match="/0.tar: packed"):
        Shards(server.url("0.tar"), 8)


def test_what_is_missing_to_read_urls_is_named(server, monkeypatch):
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(InputError, match=r"the extra `remote`.*pip install -e '.\[remote\]'"):
        Shards(server.url("0.tar"), 8)
    with pytest.raises(InputError, match="nonsense://x/a.tar: .*expected a path, https://"):
        Shards("nonsense://x/a.tar", 8)


def test_other_stores_are_read_and_globbed(server):
    import fsspec
    store = fsspec.filesystem("memory")
    for name, content in server.files.items():
        store.pipe_file(f"/bucket/{name}", content)
    far = Shards("memory://bucket/*.tar", 8)
    equal(far, Shards(on_disk(server), 8))
    with pytest.raises(InputError, match="no such shards"):
        Shards("memory://bucket/none-*.tar", 8)
    with pytest.raises(InputError, match="none.tar: cannot be read"):
        Shards("memory://bucket/none.tar", 8)


# ---------------------------------------------------------------------------------------- windows

COUNTS = [5, 3, 8, 1, 7, 6, 2]


def stream(counts=COUNTS, size=3, seed=0, first=0, last=None):
    windows = Windows(counts, size)
    last = 3 * sum(counts) if last is None else last
    return [windows.number(seed, position) for position in range(first, last)]


def shards_of(numbers, counts=COUNTS):
    return np.searchsorted(np.cumsum(counts), numbers, "right").tolist()


def test_each_epoch_sees_every_sample_once_in_windows_of_shards():
    total, whole = sum(COUNTS), stream()
    assert whole == stream() and whole != stream(seed=1)
    assert whole[40:] == stream(first=40)
    epochs = [whole[i:i + total] for i in range(0, len(whole), total)]
    assert all(sorted(epoch) == list(range(total)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3
    for epoch in epochs:
        seen = list(dict.fromkeys(shards_of(epoch)))
        first = {shard: place for place, shard in reversed(list(enumerate(shards_of(epoch))))}
        last = {shard: place for place, shard in enumerate(shards_of(epoch))}
        open_at = [sum(first[s] <= place <= last[s] for s in seen) for place in range(total)]
        assert max(open_at) == 3  # of 7 shards
    assert len({tuple(sorted(set(shards_of(epoch[:6])))) for epoch in epochs}) > 1


def test_the_samples_of_a_window_are_shuffled_together():
    numbers = stream([50] * 6, 3)[:150]
    assert len(set(shards_of(numbers[:20], [50] * 6))) == 3
    assert abs(np.corrcoef(np.argsort(np.argsort(numbers)), range(150))[0, 1]) < 0.3


def test_another_sample_is_one_of_the_same_window():
    windows = Windows(COUNTS, 2)
    for position in range(sum(COUNTS)):
        shards, _ = windows.around(0, position)
        assert shards_of([windows.number(0, position)])[0] in shards
        others = {windows.another(0, position, draw) for draw in range(40)}
        assert set(shards_of(list(others))) == set(shards)


def test_the_next_window_is_the_one_that_follows():
    windows = Windows(COUNTS, 3)
    visited = [windows.around(0, position) for position in range(3 * sum(COUNTS))]
    changes = [i for i in range(1, len(visited)) if visited[i][0] != visited[i - 1][0]]
    assert len(changes) == 8  # three windows an epoch
    assert all(visited[i][0] == visited[i - 1][1] for i in changes)


@pytest.mark.parametrize("workers", [0, 1])
def test_resumed_and_distributed_batches_are_the_same(workers, server, small_windows):
    url = server.url("{0..4}.tar")
    whole = list(batches(Shards(url, 8), 7, 0, 8, 4, workers=workers))
    resumed = list(batches(Shards(url, 8), 7, 5, 8, 4, workers=workers))
    for (images, captions), (images_2, captions_2) in zip(whole[5:], resumed, strict=True):
        assert torch.equal(images, images_2) and captions == captions_2
    halves = [list(batches(Shards(url, 8), 7, 0, 8, 2, rank, 2, workers)) for rank in (0, 1)]
    for (_, captions), *parts in zip(whole, *halves, strict=True):
        assert captions == parts[0][1] + parts[1][1]
    assert sorted(c for _, captions in whole[:5] for c in captions) == sorted(
        f"caption {i}" for i in range(20))


def test_a_broken_remote_sample_is_replaced_out_of_its_window(server, small_windows):
    server.files["3.tar"] = shard(*range(12, 16), picture=lambda i, side: noise(i) * (i != 13))
    far, counted = Shards(server.url("{0..4}.tar"), 8), Broken(4, 1, {})
    captions = [caption for _, captions in batches(far, 0, 0, 5, 4, broken=counted)
                for caption in captions]
    assert counted.new[0][0] == f"{server.url('3.tar')}: 013.png"
    missing = next(i for i in range(20) if far.number(0, i) == 13)
    shards = {f"{k}.tar" for k in far.windows.around(0, missing)[0]}
    assert f"{int(captions[missing].split()[1]) // 4}.tar" in shards
    assert "caption 13" not in captions


# ------------------------------------------------------------------------------------------ cache

def wait_for(condition):
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < 10
        time.sleep(0.01)


def test_each_shard_is_fetched_once_an_epoch_into_a_cache_of_limited_size(
        server, small_windows, tmp_path):
    for i in range(5, 24):
        server.files[f"{i}.tar"] = shard(*range(4 * i, 4 * i + 4))
    size = max(map(len, server.files.values()))
    limit = 6.5 * size / 1e9
    far = Shards(server.url("{0..23}.tar"), 8, cache=tmp_path / "copies", cache_gb=limit)
    gets = Counter({name: server.count("GET", name) for name in server.files})
    held = []
    for step, _ in enumerate(batches(far, 0, 0, 48, 2)):  # an epoch, 4 steps a window
        following = far.windows.around(0, 2 * step)[1]
        wait_for(lambda k=following: all(  # what a run does in time, and a test does at once
            list((tmp_path / "copies").glob(f"*-{far.files[shard].rpartition('/')[2]}"))
            for shard in k))
        held.append(sum(f.stat().st_size for f in (tmp_path / "copies").iterdir()))
    assert max(held) <= limit * 1e9 and max(held) > 3 * size
    fetched = Counter({name: server.count("GET", name) for name in server.files}) - gets
    # the next epoch's first window is fetched towards the end
    again = {far.files[shard].rpartition("/")[2] for shard in far.windows.around(0, 96)[0]}
    assert {name: n for name, n in fetched.items() if name not in again} == {
        name: 1 for name in server.files if name not in again}


def test_a_cache_too_small_for_the_windows_is_refused(server, small_windows):
    with pytest.raises(InputError, match="--cache-gb 1e-05: expected .* or more"):
        Shards(server.url("{0..4}.tar"), 8, cache_gb=1e-5)


def test_a_copy_appears_whole_and_what_a_killed_process_left_is_removed(server, tmp_path):
    cache, size = remote.Cache(tmp_path, 1), len(server.files["0.tar"])
    (tmp_path / f".{'0' * 16}-0.tar.new").write_bytes(b"half")
    (tmp_path / "of-others.tar").write_bytes(b"theirs")
    server.faults["0.tar"] = ["drop"] * 4
    with pytest.raises(InputError, match="cannot be read"):
        cache.copy(server.url("0.tar"), size, "")
    assert [file.name for file in tmp_path.glob("*0.tar")] == []
    copy = cache.copy(server.url("0.tar"), size, "")  # the same command goes on
    assert copy.read_bytes() == server.files["0.tar"]
    assert not list(tmp_path.glob(".*.new"))
    remote.Cache(tmp_path, 0).copy(server.url("1.tar"), 1, "")
    assert not copy.exists() and (tmp_path / "of-others.tar").exists()


def test_the_copies_that_were_used_last_are_kept(server, tmp_path):
    size = len(server.files["0.tar"])
    cache = remote.Cache(tmp_path, 2.5 * size / 1e9)
    for name in ("0.tar", "1.tar", "0.tar", "2.tar"):
        cache.copy(server.url(name), size, "")
        time.sleep(0.02)  # the clock of a file system ticks
    assert sorted(file.name[17:] for file in tmp_path.glob("*-?.tar")) == ["0.tar", "2.tar"]


def test_a_shard_that_got_shorter_is_told(server):
    far = Shards(server.url("0.tar"), 8)
    server.files["0.tar"] = server.files["0.tar"][:1000]
    with pytest.raises(InputError, match="/0.tar: cannot be read.*bytes came where"):
        far[0]


def test_processes_that_want_one_shard_fetch_it_once(server, tmp_path):
    size = len(server.files["0.tar"])
    threads = [threading.Thread(
        target=remote.Cache(tmp_path, 1).copy, args=(server.url("0.tar"), size, ""))
        for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.count("GET", "0.tar") == 1


def test_a_copy_that_others_removed_is_fetched_again(server, monkeypatch):
    far, here = Shards(server.url("0.tar"), 8), Shards.here
    removals = [1, 1, 1]

    def removed_at_once(shards, number):
        path = here(shards, number)
        if removals:
            path.unlink(removals.pop())
        return path

    monkeypatch.setattr(Shards, "here", removed_at_once)
    assert far.caption(0) == "caption 0" and not removals


def test_a_cache_that_cannot_be_written_is_told(server, tmp_path):
    (tmp_path / "file").write_text("")
    far = Shards(server.url("0.tar"), 8, cache=tmp_path / "file")
    with pytest.raises(InputError, match="--cache .*file: .*0.tar cannot be kept there"):
        far[0]


@torch.no_grad()
def test_remote_shards_are_encoded_as_those_on_a_disk(server, model_folder, tmp_path):
    options = ["--model", model_folder, "--resolution", 32, "--device", "cpu", "--precision",
               "fp32"]
    assert call(data.main, "--data", server.url("{0..1}.tar"), "--out", tmp_path / "far",
                "--cache", tmp_path / "copies", "--cache-gb", 1, *options) == 0
    assert call(data.main, "--data", f"{on_disk(server)}/{{0..1}}.tar", "--out",
                tmp_path / "near", *options) == 0
    for name in ("0.tar", "1.tar"):
        assert (tmp_path / "far" / name).read_bytes() == (tmp_path / "near" / name).read_bytes()
    assert len(list((tmp_path / "copies").iterdir())) == 2


def test_a_run_on_remote_shards_goes_on_where_it_stopped(server, model_folder, tmp_path):
    def run(out, *more):
        return call(
            train.main, "--teacher", model_folder, "--data", server.url("{0..4}.tar"), "--out",
            tmp_path / out, "--resolution", 32, "--steps", 4, "--batch-size", 4, "--reward", "none",
            "--checkpoint-every", 2, "--device", "cpu", "--precision", "fp32", "--no-compile",
            "--workers", 1, *more)

    assert run("whole") == 0
    assert run("parts") == 0
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step-000004")
    server.faults = {f"{i}.tar": ["", "drop", "503"] for i in range(5)}
    shutil.rmtree(tmp_path / "cache" / "rg-lcd" / "shards")
    assert run("parts") == 0
    first, second = (load_file(tmp_path / out / "unet" / WEIGHTS) for out in ("whole", "parts"))
    assert all(torch.equal(first[name], second[name]) for name in first)
