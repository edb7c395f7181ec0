"""Where the samples of a data set lie: tars are read once, header by header, and what was found
stays in one small file for each folder of tars, which is mapped into memory at later starts.

The file lies beside the tars, or in the cache folder (support/cache.py) where nothing can be
written there. A tar whose size or time changed is read again, and only that one. A data set that is
read in a moment leaves no file."""
import bisect
import dataclasses
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from support import remote
from support.cache import cache_home, in_turn, short_hash
from support.cli import cores
from support.shards import CONTENTS, DamagedShard, is_loose, read_loose, read_tar
from support.weights import InputError

NAME = ".rg-lcd.index"  # its name beside the tars
MAGIC = b"RG-LCD index 1\n\0"  # 16 bytes; then 8, the length of a JSON header; then the rows
SMALL = 64 * 2**20  # bytes of tars, or fewer, that are read at every start: it takes a second
SETTLED = 2  # seconds; a tar written just now may change again without its time showing it
BLOCK = 512  # of a tar: contents begin at its multiples
NPY = CONTENTS.index(".npy")

# a sample: its picture or posterior, its caption (offsets in blocks, sizes in bytes), and which of
# support.shards.CONTENTS and CAPTIONS they are
ROW = np.dtype([("offset", "<u4"), ("size", "<u4"), ("text_offset", "<u4"), ("text_size", "<u4"),
                ("kind", "u1"), ("text_kind", "u1")])


@dataclass
class Tar:
    """What the index says of one tar."""
    bytes: int
    mark: int | str  # time of its last change in ns; of a remote one whatever changes with it
    samples: int
    hash: str  # of its rows
    pictures: bool  # does it hold any?
    posteriors: list  # the sizes in bytes of those it holds; two are enough to see a mixture
    left_out: list  # [noun, reason, how many]


class Table:
    """The rows of some tars, {name: Tar} in their order, in memory or (rows=None) in an index
    file. Where a process is started afresh, that maps the file anew and copies nothing."""

    def __init__(self, tars, rows=None, file=None):
        self.tars, self.file = tars, file
        ends = np.cumsum([tar.samples for tar in tars.values()]).tolist()
        self.firsts = dict(zip(tars, [0, *ends]))
        self.rows = rows

    def of(self, name):
        """-> the rows of a tar."""
        first = self.firsts[name]
        return self.rows[first:first + self.tars[name].samples]

    def __reduce__(self):
        return (load, (self.file,)) if self.file else (Table, (self.tars, self.rows))


# --------------------------------------------------------------------------------------- the file

def load(file):
    """An index file -> Table. An empty one if there is none, or none that is whole."""
    try:
        with open(file, "rb") as raw:
            magic, length = raw.read(16), int.from_bytes(raw.read(8), "little")
            if magic != MAGIC or length > os.path.getsize(file):
                return Table({})
            tars = {name: Tar(**fields) for name, fields in json.loads(raw.read(length)).items()}
        count = sum(tar.samples for tar in tars.values())
        if os.path.getsize(file) != 24 + length + count * ROW.itemsize:
            return Table({})
        if count == 0:
            return Table(tars, np.empty(0, ROW))
        # as a plain array: a memmap takes ten times as long for one row
        rows = np.asarray(np.memmap(file, ROW, "r", 24 + length, (count,)))
        return Table(tars, rows, file)
    except (OSError, ValueError, TypeError, AttributeError):
        return Table({})


def save(file, parts):
    """Write {name: (Tar, rows)} as an index file, which appears whole or not at all."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f"{file.name}.{os.getpid()}.new")
    header = json.dumps({name: dataclasses.asdict(tar) for name, (tar, _) in parts.items()})
    try:
        with open(new, "wb") as raw:
            raw.write(MAGIC + len(header.encode()).to_bytes(8, "little") + header.encode())
            for _, rows in parts.values():
                raw.write(rows.tobytes())
            raw.flush()
            os.fsync(raw.fileno())  # else a power cut may leave the name and zeros
        new.rename(file)
    finally:
        new.unlink(missing_ok=True)


def places(folder):
    """The files where the index of a folder's tars may be, the better one first."""
    where = folder if remote.is_remote(folder) else os.path.realpath(folder)
    cached = cache_home() / f"{short_hash(where)}.index"
    return [cached] if remote.is_remote(folder) else [Path(folder) / NAME, cached]


# ------------------------------------------------------------------------------------ reading tars

def describe(files):
    """{name: path} -> {name: (bytes, mark)}, what an entry of the index is known by."""
    far = {name: file for name, file in files.items() if remote.is_remote(file)}
    found = {}
    for name in files.keys() - far.keys():
        stat = os.stat(files[name])
        found[name] = stat.st_size, stat.st_mtime_ns
    if far:
        with ThreadPoolExecutor(remote.AT_ONCE) as pool:
            found |= zip(far, pool.map(remote.describe, far.values()))
    return {name: found[name] for name in files}


