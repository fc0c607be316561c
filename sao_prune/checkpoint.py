"""Save and load dense, pruned, baked and compact checkpoints, in safetensors or torch format, running no code."""

from __future__ import annotations

import json
import os
import pickle
import tempfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .blocks import BlockModule
from .blocks.adopt import adopt
from .blocks.build import settle
from .blocks.swap import restore
from .model import report
from .prune import MaskPruning, RefreshAll, RefreshChildren, Snapshot, pruning_hooks, refresh, watch
from .prune.attachment import check_writable
from .reporting import Report

_TORCH = (".pt", ".pth", ".bin")
_WRAPPERS = ("state_dict", "model", "model_state_dict", "state_dict_ema", "module")
_PREFIXES = ("module.", "_orig_mod.")
_NESTING = 4


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or does not fit the model; the model is unchanged."""


def save(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write a model's tensors, masks included, to one file; an existing file is replaced only when all is written.

    Args:
        model: dense, pruned, baked or compact.
        path: ``*.safetensors``, or ``*.pt``, ``*.pth``, ``*.bin`` for torch's format. Masks take one byte an entry.

    Returns:
        The path.

    Raises:
        ValueError: for another ending, or a state that is not made of tensors.

    Example:
        >>> import torch, tempfile, os, sao_prune
        >>> net = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3)))
        >>> _ = sao_prune.apply(net, groups=4, seed=0)
        >>> fresh = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = sao_prune.save(net, os.path.join(folder, "m.safetensors"))
        ...     _ = sao_prune.load(fresh, file)
        >>> x = torch.randn(2, 8)
        >>> torch.equal(net(x), fresh(x))
        True
    """
    target = Path(path).resolve()
    if target.suffix not in (".safetensors", *_TORCH):
        raise ValueError(f"cannot tell the format of {target.name!r}: use .safetensors or one of {', '.join(_TORCH)}")
    state = model.state_dict()
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"state entry {key!r} is no tensor but {type(value).__name__}; it cannot be saved")
        if value.is_meta:
            raise ValueError(f"{key!r} is on the meta device and has no values to save")
    masks = {f"{name}_mask" for name in _pruned_names(dict(model.named_modules(remove_duplicate=False)))}
    tensors = {k: (v.bool() if k in masks else v).detach().cpu().contiguous() for k, v in state.items()}
    descriptor, scratch = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(descriptor)
    try:
        if target.suffix == ".safetensors":
            aliases = _drop_aliases(state, tensors)
            metadata = {"format": "sao_prune", "version": "1", "aliases": json.dumps(aliases)}
            save_file(tensors, scratch, metadata=metadata)
        else:
            torch.save(tensors, scratch)
        os.chmod(scratch, 0o666 & ~_umask())
        os.replace(scratch, target)
    except BaseException:
        os.unlink(scratch)
        raise
    return target


def load(model: nn.Module, path: str | os.PathLike[str], *, strict: bool = True) -> Report:
    """Fill a model from a dense, pruned or baked checkpoint, in place; if it does not fit, nothing changes.

    A pruned checkpoint prunes a dense model with the checkpoint's masks, or replaces the masks of a pruned one. A
    dense checkpoint in a pruned model goes under the model's masks. A compact checkpoint makes the model compact; in
    a compact model a dense or masked one is read block by block.

    Args:
        model: the architecture that the checkpoint is of, dense or pruned.
        path: ``*.safetensors``, or torch's format, which is read with ``weights_only=True``.
        strict: refuse missing and unexpected entries; wrong shapes are refused in any case.

    Returns:
        `report` of the loaded model.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it cannot be read, or names what does not fit.
    """
    state = _read(Path(path))
    try:
        changes = adopt(model, state)
    except ValueError as error:
        raise CheckpointError(f"the checkpoint does not fit the model, which is unchanged: {error}") from None
    try:
        _fill(model, state, strict)
    except BaseException:
        restore(changes)
        raise
    if any(isinstance(module, BlockModule) for module in model.modules()):
        settle(model)
    return report(model)


