"""Calls of every operator on operands of every kind, and the same by dense layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sao_prune.blocks import operators, stacks
from sao_prune.blocks.modules import block_slots, blocks_shape
from sao_prune.topology import BlockTopology, encode_sets

from .cases import LAYOUTS

ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda t: t, "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh,
}  # fmt: skip
ROWS, COLS, GROUPS = 8, 12, 4
SPACES = {0: (), 1: (6,), 2: (4, 5), 3: (3, 2, 3)}
# How an operand lies in memory; of linear layers, and of convolutions.
TOKENS = ("rows", "column-major", "transposed tokens", "channels moved last", "3-D", "sliced")
IMAGES = ("rows", "channels last", "transposed", "sliced")
NAMES = (
    "linear",
    "mlp",
    "stack",
    *(f"conv{d}" for d in SPACES),
    *(f"norm{d}" for d in SPACES),
    "norm2 eval",
    "norm0 eval",
)


@dataclass(frozen=True)
class Call:
    """An operator's call: ``operator(*inputs, *rest)``.

    Attributes:
        inputs: tensors to differentiate by, the operand first.
        rest: sets, averages, activation, backend, geometry.
        dense: the result for the same inputs by dense layers.
    """

    operator: Any
    inputs: tuple[Tensor | None, ...]
    rest: tuple[Any, ...]
    dense: Callable[..., Tensor]

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        """The operator's first result."""
        found = self.operator(*(inputs or self.inputs), *self.rest)
        return found if isinstance(found, Tensor) else found[0]

    def to(self, dtype: torch.dtype) -> Call:
        """The same with inputs and averages of another type."""

        def cast(t: Any) -> Any:
            return t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t

        return replace(self, inputs=tuple(map(cast, self.inputs)), rest=tuple(map(cast, self.rest)))

    def leaves(self) -> list[Tensor]:
        """The inputs that are there, as leaves that lie in memory as they did."""
        return [t.detach().requires_grad_() for t in self.inputs if t is not None]

    def run(self, leaves: list[Tensor], how: Callable[..., Tensor] | None = None) -> Tensor:
        """The result for such leaves."""
        given = iter(leaves)
        return (how or self)(*(None if t is None else next(given) for t in self.inputs))


def lay_out(x: Tensor, kind: str) -> Tensor:
    """The same values otherwise in memory."""
    if kind == "column-major":
        return x.reshape(-1, x.shape[-1]).t().contiguous().t()
    if kind == "channels moved last":
        return x.movedim(-1, 0).contiguous().movedim(0, -1)
    if kind == "transposed tokens":
        return x.mT.contiguous().mT
    if kind == "channels last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if kind == "transposed":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if kind == "sliced":
        return torch.cat([x, x, x], -1)[..., x.shape[-1] : 2 * x.shape[-1]]
    return x.flatten(0, -2) if kind == "rows" and x.dim() == 3 and x.shape[1] in (5, 6) else x


def _values(topology: BlockTopology, kernel: tuple[int, ...] = ()) -> Tensor:
    return torch.randn(blocks_shape(topology, kernel), dtype=torch.float64)


def _weight(topology: BlockTopology, blocks: Tensor, kernel: tuple[int, ...] = ()) -> Tensor:
    rows, cols = topology.shape
    values = blocks.reshape(-1, *kernel)
    return values.new_zeros(rows * cols, *kernel).index_copy(0, block_slots(topology), values).view(rows, cols, *kernel)


def _stack(x: Tensor, topologies: tuple[BlockTopology, ...], act: str, backend: str, bias: bool) -> Call:
    acts = ["relu" if act == "" else "tanh", act if act in stacks.ACTIVATIONS else "relu", act if act == "tanh" else ""]
    values: list[Tensor | None] = []
    sets: list[Tensor] = []
    for t in topologies:
        values += [_values(t), torch.randn(t.shape[0], dtype=torch.float64) if bias else None]
        sets += [encode_sets(t.row_set), encode_sets(t.col_set)]

    def dense(x: Tensor, *values: Tensor | None) -> Tensor:
        for t, w, b, name in zip(topologies, values[::2], values[1::2], acts):
            assert w is not None
            x = ACTS[name](F.linear(x, _weight(t, w), b))
        return x

    return Call(stacks.OPERATORS[3], (x, *values), (*sets, acts, backend), dense)


