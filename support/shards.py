"""Where captioned pictures lie: patterns -> files, a tar's members -> samples, a caption's bytes ->
captions."""
import glob
import json
import os
import re
import shlex
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np

from support.cli import require
from support.remote import expand, is_remote, open_url
from support.weights import InputError

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
CONTENTS = (".npy", *PICTURES)  # of several files of one name the first of this list is taken
CAPTIONS = (".txt", ".caption", ".json")  # likewise

# the first bytes of packed files, and what unpacks them
PACKED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz",
          b"\x28\xb5\x2f\xfd": "unzstd"}


class BadSample(InputError):
    """A picture, a posterior or a caption that cannot be read. place: the names of its shard and
    of the member; kind: in a few words, for counting."""

    def __init__(self, place, kind, reason):
        super().__init__(f"{place}: {kind} ({reason}); make the shard again or leave it out")
        self.place, self.kind, self.reason = place, kind, reason


class DamagedShard(InputError):
    """A tar that is not whole, or is packed: --skip-bad-shards goes on without it."""


# --------------------------------------------------------------------------------------- patterns

def find_files(path, name):
    """What an option such as --data names -> its tars and loose files, sorted.

    path: a tar, a folder of tars or of pictures with captions, a glob, a brace pattern such as
    {00000..01099}.tar, or several of them with commas between; ~ is the home folder. Or URLs of
    tars (https://, s3://, hf://)."""
    text = str(path)
    require(not text.startswith("pipe:"),
            f"{name} {text}: a command's output comes in one order, and training reads samples by "
            f"their places in any order; write it to files and name these")
    parts = re.split(r",(?![^{}]*\})", text)  # at commas outside of braces
    patterns = [text] if os.path.exists(text) else [p for part in parts for p in braces(part)]
    files, missing = set(), []
    for pattern in patterns:
        if is_remote(pattern):
            found = expand(pattern)
            require(not any(is_loose(file) for file in found),
                    f"{name} {pattern}: of what lies on servers only tars are read")
        else:
            found = [file for match in matches(pattern) for file in contents(match)]
        files.update(found)
        if not found:
            missing.append(pattern)
    others = f" ({len(missing)} of {len(patterns)} are missing)" if len(patterns) > 1 else ""
    require(not missing,
            f"{name} {', '.join(missing[:1])}: no such shards{others}; expected a .tar, a folder "
            f"of them or of pictures, a glob such as 'shards/*.tar', or '{{00000..01099}}.tar'")
    return sorted(files)


def braces(text):
    """"a{08..10}.tar" -> a08.tar, a09.tar, a10.tar; "{a,b}.tar" -> a.tar, b.tar, as in a shell."""
    match = re.search(r"\{([^{}]*)\}", text)
    if match is None:
        return [text]
    ends = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if ends:
        low, high = sorted(ends.groups(), key=int)
        values = [f"{n:0{len(low)}d}" for n in range(int(low), int(high) + 1)]
    else:
        values = match[1].split(",") if "," in match[1] else [match[0]]
    tails = braces(text[match.end():])
    return [text[:match.start()] + value + tail for value in values for tail in tails]


def matches(pattern):
    """The paths that a glob names; brackets that select nothing are brackets in a name."""
    pattern = os.path.expanduser(pattern)
    if os.path.exists(pattern):
        return [pattern]
    return (glob.glob(pattern, recursive=True)
            or glob.glob(pattern.replace("[", "[[]"), recursive=True))


def contents(path):
    """A file -> itself; a folder -> the tars in it, or if there are none the pictures, posteriors
    and captions in it and in its folders."""
    if not os.path.isdir(path):
        return [path]
    for pattern in ("*.tar", "*.tar.*", "*.tgz"):  # the packed ones, to be refused by name
        if tars := glob.glob(pattern, root_dir=path):
            return [os.path.join(path, tar) for tar in tars]
    found = (os.path.join(folder, file) for folder, _, files in os.walk(path) for file in files)
    return [file for file in found if is_loose(file)]


def is_loose(file):
    """Is the file a picture, posterior or caption of its own, and no tar?"""
    return Path(file).suffix.lower() in CONTENTS + CAPTIONS


# ---------------------------------------------------------------------------------------- samples

def read_tar(file, size):
    """-> the samples of a tar of so many bytes, int64 [N, 8]:

        0, offset, size         of the picture or posterior
        0, offset, size         of its caption
        which of CONTENTS, which of CAPTIONS

    and {(noun, reason): how many were left out}. Raises DamagedShard."""
    found, left_out = {}, Counter()
    for name, *place in members(file, size, left_out):
        keep(name, (0, *place), found, left_out)
    return pairs(found, left_out), left_out


def read_loose(files):
    """-> the samples that files of their own make, likewise; instead of 0 the numbers of the files.
    files: {number: path}"""
    found, left_out = {}, Counter()
    for number, file in files.items():
        keep(file, (number, 0, os.path.getsize(file)), found, left_out)
    return pairs(found, left_out), left_out