def _fill(model: nn.Module, state: dict[str, Tensor], strict: bool) -> None:
    """Load a state whose block layers are the model's; changes nothing if it does not fit."""
    # A module that is used twice has its entries under both paths, as state_dict has them.
    modules = dict(model.named_modules(remove_duplicate=False))
    ours = _pruned_names(modules)
    theirs = _masked_names(state, set(model.state_dict()), ours)
    to_prune = sorted(theirs - ours)
    for name in ours - theirs:
        if name in state:
            _check_support(name, state[name], modules)
            state[f"{name}_orig"] = state.pop(name)
            state[f"{name}_mask"] = _mask(modules, name)
    _check_fit(model, state, to_prune, ours - theirs, strict)
    _check_masks(state, theirs)
    for name, parameter in model.named_parameters():
        check_writable(name, parameter)
    backup = {key: value.clone() for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    snapshot = _prune_like(modules, state, to_prune)
    try:
        model.load_state_dict(_versioned(state, model), strict=False)
    except BaseException as error:
        snapshot.restore()
        with torch.no_grad():
            for key, value in model.state_dict().items():
                if key in backup:
                    value.copy_(backup[key])
        if isinstance(error, Exception):
            raise CheckpointError(f"the model refused the checkpoint and is unchanged: {_first_line(error)}") from error
        raise
    for module in modules.values():
        refresh(module)


def _versioned(state: Mapping[str, Tensor], model: nn.Module) -> OrderedDict[str, Tensor]:
    """A state with the versions of the model's own modules, which some refuse to load without."""
    versioned = OrderedDict(state)
    versioned._metadata = getattr(model.state_dict(), "_metadata", None)  # type: ignore[attr-defined]
    return versioned


def _masked_names(state: Mapping[str, Tensor], own: set[str], pruned: set[str]) -> set[str]:
    """The weights of a checkpoint that come with a mask; buffers that merely sound like one are none."""
    named = {key[:-5] for key in state if key.endswith("_mask") and f"{key[:-5]}_orig" in state}
    return {name for name in named if name in pruned or f"{name}_orig" not in own}


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _drop_aliases(state: Mapping[str, Tensor], tensors: dict[str, Tensor]) -> dict[str, str]:
    """Remove second names of one tensor from ``tensors`` and tell whose they are."""
    owners: dict[tuple[Any, ...], str] = {}
    aliases = {}
    for key, value in state.items():
        if value.numel() == 0:
            continue
        identity = (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype)
        if identity in owners:
            aliases[key] = owners[identity]
            del tensors[key]
        else:
            owners[identity] = key
    return aliases


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                aliases = json.loads((file.metadata() or {}).get("aliases", "{}"))
            loaded: Any = {**{alias: state[owner] for alias, owner in aliases.items()}, **state}
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path} holds more than tensors and was not loaded, because reading it could run code"
        ) from None
    except Exception as error:
        # Whatever a damaged or hostile file makes the readers raise, it is the file's fault.
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {_first_line(error)}") from None
    state = _unwrap(loaded, path)
    for key, value in state.items():
        expanded = any(stride == 0 and size > 1 for stride, size in zip(_strides(value), value.shape))
        if value.is_meta or value.layout != torch.strided or expanded:
            raise CheckpointError(f"{path}: {key!r} is not stored as a plain dense tensor")
    return state


def _strides(value: Tensor) -> tuple[int, ...]:
    return value.stride() if value.layout == torch.strided else ()


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


def _unwrap(loaded: Any, path: Path) -> dict[str, Tensor]:
    """The state dict inside what training scripts save."""
    for _ in range(_NESTING):
        if not isinstance(loaded, Mapping) or all(isinstance(v, Tensor) for v in loaded.values()):
            break
        inner = next((loaded[key] for key in _WRAPPERS if isinstance(loaded.get(key), Mapping)), None)
        if inner is None:
            break
        loaded = inner
    plain = isinstance(loaded, Mapping) and loaded and all(isinstance(v, Tensor) for v in loaded.values())
    if not plain or not all(isinstance(key, str) for key in loaded):
        raise CheckpointError(
            f"{path} holds no state dict: expected names and tensors, at the top or under one of {', '.join(_WRAPPERS)}"
        )
    state = dict(loaded)
    while prefix := next((p for p in _PREFIXES if all(key.startswith(p) for key in state)), ""):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _pruned_names(modules: Mapping[str, nn.Module]) -> set[str]:
    return {
        f"{path}.{hook._tensor_name}" if path else hook._tensor_name
        for path, module in modules.items()
        for hook in pruning_hooks(module)
    }


