"""Save and load dense, pruned, baked and compact checkpoints, in safetensors or torch format, running no code."""

from __future__ import annotations

import json
import os
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .blocks import BlockModule
from .blocks.adopt import adopt
from .blocks.build import settle
from .blocks.calls import to_contiguous
from .blocks.plan import machine, plan_of, put_back
from .blocks.resume import resume
from .blocks.swap import Changes, restore
from .discovery.trace import evaluating
from .files import replacing
from .held import held_tensors
from .model import report
from .naming import dotted
from .prune import MaskPruning, RefreshAll, RefreshChildren, Snapshot, pruning_hooks, refresh, watch
from .prune.attachment import check_writable
from .prune.frozen import thaw, thaw_others
from .replaced import warn_replaced
from .reporting import Report
from .state_file import CheckpointError, check_plain, first_line, read_metadata, read_states
from .state_fit import check_block_layers, check_fit, check_held, check_masks, check_support, mask_of, masked_names
from .state_names import choose, complete_tied

_TORCH = (".pt", ".pth", ".bin")


def save(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write a model's tensors, masks included, to one file; an existing file is replaced only when all is written.

    Args:
        model: dense, pruned, baked or compact.
        path: ``*.safetensors``, or ``*.pt``, ``*.pth``, ``*.bin`` for torch's format. Masks take one byte an entry.
            The first holds the plan of a compact model too, by which `load` runs it again on such a machine, with the
            shapes, types and ranges (no values) of the example input that `compact` was given.

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
    with replacing(target) as scratch:
        if target.suffix == ".safetensors":
            aliases = _drop_aliases(state, tensors)
            metadata = {"format": "sao_prune", "version": "1", "aliases": json.dumps(aliases)}
            if any(isinstance(module, BlockModule) for module in model.modules()):
                metadata["plan"] = plan_of(model, machine()).to_json()
            save_file(_apart(tensors), scratch, metadata=metadata)
        else:
            torch.save(tensors, scratch)
    return target


def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    strict: bool = True,
    prefix: str | None = None,
    example_input: Any = None,
) -> Report:
    """Fill a model from a dense, pruned or baked checkpoint, in place; if it does not fit, nothing changes.

    A pruned checkpoint prunes a dense model with the checkpoint's masks, or replaces the masks of a pruned one. A
    dense checkpoint in a pruned model goes under the model's masks. A compact checkpoint makes the model compact; in
    a compact model a dense or masked one is read block by block. What was saved while it was held (`hold`) goes into
    a model that is held. A prefix that all names share (``model.``, ``net.``, ..), or that all the model's have, is
    recognised, a state dict among other things in a checkpoint is found, and weights that the model ties need be
    there once.

    Where a compact checkpoint makes layers compact, their parameters are new ones: make the optimizer afterwards. That
    layers compute the norm, activation or linear layer behind them depends on how the model calls them, so then the
    model is run twice in eval mode, on ``example_input`` or on random values of the shapes that the checkpoint names;
    what a run does not show to follow a layer is left to itself, and the report's title and a warning say so.

    Args:
        model: the architecture that the checkpoint is of, dense or pruned.
        path: ``*.safetensors``, torch's format (``*.pt``, ``*.ckpt``, ..; read with ``weights_only=True``), the
            ``*.index.json`` of a sharded checkpoint, or the folder of one as ``save_pretrained`` writes it.
        strict: refuse missing and unexpected entries; wrong shapes are refused in any case.
        prefix: of the model's entries, where the checkpoint holds others too, which are then left out.
        example_input: a tensor, tuple or dict to run a compact model on. Needed for epilogues where the checkpoint is
            in torch's format, of a model that was made compact without one or of an older version, or where several
            processes share the model, all of which must then load.

    Returns:
        `report` of the loaded model.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it cannot be read, or names what does not fit.
        ValueError: if a compact model fails on the example input; it is then as it was.

    Warns:
        RuntimeWarning: if layers have less of their epilogues than in the model that was saved.
        StaleOptimizerWarning: if an optimizer that was made before holds parameters that are replaced.

    Example:
        >>> import torch, tempfile, os, sao_prune
        >>> def net():
        ...     return torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3)))
        >>> pruned, fresh = net(), net()
        >>> _ = sao_prune.apply(pruned, groups=4, seed=0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = load(fresh, sao_prune.save(pruned, os.path.join(folder, "m.safetensors")))
        >>> report.sparsity
        0.75
    """
    states = read_states(Path(path))
    state = choose(states, model.state_dict(), prefix, strict)
    check_plain(state, Path(path))
    complete_tied(model, state)
    check_held(model, state)
    check_block_layers(model, state)
    before = plan_of(model)
    try:
        changes = adopt(model, state)
    except ValueError as error:
        raise CheckpointError(f"the checkpoint does not fit the model, which is unchanged: {error}") from None
    title = "model"
    with ExitStack() as undo:
        undo.callback(put_back, model, before)
        undo.callback(restore, changes)
        warn_replaced(_replaced(changes), "load")
        undo.callback(_fill(model, state, strict))
        if any(isinstance(module, BlockModule) for module in model.modules()):
            undo.callback(to_contiguous, settle(model))
            text = read_metadata(Path(path)).get("plan")
            formats, title, reason = resume(model, text, example_input)
            undo.callback(to_contiguous, formats)
            if reason:
                warnings.warn(f"sao_prune.load: {reason}", RuntimeWarning, stacklevel=2)
        undo.pop_all()
    thaw_others(model)
    return replace(report(model), title=title)


