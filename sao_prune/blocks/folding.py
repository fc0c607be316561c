"""Moving channel permutations into neighbours: hidden channels get an order that their consumers like better."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..topology import BlockTopology, encode_sets
from .absorbed import with_activation
from .eligible import tied
from .following import Flow, Watch
from .layout import layout_of_topology
from .modules import BlockConv, BlockLinear, BlockModule, NativeMaxPool2d
from .norm_folding import NORMS
from .permutation import Kind

# Elementwise, and the same for all channels.
_STEPS: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardsigmoid, nn.Tanh,
    nn.Sigmoid, nn.Softplus, nn.Dropout, nn.Identity,
)  # fmt: skip
_SPATIAL: tuple[type[nn.Module], ...] = (
    nn.Dropout2d, nn.MaxPool2d, NativeMaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d,
)  # fmt: skip
_FUNCTIONS = {F.relu, torch.relu, F.gelu, F.silu, torch.tanh, torch.sigmoid, F.dropout, F.hardswish, Tensor.contiguous}
_DEPTHWISE: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_KINDS: set[type] = {BlockLinear, *BlockConv.__subclasses__()}


def fold(model: nn.Module, example_input: Any) -> int:
    """Relabel hidden channels, in place, so that permutations between block layers disappear; the function stays.

    The channels between a block layer and the only block layer that takes them, through elementwise activations,
    dropouts, batch norms and depthwise convolutions, may stand in any order. They are put into that of the first
    layer's blocks and, within each, into that of the second's: of two irregular permutations one remains at most, none
    but a strided one where every block of the first feeds every block of the second alike, and none at all where both
    have the same sets. What cannot be proven to be such a pair stays as it is.

    Args:
        model: without epilogues; a copy, as parameters, statistics and sets are permuted in place.
        example_input: what to run it on, once, to find the pairs.

    Returns:
        How many pairs were relabelled.

    Raises:
        ValueError: if the model fails on the example input.

    Example:
        >>> from sao_prune.topology import ramanujan
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(BlockLinear(ramanujan(32, 8, 4)), nn.ReLU(), BlockLinear(ramanujan(8, 32, 4)))
        >>> x = torch.randn(3, 8)
        >>> y = net(x)
        >>> fold(net, x), bool(torch.allclose(net(x), y, atol=1e-6)), net[0].layout.outputs.kind.value
        (1, True, 'identity')
    """
    done = 0
    for first, then, between in _pairs(model, example_input):
        if not _suits(first, then):
            continue
        order = _order(first.topology, then.topology)
        if order is None:
            continue
        with torch.no_grad():
            _relabel_rows(first, order)
            _relabel_cols(then, order)
            for step in between:
                for name in ("weight", "bias", "running_mean", "running_var"):
                    values = getattr(step, name, None)
                    if values is not None:
                        values.copy_(values[order])
        done += 1
    return done


def _pairs(model: nn.Module, example_input: Any) -> list[tuple[Any, Any, list[Any]]]:
    """Two block layers, the second of which alone takes the first one's result, and what of the steps between them has
    parameters a channel."""
    watch = Watch([m for m in model.modules() if isinstance(m, BlockModule)], _keeps_channels, _FUNCTIONS)
    watch.run(model, example_input)
    shared, found = tied(model), []
    for flow in watch.flows:
        if flow.then is None or flow.reach() is not flow or _is_matrix(flow.owner) != _is_matrix(flow.then):
            continue
        between = [step for step in flow.steps if _is_norm(step) or _is_depthwise(step)]
        if all(watch.calls[id(m)] == 1 and id(m) not in shared for m in (flow.owner, flow.then, *between)):
            found.append((flow.owner, flow.then, between))
    return found


def _keeps_channels(flow: Flow, module: nn.Module, x: Tensor) -> bool:
    """Whether a module treats all channels of a layer's result alike, its own parameters apart."""
    if module._forward_hooks or module._forward_pre_hooks:
        return False
    if _is_norm(module):
        # A batch norm takes dimension 1 for the channels, a linear layer the last.
        return x.dim() == 2 or not _is_matrix(flow.owner)
    spatial = not _is_matrix(flow.owner) and (type(module) in _SPATIAL or _is_depthwise(module))
    return spatial or type(module) in _STEPS


