"""A linear layer that holds and computes only its blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import Proxy, wrap
from torch.nn import functional as F

from ...topology import BlockTopology
from ...weights import orthogonal_blocks
from .. import functional, operators, stacks
from ..epilogue import Epilogue
from .base import BlockModule, Execution, cast, is_batched, is_plain, normed, stack_blocks


@wrap
def run_linear(
    x: Tensor, blocks: Tensor, bias: Tensor | None, row_set: Tensor, col_set: Tensor, backend: str
) -> Tensor:
    """The layer's operator, a single step of a traced graph, so that the graph follows what is loaded into it."""
    x, blocks, bias = cast(x, blocks, bias)
    y: Tensor = operators.block_linear(x, blocks, bias, row_set, col_set, "", backend)[0]
    return y


class BlockLinear(BlockModule):
    """``y = x W^T + b`` for a block weight ``W``: one batched product between two channel permutations.

    Its cost is that of a dense layer divided by the number of blocks. Inputs have shape ``(..., n)``, outputs
    ``(..., m)``, in the memory order of the input.

    Args:
        topology: which outputs see which inputs, shape ``(m, n)``.
        bias: whether to add one.
        copies: how often the topology has every input: the gates of a recurrent layer, each with sets of its own,
            stand on the diagonal of one ``(m, n * copies)`` topology, so that one call computes them all.
        seed: a generator for the orthogonal initial values.

    Raises:
        ValueError: if ``copies`` does not divide the topology.

    Example:
        >>> import torch
        >>> from sao_prune.topology import interleaved
        >>> layer = BlockLinear(interleaved(8, 12, 4))
        >>> layer(torch.ones(2, 5, 12)).shape, tuple(layer.blocks.shape), tuple(layer.weight.shape)
        (torch.Size([2, 5, 8]), (4, 2, 3), (8, 12))
    """

    in_features: int
    out_features: int
    execution = Execution()
    # Parts of the outputs that each have sets of inputs of their own; the topology then has the inputs once a part.
    copies = 1
    # Matrices that each block is of, one above the other, where they have the same sets of inputs.
    stacked = 1

    def __init__(
        self, topology: BlockTopology, bias: bool = True, *, copies: int = 1, seed: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.out_features, inputs = topology.shape
        if copies < 1 or inputs % copies or self.out_features % copies:
            raise ValueError(f"copies={copies} does not divide the topology's {self.out_features} x {inputs}")
        self.in_features, self.copies = inputs // copies, copies
        generator = seed or torch.Generator().manual_seed(torch.initial_seed() % 2**63)
        blocks = orthogonal_blocks([topology], [generator])[0]
        self.set_topology(topology, nn.Parameter(stack_blocks(topology, blocks)))
        self.register_parameter(
            "bias", nn.Parameter(self.blocks.detach().new_zeros(self.out_features)) if bias else None
        )

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """``(m, n)``."""
        return self.out_features, self.in_features

    @property
    def parts(self) -> int:
        """How often the topology has every input."""
        return self.copies

    def dense_forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """What the layer would compute with a dense weight, without its bias."""
        return F.linear(x, weight)

    def forward(self, input: Tensor) -> Tensor:
        """Shape ``(..., n)`` to ``(..., m)``."""
        x = input
        if self.absorbed is not None and not isinstance(x, Proxy) and self.absorbed.given(x, self):
            return x
        run = self.execution
        blocks = self.values()
        bias: Tensor | None = self._parameters.get("bias")
        bias = self.bias if bias is None else bias
        plain = is_plain(x)
        epilogue = self.epilogue if self.copies == 1 else None
        if epilogue is not None and epilogue.begin(x, plain):
            return epilogue.done(self._fused(x, blocks, bias, epilogue))
        if isinstance(x, Proxy):
            return run_linear(x, blocks, bias, *self.sets, run.backend)
        if run.dense and not plain:
            return F.linear(x, self.dense(blocks), bias)
        if self.copies > 1:
            x = torch.cat([x] * self.copies, -1)
        if plain:
            if is_batched(self.row_set) and blocks.dim() == 3:
                return functional.block_conv_by_sets(x, blocks, bias, self.row_set, self.col_set)
            return functional.block_linear(x, blocks, bias, self.captured_layout)
        return run_linear(x, blocks, bias, *self.sets, run.backend)

    def _fused(self, x: Tensor, blocks: Tensor, bias: Tensor | None, epilogue: Epilogue) -> Tensor:
        own, sets = (x, blocks, bias), self.sets
        y: Tensor
        if epilogue.is_stack:
            layers, behind = epilogue.stack()
            values = [(layer.values(), layer.bias) for layer in layers]
            return stacks.block_stack(x, values, [layer.sets for layer in layers], behind, self.execution.backend)
        norm, activation, then = epilogue.parts()
        if then is not None:
            second = then.values(), then.bias, *sets, *then.sets
            y = operators.block_mlp(*own, *second, activation, self.execution.backend)[0]
        elif norm is not None:
            y = normed(norm, own, sets, activation, self.execution.backend, ([], [], [], 1))
        else:
            y = operators.block_linear(*own, *sets, activation, self.execution.backend)[0]
        return y

    def extra_repr(self) -> str:
        """Shape, bias, blocks and execution."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"blocks={self.topology.groups}, execution={self.execution}"
        )
