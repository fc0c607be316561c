"""Residual additions: which layers form the branch beside a shortcut, and what stands between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .branch import (
    ADDS,
    MAX_POOLS,
    NORMS,
    POOLS,
    SAME,
    WEIGHTED,
    BranchLayer,
    BranchReader,
    branch_layer,
    shortcut_padding,
)
from .dataflow import Graph, Node, record

Kind = Literal["relu", "plain"]
Shortcut = Literal["identity", "projection", "fixed"]


@dataclass(frozen=True)
class ResidualBlock:
    """One residual addition of a model.

    Attributes:
        name: what its branch's layers have in common in their paths.
        kind: ``"relu"``, a ReLU follows the addition; ``"plain"``, none does.
        layers: those of the branch, first to last.
        activations: function names between them, one fewer.
        shortcut: ``"identity"``; ``"projection"``, a layer; ``"fixed"``, no parameters but another size.
        projection: the shortcut's layer.
        padding: zero channels before the shortcut's, where it only strides and pads; ``None`` for others.
        norms: names of the modules that normalise, in branch and shortcut.
        batch_norms: whether all of them are batch norms.
        scales: parameters that multiply inside the branch.
        shifts: parameters that are added inside the branch.
        start: node of the block's input.
        stop: node of its output, the ReLU's if there is one.
        reason: why nothing can be done about it; ``None`` if something can.
    """

    name: str
    kind: Kind
    layers: tuple[BranchLayer, ...]
    activations: tuple[str, ...]
    shortcut: Shortcut
    projection: BranchLayer | None
    padding: int | None
    norms: tuple[str, ...]
    batch_norms: bool
    scales: tuple[str, ...]
    shifts: tuple[str, ...]
    start: int
    stop: int
    reason: str | None = None


@dataclass(frozen=True)
class Residuals:
    """The residual blocks of a model and the layers around chains of blocks that end in a ReLU.

    Attributes:
        graph: the forward pass that they were found in.
        blocks: in execution order.
        entries: weights whose outputs, after a ReLU, are the input of such a chain.
        exits: weights that read the output of one.
        pooled: whether a max pool stands between an entry and its chain.
    """

    graph: Graph
    blocks: tuple[ResidualBlock, ...]
    entries: tuple[str, ...]
    exits: tuple[str, ...]
    pooled: bool


def find_residuals(model: nn.Module, example_input: Any = None) -> Residuals:
    """Find every residual addition in one forward pass.

    Args:
        model: any module.
        example_input: what it takes; by default zeros of the size in its ``pretrained_cfg`` or of its first layer.

    Raises:
        ValueError: if no example input is given and none can be made up, or the model does not run on it.

    Example:
        >>> import timm, sao_prune.models
        >>> found = find_residuals(timm.create_model("sao_resnet", depth=8))
        >>> [(block.name, block.shortcut) for block in found.blocks]
        [('stages.0.0', 'identity'), ('stages.1.0', 'fixed'), ('stages.2.0', 'fixed')]
        >>> found.entries, found.exits
        (('stem.weight',), ('head.weight',))
    """
    made_up = example_input is None
    example = _made_up_input(model) if made_up else example_input
    try:
        graph = record(model, example)
    except ValueError as error:
        hint = "; give example_input=.., one batch that the model takes" if made_up else ""
        raise ValueError(f"{error}{hint}") from None
    adds = [node for node in graph.nodes if node.op in ADDS and len(node.sources) == 2]
    blocks = [block for node in adds if (block := _block(graph, node)) is not None]
    blocks = _refuse_shared(blocks)
    return Residuals(graph, tuple(blocks), *_ends(graph, blocks))


def _made_up_input(model: nn.Module) -> Tensor:
    """Zeros that the model may take: of the size that timm's configuration names, or of its first layer's inputs.

    Raises:
        ValueError: if neither tells.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    size = _input_size(model)
    if size is not None:
        return torch.zeros(1, *size, dtype=dtype, device="cpu")
    raise ValueError("residual blocks are found in a forward pass: give example_input=.., a batch that the model takes")


def _input_size(model: nn.Module) -> tuple[int, ...] | None:
    """Of one sample, as timm's configuration or the first layer has it."""
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    size = config.get("input_size") if isinstance(config, dict) else getattr(config, "input_size", None)
    if size is not None:
        # timm's configuration does not know of another image size that the model was built for; its patches do.
        image = getattr(getattr(model, "patch_embed", None), "img_size", None)
        return (size[0], *(image or size[1:]))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            return (module.in_features,)
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            return (module.in_channels, *(32,) * len(module.kernel_size))
    return None


