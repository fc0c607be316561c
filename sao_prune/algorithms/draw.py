"""What a method decided for one weight: which entries stay, and which values stand there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Literal

import torch
from torch import Tensor

from ..discovery import PrunableWeight
from ..topology import BlockTopology
from ..weights import Blocks, delta_

Values = Literal["kept", "drawn", "solved"]


@dataclass(frozen=True)
class Fidelity:
    """How much of what a trained weight did is left.

    Attributes:
        energy: share of the input-weighted energy of its entries on those that stay.
        error_kept: squared error of its output, relative to the variance of what it gives in the trained model, with
            those entries as they were; what layers before it lost counts too.
        error: the same with the values that it gets; ``None`` for both where no data reached it.
        rows: rows of inputs that tell, at most as many as the method takes.
        seconds: what it took.
    """

    energy: float
    error_kept: float | None
    error: float | None
    rows: int
    seconds: float

    def __str__(self) -> str:
        text = f"{self.energy:.0%} of the energy stays"
        if self.error_kept is not None and self.error is not None:
            text += f", output error {self.error_kept:.3f} -> {self.error:.3f}"
        return f"{text}, {self.seconds:.1f} s"


@dataclass(frozen=True)
class Draw:
    """The outcome for one weight, in the least memory that tells it.

    Attributes:
        weight: the weight it is for.
        topologies: one a part, where the support is made of blocks; else empty.
        blocks: values, one tuple a part with a tensor a bucket: ``(blocks, r, c)`` for the centre tap alone, or
            ``(blocks, r, c, taps)`` for every tap of the kernel. Empty keeps the weight's own values.
        units: for other supports, a boolean ``(parts, m, n)`` tensor; ``(parts, m, n, *kernel)`` where the taps of a
            kernel differ.
        matrices: values for other supports, ``(parts, m, n)`` for the centre tap alone or with every tap,
            ``(parts, m, n, *kernel)``; ``None`` keeps the weight's own.
        also: values for other parameters and buffers of the model, by their full names: a bias, say, or the
            statistics of a batch norm behind it.
        fidelity: how well values that came from a trained weight do its work.
        note: anything else worth knowing.
        solved: whether the values were computed from the weight's own and from data, not drawn.
    """

    weight: PrunableWeight
    topologies: tuple[BlockTopology, ...] = ()
    blocks: tuple[Blocks, ...] = ()
    units: Tensor | None = None
    matrices: Tensor | None = None
    also: Mapping[str, Tensor] = field(default_factory=dict)
    fidelity: Fidelity | None = None
    note: str = ""
    solved: bool = False

    @property
    def edges(self) -> int:
        """Matrix entries (kernels, for a convolution) that stay, over all parts."""
        if self.units is None:
            return sum(t.nnz for t in self.topologies)
        return int((self.units.flatten(3).any(3) if self.units.dim() > 3 else self.units).sum())

    @property
    def nnz(self) -> int:
        """Weights that stay, every tap of a kernel counted."""
        if self.units is not None and self.units.dim() > 3:
            return int(self.units.sum())
        return self.edges * prod(self.weight.kernel)

    @property
    def groups(self) -> int | None:
        """Blocks of each part; ``None`` where the support is not made of blocks."""
        return self.topologies[0].groups if self.topologies else None

    @property
    def keeps_values(self) -> bool:
        """Whether the weight's own values stay."""
        return not self.blocks and self.matrices is None

    @property
    def origin(self) -> Values:
        """Where the values come from: kept, drawn or solved."""
        return "kept" if self.keeps_values else "solved" if self.solved else "drawn"

    def mask(self, like: Tensor) -> Tensor:
        """A fresh mask of the shape, dtype and device of ``like``, the weight itself."""
        mask = torch.zeros_like(like, requires_grad=False)
        for part, target in enumerate(self.weight.matrices(mask)):
            if self.units is not None:
                unit = self.units[part].to(target)
                unit = unit.reshape(*unit.shape, *(1,) * (target.dim() - unit.dim()))
                target.copy_(unit.expand_as(target))
            else:
                _write(target, self.topologies[part], None)
        return mask

    @torch.no_grad()
    def write_(self, weight: Tensor) -> None:
        """Put the values into the weight, in place; leaves it as it is where the draw keeps values."""
        for part, target in enumerate(self.weight.matrices(weight)):
            if self.blocks:
                _write(target, self.topologies[part], self.blocks[part])
            elif self.matrices is not None:
                values = self.matrices[part]
                if values.dim() == target.dim():
                    target.copy_(values)
                else:
                    delta_(target, values)


def _write(target: Tensor, topology: BlockTopology, blocks: Blocks | None) -> None:
    """Write block values into ``(m, n, *kernel)``; ``None`` writes ones at every tap of an already zeroed target."""
    if target.dim() == 2 and target.is_contiguous():
        if blocks is not None:
            topology.scatter(blocks, out=target)
            return
        flat = target.view(-1)
        for index in topology.flat_index:
            flat[index.to(flat.device)] = 1
    elif blocks is None:
        target.copy_(topology.mask(target.dtype, target.device).view(*topology.shape, *(1,) * (target.dim() - 2)))
    elif blocks[0].dim() == 3:
        delta_(target, topology.scatter(blocks))
    else:
        full = blocks[0].new_zeros(topology.shape[0] * topology.shape[1], blocks[0].shape[-1])
        for index, values in zip(topology.flat_index, blocks):
            full[index] = values.flatten(0, 2)
        target.copy_(full.view(target.shape))
