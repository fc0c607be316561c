"""One process at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait until no other process is in a ``with`` of this path, on systems that have such locks (Windows has not).

    The system lets go of the lock when its process ends, however it ends. A file beside ``path`` stays.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("ab") as file:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX)
        yield


def try_lock(descriptor: int) -> bool:
    """Lock an open file without waiting; whether it worked, or there are no such locks.

    The system lets go of the lock when the process ends, however it ends.
    """
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
