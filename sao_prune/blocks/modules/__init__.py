"""Layers that hold and compute only their blocks."""

from .base import BlockModule, Execution, block_slots, blocks_shape, joined_topology, stack_blocks
from .conv import BlockConv, BlockConv1d, BlockConv2d, BlockConv3d
from .linear import BlockLinear

__all__ = [
    "BlockConv",
    "BlockConv1d",
    "BlockConv2d",
    "BlockConv3d",
    "BlockLinear",
    "BlockModule",
    "Execution",
    "block_slots",
    "blocks_shape",
    "joined_topology",
    "stack_blocks",
]