def make(name: str, layout: str, operand: str, act: str, backend: str, bias: bool = True, stride: int = 1) -> Call:
    """A call in double precision."""
    topology = LAYOUTS[layout](ROWS, COLS, GROUPS)
    sets = encode_sets(topology.row_set), encode_sets(topology.col_set)
    b = torch.randn(ROWS, dtype=torch.float64) if bias else None
    if name in ("linear", "mlp", "stack"):
        # Of stacks as many rows as the kernels ask for.
        x = lay_out(torch.randn(3, 6 if name == "stack" else 5, COLS, dtype=torch.float64), operand)
        if name == "linear":

            def linear(x: Tensor, blocks: Tensor, b: Tensor | None) -> Tensor:
                return ACTS[act](F.linear(x, _weight(topology, blocks), b))

            return Call(operators.block_linear, (x, _values(topology), b), (*sets, act, backend), linear)
        if name == "stack":
            return _stack(x, (topology, LAYOUTS[layout](6, ROWS, 2), LAYOUTS[layout](ROWS, 6, 2)), act, backend, bias)
        second = LAYOUTS[layout](6, ROWS, 2)
        own = x, _values(topology), b, _values(second), torch.randn(6, dtype=torch.float64) if bias else None
        more = encode_sets(second.row_set), encode_sets(second.col_set)

        def mlp(x: Tensor, blocks1: Tensor, b1: Tensor | None, blocks2: Tensor, b2: Tensor | None) -> Tensor:
            hidden = ACTS[act](F.linear(x, _weight(topology, blocks1), b1))
            return F.linear(hidden, _weight(second, blocks2), b2)

        return Call(operators.block_mlp, own, (*sets, *more, act, backend), mlp)
    dims = int(name[4])
    kernel = (3,) * dims
    x = torch.randn(3, COLS, *SPACES[dims], dtype=torch.float64)
    x = lay_out(x, operand if dims else {"channels last": "rows", "transposed": "column-major"}.get(operand, operand))
    geometry = [stride] * dims, [1] * dims, [1] * dims

    def convolve(x: Tensor, blocks: Tensor, b: Tensor | None) -> Tensor:
        weight = _weight(topology, blocks, kernel)
        if not dims:
            return F.linear(x, weight, b)
        result: Tensor = (F.conv1d, F.conv2d, F.conv3d)[dims - 1](x, weight, b, *geometry)
        return result

    own = x, _values(topology, kernel), b
    if name.startswith("conv"):
        rest = *sets, act, backend, *geometry, 1
        return Call(operators.block_conv, own, rest, lambda x, w, b: ACTS[act](convolve(x, w, b)))
    affine = (
        (torch.rand(ROWS, dtype=torch.float64) + 0.5, torch.randn(ROWS, dtype=torch.float64)) if bias else (None,) * 2
    )
    averages: tuple[Tensor | None, ...] = None, None
    if name.endswith("eval"):
        averages = torch.randn(ROWS, dtype=torch.float64), torch.rand(ROWS, dtype=torch.float64) + 0.5

    def normed(x: Tensor, blocks: Tensor, b: Tensor | None, gain: Tensor | None, offset: Tensor | None) -> Tensor:
        return ACTS[act](F.batch_norm(convolve(x, blocks, b), *averages, gain, offset, averages[0] is None, 0.0, 1e-3))

    rest = *sets, *averages, act, backend, 1e-3, *geometry, 1
    return Call(operators.block_conv_norm, (*own, *affine), rest, normed)
