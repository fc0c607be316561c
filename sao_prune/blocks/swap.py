"""Turn a layer into its block form and back, in place, so that every reference to it stays good."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from ..prune import MaskPruning, refresh
from ..topology import BlockTopology
from .eligible import BLOCK_CLASSES, dense_class, dense_weight
from .modules import BlockModule, Execution, block_slots, blocks_shape

# Attributes of block layers that dense ones do not have.
_OWN_FIELDS = (
    "_dense_class",
    "_masked",
    "_layout",
    "execution",
    "epilogue",
    "absorbed",
)
Changes = list[tuple[nn.Module, type[nn.Module], dict[str, Any]]]


def _fields(module: nn.Module) -> dict[str, Any]:
    """A module's attributes, its registries copied one level deep."""
    return {k: v.copy() if isinstance(v, dict) else v for k, v in module.__dict__.items()}


def become(module: nn.Module, other: nn.Module) -> tuple[nn.Module, type[nn.Module], dict[str, Any]]:
    """Make ``module`` what ``other`` is; returns what undoes it with `restore`."""
    undo = module, type(module), module.__dict__.copy()
    module.__class__ = type(other)
    module.__dict__.clear()
    module.__dict__.update(other.__dict__)
    return undo


def restore(changes: Changes) -> None:
    """Undo `become`, last change first."""
    for module, kind, fields in reversed(changes):
        module.__class__ = kind
        module.__dict__.clear()
        module.__dict__.update(fields)


def block_form(module: nn.Module, topology: BlockTopology, blocks: Tensor | None = None) -> BlockModule:
    """The block layer equivalent to a stock layer with a block weight; the layer itself is left alone.

    Args:
        module: a stock layer; masked, baked, or on the meta device.
        topology: its topology, over all channels.
        blocks: the values, shaped as `BlockModule.blocks`; ``None`` reads them from the layer's weight.
    """
    stock = dense_class(module)
    weight = dense_weight(module)
    parts = int(getattr(module, "groups", 1))
    if blocks is None:
        shape = blocks_shape(topology, tuple(weight.shape[2:]))
        values = weight.detach().reshape(weight.shape[0] * weight.shape[1], *weight.shape[2:])
        blocks = values[block_slots(topology, parts).to(weight.device)].reshape(shape)
    new = BLOCK_CLASSES[stock].__new__(BLOCK_CLASSES[stock])
    new.__dict__.update(_fields(module))
    for registry, name in (
        ("_parameters", "weight"),
        ("_parameters", "weight_orig"),
        ("_buffers", "weight_mask"),
    ):
        getattr(new, registry).pop(name, None)
    masked = _pruning_hooks(module)
    for key in masked:
        del new._forward_pre_hooks[key]
    new.__dict__.pop("weight", None)
    new.__dict__.update(_dense_class=type(module), _masked=bool(masked), execution=Execution())
    new.set_topology(topology, nn.Parameter(blocks.contiguous(), requires_grad=weight.requires_grad))
    _bias_last(new)
    return new


def dense_form(module: BlockModule, masked: bool | None = None) -> nn.Module:
    """The stock layer equivalent to a block layer, baked or masked; the block layer itself is left alone."""
    kind: type[nn.Module] = module.__dict__.get("_dense_class") or next(
        stock for stock, block in BLOCK_CLASSES.items() if isinstance(module, block)
    )
    masked = module.__dict__.get("_masked", False) if masked is None else masked
    new = kind.__new__(kind)
    new.__dict__.update(_fields(module))
    for name in ("row_set", "col_set"):
        del new._buffers[name]
        new._non_persistent_buffers_set.discard(name)
    blocks = new._parameters.pop("blocks")
    assert blocks is not None
    for name in _OWN_FIELDS:
        new.__dict__.pop(name, None)
    with torch.no_grad():
        weight = module.weight.clone()
    new.register_parameter("weight", nn.Parameter(weight, requires_grad=blocks.requires_grad))
    _bias_last(new)
    if masked:
        mask = torch.zeros_like(weight).flatten(0, 1)
        mask[block_slots(module.topology, module.parts).to(mask.device)] = 1
        MaskPruning.register(new, "weight", mask.view_as(weight))
        refresh(new)
    return new


def _bias_last(module: nn.Module) -> None:
    """Weight before bias, as the stock layer registers them: optimizers number parameters in this order."""
    bias = module._parameters.pop("bias", None)
    module._parameters["bias"] = bias


def _pruning_hooks(module: nn.Module) -> list[int]:
    return [k for k, hook in module._forward_pre_hooks.items() if isinstance(hook, BasePruningMethod)]
