"""Results on disk: one JSON line a finished trial, safe against being killed at any moment."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .errors import ResultsError

Record = dict[str, Any]


def read_results(path: Path, warn: Callable[[str], None]) -> dict[str, Record]:
    """Records by key, of equal keys the last; damaged lines are left out, with a warning each.

    Raises:
        ResultsError: if the file cannot be read.
    """
    return _parse(path, _read(path), warn)[0]


class ResultsLog(AbstractContextManager["ResultsLog"]):
    """An append-only results file, open for one run at a time.

    The lock beside it is let go when its process ends, however that ends.
    A record is on the disk when `append` returns. On opening, a last line that is damaged (the run was killed in the
    middle of it) is cut off, so that the next record starts on a line of its own.

    Raises:
        ResultsError: if another run has the file open, or it cannot be written.
    """

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        self.path = path
        self._lock = FileLock(f"{path}.lock", thread_local=False)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
            self._file = path.open("a+b")
        except Timeout:
            raise ResultsError(
                f"another run is writing {path}: wait for it, or give this one another --out folder"
            ) from None
        except OSError as error:
            self._lock.release()
            raise ResultsError(f"cannot write {path}: {error.strerror or error}") from error
        raw = _read(path)
        self.records, sound = _parse(path, raw, warn)
        if sound < len(raw):
            os.ftruncate(self._file.fileno(), sound)
        if sound and raw[sound - 1 : sound] != b"\n":
            self._write(b"\n")

    def append(self, record: Record) -> None:
        """Add one record; it must have a ``key``. JSON has no NaN: such numbers are written as null."""
        line = json.dumps(_finite(record), allow_nan=False, separators=(",", ":"))
        self._write(line.encode() + b"\n")
        self.records[record["key"]] = json.loads(line)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._file.flush()
        os.fsync(self._file.fileno())

    def __exit__(self, *error: object) -> None:
        self._file.close()
        self._lock.release()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ResultsError(f"cannot read {path}: {error.strerror}") from error


def _parse(path: Path, raw: bytes, warn: Callable[[str], None]) -> tuple[dict[str, Record], int]:
    """Sound records, and how many bytes of the file come before a damaged last line."""
    records: dict[str, Record] = {}
    lines = raw.splitlines(keepends=True)
    sound = 0
    for number, line in enumerate(lines, 1):
        record = _record(line)
        if record is not None:
            records[record["key"]] = record
        elif number == len(lines):
            warn(f"{path}:{number}: the last line is damaged and is dropped; its trial will run again")
            break
        elif line.strip():
            warn(f"{path}:{number}: a damaged line is ignored; its trial will run again")
        sound += len(line)
    return records, sound


def _record(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    sound = isinstance(record, dict) and isinstance(record.get("key"), str) and isinstance(record.get("result"), dict)
    return record if sound else None


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if abs(value) != float("inf") and value == value else None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value
