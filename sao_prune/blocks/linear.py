"""A linear layer that holds and computes only its blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional as F

from ..topology import BlockTopology
from ..weights import orthogonal_blocks
from .base import BlockModule, Execution, stack_blocks
from .deferred import Deferred, strides_of
from .matmul import block_matmul, plain_block_matmul, plane_matmul
from .native import NOTHING, After, Half, native_matmul, native_pair, native_plane_matmul, ready, suit_pair
from .order import is_features_first, is_plain


class BlockLinear(BlockModule):
    """``y = x W^T + b`` for a block weight ``W``: one batched product between two channel orders.

    Its cost is that of a dense layer divided by the number of blocks. Inputs have shape ``(..., n)``, outputs
    ``(..., m)``. The result follows the input's memory order unless ``features_first`` says otherwise.

    Args:
        topology: which outputs see which inputs, shape ``(m, n)``.
        bias: whether to add one.
        seed: a generator for the orthogonal initial values.

    Example:
        >>> import torch
        >>> from sao_prune.topology import interleaved
        >>> layer = BlockLinear(interleaved(8, 12, 4))
        >>> layer(torch.ones(2, 5, 12)).shape, tuple(layer.blocks.shape), tuple(layer.weight.shape)
        (torch.Size([2, 5, 8]), (4, 2, 3), (8, 12))
    """

    in_features: int
    out_features: int
    features_first: bool | None = None
    execution = Execution()

    def __init__(self, topology: BlockTopology, bias: bool = True, *, seed: torch.Generator | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = topology.shape
        generator = seed or torch.Generator().manual_seed(torch.initial_seed() % 2**63)
        blocks = orthogonal_blocks([topology], [generator])[0]
        self.set_topology(topology, nn.Parameter(stack_blocks(topology, blocks)))
        self.register_parameter("bias", nn.Parameter(torch.zeros(self.out_features)) if bias else None)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """``(m, n)``."""
        return self.out_features, self.in_features

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``(..., n)`` to ``(..., m)``."""
        if type(x) is Deferred:
            y = self._paired(x)
            if y is not None:
                return y
            x = x.value()
        if self.execution.dense:
            return F.linear(x, self.weight, self.bias)
        if not isinstance(x, Proxy) and x.shape[-1] != self.in_features:
            raise RuntimeError(f"expected inputs of shape (..., {self.in_features}), got {tuple(x.shape)}")
        weight, bias = self._matrices()
        packing = self._packing or self.packing
        if is_plain() or isinstance(x, Proxy):
            return plain_block_matmul(x, weight, bias, packing)
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        if self.execution.native and ready(x, weight, bias):
            return self._native(x, weight, bias)
        if x.dim() == 2:
            return block_matmul(x, weight, bias, packing, self.features_first)
        if self._transposed(x):
            y = plane_matmul(x.mT.flatten(0, -3), weight, bias, packing)
            return y.view(*x.shape[:-2], self.out_features, x.shape[-2]).mT
        flat = block_matmul(x.reshape(-1, x.shape[-1]), weight, bias, packing, self.features_first)
        return flat.view(*x.shape[:-1], self.out_features)

    def _matrices(self) -> tuple[Tensor, Tensor | None]:
        parameters = self._parameters
        weight: Tensor | None = parameters.get("blocks")
        if weight is None:  # parametrized: computed from other parameters
            weight = self.blocks
        if (self._packing or self.packing).slots is not None or weight.dim() != 3:
            weight = self.packed_weight()
        return weight, parameters["bias"]

    def _paired(self, hidden: Deferred) -> Tensor | None:
        """The result together with that of the layer that ``hidden`` has yet to come from, if a kernel can do both."""
        if not self.execution.native or is_plain() or torch.is_autocast_enabled("cpu") or self.fused():
            return None
        found = hidden.origin()
        if found is None:
            return None
        (x, first, planes), act = found
        second = Half(*self._matrices(), self.packing)
        flat = x.mT.flatten(0, -3) if planes else x.reshape(-1, x.shape[-1]).contiguous()
        if not suit_pair(flat, first, second):
            return None
        y = native_pair(flat, first, second, act, planes)
        hidden.taken()
        if planes:
            return y.view(*x.shape[:-2], self.out_features, x.shape[-2]).mT
        return y.view(*x.shape[:-1], self.out_features)

    def _transposed(self, x: Tensor) -> bool:
        """Whether tokens lie as ``(batch, n, length)``."""
        return x.stride(-1) != 1 and x.stride(-2) == 1 and x.mT.is_contiguous()

    def _native(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        packing, dims = self.packing, x.dim()
        transposed = dims > 2 and self._transposed(x)
        columns = transposed
        if dims == 2:
            columns = is_features_first(x) if self.features_first is None else self.features_first

        def compute(after: After) -> Tensor:
            if dims == 2:
                return native_matmul(x, weight, bias, packing, self.features_first, after)
            if transposed:
                y = native_plane_matmul(x.mT.flatten(0, -3), weight, bias, packing, after)
                return y.view(*x.shape[:-2], self.out_features, x.shape[-2]).mT
            flat = native_matmul(x.reshape(-1, x.shape[-1]), weight, bias, packing, self.features_first, after)
            return flat.view(*x.shape[:-1], self.out_features)

        fused = self.fused()
        if not fused:
            return compute(NOTHING)
        shape = *x.shape[:-1], self.out_features
        strides = strides_of(shape, dims - 2 if columns else dims - 1)
        sources = (x, weight) if bias is None else (x, weight, bias)
        # Columns of a batch, if not of tokens, are a product's best operand as they lie.
        origin = (x, Half(weight, bias, packing), transposed) if transposed or not columns else None
        return Deferred.of(compute, fused, shape, strides, sources, 0 if packing.raw else dims - 1, origin)

    def extra_repr(self) -> str:
        """Shape, bias, blocks and execution."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"blocks={self.topology.groups}, execution={self.execution}"
        )
