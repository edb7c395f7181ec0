"""What every process of a machine shares outside of a run: a folder for what can be had again, and
turns."""
import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None


def cache_home():
    """The folder for indexes and shards that have no place beside the data."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rg-lcd"


def short_hash(content):
    """Bytes or text -> 16 hexadecimal digits."""
    content = content.encode() if isinstance(content, str) else content
    return hashlib.blake2b(content, digest_size=8).hexdigest()


@contextlib.contextmanager
def in_turn(what):
    """`with in_turn(path):` one process of this machine (and user) at a time, for each path.

    A process that is killed gives up its turn. Where files cannot be locked nobody waits: what is
    written there appears whole, so no harm is done but that of doing it twice."""
    user = os.getuid() if hasattr(os, "getuid") else 0
    file = Path(tempfile.gettempdir()) / f"rg-lcd-{user}-{short_hash(str(what))}.lock"
    handle = None
    try:
        if fcntl is not None:
            with contextlib.suppress(OSError):
                handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        if handle is not None:
            # said aloud: a process forked in the meantime holds the file open too
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_UN)
            os.close(handle)