def read(file, bytes, mark):
    """Read the headers of a tar -> Tar, its rows; or what is wrong with it."""
    try:
        wide, left_out = read_tar(file, bytes)
    except DamagedShard as error:
        return str(error)
    large = (wide[:, [2, 5]] >= 2**32).any(axis=1)
    if large.any():
        left_out["sample", "larger than 4 GB"] += int(large.sum())
        wide = wide[~large]
    rows = np.empty(len(wide), ROW)
    columns = wide[:, 1] // BLOCK, wide[:, 2], wide[:, 4] // BLOCK, wide[:, 5], *wide[:, 6:].T
    for name, column in zip(ROW.names, columns):
        rows[name] = column
    is_posterior = rows["kind"] == NPY
    return Tar(
        bytes, mark, len(rows), short_hash(rows.tobytes()), bool((~is_posterior).any()),
        np.unique(rows["size"][is_posterior])[:2].tolist(),
        [[*key, count] for key, count in left_out.items()]), rows


def read_all(files, known_by):
    """{name: path} -> yields (name, what read() gives), as they come. Tars on a disk are shared
    out over processes; for remote ones threads are enough, which wait together."""
    far = any(map(remote.is_remote, files.values()))
    workers = min(remote.AT_ONCE if far else cores(), len(files))
    jobs = [(name, file, *known_by[name]) for name, file in files.items()]
    if workers < 2 or sum(job[2] for job in jobs) <= SMALL and not far:
        for name, *job in jobs:
            yield name, read(*job)
        return
    pool = (ThreadPoolExecutor if far else ProcessPoolExecutor)(workers)
    try:
        # in order: a result that waits is small, and the bar moves all the same
        for (name, *_), result in zip(jobs, pool.map(read, *list(zip(*jobs))[1:])):
            yield name, result
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def read_folder(folder, files):
    """{name: path} of tars in one folder -> {name: Table}, {name: what is wrong with it}."""
    try:
        known_by = describe(files)
    except OSError as error:
        raise InputError(f"{error.filename}: not readable ({error.strerror})") from None
    tables, unread = look_up(folder, files, known_by)
    if unread and (remote.is_remote(folder) or sum(known_by[n][0] for n in unread) > SMALL):
        # one process of a machine reads; the others then find what it wrote
        with in_turn(places(folder)[-1]):
            tables, unread = look_up(folder, files, known_by)
            return read_and_save(folder, unread, known_by, tables)
    parts, wrong = {}, {}
    for name, result in read_all(unread, known_by):
        (wrong if isinstance(result, str) else parts)[name] = result
    return tables | in_memory(parts), wrong


def look_up(folder, files, known_by):
    """-> {name: Table} of the tars that an index holds as they are now, {name: path} of the
    others"""
    tables = {}
    for table in map(load, places(folder)):
        for name, (bytes, mark) in known_by.items():
            tar = table.tars.get(name)
            if tar and (tar.bytes, tar.mark) == (bytes, mark):
                tables.setdefault(name, table)
    return tables, {name: files[name] for name in files if name not in tables}


def in_memory(parts):
    """{name: (Tar, rows)} -> {name: Table}"""
    rows = [np.empty(0, ROW), *(rows for _, rows in parts.values())]
    table = Table({name: tar for name, (tar, _) in parts.items()}, np.concatenate(rows))
    return dict.fromkeys(parts, table)


def read_and_save(folder, unread, known_by, tables):
    """Read the tars {name: path} and add them to the index of their folder, even if the user stops
    it halfway. tables: of those that are known. -> as read_folder"""
    parts, wrong, start = {}, {}, time.time_ns()
    try:
        bar = tqdm(read_all(unread, known_by), f"index of {folder}, made once", len(unread),
                   unit="shard", disable=not unread)
        for name, result in bar:
            (wrong if isinstance(result, str) else parts)[name] = result
    finally:
        settled = {}
        for name, part in parts.items():
            mark = known_by[name][1]
            if isinstance(mark, str) or abs(start - mark) > SETTLED * 10**9:
                settled[name] = part
        mapped = add(folder, settled, tables) if settled else {}
    tables |= {name: table for name, table in mapped.items() if name in tables or name in parts}
    return tables | in_memory({n: parts[n] for n in parts if n not in mapped}), wrong


def add(folder, parts, tables):
    """Write an index of the folder that holds these parts too. -> {name: Table} of what it maps"""
    reasons = []
    for file in places(folder):
        before = load(file)
        kept = {name: (tar, before.of(name)) for name, tar in before.tars.items()
                if remote.is_remote(folder) or os.path.exists(os.path.join(folder, name))}
        kept |= {name: (table.tars[name], table.of(name)) for name, table in tables.items()}
        try:
            save(file, kept | parts)
        except OSError as error:
            reasons.append(f"{file}: {error.strerror}")
            continue
        # another machine may have written there meanwhile
        table = load(file)
        return {name: table for name, (tar, _) in (kept | parts).items()
                if table.tars.get(name) == tar}
    tqdm.write(f"no index was written, the next start reads the shards again "
               f"({'; '.join(reasons)})")
    return {}


