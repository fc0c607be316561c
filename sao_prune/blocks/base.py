"""What all block layers share: blocks as the parameter, the topology as two small buffers, the dense view."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..topology import BlockTopology
from .deferred import is_watched
from .order import Order, is_plain
from .packing import Packing, fill, pack_topology


@dataclass(frozen=True)
class Execution:
    """How a block layer runs.

    Attributes:
        dense: as an ordinary layer, its weight filled up with zeros.
        merge: neighbouring blocks put into one wider matrix, zeros between them.
        channels_last: memory format of a convolution.
        native: by the kernels of `sao_prune.blocks.native`; where those cannot be had, or cannot take an input, as
            if this were not set.
        fused: what follows the layer, to be computed by its native kernel: ``"batch_norm"`` or an activation or both;
            after an activation also ``"linear"``, the block layer that reads it.
    """

    dense: bool = False
    merge: int = 1
    channels_last: bool = False
    native: bool = False
    fused: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.dense:
            return "dense"
        merged = f", {self.merge} merged" if self.merge > 1 else ""
        native = "".join(f" + {name}" for name in self.fused)
        native = f", native{native}" if self.native else ""
        return f"blocks{merged}{', channels last' if self.channels_last else ''}{native}"


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


class BlockModule(nn.Module):
    """Base of `BlockLinear` and the block convolutions.

    The parameter ``blocks`` has shape ``(g, m/g, n/g, *kernel)``; where the blocks are of several shapes,
    ``(edges, 1, *kernel)``, bucket after bucket as in `BlockTopology.buckets`. The buffers ``row_set`` and ``col_set``
    are the topology, so that a state dict holds everything.
    """

    # For the rooms to the left, which cannot import this class.
    is_block_layer: ClassVar[bool] = True

    blocks: nn.Parameter
    bias: nn.Parameter | None
    row_set: Tensor
    col_set: Tensor
    execution: Execution
    # An input order in place of the topology's own, and whether a reader takes care of the output order.
    folded: tuple[Order | None, bool] = (None, False)
    # The modules whose hooks would see results between the steps that the execution fuses; not children of this one.
    followers: tuple[nn.Module, ...] = ()
    # Set by `set_topology`, so that a layer converted in place need not run a constructor.
    _topology: BlockTopology | None
    _packing: Packing | None

    def set_topology(self, topology: BlockTopology, blocks: nn.Parameter) -> None:
        """Register the blocks and the topology's buffers."""
        dtype = torch.uint8 if topology.groups < 255 else torch.int32
        empty = torch.iinfo(dtype).max
        for name, sets in (("row_set", topology.row_set), ("col_set", topology.col_set)):
            small = torch.where(sets < 0, empty, sets).to(dtype)
            self.register_buffer(name, small.to(blocks.device))
        self.register_parameter("blocks", blocks)
        self.__dict__.update(_topology=topology, _packing=None)

    @property
    def topology(self) -> BlockTopology:
        """Which outputs see which inputs; for a grouped convolution over all its channels."""
        if self._topology is None:
            empty = torch.iinfo(self.row_set.dtype).max
            sets = [torch.where(s == empty, -1, s.long()) for s in (self.row_set.cpu(), self.col_set.cpu())]
            self.__dict__["_topology"] = BlockTopology(*sets)
        assert self._topology is not None
        return self._topology

    @property
    def packing(self) -> Packing:
        """How the blocks are laid out for execution."""
        if self._packing is None:
            # Plain index arithmetic, whatever function transform the layer is first called under.
            with torch._C._DisableFuncTorch():
                packing = pack_topology(self.topology, self.execution.merge)
            inputs, raw = self.folded
            packing = replace(packing, inputs=inputs or packing.inputs, raw=raw)
            self.__dict__["_packing"] = packing.to(self.blocks.device)
        assert self._packing is not None
        return self._packing

    def run_as(self, execution: Execution) -> None:
        """Change how the layer runs; its values stay.

        Raises:
            ValueError: if a neighbour relies on the layer's present order of channels.
        """
        if self.folded != (None, False):
            raise ValueError("this layer's channel order is folded into a neighbour's: expand and compact the model")
        self.__dict__.update(execution=execution, _packing=None)

    def fused(self) -> tuple[str, ...]:
        """What is to be computed along with this layer now: nothing while somebody watches what comes out of it."""
        names = self.execution.fused
        return names if names and not is_watched((self, *self.followers)) else ()

    def fold(self, inputs: Order | None = None, raw: bool = False) -> None:
        """Read channels in another order than the topology's (``None``), or leave outputs in the blocks' order."""
        self.__dict__.update(folded=(inputs, raw), _packing=None)

    @property
    def weight(self) -> Tensor:
        """The dense weight, zeros included; computed anew each time, differentiable, not a parameter."""
        shape = self.weight_shape
        slots = block_slots(self.topology, self.parts).to(self.blocks.device)
        values = self.blocks.reshape(-1, *shape[2:])
        return fill(values, slots, shape[0] * shape[1], shape[2:], is_plain()).view(shape)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the dense weight."""
        raise NotImplementedError

    @property
    def parts(self) -> int:
        """Groups of the dense layer."""
        return 1

    def packed_weight(self) -> Tensor:
        """The matrices of the packing, shape ``(groups, rows, cols, *kernel)``."""
        packing, blocks = self.packing, self.blocks
        kernel = self.weight_shape[2:]
        shape = packing.groups, packing.rows, packing.cols, *kernel
        if packing.slots is None:
            return blocks.view(shape)
        return fill(blocks.reshape(-1, *kernel), packing.slots, packing.size, kernel, is_plain()).view(shape)

    def extra_repr(self) -> str:
        """The dense layer's own line, and the blocks."""
        dense: str = super().extra_repr()
        return f"{dense}, blocks={self.topology.groups}, execution={self.execution}"

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        if self._packing is not None and not self.blocks.is_meta:
            self.__dict__["_packing"] = self._packing.to(self.blocks.device)
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        own = {"row_set": self.row_set, "col_set": self.col_set}
        new = {name: state_dict.get(f"{prefix}{name}", sets) for name, sets in own.items()}
        same = all(torch.equal(new[name].cpu(), sets.cpu()) for name, sets in own.items())
        if not same and self.folded != (None, False):
            args[-1].append(f"{prefix}row_set: not the topology that neighbours rely on; use sao_prune.load")
            return
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if not same:
            self.__dict__.update(_topology=None, _packing=None)


def stack_blocks(topology: BlockTopology, values: Sequence[Tensor]) -> Tensor:
    """The ``blocks`` parameter's tensor from one ``(blocks, r, c, *kernel)`` tensor a bucket."""
    if len(values) == 1:
        return values[0]
    return torch.cat([v.flatten(0, 2).unsqueeze(1) for v in values])


def blocks_shape(topology: BlockTopology, kernel: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the ``blocks`` parameter."""
    if len(topology.buckets) == 1:
        return *topology.buckets[0].shape, *kernel
    return topology.nnz, 1, *kernel
