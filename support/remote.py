"""Shards on servers and in buckets (https://, s3://, hf://, ...), through fsspec.

What is read once, in order, is read piece by piece where it lies (open_url); what is read in any
order is copied first, whole, into a folder of limited size (Cache)."""
import contextlib
import os
import posixpath
import re
import time
from pathlib import Path

from support.cache import cache_home, in_turn, short_hash
from support.cli import require
from support.weights import InputError, first_line

STALL = 30  # seconds without a byte after which a connection is given up
WAITS = (1, 2, 4, 8, 16, 32)  # seconds before each further try
AHEAD = 2**20  # bytes that are read at once where only headers are wanted
PIECE = 2**23  # bytes that are fetched at once; a dropped connection costs not much more
AT_ONCE = 16  # shards whose headers are read at the same time


def is_remote(path):
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", str(path)) is not None


def without_query(url):
    """https://host/a.tar?TOKEN -> https://host/a.tar: the token may be another every day."""
    return re.sub(r"^(https?://[^?]*\.tar)\?.*", r"\1", url)


def name_of(file):
    """The last part of a path or of a URL."""
    return posixpath.basename(without_query(file)) if is_remote(file) else os.path.basename(file)


def folder_of(file):
    """What stands before that, or "."."""
    if is_remote(file):
        return posixpath.dirname(without_query(file))
    return os.path.dirname(file) or "."


def filesystem(url):
    """fsspec's file system for a URL. It is asked for anew each time, since fsspec gives every
    process its own."""
    kind = url.partition("://")[0]
    try:
        import fsspec
        options = {}
        if kind in ("http", "https"):
            import aiohttp
            # trust_env: proxies as the environment names them
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=STALL, sock_read=STALL)
            options = {"client_kwargs": {"timeout": timeout, "trust_env": True}}
        return fsspec.filesystem(kind, **options)
    except ImportError as error:
        raise InputError(
            f"{url}: shards on servers need the extra `remote`, and s3:// and gs:// the package "
            f"s3fs or gcsfs ({first_line(error)}): pip install -e '.[remote]'") from None
    except ValueError as error:
        raise InputError(f"{url}: {first_line(error)}; "
                         f"expected a path, https://, s3:// or hf://") from None


def patiently(url, action):
    """-> action(), tried again for a minute if the server stalls, breaks off or is busy. Raises
    InputError at once if the server says no, and else in the end."""
    for wait in (*WAITS, None):
        try:
            return action()
        except InputError:
            raise
        except Exception as error:  # of fsspec, of the network, of the library behind either
            # fsspec says FileNotFoundError of whatever keeps it from asking for a file's size
            cause = error.__cause__ or error
            response = getattr(cause, "response", None)  # where the hub's errors keep it
            status = getattr(cause, "status", None) or getattr(response, "status_code", None) or 0
            missing = isinstance(cause, (FileNotFoundError, PermissionError, ValueError))
            refused = 400 <= status < 500 and status not in (408, 425, 429)
            reason = f"HTTP status {status}" if status else first_line(cause)
            if missing or refused:
                raise InputError(f"{url}: cannot be read ({reason}); "
                                 f"is the address right, and may you read it?") from None
            if wait is None:
                raise InputError(f"{url}: cannot be read, after {len(WAITS) + 1} tries ({reason}); "
                                 f"the same command goes on once the server answers") from None
            time.sleep(wait)
    return None


def expand(pattern):
    """A URL, or one with * in it (s3://bucket/*.tar) -> URLs."""
    if "*" not in without_query(pattern):
        return [pattern]
    files = filesystem(pattern)
    return [files.unstrip_protocol(file)
            for file in patiently(pattern, lambda: files.glob(pattern))]


