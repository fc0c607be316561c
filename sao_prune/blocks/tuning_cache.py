"""Timings that were taken before on this machine, kept between runs; losing them costs time, nothing else."""

from __future__ import annotations

import json
import os
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..files import replacing
from .backends import cpu

SWITCH = "SAO_PRUNE_TUNING_CACHE"
_MOST = 4096


class TuningCache:
    """A mapping from descriptions to results, in a file of the user's cache folder.

    ``SAO_PRUNE_TUNING_CACHE=0`` keeps nothing.

    Args:
        machine: what the timings depend on besides what they are of and the code that was timed.
    """

    def __init__(self, machine: str) -> None:
        self._entries: dict[str, Any] = {}
        self._new = False
        folder = None if os.environ.get(SWITCH) == "0" else cpu.cache_folder()
        name = sha256(f"{machine}, {_code()}".encode()).hexdigest()[:16]
        self._file = None if folder is None else folder / f"timings-{name}.json"
        if self._file is not None:
            self._entries = _read(self._file)

    def get(self, key: str) -> Any:
        """What was kept, or ``None``."""
        return self._entries.get(_short(key))

    def put(self, key: str, value: Any) -> None:
        """Keep a value that JSON can hold."""
        self._entries[_short(key)] = value
        self._new = True

    def save(self) -> None:
        """Write the file, if there is anything new; a failure is no error."""
        if self._file is None or not self._new:
            return
        entries = {**_read(self._file), **self._entries}
        kept = dict(list(entries.items())[-_MOST:])
        try:
            with replacing(self._file) as scratch:
                scratch.write_text(json.dumps(kept))
        except OSError:
            return


@lru_cache
def _code() -> str:
    """What tells this version of the block layers from others: timings of other code are none of this one."""
    digest = sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _short(key: str) -> str:
    return sha256(key.encode()).hexdigest()[:32]


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
