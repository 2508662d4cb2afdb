"""Directories that take long to make: made once, kept in the user's cache, never seen half made.

A name says everything that its content depends on, so that a directory is never updated: what
is made differently has another name. A directory in use, or being made, is locked with flock(2);
the lock ends with its process, however that ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from sdtool.errors import Unavailable

_UNFINISHED = ".unfinished-"
_KEPT_S = 30 * 24 * 3600


def cache_directory() -> Path:
    """Find the user's cache of sdtool: ``$XDG_CACHE_HOME/sdtool`` or ``~/.cache/sdtool``."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or "")
    if not home.is_absolute():  # the XDG Base Directory Specification has such ones ignored
        home = Path.home().absolute() / ".cache"
    return home / "sdtool"


def find(name: str) -> Path | None:
    """Find a directory that has been made already."""
    path = cache_directory() / name
    return path if path.is_dir() else None


def obtain(name: str, make: Callable[[Path], None]) -> Path:
    """Return the directory of this name, made by ``make`` if it is not there yet.

    Whoever asks while it is being made waits. What a maker that was killed left is removed.

    Args:
        name: KIND-KEY; once it is made, others of its kind go that nobody used for a month.
        make: Fills a new directory; what it raises is the caller's. The directory above it is
            its own too, for what it needs meanwhile.

    Raises:
        Unavailable: The cache cannot be written.
    """
    cache = cache_directory()
    path = cache / name
    with _refusal_of(cache):
        cache.mkdir(parents=True, exist_ok=True)
        lock = (cache / f"{name}.lock").open("w")
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.is_dir():
            _make(path, make)
            _remove_others(path)
    return path


@contextlib.contextmanager
def _refusal_of(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Unavailable(f"The cache {path} cannot be used: {error.strerror}.") from error


def _make(path: Path, make: Callable[[Path], None]) -> None:
    # Its maker is dead, or the lock would not be ours.
    for remains in path.parent.glob(f"{_UNFINISHED}{path.name}-*"):
        shutil.rmtree(remains, ignore_errors=True)
    with _refusal_of(path.parent):
        prefix = f"{_UNFINISHED}{path.name}-"
        unfinished = Path(tempfile.mkdtemp(prefix=prefix, dir=path.parent))
    try:
        content = unfinished / "content"
        content.mkdir()
        content.chmod(0o755)
        make(content)
        content.rename(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _remove_others(path: Path) -> None:
    """Remove what this directory may replace; what is in use stays for the next time."""
    kind = path.name.rpartition("-")[0]
    for other in (*path.parent.glob(f"{kind}-*"), *path.parent.glob(f"{_UNFINISHED}{kind}-*")):
        if other.is_dir() and time.time() - other.stat().st_mtime > _KEPT_S:
            with contextlib.suppress(OSError):
                lock = _lock(other, fcntl.LOCK_EX)
                shutil.rmtree(other, ignore_errors=True)
                other.with_name(f"{other.name}.lock").unlink(missing_ok=True)
                os.close(lock)


def use(path: Path) -> int:
    """Keep a directory from being removed until the descriptor that is returned is closed.

    Raises:
        Unavailable: It has just been removed, or is being.
    """
    with _refusal_of(path):
        fd = _lock(path, fcntl.LOCK_SH)
    with contextlib.suppress(OSError):  # a cache may be read-only
        os.utime(path)
    return fd


def _lock(path: Path, kind: int) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise
    return fd