# ------------------------------------------------------------------------------------- the samples

def read_index(files, skip_bad=False):
    """Tars and loose files -> Samples. A damaged tar is an error, or with skip_bad left out."""
    folders = {}
    for file in files:
        if not is_loose(file):
            folders.setdefault(remote.folder_of(file), {})[remote.name_of(file)] = file
    tables, wrong = {}, {}
    for folder, names in folders.items():
        found, bad = read_folder(folder, names)
        tables |= {names[name]: (name, table) for name, table in found.items()}
        wrong |= {names[name]: reason for name, reason in bad.items()}
    if wrong and not skip_bad:
        more = [remote.name_of(file) for file in list(wrong)[1:]]
        raise InputError(next(iter(wrong.values()))
                         + (f"; so are {', '.join(more[:10])}"
                            f"{'' if len(more) <= 10 else ', ...'}" if more else ""))
    return Samples(files, tables, wrong)


class Samples:
    """The samples of `files`, in their order: those of the tars, then those of loose files.

    samples[i] -> number of the file, offset and size of the picture or posterior; the same of the
    caption; which of CONTENTS, which of CAPTIONS. left_out: {(noun, reason): how many}; skipped:
    {damaged tar: what is wrong with it}."""

    def __init__(self, files, tables, skipped):
        """tables: {path of a tar: (its name, a Table that holds it)}"""
        self.files, self.skipped = files, skipped
        self.tars = [(number, *tables[file]) for number, file in enumerate(files) if file in tables]
        counts = [table.tars[name].samples for _, name, table in self.tars]
        self.ends = np.cumsum(counts, dtype=np.int64).tolist()
        self.loose, self.left_out = read_loose({n: f for n, f in enumerate(files) if is_loose(f)})
        for tar in self.described():
            self.left_out.update({(noun, reason): count for noun, reason, count in tar.left_out})

    def __getstate__(self):
        return self.__dict__ | {"hashes": [tar.hash for tar in self.described()]}

    def __setstate__(self, state):
        hashes = state.pop("hashes")
        self.__dict__ |= state
        for (_, name, table), expected in zip(self.tars, hashes):
            if name not in table.tars or table.tars[name].hash != expected:
                raise InputError(f"{table.file}: {name} changed while this run started; "
                                 f"the same command goes on")

    def described(self):
        """-> the Tar of each tar."""
        return [table.tars[name] for _, name, table in self.tars]

    def __len__(self):
        return (self.ends[-1] if self.ends else 0) + len(self.loose)

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)
        k = bisect.bisect_right(self.ends, i)
        if k == len(self.ends):
            return tuple(self.loose[i - len(self)].tolist())
        number, name, table = self.tars[k]
        place = i - (self.ends[k - 1] if k else 0)
        offset, size, text_offset, text_size, *kinds = table.rows[table.firsts[name] + place].item()
        return number, offset * BLOCK, size, number, text_offset * BLOCK, text_size, *kinds

    def tar_of(self, number):
        """-> the Tar of file `number`."""
        _, name, table = self.tars[bisect.bisect_left(self.tars, number, key=lambda tar: tar[0])]
        return table.tars[name]

    def groups(self):
        """Yields (number of a tar, the numbers of its samples), and last (None, those of loose
        files)."""
        first = 0
        for (number, _, _), end in zip(self.tars, self.ends):
            yield number, range(first, end)
            first = end
        yield None, range(first, len(self))

    def contents(self):
        """-> does it hold pictures?, the sizes in bytes of its posteriors (of many, some)"""
        is_posterior = self.loose[:, 6] == NPY
        pictures, sizes = bool((~is_posterior).any()), set(self.loose[is_posterior, 2].tolist())
        for tar in self.described():
            pictures |= tar.pictures
            sizes.update(tar.posteriors)
        return pictures, sizes

    def record(self):
        """-> {"count", "hash", "files": {name of a shard: [bytes, samples, hash]}}, for JSON. Names
        are paths where the shards lie in several folders. Loose files are one entry together."""
        folders = [remote.folder_of(self.files[number]) + "/" for number, _, _ in self.tars]
        shared = os.path.commonprefix(folders).rpartition("/")[0]
        names = [(folder + name)[len(shared):].lstrip("/")
                 for folder, (_, name, _) in zip(folders, self.tars)]
        files = {name: [tar.bytes, tar.samples, tar.hash]
                 for name, tar in zip(names, self.described())}
        if len(self.loose):
            seen = [[remote.name_of(self.files[number]), *row]
                    for number, *row in self.loose[:, [0, 2, 5, 6, 7]].tolist()]
            total = int(self.loose[:, [2, 5]].sum())
            files["loose files"] = [total, len(self.loose), short_hash(json.dumps(seen))]
        return {"count": len(self), "hash": short_hash(json.dumps(list(files.items()))),
                "files": files}