def keep(name, place, found, left_out):
    """Note the place of a file under its stem and suffix, found[stem][suffix], unless it is no part
    of a sample. The suffix begins at the last dot: NAME.v2.jpg goes with NAME.v2.txt."""
    stem, suffix = os.path.splitext(name)
    parts = name.split("/")
    if parts[-1].startswith(".") or "__MACOSX" in parts:
        left_out["file", "hidden (._NAME, __MACOSX)"] += 1
    elif suffix.lower() in CONTENTS + CAPTIONS and not name.endswith("_stats.json"):
        found.setdefault(stem, {})[suffix.lower()] = place


def pairs(found, left_out):
    """{stem: {suffix: place}} -> the rows of those with both content and caption."""
    rows = []
    for part in found.values():
        content = next((suffix for suffix in CONTENTS if suffix in part), None)
        caption = next((suffix for suffix in CAPTIONS if suffix in part), None)
        if content is None:
            left_out["caption", "no picture of its name"] += 1
        elif caption is None:
            noun = "posterior" if content == ".npy" else "picture"
            left_out[noun, f"no caption ({', '.join(CAPTIONS)})"] += 1
        else:
            which = CONTENTS.index(content), CAPTIONS.index(caption)
            rows.append((*part[content], *part[caption], *which))
    return np.array(rows, dtype=np.int64).reshape(-1, 8)


def open_shard(file, size):
    """A tar of so many bytes, open for reading, wherever it lies."""
    return open_url(file, size) if is_remote(file) else open(file, "rb")


def members(file, size, left_out):
    """Yields (name, offset, size) of the files in a tar. Raises DamagedShard, after the last one,
    if the tar is not whole: tarfile ends at a damaged header without a word."""
    try:
        with open_shard(file, size) as raw:
            refuse_packed(file, raw.read(6))
            raw.seek(0)
            with tarfile.open(fileobj=raw, mode="r:") as tar:
                for member in tar:
                    tar.members = []  # else tarfile keeps them all
                    if member.isreg() and not member.issparse():
                        yield member.name, member.offset_data, member.size
                    elif not member.isdir():
                        left_out["link", "not followed"] += 1
                check_end(raw, tar.offset)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DamagedShard(f"{file}: not a whole tar file ({error}); "
                           f"copy the shard again or leave it out (--skip-bad-shards)") from None


def refuse_packed(file, head):
    for magic, command in PACKED.items():
        if head.startswith(magic):
            plain = re.sub(r"(\.tar)?\.\w+$", "", str(file)) + ".tar"
            if plain == str(file):
                plain = plain.removesuffix(".tar") + "-plain.tar"
            raise DamagedShard(
                f"{file}: packed, and samples are read by their places in a plain tar; repack: "
                f"{command} < {shlex.quote(str(file))} > {shlex.quote(plain)}")


def check_end(raw, end):
    """Nothing but zeros may stand from the end marker of a tar on."""
    raw.seek(end)
    block = raw.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("it ends too early")
    if any(block):
        raise tarfile.ReadError(f"a damaged header at byte {end}")
    while block := raw.read(2**20):
        if any(block):
            raise tarfile.ReadError(
                f"its end mark at byte {end} is followed by data: "
                f"a hole of zeros, or tars joined by cat")


def place_of(file, offset, copy=None):
    """The names of a tar and of the member whose content begins there, or of a loose file. copy:
    where the tar can be read, if not under its name."""
    if offset == 0:
        return str(file)
    try:
        with open(copy or file, "rb") as raw:
            raw.seek(offset - tarfile.BLOCKSIZE)
            header = raw.read(tarfile.BLOCKSIZE)
        return f"{file}: {tarfile.TarInfo.frombuf(header, 'utf-8', 'replace').name}"
    except (tarfile.TarError, OSError):
        return f"{file}: byte {offset}"


def read_captions(data, kind, lines):
    """The bytes of a caption file -> list of captions, one or more. kind: which of CAPTIONS;
    lines: a text is one caption a line. Raises ValueError."""
    text = data.decode("utf-8-sig")
    if CAPTIONS[kind] == ".json":
        content = json.loads(text)
        found = content.get("caption") if isinstance(content, dict) else None
        found = [caption for caption in (found if isinstance(found, list) else [found])
                 if isinstance(caption, str)]
        if not found:
            raise ValueError('no text under "caption"')
    else:
        found = [line for line in text.splitlines() if line.strip()] if lines else []
        found = found or [text]
    return [caption.strip() for caption in found]


# ---------------------------------------------------------------------------------------- records

def changed(before, now):
    """What became of the shards between two records (data.Shards.record) -> sentences that name
    those added, removed or exchanged; [] if the samples are the same, in the same order."""
    if before.get("hash") == now.get("hash"):
        return []
    old, new = before.get("files", {}), now.get("files", {})
    groups = {
        "added": [name for name in new if name not in old],
        "removed": [name for name in old if name not in new],
        "exchanged": [name for name in new if name in old and new[name] != old[name]],
    }
    sentences = [f"{listed(names)} {'was' if len(names) == 1 else 'were'} {what}"
                 for what, names in groups.items() if names]
    if not sentences and before.get("window") != now.get("window"):
        sentences = [f"the order is that of windows of {now.get('window')} shards, and was that of "
                     f"{before.get('window')} (null: all shards at once)"]
    return sentences or ["the shards come in another order: did their folders get other names?"]


def listed(names):
    """The first three of some names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
