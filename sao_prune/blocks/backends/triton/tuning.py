"""The fastest tile for a shape: timed on the device once, remembered in the user's cache folder."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import astuple, replace
from pathlib import Path

import torch

from ....files import replacing
from .suits import interpreted
from .tiles import Tile

_CHOSEN: dict[tuple[str, str], Tile] = {}
_READ: set[Path] = set()


def choose(key: Hashable, tiles: Sequence[Tile], run: Callable[[Tile], int], device: torch.device) -> Tile:
    """The fastest of ``tiles``, by running each; the first in the interpreter and while a CUDA graph is captured.

    ``run`` must write the same numbers whenever it is called; it says how much it spilled. A tile that spills is tried
    with all registers there are.
    """
    if device.type != "cuda" or interpreted() or len(tiles) == 1:
        return tiles[0]
    name = torch.cuda.get_device_name(device)
    path = _cache_path(name)
    known = (name, repr(key))
    _read(path, name)
    found = _CHOSEN.get(known)
    if found is not None and replace(found, registers=0) in tiles:
        return found
    if torch.cuda.is_current_stream_capturing():
        return tiles[0]
    _CHOSEN[known] = _fastest(tiles, run)
    _write(path, name)
    return _CHOSEN[known]


def _cache_path(device: str) -> Path:
    """``$XDG_CACHE_HOME/sao_prune/triton-VERSION-DEVICE.json``; safe to delete."""
    import triton

    root = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(root) if root and os.path.isabs(root) else Path.home() / ".cache") / "sao_prune"
    return folder / f"triton-{triton.__version__}-{re.sub(r'[^A-Za-z0-9]+', '-', device)}.json"


def _fastest(tiles: Sequence[Tile], run: Callable[[Tile], int]) -> Tile:
    from triton.runtime.errors import OutOfResources, PTXASError
    from triton.testing import do_bench

    times: list[tuple[float, int, Tile]] = []
    for i, tile in enumerate(tiles):
        try:
            tile = tile.roomy if run(tile) else tile
            milliseconds = do_bench(lambda tile=tile: run(tile), warmup=5, rep=20, return_mode="median")
        except (OutOfResources, PTXASError):
            continue
        times.append((milliseconds, i, tile))
    return min(times)[2] if times else tiles[0]


def _read(path: Path, device: str) -> None:
    if path in _READ:
        return
    _READ.add(path)
    try:
        stored = json.loads(path.read_text())
        found = {(device, key): Tile(*map(int, tile)) for key, tile in stored.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return
    for known, tile in found.items():
        _CHOSEN.setdefault(known, tile)


def _write(path: Path, device: str) -> None:
    """Write what is known of a device. A cache that cannot be written costs a later run its time, nothing else."""
    _READ.discard(path)
    _read(path, device)  # what other processes have found since
    stored = {key: astuple(tile) for (name, key), tile in _CHOSEN.items() if name == device}
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as scratch:
            scratch.write_text(json.dumps(stored))
