"""The index of a data set's samples, and the record of what a run was trained on."""
import io
import json
import multiprocessing
import os
import pickle
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import cut, random_png, write_shard
from data import Shards, StepSampler, batches, permutation
from support import index
from support.broken import Broken
from support.shards import changed
from support.weights import InputError


def fill(file, *names, age=60):
    """A tar of one picture and caption for each name, written so many seconds ago."""
    members = []
    for name in names:
        members += [(f"{name}.png", random_png(len(name))), (f"{name}.txt", name.encode())]
    write_shard(file, members)
    os.utime(file, (time.time() - age,) * 2)
    return file


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Four tars of 1 to 4 samples, which are enough for an index here. The cache is apart."""
    monkeypatch.setattr(index, "SMALL", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "shards").mkdir()
    for i in range(4):
        fill(tmp_path / "shards" / f"{i}.tar", *(f"{i}{letter}" for letter in "abcd"[:i + 1]))
    return tmp_path / "shards"


@pytest.fixture
def read(monkeypatch):
    """-> the names of the tars whose headers are read"""
    names = []

    def counting(files, known_by):
        names.extend(files)
        return read_all(files, known_by)

    read_all = index.read_all
    monkeypatch.setattr(index, "read_all", counting)
    return names


def content(shards):
    return [(tuple(place), *shards.captions(i)) for i, place in enumerate(shards.samples)]


def test_the_index_gives_what_the_tars_give(folder, read, monkeypatch):
    first = Shards(folder, 8)
    assert (folder / index.NAME).is_file() and len(read) == 4
    again = Shards(folder, 8)
    assert len(read) == 4
    monkeypatch.setattr(index, "SMALL", 2**30)
    (folder / index.NAME).unlink()
    plain = Shards(folder, 8)
    assert content(first) == content(again) == content(plain) and len(plain) == 10
    assert torch.equal(again[9][0], plain[9][0]) and again[9][1] == "3d"
    assert first.record() == again.record() == plain.record()


def test_a_small_data_set_and_loose_pictures_leave_no_index(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(index, "SMALL", 64 * 2**20)
    Shards(folder, 8)
    assert len(list(folder.iterdir())) == 4
    monkeypatch.setattr(index, "SMALL", 0)
    (tmp_path / "loose").mkdir()
    (tmp_path / "loose" / "a.png").write_bytes(random_png(0))
    (tmp_path / "loose" / "a.txt").write_text("words")
    shards = Shards(tmp_path / "loose", 8)
    assert len(list((tmp_path / "loose").iterdir())) == 2 and not (tmp_path / "cache").exists()
    assert shards.record()["files"].keys() == {"loose files"}


def test_only_changed_shards_are_read_again(folder, read):
    Shards(folder / "[0-2].tar", 8)
    Shards(folder, 8)
    assert read == ["0.tar", "1.tar", "2.tar", "3.tar"]
    fill(folder / "1.tar", "xa", "xb", age=30)  # as large as before, and another time
    fill(folder / "4.tar", "new")
    (folder / "0.tar").unlink()
    assert [text for _, text in content(Shards(folder, 8))][:2] == ["xa", "xb"]
    assert read[4:] == ["1.tar", "4.tar"]
    assert Shards(folder / "3.tar", 8).caption(0) == "3a" and len(read) == 6
    assert list(index.load(folder / index.NAME).tars) == ["1.tar", "2.tar", "3.tar", "4.tar"]


def test_a_tar_that_was_written_just_now_is_read_again(folder, read):
    fill(folder / "1.tar", "1a", "1b", age=0)
    Shards(folder, 8)
    before = os.stat(folder / "1.tar")
    fill(folder / "1.tar", "xa", "xb")
    os.utime(folder / "1.tar", ns=(before.st_mtime_ns,) * 2)  # within one tick of the clock
    assert [text for _, text in content(Shards(folder, 8))][1:3] == ["xa", "xb"]
    assert read[4:] == ["1.tar"]


def test_the_index_of_a_folder_that_is_not_ours_lies_in_the_cache(folder, read):
    (folder / index.NAME).mkdir()  # so that no file can be written there, even by root
    first = content(Shards(folder, 8))
    assert len(list((folder.parent / "cache" / "rg-lcd").glob("*.index"))) == 1
    assert content(Shards(folder, 8)) == first and len(read) == 4


def test_without_a_place_for_the_index_the_shards_are_read_each_time(folder, read, capsys):
    (folder / index.NAME).mkdir()
    (folder.parent / "cache").write_text("a file where a folder should be")
    first = content(Shards(folder, 8))
    assert "no index was written" in capsys.readouterr().out
    assert content(Shards(folder, 8)) == first and len(read) == 8


@pytest.mark.parametrize("spoil", [
    lambda file: cut(file, 100), lambda file: cut(file, file.stat().st_size - 1),
    lambda file: file.write_bytes(file.read_bytes() + b"0"), lambda file: file.write_bytes(b""),
    lambda file: file.write_bytes(b"index of another version"),
    lambda file: file.write_bytes(index.MAGIC + (2).to_bytes(8, "little") + b"[]"),
])
def test_an_index_that_is_not_whole_is_made_again(spoil, folder, read):
    first = content(Shards(folder, 8))
    spoil(folder / index.NAME)
    assert content(Shards(folder, 8)) == first and len(read) == 8
    assert content(Shards(folder, 8)) == first and len(read) == 8


def slowly(folder):
    """What a process of several does. -> the record, how many tars it read itself"""
    count, read_tar = [], index.read_tar

    def slow(*args):
        time.sleep(0.05)
        count.append(1)
        return read_tar(*args)

    index.read_tar = slow
    index.ProcessPoolExecutor = index.ThreadPoolExecutor  # so that this process counts
    return Shards(folder, 8).record(), len(count)


def test_of_processes_that_start_at_once_one_makes_the_index(folder):
    with multiprocessing.get_context("fork").Pool(3) as pool:
        records, counts = zip(*pool.map(slowly, [folder] * 3, chunksize=1))
    assert sorted(counts) == [0, 0, 4]
    assert records[0] == records[1] == records[2]
    assert sorted(file.name for file in folder.iterdir()) == [
        index.NAME, "0.tar", "1.tar", "2.tar", "3.tar"]


def test_a_damaged_shard_costs_no_other_shard_its_place_in_the_index(folder, read):
    whole = (folder / "1.tar").read_bytes()
    for name in ("1.tar", "2.tar"):
        cut(folder / name, 1000)
        os.utime(folder / name, (1, 1))
    with pytest.raises(InputError, match="/1.tar: not a whole tar file .*; so are 2.tar"):
        Shards(folder, 8)
    assert len(read) == 4
    shards = Shards(folder, 8, skip_bad=True)
    assert len(shards) == 5 and read[4:] == ["1.tar", "2.tar"]
    assert sorted(shards.skipped) == [str(folder / "1.tar"), str(folder / "2.tar")]
    (folder / "1.tar").write_bytes(whole)
    assert len(Shards(folder, 8, skip_bad=True)) == 7


def test_what_is_left_out_is_counted_from_the_index_too(folder):
    write_shard(folder / "4.tar", [("a.jpg", b""), ("b.txt", b"words"), ("._c.jpg", b"")])
    os.utime(folder / "4.tar", (1, 1))
    first, again = (Shards(folder, 8).notes() for _ in range(2))
    assert first == again and len(first) == 3


def test_mixtures_are_refused_from_the_index_too(folder):
    np.save(buffer := io.BytesIO(), np.zeros((2, 4, 4, 4), np.float16))
    write_shard(folder / "4.tar", [("a.npy", buffer.getvalue()), ("a.txt", b"words")])
    os.utime(folder / "4.tar", (1, 1))
    for _ in range(2):
        with pytest.raises(InputError, match="one kind"):
            Shards(folder, 8)


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="Linux tells the peak")
def test_a_warm_start_on_11_million_pairs_takes_2_seconds_and_200_mb(tmp_path):
    tars = {}
    for i in range(1100):
        file = tmp_path / f"{i:05d}.tar"
        file.write_bytes(b"a tar")
        os.utime(file, ns=(10**18,) * 2)
        tar = index.Tar(5, 10**18, 10_000, f"{i:016x}", True, [], [])
        tars[file.name] = (tar, np.empty(0, index.ROW))
    index.save(tmp_path / index.NAME, tars)
    size = os.path.getsize(tmp_path / index.NAME)
    os.truncate(tmp_path / index.NAME, size + 11_000_000 * index.ROW.itemsize)  # rows of zeros
    permutation.cache_clear()

    def peak():
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024

    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forget the peak so far
    before, start = peak(), time.process_time()
    shards = Shards(tmp_path, 512)
    steps = iter(StepSampler(len(shards), 0, 0, 10, 16, shards=shards))
    assert len({shards.samples[number][0] for number, _ in next(steps)}) > 8
    record = shards.record()
    assert time.process_time() - start < 2
    assert shards.number(0, len(shards)) >= 0  # the second epoch
    assert peak() - before < 200e6
    assert record["count"] == 11_000_000 and len(json.dumps(record)) < 100_000
    permutation.cache_clear()


def test_the_order_is_that_of_64_bit_permutations():
    for count in (10, 70_000):
        generator = torch.Generator().manual_seed(int(5e18) + count)
        wide = torch.randperm(count, generator=generator)
        generator.manual_seed(int(5e18) + count)
        assert torch.equal(wide, torch.randperm(count, generator=generator, dtype=torch.int32))
    # what runs drew before there was an index
    assert permutation(0, 0, 10).tolist() == [8, 2, 0, 7, 4, 1, 3, 5, 9, 6]


def test_a_process_that_starts_afresh_maps_the_index(folder, read):
    shards = Shards(folder, 8)
    packed = pickle.dumps(shards)
    rows = shards.samples.tars[0][2].rows
    assert isinstance(rows.base, np.memmap) and rows.tobytes() not in packed
    fill(folder / "4.tar", "new")
    Shards(folder, 8)  # another run writes the index anew
    assert content(pickle.loads(packed)) == content(shards)
    fill(folder / "1.tar", "another", age=30)
    Shards(folder, 8)
    with pytest.raises(InputError, match="1.tar changed while this run started"):
        pickle.loads(packed)


# ---------------------------------------------------------------------------------------- records

def test_a_copy_of_the_data_has_the_same_record(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "elsewhere")
    before, now = (json.loads(json.dumps(Shards(path, 8).record()))
                   for path in (folder, tmp_path / "elsewhere"))
    assert before == now and changed(before, now) == []
    assert before["count"] == 10 and before["files"]["2.tar"][:2] == [
        os.path.getsize(folder / "2.tar"), 3]


def test_shards_that_were_added_removed_or_exchanged_are_named(folder):
    before = Shards(folder, 8).record()
    fill(folder / "1.tar", "another", "thing", age=30)
    (folder / "2.tar").unlink()
    for i in range(4, 9):
        fill(folder / f"{i}.tar", f"{i}")
    assert changed(before, Shards(folder, 8).record()) == [
        "4.tar, 5.tar, 6.tar and 2 more were added", "2.tar was removed", "1.tar was exchanged"]


def test_shards_of_several_folders_are_named_by_their_paths(folder):
    for name in ("one", "two"):
        (folder / f"set-{name}").mkdir()
        fill(folder / f"set-{name}" / "a.tar", name)
    before = Shards(folder / "set-*/a.tar", 8).record()
    assert list(before["files"]) == ["set-one/a.tar", "set-two/a.tar"]
    (folder / "set-two").rename(folder / "a-set")
    now = Shards(f"{folder}/a-set/a.tar,{folder}/set-one/a.tar", 8).record()
    assert changed(before, now) == ["a-set/a.tar was added", "set-two/a.tar was removed"]


def test_another_order_is_told(folder):
    before = Shards(folder, 8).record()
    now = before | {"hash": "another", "files": dict(reversed(before["files"].items()))}
    assert "another order" in changed(before, now)[0]


# -------------------------------------------------------------------------------------- leftovers

def test_first_passes_over_broken_samples(tmp_path):
    members = [("a.png", b""), ("a.txt", b"a")]
    for name in "bcd":
        members += [(f"{name}.png", random_png(0)), (f"{name}.txt", name.encode())]
    shards = Shards(write_shard(tmp_path / "a.tar", members), 8)
    assert [caption for _, caption in shards.first(2)] == ["b", "c"]
    assert [caption for _, caption in shards.first(9)] == ["b", "c", "d"]


def test_a_json_without_a_caption_is_counted_each_time_it_is_drawn(tmp_path):
    members = [("a.png", random_png(0)), ("a.json", b'{"caption": null}'),
               ("b.png", random_png(0)), ("b.json", b'{"caption": "words"}')]
    shards = Shards(write_shard(tmp_path / "a.tar", members), 8)
    assert len(shards) == 2  # what a JSON file holds is seen when it is drawn
    counted, drawn, sample = Broken(4, 1, {}), [], Shards.sample
    shards.sample = lambda i, draw: drawn.append(i) or sample(shards, i, draw)
    for _, captions in batches(shards, 0, 0, 6, 4, broken=counted):
        assert captions == ("words",) * 4
    assert counted.gather() == {"broken": {"unreadable caption": drawn.count(0)}}
    assert drawn.count(0) >= 12
