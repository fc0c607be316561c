"""Residual additions: which layers form the branch beside a shortcut, and what stands between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product, takewhile
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .dataflow import Graph, Held, Node, record

Kind = Literal["relu", "plain"]
Shortcut = Literal["identity", "projection", "fixed"]

_WEIGHTED = {"linear": 0, "conv1d": 1, "conv2d": 2, "conv3d": 3}
_NORMS = ("batch_norm", "layer_norm", "group_norm", "instance_norm")
_SAME = ("dropout", "dropout1d", "dropout2d", "alpha_dropout", "feature_dropout", "contiguous", "clone", "to", "float")
_VIEWS = ("transpose", "permute", "flatten", "reshape", "view", "movedim", "unflatten", "swapaxes", "squeeze")
_POOLS = ("avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "mean")
_MAX_POOLS = ("max_pool1d", "max_pool2d", "max_pool3d", "boolean_dispatch")
_ADDS = ("add", "iadd", "radd")
_SCALES = ("mul", "imul", "rmul")

#: Activations ``f`` with ``f(u) - f(-u) = c u`` for every ``u``, and their ``c``.
PAIRED = {"relu": 1.0, "gelu": 1.0, "silu": 1.0, "hardswish": 1.0, "softplus": 1.0}
#: Odd activations of derivative 1 at 0.
ODD = ("tanh", "hardtanh", "softsign", "asinh", "atan", "sin")


@dataclass(frozen=True)
class BranchLayer:
    """A linear layer or convolution inside a residual block.

    Attributes:
        weight: full name of its weight.
        bias: of its bias, if it has one.
        taps: flat kernel positions that read the cell of inputs that an output position stands for, its first corner
            first: one where the stride is 1, ``()`` where the layer shifts or dilates in another way.
        strided: whether any stride is above 1.
    """

    weight: str
    bias: str | None
    taps: tuple[int, ...]
    strided: bool


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
    example = made_up_input(model) if made_up else example_input
    try:
        graph = record(model, example)
    except ValueError as error:
        hint = "; give example_input=.., one batch that the model takes" if made_up else ""
        raise ValueError(f"{error}{hint}") from None
    adds = [node for node in graph.nodes if node.op in _ADDS and len(node.sources) == 2]
    blocks = [block for node in adds if (block := _block(graph, node)) is not None]
    blocks = _refuse_shared(blocks)
    return Residuals(graph, tuple(blocks), *_ends(graph, blocks))


def made_up_input(model: nn.Module) -> Tensor:
    """Zeros that the model may take: of the size that timm's configuration names, or of its first layer's inputs.

    Raises:
        ValueError: if neither tells.
    """
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    size = config.get("input_size") if isinstance(config, dict) else getattr(config, "input_size", None)
    if size is not None:
        # timm's configuration does not know of another image size that the model was built for; its patches do.
        image = getattr(getattr(model, "patch_embed", None), "img_size", None)
        return torch.zeros(1, size[0], *(image or size[1:]))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            return torch.zeros(1, module.in_features)
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            return torch.zeros(1, module.in_channels, *(32,) * len(module.kernel_size))
    raise ValueError("residual blocks are found in a forward pass: give example_input=.., a batch that the model takes")


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
    parts = _Parts(graph, start)
    after = [i for i in graph.consumers[add.index] if graph.nodes[i].op in ("relu", *_SAME)]
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
        _padding(graph, shortcut),
        tuple(dict.fromkeys(parts.norms)),
        parts.batch_norms,
        tuple(parts.scales),
        tuple(parts.shifts),
        start,
        stop,
        reason,
    )


class _Parts:
    """What a branch and a shortcut consist of."""

    def __init__(self, graph: Graph, start: int) -> None:
        self.graph, self.start = graph, start
        self.layers: list[BranchLayer] = []
        self.activations: list[str] = []
        self.norms: list[str] = []
        self.scales: list[str] = []
        self.shifts: list[str] = []
        self.projection: BranchLayer | None = None
        self.batch_norms = True

    def read(self, branch: Sequence[int], shortcut: Sequence[int]) -> str | None:
        """Take the nodes apart; what stands in the way, if anything does."""
        obstacle = self._chain(branch, in_branch=True)
        return obstacle or self._chain(shortcut, in_branch=False)

    def _chain(self, nodes: Sequence[int], *, in_branch: bool) -> str | None:
        previous, pending, obstacle = self.start, 0, None
        for node in (self.graph.nodes[index] for index in nodes):
            if node.op in _WEIGHTED and (layer := branch_layer(self.graph, node)) is not None:
                if in_branch:
                    if self.layers and not pending:
                        self.activations.append("none")
                    self.layers.append(layer)
                elif self.projection is None:
                    self.projection = layer
                else:
                    obstacle = obstacle or "its shortcut has several layers"
                pending = 0
            elif node.op in _NORMS:
                self.norms += [name.rpartition(".")[0] for name in node.held[:1]]
                self.batch_norms &= node.op == "batch_norm"
            elif node.op in (*PAIRED, *ODD) and in_branch and self.layers and not pending:
                self.activations.append(node.op)
                pending += 1
            elif node.op in _SCALES and node.held and in_branch:
                self.scales += node.held
            elif node.op in _ADDS and node.held and in_branch:
                self.shifts += node.held
            elif node.op not in (*_SAME, *_VIEWS) and (in_branch or node.op not in ("getitem", "pad", *_POOLS)):
                obstacle = obstacle or f"its {'branch' if in_branch else 'shortcut'} has {_article(node.op)}"
            if node.sources != (previous,) and obstacle is None:
                obstacle = f"its {'branch' if in_branch else 'shortcut'} is no chain of layers"
            previous = node.index
        if in_branch and pending and obstacle is None:
            obstacle = "its branch ends in an activation"
        return obstacle


def branch_layer(graph: Graph, node: Node) -> BranchLayer | None:
    """The layer behind a node, if its weight is a parameter."""
    weight, bias = (node.argument(position, name) for position, name in ((1, "weight"), (2, "bias")))
    if not isinstance(weight, Held):
        return None
    kernel = graph.shapes[weight.name][2:]
    stride = _sizes(node.argument(3, "stride", 1), len(kernel))
    taps: tuple[int, ...] = (0,)
    if kernel:
        dilation = _sizes(node.argument(5, "dilation", 1), len(kernel))
        padding = node.argument(4, "padding", 0)
        around = tuple(k // 2 for k in kernel) if padding == "same" else _sizes(padding, len(kernel))
        taps = _cell_taps(kernel, stride, around) if all(d == 1 for d in dilation) else ()
    return BranchLayer(weight.name, bias.name if isinstance(bias, Held) else None, taps, any(s > 1 for s in stride))


def _cell_taps(kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...]) -> tuple[int, ...]:
    """Kernel positions over the ``stride x stride`` cell of each output, if the centre tap reads its first corner."""
    if any(p != k // 2 for p, k in zip(padding, kernel)):
        return ()
    strides = [1]
    for k in reversed(kernel[1:]):
        strides.insert(0, strides[0] * k)
    along = [[p + o for o in range(s) if p + o < k] for k, s, p in zip(kernel, stride, padding)]
    return tuple(sum(t * s for t, s in zip(tap, strides)) for tap in product(*along))


def _padding(graph: Graph, shortcut: Sequence[int]) -> int | None:
    """Zero channels before its own that a shortcut of strided slices and pads puts; ``None`` for any other."""
    before = 0
    for node in (graph.nodes[index] for index in shortcut):
        if node.op == "getitem":
            index = node.args[1]
            whole = isinstance(index, tuple) and all(isinstance(i, slice) for i in index)
            if not whole or any(i.start or i.stop is not None for i in index) or index[1].step not in (None, 1):
                return None
        elif node.op == "pad":
            pads = tuple(node.argument(1, "pad"))
            spatial = 2 * (len(node.shape) - 2)
            if len(pads) != spatial + 2 or any(pads[:spatial]) or node.argument(3, "value"):
                return None
            before += pads[spatial]
        elif node.op not in _SAME:
            return None
    return before


def _sizes(value: Any, dims: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * dims
    given = tuple(value)
    return given * dims if len(given) == 1 else given


def _weights(graph: Graph, nodes: Sequence[int]) -> int:
    return sum(graph.nodes[index].op in _WEIGHTED for index in nodes)


def _relu_obstacle(graph: Graph, start: int, parts: _Parts) -> str | None:
    if any(name != "relu" for name in parts.activations):
        return f"its layers have {', '.join(parts.activations)} between them, not ReLU"
    source = _back(graph, start, (*_SAME, *_MAX_POOLS))
    if graph.nodes[source].op not in ("relu", "input"):
        return "its input is not the output of a ReLU"
    layers = [*parts.layers, *([parts.projection] if parts.projection else [])]
    if any(not layer.taps for layer in layers):
        return "a layer of it shifts or dilates its input"
    return None


def _plain_obstacle(parts: _Parts, shortcut: Sequence[int]) -> str | None:
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
        source = _back(graph, block.start, (*_SAME, *_MAX_POOLS))
        if source in stops or graph.nodes[source].op != "relu":
            continue
        pooled |= _back(graph, block.start, _SAME) != source
        before = graph.nodes[_back(graph, graph.nodes[source].sources[0], (*_SAME, *_NORMS))]
        if before.op in _WEIGHTED and (layer := branch_layer(graph, before)) and layer.weight not in inside:
            entries.append(layer.weight)
    between = (*_SAME, "flatten", "reshape", "view", "squeeze", *_POOLS)
    for node in graph.nodes:
        layer = branch_layer(graph, node) if node.op in _WEIGHTED else None
        if layer and layer.weight not in inside and _back(graph, node.sources[0], between) in stops:
            exits.append(layer.weight)
    return tuple(dict.fromkeys(entries)), tuple(dict.fromkeys(exits)), pooled


def _name(weights: Sequence[str]) -> str:
    """The path that all weights share, module by module."""
    paths = [weight.split(".")[:-1] for weight in weights]
    shared = [steps[0] for steps in takewhile(lambda steps: len(set(steps)) == 1, zip(*paths))]
    return ".".join(shared or paths[0])


def _article(op: str) -> str:
    return f"{'an' if op[:1] in 'aeiou' else 'a'} {op}"
