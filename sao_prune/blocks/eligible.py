"""Which layers can be made compact, and why others cannot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod

from ..prune import RefreshAll, RefreshChildren
from ..topology import BlockTopology, NotBlockStructuredError
from .modules import BlockConv1d, BlockConv2d, BlockConv3d, BlockLinear, BlockModule, joined_topology

BLOCK_CLASSES: dict[type[nn.Module], type[BlockModule]] = {
    nn.Linear: BlockLinear,
    nn.Conv1d: BlockConv1d,
    nn.Conv2d: BlockConv2d,
    nn.Conv3d: BlockConv3d,
}
_HOOKS = ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks")


class Ineligible(ValueError):
    """A layer that has to stay as it is; the message says why."""


def layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every linear and convolutional layer of a model, compact ones included, with its path."""
    kinds: tuple[type[nn.Module], ...] = (*BLOCK_CLASSES, BlockModule, nn.modules.conv._ConvNd)
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            yield name, module


def dense_class(module: nn.Module) -> type[nn.Module]:
    """The stock class whose forward the module runs.

    Raises:
        Ineligible: if it runs one of its own.
    """
    for stock in BLOCK_CLASSES:
        if isinstance(module, stock):
            own = "forward" in module.__dict__ or type(module).forward is not stock.forward
            for name in ("_conv_forward",):
                own = own or getattr(type(module), name, None) is not getattr(stock, name, None)
            if own:
                raise Ineligible(f"{type(module).__name__} has a forward of its own")
            return stock
    raise Ineligible(f"no block form of {type(module).__name__}")


def check_state(module: nn.Module, meta: bool = False) -> None:
    """Refuse a layer with hooks or a computed weight; ``meta`` allows one on the meta device.

    Raises:
        Ineligible: if its weight is more than a parameter and at most a mask.
    """
    if parametrize.is_parametrized(module):
        raise Ineligible("its weight is parametrized")
    hooks = [h for h in module._forward_pre_hooks.values() if not isinstance(h, (RefreshAll, RefreshChildren))]
    foreign = [h for h in hooks if not isinstance(h, BasePruningMethod)]
    foreign += [h for field in _HOOKS for h in getattr(module, field).values()]
    if foreign:
        raise Ineligible(f"it has a hook: {getattr(foreign[0], '__name__', type(foreign[0]).__name__)}")
    if any(h._tensor_name != "weight" for h in hooks if isinstance(h, BasePruningMethod)):
        raise Ineligible("its bias is pruned")
    weight = module._parameters.get("weight_orig" if hooks else "weight")
    if weight is None:
        raise Ineligible("its weight is not a parameter")
    if isinstance(weight, nn.parameter.UninitializedParameter):
        raise Ineligible("not initialised yet (lazy): run the model once first")
    if weight.is_meta and not meta:
        raise Ineligible("its weight is on the meta device, so it has no zeros to read")
    if not weight.is_floating_point():
        raise Ineligible(f"not a floating-point weight ({weight.dtype})")


def read_topology(module: nn.Module) -> BlockTopology:
    """A layer's topology, from its mask or from its zeros.

    Raises:
        Ineligible: if it has none.
    """
    mask = module._buffers.get("weight_mask")
    source = module._parameters["weight"] if mask is None else mask
    assert source is not None
    entries = source.detach() != 0
    units = entries.flatten(2).any(2) if entries.dim() > 2 else entries
    if mask is not None and entries.dim() > 2 and not torch.equal(units, entries.flatten(2).all(2)):
        raise Ineligible("its mask cuts inside kernels; blocks keep whole kernels")
    if bool(units.all()):
        raise Ineligible("dense: nothing in it is pruned")
    parts = units.unflatten(0, (int(getattr(module, "groups", 1)), -1))
    try:
        topology = joined_topology([BlockTopology.from_mask(part) for part in parts])
    except NotBlockStructuredError as error:
        raise Ineligible(str(error)) from None
    if topology.groups == 0:
        raise Ineligible("nothing is left in it")
    if topology.groups == parts.shape[0] and topology.nnz == units.numel():
        raise Ineligible("dense: nothing in it is pruned")
    return topology


def read_from_outside(model: nn.Module) -> dict[int, str]:
    """Layers whose weight others read, by the id of the module, with the reason."""
    reasons: dict[int, str] = {}
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            reasons[id(module.out_proj)] = "MultiheadAttention reads its weight without calling it"
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(module)
    for sharing in owners.values():
        if len(sharing) > 1:
            reasons.update({id(module): "its weight is tied to another module's" for module in sharing})
    return reasons


def dense_weight(module: nn.Module) -> Tensor:
    """The parameter that holds a layer's values."""
    parameters: Mapping[str, nn.Parameter | None] = module._parameters
    weight = parameters.get("weight_orig")
    weight = parameters.get("weight") if weight is None else weight
    assert weight is not None
    return weight