def _block(graph: Graph, add: Node) -> ResidualBlock | None:
    first, second = add.sources
    common = graph.ancestors[first] & graph.ancestors[second]
    if first == second or not common:
        return None
    start = max(common)
    branch, shortcut = (sorted(graph.ancestors[end] - graph.ancestors[start]) for end in (first, second))
    if _weights(graph, branch) < _weights(graph, shortcut) or not branch:
        branch, shortcut = shortcut, branch
    if not _weights(graph, branch):
        return None
    parts = BranchReader(graph, start)
    after = [i for i in graph.consumers[add.index] if graph.nodes[i].op in ("relu", *SAME)]
    ends_in_relu = len(after) == 1 == len(graph.consumers[add.index]) and graph.nodes[after[0]].op == "relu"
    kind: Kind = "relu" if ends_in_relu else "plain"
    reason = parts.read(branch, shortcut)
    stop = after[0] if ends_in_relu else add.index
    if reason is None and kind == "relu":
        reason = _relu_obstacle(graph, start, parts)
    elif reason is None:
        reason = _plain_obstacle(parts, shortcut)
    name = _name([layer.weight for layer in parts.layers]) if parts.layers else add.op
    projection = parts.projection
    kind_of_shortcut: Shortcut = "projection" if projection else "fixed" if shortcut else "identity"
    return ResidualBlock(
        name,
        kind,
        tuple(parts.layers),
        tuple(parts.activations),
        kind_of_shortcut,
        projection,
        shortcut_padding(graph, shortcut),
        tuple(dict.fromkeys(parts.norms)),
        parts.batch_norms,
        tuple(parts.scales),
        tuple(parts.shifts),
        start,
        stop,
        reason,
    )


def _weights(graph: Graph, nodes: Sequence[int]) -> int:
    return sum(graph.nodes[index].op in WEIGHTED for index in nodes)


def _relu_obstacle(graph: Graph, start: int, parts: BranchReader) -> str | None:
    if any(name != "relu" for name in parts.activations):
        return f"its layers have {', '.join(parts.activations)} between them, not ReLU"
    source = _back(graph, start, (*SAME, *MAX_POOLS))
    if graph.nodes[source].op not in ("relu", "input"):
        return "its input is not the output of a ReLU"
    layers = [*parts.layers, *([parts.projection] if parts.projection else [])]
    if any(not layer.taps for layer in layers):
        return "a layer of it shifts or dilates its input"
    return None


def _plain_obstacle(parts: BranchReader, shortcut: Sequence[int]) -> str | None:
    if shortcut:
        return "its shortcut is no identity, and no ReLU follows"
    if len(parts.layers) > 2:
        return f"its branch has {len(parts.layers)} layers, and no ReLU follows"
    if any(layer.strided or not layer.taps for layer in parts.layers):
        return "a layer of it strides, shifts or dilates its input"
    return None


def _back(graph: Graph, index: int, through: Sequence[str]) -> int:
    """The nearest node at or before ``index`` that is none of ``through``, along the first source."""
    while graph.nodes[index].op in through and graph.nodes[index].sources:
        index = graph.nodes[index].sources[0]
    return index


def _refuse_shared(blocks: list[ResidualBlock]) -> list[ResidualBlock]:
    """A layer that two blocks use, or one block twice, cannot serve both."""
    uses: dict[str, int] = {}
    for block in blocks:
        for layer in _all_layers(block):
            uses[layer.weight] = uses.get(layer.weight, 0) + 1
    return [
        block
        if block.reason is not None or all(uses[layer.weight] == 1 for layer in _all_layers(block))
        else replace(block, reason="a layer of it is used more than once")
        for block in blocks
    ]


def _all_layers(block: ResidualBlock) -> tuple[BranchLayer, ...]:
    return (*block.layers, *((block.projection,) if block.projection else ()))


def _ends(graph: Graph, blocks: Sequence[ResidualBlock]) -> tuple[tuple[str, ...], tuple[str, ...], bool]:
    """The weights before and after chains of blocks that end in a ReLU, and whether a max pool comes between."""
    usable = [block for block in blocks if block.kind == "relu" and block.reason is None]
    stops = {block.stop for block in usable}
    inside = {layer.weight for block in blocks for layer in _all_layers(block)}
    entries, exits, pooled = [], [], False
    for block in usable:
        source = _back(graph, block.start, (*SAME, *MAX_POOLS))
        if source in stops or graph.nodes[source].op != "relu":
            continue
        pooled |= _back(graph, block.start, SAME) != source
        before = graph.nodes[_back(graph, graph.nodes[source].sources[0], (*SAME, *NORMS))]
        if before.op in WEIGHTED and (layer := branch_layer(graph, before)) and layer.weight not in inside:
            entries.append(layer.weight)
    between = (*SAME, "flatten", "reshape", "view", "squeeze", *POOLS)
    for node in graph.nodes:
        layer = branch_layer(graph, node) if node.op in WEIGHTED else None
        if layer and layer.weight not in inside and _back(graph, node.sources[0], between) in stops:
            exits.append(layer.weight)
    return tuple(dict.fromkeys(entries)), tuple(dict.fromkeys(exits)), pooled


def _name(weights: Sequence[str]) -> str:
    """The path that all weights share, module by module."""
    paths = [weight.split(".")[:-1] for weight in weights]
    shared = [steps[0] for steps in takewhile(lambda steps: len(set(steps)) == 1, zip(*paths))]
    return ".".join(shared or paths[0])
