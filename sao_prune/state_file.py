"""Reading checkpoints: single files, sharded folders, and the state dicts inside what training scripts save."""

from __future__ import annotations

import argparse
import json
import pathlib
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

# The names under which libraries save a model in a folder of its own, whole or with an index of its parts.
_IN_FOLDERS = tuple(
    f"{stem}.{ending}{index}"
    for stem, ending in (
        ("model", "safetensors"),
        ("pytorch_model", "bin"),
        ("diffusion_pytorch_model", "safetensors"),
        ("diffusion_pytorch_model", "bin"),
    )
    for index in ("", ".index.json")
)
_WRAPPERS = ("state_dict", "model", "model_state_dict", "state_dict_ema", "module")
_NESTING = 4
# Classes without any behaviour of their own, which training scripts keep their options in.
_HARMLESS: list[Any] = [argparse.Namespace, pathlib.PosixPath, pathlib.PurePosixPath]


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or does not fit the model; the model is unchanged."""


def read_states(path: Path) -> list[dict[str, Tensor]]:
    """The state dicts in a checkpoint, the likeliest first: names and tensors, without any other entries.

    Args:
        path: a file in safetensors' or torch's format, the index of a sharded one, or the folder of either.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it cannot be read without running code, or holds no state dict.
    """
    file = _find(path)
    loaded = _read_shards(file) if file.name.endswith(".index.json") else _read_file(file)
    states = list(_states(loaded, _NESTING))
    if not states:
        raise CheckpointError(
            f"{path} holds no state dict: expected names and tensors, at the top or under one of {', '.join(_WRAPPERS)}"
        )
    return states


def read_metadata(path: Path) -> dict[str, str]:
    """The texts beside the tensors of a safetensors file; none for other files."""
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except Exception:
        return {}


def check_plain(state: Mapping[str, Tensor], path: Path) -> None:
    """Refuse tensors that are no memory of their own.

    Raises:
        CheckpointError: naming the first.
    """
    for key, value in state.items():
        strided = value.layout == torch.strided
        expanded = strided and any(stride == 0 and size > 1 for stride, size in zip(value.stride(), value.shape))
        if value.is_meta or not strided or expanded:
            raise CheckpointError(f"{path}: {key!r} is not stored as a plain dense tensor")


def first_line(error: Exception) -> str:
    """What an error says, in short."""
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"no checkpoint at {path}")
    found = next((path / name for name in _IN_FOLDERS if (path / name).is_file()), None)
    if found is not None:
        return found
    if (path / ".metadata").is_file():
        raise CheckpointError(
            f"{path} is a distributed checkpoint: make it one file first, with "
            "torch.distributed.checkpoint.format_utils.dcp_to_torch_save"
        )
    raise CheckpointError(f"no checkpoint in the folder {path}: expected one of {', '.join(_IN_FOLDERS)}")


def _read_shards(index: Path) -> dict[str, Tensor]:
    """All tensors of a sharded checkpoint, from the files that its index names, beside it."""
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(places.values()))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{index} cannot be read as the index of a checkpoint: {first_line(error)}") from None
    merged: dict[str, Tensor] = {}
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{index} names a file outside its folder: {name!r}")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index.parent / name} is missing, which {index.name} names")
        merged.update(_read_file(index.parent / name))
    missing = [key for key in places if key not in merged]
    if missing:
        raise CheckpointError(f"{index} names {missing[0]!r} in {places[missing[0]]}, where it is not")
    return merged


def _read_file(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                aliases = json.loads((file.metadata() or {}).get("aliases", "{}"))
            return {**{alias: state[owner] for alias, owner in aliases.items()}, **state}
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"more than tensors ({named[1]})" if named else "more than tensors"
        raise CheckpointError(
            f"{path} holds {what} and was not loaded, because reading it could run code; where you trust its source, "
            "save the state dict in it alone"
        ) from None
    except Exception as error:
        # Whatever a damaged or hostile file makes the readers raise, it is the file's fault.
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {first_line(error)}") from None


def _states(loaded: Any, depth: int) -> Iterator[dict[str, Tensor]]:
    """The mappings with named tensors in what was loaded: those under the usual names, then itself, then others."""
    if not isinstance(loaded, Mapping):
        return
    inner = [loaded[name] for name in _WRAPPERS if isinstance(loaded.get(name), Mapping)]
    others = [value for value in loaded.values() if isinstance(value, Mapping) and all(value is not i for i in inner)]
    if depth:
        for value in inner:
            yield from _states(value, depth - 1)
    own = {key: value for key, value in loaded.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if own:
        yield own
    if depth:
        for value in others:
            yield from _states(value, depth - 1)