def describe(url):
    """-> bytes of a remote file, and a text that is another when the file is another."""
    info = patiently(url, lambda: filesystem(url).info(url))
    require(info.get("size") is not None,
            f"{url}: the server does not say how large it is, so no part of it can be asked for; "
            f"copy the shards to a disk and name the copies")
    marks = ("ETag", "etag", "Last-Modified", "LastModified", "last_modified", "blob_id",
             "mtime", "created")
    return info["size"], str(next((info[mark] for mark in marks if info.get(mark)), ""))


class open_url:
    """A remote file of so many bytes, open for reading: read(count), seek(place), tell(), with. A
    read that fails is tried again. ahead: bytes that are asked for at once at least."""

    def __init__(self, url, size, ahead=None):
        self.url, self.size, self.ahead = url, size, ahead or AHEAD
        self.place, self.file = 0, None

    def read(self, count):
        wanted = max(min(count, self.size - self.place), 0)
        data = patiently(self.url, lambda: self.try_to_read(wanted))
        self.place += len(data)
        return data

    def try_to_read(self, count):
        try:
            if self.file is None:
                # the size is known: with it fsspec does not ask a web server again
                known = {"size": self.size} if self.url.startswith("http") else {}
                self.file = filesystem(self.url).open(
                    self.url, block_size=self.ahead, cache_type="readahead", **known)
            self.file.seek(self.place)
            data = self.file.read(count)
            if len(data) != count:
                raise OSError(f"{len(data)} bytes came where {count} were asked for")
            return data
        except InputError:
            raise
        except ValueError as error:  # fsspec's, where a server answers with the whole file
            raise InputError(f"{self.url}: {first_line(error)} Copy the shards to a disk and name "
                             f"the copies") from None
        except Exception:
            self.file = None  # a fresh one for the next try
            raise

    def seek(self, place):
        self.place = place
        return place

    def tell(self):
        return self.place

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file = None


class Cache:
    """Whole copies of remote shards, in a folder that never holds more than so many GB (10^9
    bytes). Those that were used last are kept. The processes of a machine may share it: a shard
    is fetched by one of them, while the others wait."""

    def __init__(self, folder, gb):
        self.folder = Path(folder).expanduser() if folder else cache_home() / "shards"
        self.limit = int(gb * 1e9)

    def copy(self, url, size, mark):
        """-> the path of a copy of the shard that describe() describes so."""
        key = short_hash(f"{without_query(url)} {size} {mark}")
        path = self.folder / f"{key}-{name_of(url)}"
        try:
            if not self.touch(path):
                with in_turn(self.folder.absolute()):
                    if not self.touch(path):  # fetched while this process waited
                        self.fetch(url, size, path)
        except OSError as error:  # of the disk: those of the network are InputErrors by now
            raise InputError(f"--cache {self.folder}: {url} cannot be kept there "
                             f"({error.strerror}); make room or give another folder") from None
        return path

    def touch(self, path):
        """Note that a copy is in use now. -> is it there?"""
        with contextlib.suppress(FileNotFoundError):
            os.utime(path)
            return True
        return False

    def fetch(self, url, size, path):
        self.folder.mkdir(parents=True, exist_ok=True)
        self.make_room(size)
        new = path.with_name(f".{path.name}.new")
        try:
            with open_url(url, size, ahead=PIECE) as source, open(new, "wb") as target:
                while piece := source.read(PIECE):
                    target.write(piece)
            new.rename(path)
        finally:
            new.unlink(missing_ok=True)

    def make_room(self, size):
        """Remove the copies that were used longest ago, and what a killed process left."""
        ours = "[0-9a-f]" * 16 + "-*"  # whatever else lies there is left alone
        for left in self.folder.glob(f".{ours}.new"):
            left.unlink(missing_ok=True)
        copies = []
        for path in self.folder.glob(ours):
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                copies.append((stat.st_mtime_ns, path, stat.st_size))
        total = size + sum(bytes for _, _, bytes in copies)
        for _, path, bytes in sorted(copies):
            if total > self.limit:
                path.unlink(missing_ok=True)
                total -= bytes