def _mask(modules: Mapping[str, nn.Module], name: str) -> Tensor:
    path, _, tensor = name.rpartition(".")
    return getattr(modules[path], f"{tensor}_mask")


def _check_support(name: str, values: Tensor, modules: Mapping[str, nn.Module]) -> None:
    """Refuse a baked weight whose zeros are elsewhere than the model's mask: little of it would be left."""
    mask = _mask(modules, name)
    if values.shape != mask.shape:
        return
    units = (values != 0).flatten(2).any(2) if values.dim() > 2 else values != 0
    kept = (mask != 0).flatten(2).any(2) if mask.dim() > 2 else mask != 0
    if units.float().mean() < 0.9 and bool((units & ~kept.cpu()).any()):
        raise CheckpointError(
            f"{name}: the checkpoint is sparse already, with other non-zeros than the model's mask; load it into an "
            "unpruned model instead"
        )


def _check_fit(
    model: nn.Module, state: Mapping[str, Tensor], to_prune: list[str], masked: set[str], strict: bool
) -> None:
    own = model.state_dict()
    expected = {key: tuple(value.shape) for key, value in own.items()}
    for name in to_prune:
        shape = expected.pop(name, None)
        if shape is not None:
            expected[f"{name}_orig"] = expected[f"{name}_mask"] = shape
    problems = [
        f"{key}: the checkpoint has shape {tuple(state[key].shape)}, the model {shape}"
        for key, shape in expected.items()
        if key in state and tuple(state[key].shape) != shape
    ]
    if strict:
        unseen = {f"{name}{suffix}" for name in masked for suffix in ("_orig", "_mask")}
        unseen |= {key for key in expected if key.endswith("num_batches_tracked")}
        missing = [key for key in expected if key not in state and key not in unseen]
        problems += [f"{key}: missing from the checkpoint" for key in missing]
        problems += [f"{name}: missing from the checkpoint" for name in masked if f"{name}_orig" not in state]
        problems += [f"{key}: the model has no such entry" for key in state if key not in expected]
    elif to_prune:
        problems += [f"{name}: the model has no such weight" for name in to_prune if f"{name}_orig" not in expected]
    if problems:
        more = f"\n  .. and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise CheckpointError(
            "the checkpoint does not fit the model, which is unchanged:\n  " + "\n  ".join(problems[:10]) + more
        )


def _check_masks(state: Mapping[str, Tensor], names: set[str]) -> None:
    for name in sorted(names):
        mask = state[f"{name}_mask"]
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise CheckpointError(f"{name}_mask: holds values other than 0 and 1; the model is unchanged")


def _prune_like(modules: Mapping[str, nn.Module], state: Mapping[str, Tensor], names: list[str]) -> Snapshot:
    """Prune the named weights with the state's masks; the snapshot undoes it."""
    owners = [(name, *name.rpartition(".")[::2]) for name in names]
    owned = {path for _, path, _ in owners}
    readers = {path.rpartition(".")[0] for path in owned if path}
    snapshot = Snapshot(modules[path] for path in owned | readers | {""})
    try:
        for name, path, tensor in owners:
            if f"{tensor}_mask" in modules[path]._buffers:
                continue
            weight = getattr(modules[path], tensor)
            MaskPruning.register(modules[path], tensor, state[f"{name}_mask"].to(weight, copy=True))
        for path in readers - {""}:
            watch(modules[path], RefreshChildren)
        if owned - {""}:
            watch(modules[""], RefreshAll)
    except BaseException:
        snapshot.restore()
        raise
    return snapshot