def _replaced(changes: Changes) -> list[nn.Parameter | None]:
    """The parameters that modules had and have no longer."""
    return [
        old
        for module, _, fields in changes
        for old in fields["_parameters"].values()
        if all(old is not new for new in module._parameters.values())
    ]


def _fill(model: nn.Module, state: dict[str, Tensor], strict: bool) -> Callable[[], None]:
    """Load a state whose block layers are the model's; returns what undoes it, and changes nothing if it does not
    fit."""
    # A module that is used twice has its entries under both paths, as state_dict has them.
    modules = dict(model.named_modules(remove_duplicate=False))
    computed = _computed_names(modules)
    ours = _pruned_names(modules) - computed
    theirs = masked_names(state, set(model.state_dict()), ours)
    to_prune = sorted(theirs - ours)
    for name in ours - theirs:
        if name in state:
            check_support(name, state[name], modules)
            state[f"{name}_orig"] = state.pop(name)
            state[f"{name}_mask"] = mask_of(modules, name)
    check_fit(model, state, to_prune, ours - theirs, strict)
    check_masks(state, theirs | {name for name in computed if f"{name}_mask" in state})
    for name, parameter in model.named_parameters():
        check_writable(name, parameter)
    backup = {key: value.clone() for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    snapshot = prune_like(modules, {name: state[f"{name}_mask"] for name in to_prune})
    undo = partial(_undo_fill, model, snapshot, backup)
    try:
        model.load_state_dict(_versioned(state, model), strict=False)
    except BaseException as error:
        undo()
        if isinstance(error, Exception):
            raise CheckpointError(f"the model refused the checkpoint and is unchanged: {first_line(error)}") from error
        raise
    _refresh_all(model)
    return undo


def _undo_fill(model: nn.Module, snapshot: Snapshot, backup: Mapping[str, Tensor]) -> None:
    snapshot.restore()
    _put_back(model, backup)
    _refresh_all(model)


def _refresh_all(model: nn.Module) -> None:
    with evaluating(model):  # in train mode some parametrizations change what they have just loaded
        for module in model.modules():
            refresh(module)


def _put_back(model: nn.Module, backup: Mapping[str, Tensor]) -> None:
    """Values as they were, and what modules derive from them when they load; one that cannot load has its values."""
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if key in backup:
                value.copy_(backup[key])
    for path, module in model.named_modules(remove_duplicate=False):
        with suppress(Exception):
            prefix = f"{path}." if path else ""
            module._load_from_state_dict(backup, prefix, {"version": module._version}, False, [], [], [])


def _versioned(state: Mapping[str, Tensor], model: nn.Module) -> OrderedDict[str, Tensor]:
    """A state with the versions of the model's own modules, which some refuse to load without."""
    versioned = OrderedDict(state)
    versioned._metadata = getattr(model.state_dict(), "_metadata", None)  # type: ignore[attr-defined]
    return versioned


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


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that share no memory, as safetensors wants them: a buffer may be a part of another."""
    seen: set[int] = set()
    apart = {}
    for key, value in tensors.items():
        place = value.untyped_storage().data_ptr()
        apart[key] = value.clone() if place in seen else value
        seen.add(place)
    return apart


def _pruned_names(modules: Mapping[str, nn.Module]) -> set[str]:
    return {dotted(path, hook._tensor_name) for path, module in modules.items() for hook in pruning_hooks(module)}


def _computed_names(modules: Mapping[str, nn.Module]) -> set[str]:
    """The weights whose parameters hold, parametrizations or norms compute, by the names that they have without."""
    tensors = [(path, tensor.removesuffix("_orig")) for path, m in modules.items() for tensor in held_tensors(m)]
    tensors += [
        (path, hook._tensor_name)
        for path, m in modules.items()
        for hook in pruning_hooks(m)
        if f"{hook._tensor_name}_orig" not in m._parameters
    ]
    return {dotted(path, tensor) for path, tensor in tensors}


def prune_like(modules: Mapping[str, nn.Module], masks: Mapping[str, Tensor]) -> Snapshot:
    """Prune weights, by their full names, with the masks given; the snapshot undoes it."""
    owners = [(name, *name.rpartition(".")[::2]) for name in masks]
    owned = {path for _, path, _ in owners}
    consumers = {path.rpartition(".")[0] for path in owned if path}
    snapshot = Snapshot(modules[path] for path in owned | consumers | {""})
    try:
        for name, path, tensor in owners:
            if f"{tensor}_mask" in modules[path]._buffers:
                continue
            weight = getattr(modules[path], tensor)
            thaw(modules[path], tensor)
            MaskPruning.register(modules[path], tensor, masks[name].to(weight, copy=True))
        for path in consumers - {""}:
            watch(modules[path], RefreshChildren)
        if owned - {""}:
            watch(modules[""], RefreshAll)
    except BaseException:
        snapshot.restore()
        raise
    return snapshot