def _is_norm(module: nn.Module) -> bool:
    """Whether it is a batch norm, with an activation in it or without."""
    kind: Any = type(module)
    return kind in NORMS or (kind in with_activation() and all(type(m) in _STEPS for m in (module.drop, module.act)))


def _is_depthwise(module: nn.Module) -> bool:
    """Whether it is a convolution of every channel by itself, by a weight of its own."""
    padded = getattr(sys.modules.get("timm.layers.conv2d_same"), "Conv2dSame", None)
    if type(module) not in (*_DEPTHWISE, padded) or "weight" not in module._parameters:
        return False
    return module.groups == module.in_channels == module.out_channels


def _is_matrix(layer: nn.Module) -> bool:
    return isinstance(layer, BlockLinear)


def _suits(first: BlockModule, then: BlockModule) -> bool:
    """Whether both have blocks of one shape and every channel is in one of them."""
    if first is then or type(first) not in _KINDS or type(then) not in _KINDS:
        return False
    rows, cols = first.topology.row_set, then.topology.col_set
    even = len(first.layout.own) == len(then.layout.own) == 3
    return even and len(rows) == len(cols) and first.parts == then.parts == 1


def _order(first: BlockTopology, then: BlockTopology) -> torch.Tensor | None:
    """The channels by the blocks of one layer, in each by their rank in the other's, if that saves permutations.

    By the second's where both have the same sets: blocks are numbered by their rows, so that those of the first follow.
    """
    rows, cols = first.row_set, then.col_set
    if bool((rows < 0).any()) or bool((cols < 0).any()):
        return None
    orders = (torch.argsort(a * (int(b.max()) + 1) + b, stable=True) for a, b in ((rows, cols), (cols, rows)))
    costs = {_cost(first, then, order): order for order in reversed(list(orders))}
    least = min(costs)
    return costs[least] if least < _cost(first, then, torch.arange(len(rows), device=rows.device)) else None


def _cost(first: BlockTopology, then: BlockTopology, order: torch.Tensor) -> int:
    """How much channels move in and out of both layers with the hidden ones in an order."""
    each = {Kind.IDENTITY: 0, Kind.STRIDED: 1, Kind.INDEX: 10}
    new = BlockTopology(first.row_set[order], first.col_set), BlockTopology(then.row_set, then.col_set[order])
    layouts = [layout_of_topology(topology) for topology in new]
    return sum(each[layout.inputs.kind] + each[layout.outputs.kind] for layout in layouts)


def _relabel_rows(layer: BlockModule, order: torch.Tensor) -> None:
    old = layer.topology
    new = BlockTopology(old.row_set[order], old.col_set)
    _replace(layer, old, new, order, torch.arange(len(old.col_set), device=order.device))
    if layer.bias is not None:
        layer.bias.copy_(layer.bias[order])


def _relabel_cols(layer: BlockModule, order: torch.Tensor) -> None:
    old = layer.topology
    new = BlockTopology(old.row_set, old.col_set[order])
    _replace(layer, old, new, torch.arange(len(old.row_set), device=order.device), order)


def _replace(
    layer: BlockModule, old: BlockTopology, new: BlockTopology, rows: torch.Tensor, cols: torch.Tensor
) -> None:
    """Give a layer the topology ``new``, of which row ``i`` was row ``rows[i]`` before, and columns likewise."""
    (before,), (after,) = old.buckets, new.buckets
    row_place, col_place = _places(before.rows), _places(before.cols)
    source_rows, source_cols = row_place[rows[after.rows]], col_place[cols[after.cols]]
    width, depth = before.rows.shape[1], before.cols.shape[1]
    block = (source_rows // width)[:, :1, None]
    index = (block, (source_rows % width)[:, :, None], (source_cols % depth)[:, None, :])
    layer.blocks.copy_(layer.blocks[index].contiguous())
    layer.row_set.copy_(encode_sets(new.row_set))
    layer.col_set.copy_(encode_sets(new.col_set))
    _ = layer.layout


def _places(members: torch.Tensor) -> torch.Tensor:
    """The position of every channel in the flattened members of all blocks."""
    flat = members.flatten()
    place = torch.empty_like(flat)
    place[flat] = torch.arange(len(flat), device=flat.device)
    return place
