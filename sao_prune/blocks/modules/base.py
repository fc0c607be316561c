"""What all block layers share: blocks as the parameter, the topology as two small buffers, the dense view."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from ..._torch import BatchNorm, forward_level, is_wrapped, tracing_state, transforms_active
from ..._torch import is_batched as holds_several
from ..._torch import unwrapped as inner
from ...discovery import Packed
from ...topology import BlockTopology, decode_sets, encode_sets, unwrapped
from .. import operators
from ..epilogue import Epilogue
from ..flops import register_flops
from ..layout import Layout, layout_of, layout_of_topology
from .computed import computed, refusal


@dataclass(frozen=True)
class Execution:
    """How a block layer runs.

    Attributes:
        dense: as an ordinary layer, its weight filled up with zeros.
        merge: neighbouring blocks put into one wider matrix, zeros between them; of convolutions by torch.
        channels_last: memory format of a convolution.
        native: by the kernels of `sao_prune.blocks.backends.cpu`; where those cannot be had, or cannot take an input,
            as if this were not set.
    """

    dense: bool = False
    merge: int = 1
    channels_last: bool = False
    native: bool = False

    def __str__(self) -> str:
        if self.dense:
            return "dense"
        merged = f", {self.merge} merged" if self.merge > 1 else ""
        return f"blocks{merged}{', channels last' if self.channels_last else ''}{', native' if self.native else ''}"

    @property
    def backend(self) -> str:
        """What the operators call it."""
        return "cpu" if self.native else ""


def joined_topology(parts: Sequence[BlockTopology]) -> BlockTopology:
    """One topology for matrices that stand on a diagonal, as the groups of a grouped convolution do.

    Example:
        >>> from sao_prune.topology import interleaved
        >>> joined_topology([interleaved(4, 4, 2), interleaved(4, 4, 2)])
        BlockTopology(8 x 8, groups=4, sparsity=75.0000%)
    """
    rows, cols, first = [], [], 0
    for part in parts:
        rows.append(torch.where(part.row_set < 0, -1, part.row_set + first))
        cols.append(torch.where(part.col_set < 0, -1, part.col_set + first))
        first += part.groups
    return BlockTopology(torch.cat(rows), torch.cat(cols))


def block_slots(topology: BlockTopology, parts: int = 1) -> Tensor:
    """Positions of all block values in the flattened ``(m, n / parts)`` weight, bucket after bucket."""
    rows, cols = topology.shape
    width = cols // parts
    slots = [
        (b.rows[:, :, None] * width + b.cols[:, None, :] - b.rows[:, :1, None] * parts // rows * width).flatten()
        for b in topology.buckets
    ]
    return torch.cat(slots)


_STORED = (nn.Parameter, Tensor)


def is_plain(x: Any) -> bool:
    """Whether a layer has to run as ordinary operations: exported, traced, under functorch or forward-mode AD."""
    return (
        isinstance(x, Proxy)
        or _is_exporting()
        or (
            not torch.compiler.is_compiling()
            and (tracing_state() is not None or transforms_active() or forward_level() >= 0)
        )
    )


_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)


class BlockModule(Packed):
    """Base of `BlockLinear` and the block convolutions.

    The parameter ``blocks`` has shape ``(g, m/g, n/g, *kernel)``; where the blocks are of several shapes,
    ``(edges, 1, *kernel)``, bucket after bucket as in `BlockTopology.buckets`. The buffers ``row_set`` and ``col_set``
    are the topology (`encode_sets`), so that a state dict holds everything; the layer follows what they hold, whoever
    put it there.
    """

    blocks: nn.Parameter
    bias: nn.Parameter | None
    row_set: Tensor
    col_set: Tensor
    execution: Execution
    # Last known; what the buffers hold is what counts wherever they can be read.
    _layout: Layout

    # Whether there are native kernels for such layers.
    has_kernels: ClassVar[bool] = True

    # What joins this layer's kernel, if it owns something; what this layer joined, if it did. See `fusion`.
    epilogue: Epilogue | None = None
    absorbed: Epilogue | None = None

    def set_topology(self, topology: BlockTopology, blocks: nn.Parameter) -> None:
        """Register the blocks and the topology's buffers."""
        register_flops()
        for name, sets in (("row_set", topology.row_set), ("col_set", topology.col_set)):
            self.register_buffer(name, encode_sets(sets).to(blocks.device))
        self.register_parameter("blocks", blocks)
        self.__dict__["_layout"] = layout_of_topology(topology, self.execution.merge).to(blocks.device)

    @property
    def topology(self) -> BlockTopology:
        """Which outputs see which inputs; for a grouped convolution over all its channels."""
        return self.layout.topology

    @property
    def layout(self) -> Layout:
        """How the blocks are laid out for execution, by what the buffers hold; while traced as last known."""
        rows, cols = self.row_set, self.col_set
        if type(rows) is not Tensor or rows.is_meta or torch.compiler.is_compiling():
            return self._layout
        layout = layout_of(unwrapped(rows), unwrapped(cols), self.execution.merge)
        if layout is not self._layout:
            self.__dict__["_layout"] = layout
        return layout

    @property
    def captured_layout(self) -> Layout:
        """The layout for ordinary operations; a program that is captured knows these sets only, and checks it."""
        layout = self.layout
        captured = torch.compiler.is_compiling() or tracing_state() is not None
        if captured and not torch.onnx.is_in_onnx_export():
            layout.check_captured(self.row_set, self.col_set)
        return layout

    def run_as(self, execution: Execution) -> None:
        """Change how the layer runs; its values stay."""
        topology = self._layout.topology
        layout = layout_of_topology(topology, execution.merge).to(self._layout.inputs.index.device)
        self.__dict__.update(execution=execution, _layout=layout)

    @property
    def sets(self) -> tuple[Tensor, Tensor]:
        """The two buffers."""
        rows, cols = self._buffers.get("row_set"), self._buffers.get("col_set")
        return (self.row_set, self.col_set) if rows is None or cols is None else (rows, cols)

    def values(self) -> Tensor:
        """The blocks that the layer computes with."""
        return self.stored()

    def stored(self) -> Tensor:
        """The parameter; what another library has quantized, in floating point again."""
        # Found without `nn.Module.__getattr__`, which takes as long as a small operation; not so once parametrized.
        blocks: Any = self._parameters.get("blocks")
        blocks = self.blocks if blocks is None else blocks
        if type(blocks) in _STORED or isinstance(blocks, Proxy):
            return blocks  # type: ignore[no-any-return]
        if not isinstance(blocks, Tensor) or type(blocks).dequantize is Tensor.dequantize:
            return blocks
        return blocks.dequantize()  # type: ignore[no-any-return]

    @property
    def weight(self) -> Tensor:
        """The dense weight, zeros included; computed anew each time, differentiable, not a parameter.

        Raises:
            RuntimeError: once somebody writes to it.
        """
        return computed(self.dense(self.stored()), type(self).__name__)

    def dense(self, blocks: Tensor) -> Tensor:
        """Values shaped as the blocks in a dense weight, zeros elsewhere."""
        shape = self.weight_shape
        slots = block_slots(self.captured_layout.topology, self.parts).to(blocks.device)
        values = blocks.reshape(-1, *shape[2:])
        zeros = values.new_zeros(shape[0] * shape[1], *shape[2:])
        if transforms_active():
            return zeros.index_copy(0, slots, values).view(shape)
        return zeros.index_copy_(0, slots, values).view(shape)

    def dense_forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """What the layer would compute with a dense weight, without its bias."""
        raise NotImplementedError

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the dense weight."""
        raise NotImplementedError

    @property
    def parts(self) -> int:
        """Groups of the dense layer."""
        return 1

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As of any module.

        Raises:
            AttributeError: for ``weight``, which is no parameter.
        """
        if name == "weight":
            raise AttributeError(refusal(type(self).__name__))
        super().register_parameter(name, param)

    def extra_repr(self) -> str:
        """The dense layer's own line, and the blocks."""
        dense: str = super().extra_repr()
        return f"{dense}, blocks={self.topology.groups}, execution={self.execution}"

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        def flat(t: Tensor) -> Tensor:
            # Blocks of convolutions have as many dimensions as images, but no memory format.
            return fn(t.reshape(len(t), -1)).view(t.shape) if t.dim() in (4, 5) else fn(t)

        return super()._apply(flat, recurse)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, metadata: Any, *args: Any) -> None:
        names = f"{prefix}row_set", f"{prefix}col_set"
        if all(name in state_dict for name in names):
            # Anew, so that sets of an average or of an earlier format are stored exactly, in the type that they need.
            sets = [encode_sets(decode_sets(state_dict[name])) for name in names]
            if [len(s) for s in sets] == [len(self.row_set), len(self.col_set)]:
                state_dict = {**state_dict, **dict(zip(names, sets))}
                device = self.row_set.device if not self.row_set.is_meta else torch.device("cpu")
                for name, new in zip(("row_set", "col_set"), sets):
                    if self._buffers[name].dtype != new.dtype or self.row_set.is_meta:  # type: ignore[union-attr]
                        self._buffers[name] = torch.empty_like(new, device=device)
        super()._load_from_state_dict(state_dict, prefix, metadata, *args)
        _ = self.layout


