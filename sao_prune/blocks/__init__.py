"""Run it fast: layers that hold and compute only their blocks, and the verbs that make them."""

from .base import BlockModule, Execution
from .conv import BlockConv1d, BlockConv2d, BlockConv3d
from .convert import compact, expand
from .linear import BlockLinear
from .native import release_memory
from .report import CompactRecord, CompactReport

__all__ = [
    "BlockConv1d",
    "BlockConv2d",
    "BlockConv3d",
    "BlockLinear",
    "BlockModule",
    "CompactRecord",
    "CompactReport",
    "Execution",
    "compact",
    "expand",
    "release_memory",
]
