"""Checkpoints and block layers: make a model fit a state dict with blocks in it, and the reverse."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..topology import BlockTopology
from .autotune import default_execution
from .eligible import Ineligible, check_state, dense_class, dense_weight
from .layout import decode_sets
from .modules import BlockModule, block_slots, blocks_shape
from .swap import Changes, become, block_form, restore


def adopt(model: nn.Module, state: dict[str, Tensor]) -> Changes:
    """Turn the dense layers whose blocks a state dict holds into block layers, and read dense weights as blocks
    where the model has block layers.

    Args:
        model: changed in place.
        state: changed in place where the model is compact and the checkpoint is not.

    Returns:
        What `restore` needs to undo it.

    Raises:
        ValueError: naming the first layer that does not fit; nothing is changed then.
    """
    modules = dict(model.named_modules())
    forms: list[tuple[nn.Module, BlockModule]] = []
    for path in sorted(_paths(state)):
        module = modules.get(path)
        if module is None:
            raise ValueError(f"{path or 'the model'}: the checkpoint has a compact layer, the model no such module")
        topology = _topology(state, path)
        shape = _matrix(module)
        if shape != topology.shape:
            raise ValueError(f"{path}: the checkpoint's layer is {_times(topology.shape)}, the model's {_times(shape)}")
        kernel = _kernel(module)
        expected = blocks_shape(topology, kernel)
        blocks = state[_key(path, "blocks")]
        if tuple(blocks.shape) != expected:
            raise ValueError(f"{path}.blocks: the checkpoint has shape {tuple(blocks.shape)}, expected {expected}")
        if isinstance(module, BlockModule) and module.topology == topology:
            continue
        forms.append((module, _form(path, module, topology, blocks)))
    replaced = _blocks_from_dense(modules, state)
    changes: Changes = []
    try:
        for module, form in forms:
            changes.append(become(module, form))
    except BaseException:
        restore(changes)
        raise
    for key in [k for k in state if k in replaced[1]]:
        del state[key]
    state.update(replaced[0])
    return changes


def _form(path: str, module: nn.Module, topology: BlockTopology, blocks: Tensor) -> BlockModule:
    if isinstance(module, BlockModule):
        form = module.__class__.__new__(module.__class__)
        form.__dict__.update({k: v.copy() if isinstance(v, dict) else v for k, v in module.__dict__.items()})
        values = torch.empty(blocks.shape, dtype=module.blocks.dtype, device=module.blocks.device)
        form.set_topology(topology, nn.Parameter(values, module.blocks.requires_grad))
        form.run_as(default_execution(form))
        return form
    try:
        dense_class(module)
        check_state(module, meta=True)
    except Ineligible as reason:
        raise ValueError(f"{path}: the checkpoint's layer is compact, the model's cannot be: {reason}") from None
    weight = dense_weight(module)
    values = torch.empty(blocks.shape, dtype=weight.dtype, device=weight.device)
    form = block_form(module, topology, values)
    form.run_as(default_execution(form))
    return form


def _blocks_from_dense(
    modules: Mapping[str, nn.Module], state: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], set[str]]:
    """For block layers whose dense weight a checkpoint holds: their entries, and the entries that those replace."""
    new: dict[str, Tensor] = {}
    old: set[str] = set()
    for path, module in modules.items():
        if not isinstance(module, BlockModule) or _key(path, "blocks") in state:
            continue
        names = [name for name in ("weight", "weight_orig") if _key(path, name) in state]
        if not names:
            continue
        key = _key(path, names[0])
        weight = state[key]
        if tuple(weight.shape) != module.weight_shape:
            raise ValueError(f"{key}: the checkpoint has shape {tuple(weight.shape)}, the model {module.weight_shape}")
        mask = state.get(_key(path, "weight_mask"))
        entries = (weight if mask is None else mask) != 0
        units = entries.flatten(2).any(2) if entries.dim() > 2 else entries
        slots = block_slots(module.topology, module.parts)
        inside = int(units.flatten()[slots].sum())
        if float(units.float().mean()) < 0.9 and inside != int(units.sum()):
            raise ValueError(
                f"{path}: the checkpoint is sparse elsewhere than the model's blocks; expand the model, or load into "
                "a dense one"
            )
        values = weight.flatten(0, 1)[slots].reshape(module.blocks.shape)
        new.update(
            {_key(path, "blocks"): values, _key(path, "row_set"): module.row_set, _key(path, "col_set"): module.col_set}
        )
        old |= {_key(path, name) for name in ("weight", "weight_orig", "weight_mask")}
    return new, old


def _key(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _paths(state: Mapping[str, Tensor]) -> set[str]:
    """Paths of the block layers in a state dict."""
    paths = {key.rpartition(".")[0] for key in state if key.rpartition(".")[2] == "row_set"}
    return {p for p in paths if _key(p, "col_set") in state and _key(p, "blocks") in state}


def _topology(state: Mapping[str, Tensor], path: str) -> BlockTopology:
    sets = []
    for name in ("row_set", "col_set"):
        stored = state[_key(path, name)]
        if stored.dtype not in (torch.uint8, torch.int32) or stored.dim() != 1:
            raise ValueError(f"{_key(path, name)}: {stored.dtype} of shape {tuple(stored.shape)} is no list of sets")
        sets.append(decode_sets(stored))
    return BlockTopology(*sets)


def _matrix(module: nn.Module) -> tuple[int, ...]:
    if isinstance(module, BlockModule):
        return module.topology.shape
    weight = module._parameters.get("weight")
    weight = module._parameters.get("weight_orig") if weight is None else weight
    if weight is None or weight.dim() < 2:
        return ()
    return weight.shape[0], weight.shape[1] * int(getattr(module, "groups", 1))


def _kernel(module: nn.Module) -> tuple[int, ...]:
    return tuple(module.weight_shape[2:] if isinstance(module, BlockModule) else dense_weight(module).shape[2:])


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "no matrix"