def is_batched(t: Tensor) -> bool:
    """Whether `torch.vmap` runs over several of these tensors, so that no single one can be read."""
    if not transforms_active():
        return False
    while is_wrapped(t):
        if holds_several(t):
            return True
        t = inner(t)
    return False


def stack_blocks(topology: BlockTopology, values: Sequence[Tensor]) -> Tensor:
    """The ``blocks`` parameter's tensor from one ``(blocks, r, c, *kernel)`` tensor a bucket.

    Raises:
        ValueError: if the topology has no block.
    """
    if not values:
        raise ValueError(f"{topology} has no block for a layer to hold")
    if len(values) == 1:
        return values[0]
    return torch.cat([v.flatten(0, 2).unsqueeze(1) for v in values])


def blocks_shape(topology: BlockTopology, kernel: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the ``blocks`` parameter."""
    if len(topology.buckets) == 1:
        return *topology.buckets[0].shape, *kernel
    return topology.nnz, 1, *kernel


def cast(x: Tensor, blocks: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operands in the type of autocast, where that is on."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return x, blocks, bias
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), blocks.to(dtype), None if bias is None else bias.to(dtype)


def normed(
    norm: BatchNorm,
    own: tuple[Any, ...],
    sets: tuple[Tensor, Tensor],
    activation: str,
    backend: str,
    options: tuple[Any, ...],
) -> Tensor:
    """A layer, its batch norm and activation; the norm's running averages are updated as torch does."""
    training = norm.training
    averages = (None, None) if training else (norm.running_mean, norm.running_var)
    inputs = *own, norm.weight, norm.bias
    y, _, mean, variance = operators.block_conv_norm(*inputs, *sets, *averages, activation, backend, norm.eps, *options)
    if training:
        track(norm, y, mean, variance)
    return y  # type: ignore[no-any-return]


def track(norm: BatchNorm, y: Tensor, mean: Tensor, variance: Tensor) -> None:
    """Update a norm's running averages with mean and biased variance of a batch, as torch does.

    Raises:
        ValueError: if the result has one value a channel, which has no variance.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    values = y.numel() // y.shape[1]
    if values < 2:
        raise ValueError(f"expected more than 1 value per channel when training, got a result of {tuple(y.shape)}")
    momentum: Any = norm.momentum
    with torch.no_grad():
        norm.running_mean.lerp_(mean, momentum)
        norm.running_var.lerp_(variance * (values / (values - 1)), momentum)
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
