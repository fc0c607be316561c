"""What stands between a residual block's input and its addition: layers, activations, norms, scales."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from .dataflow import Graph, Held, Node

WEIGHTED = {"linear": 0, "conv1d": 1, "conv2d": 2, "conv3d": 3}
NORMS = ("batch_norm", "layer_norm", "group_norm", "instance_norm")
SAME = ("dropout", "dropout1d", "dropout2d", "alpha_dropout", "feature_dropout", "contiguous", "clone", "to", "float")
VIEWS = ("transpose", "permute", "flatten", "reshape", "view", "movedim", "unflatten", "swapaxes", "squeeze")
POOLS = ("avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "mean")
MAX_POOLS = ("max_pool1d", "max_pool2d", "max_pool3d", "boolean_dispatch")
ADDS = ("add", "iadd", "radd")
SCALES = ("mul", "imul", "rmul")

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


class BranchReader:
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
            if node.op in WEIGHTED and (layer := branch_layer(self.graph, node)) is not None:
                if in_branch:
                    if self.layers and not pending:
                        self.activations.append("none")
                    self.layers.append(layer)
                elif self.projection is None:
                    self.projection = layer
                else:
                    obstacle = obstacle or "its shortcut has several layers"
                pending = 0
            elif node.op in NORMS:
                self.norms += [name.rpartition(".")[0] for name in node.held[:1]]
                self.batch_norms &= node.op == "batch_norm"
            elif node.op in (*PAIRED, *ODD) and in_branch and self.layers and not pending:
                self.activations.append(node.op)
                pending += 1
            elif node.op in SCALES and node.held and in_branch:
                self.scales += node.held
            elif node.op in ADDS and node.held and in_branch:
                self.shifts += node.held
            elif in_branch and (affine := _affine(node)):
                self.shifts.append(affine[0])
                self.scales.append(affine[1])
            elif in_branch and node.op in (*PAIRED, *ODD):
                where = "follows another" if self.layers else "stands before its first layer"
                obstacle = obstacle or f"in its branch {_article(node.op)} {where}"
            elif node.op not in (*SAME, *VIEWS) and (in_branch or node.op not in ("getitem", "pad", *POOLS)):
                obstacle = obstacle or f"its {'branch' if in_branch else 'shortcut'} has {_article(node.op)}"
            if node.sources != (previous,) and obstacle is None:
                obstacle = f"its {'branch' if in_branch else 'shortcut'} is no chain of layers"
            previous = node.index
        if in_branch and pending and obstacle is None:
            obstacle = "its branch ends in an activation"
        return obstacle


def _affine(node: Node) -> tuple[str, str] | None:
    """Shift and scale of ``addcmul(shift, scale, x)``, where both are the model's."""
    if node.op != "addcmul" or node.argument(3, "value", 1) != 1:
        return None
    shift, *factors = node.argument(0, "input"), node.argument(1, "tensor1"), node.argument(2, "tensor2")
    scales = [factor for factor in factors if isinstance(factor, Held)]
    return (shift.name, scales[0].name) if isinstance(shift, Held) and len(scales) == 1 else None


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


def shortcut_padding(graph: Graph, shortcut: Sequence[int]) -> int | None:
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
        elif node.op not in SAME:
            return None
    return before


def _sizes(value: Any, dims: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * dims
    given = tuple(value)
    return given * dims if len(given) == 1 else given


def _article(op: str) -> str:
    return f"{'an' if op[:1] in 'aeiou' else 'a'} {op}"
