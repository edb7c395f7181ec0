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
    held = None
    try:
        if fcntl is not None:
            with contextlib.suppress(OSError):
                held = os.fdopen(os.open(file, os.O_RDWR | os.O_CREAT, 0o600))
                # else a process forked in the meantime holds the lock on after a kill
                os.register_at_fork(after_in_child=held.close)
                fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        if held is not None:
            held.close()
