"""Looks-linear (mirrored) weights: ReLU networks that are orthogonal linear maps at initialisation.

``relu(h) - relu(-h) = h``, so a layer that emits ``[h, -h]`` followed by ReLU loses nothing (thesis
section 3.4.3). The first mirrored layer takes plain inputs, the layer after the last ReLU gives plain outputs.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

from ..topology import BlockTopology


class Mirror(Enum):
    """Where a layer stands in a chain of mirrored ReLU layers; the value says which sides are doubled."""

    ENTRY = (True, False)
    INNER = (True, True)
    EXIT = (False, True)

    @property
    def rows(self) -> bool:
        """Whether the outputs come in pairs ``h, -h``."""
        return self.value[0]

    @property
    def cols(self) -> bool:
        """Whether the inputs come in pairs ``relu(h), relu(-h)``."""
        return self.value[1]

    def half(self, rows: int, cols: int) -> tuple[int, int]:
        """The shape of the matrix that is mirrored into ``rows x cols``.

        Raises:
            ValueError: if a side that is doubled is odd.
        """
        for doubled, size, side in ((self.rows, rows, "outputs"), (self.cols, cols, "inputs")):
            if doubled and size % 2:
                raise ValueError(f"mirrored weights pair the {side} up, but there are {size}, an odd number")
        return rows // 2 if self.rows else rows, cols // 2 if self.cols else cols


def mirror_topology(half: BlockTopology, mirror: Mirror) -> BlockTopology:
    """The topology of the mirrored matrix: both copies of a node are in the node's set.

    Args:
        half: of the matrix that is mirrored.
        mirror: which sides are doubled.

    Returns:
        The `BlockTopology`, twice as large along every doubled side.

    Example:
        >>> half = BlockTopology(torch.tensor([0, 1]), torch.tensor([0, 1]))
        >>> mirror_topology(half, Mirror.ENTRY).row_set.tolist()
        [0, 1, 0, 1]
    """
    return BlockTopology(
        half.row_set.repeat(2) if mirror.rows else half.row_set,
        half.col_set.repeat(2) if mirror.cols else half.col_set,
    )


def mirror_blocks(blocks: tuple[Tensor, ...], mirror: Mirror) -> tuple[Tensor, ...]:
    """The block values of the mirrored matrix: ``B`` becomes ``[B, -B]`` along every doubled side.

    Args:
        blocks: values, one ``(blocks, r, c)`` tensor a bucket; further dimensions are kept.
        mirror: which sides are doubled.

    Returns:
        As many tensors, twice as large along every doubled side.

    Example:
        >>> mirror_blocks((torch.ones(1, 1, 1),), Mirror.INNER)[0].tolist()
        [[[1.0, -1.0], [-1.0, 1.0]]]
    """
    for dim in [d for d, doubled in ((1, mirror.rows), (2, mirror.cols)) if doubled]:
        blocks = tuple(torch.cat([b, -b], dim) for b in blocks)
    return blocks
