"""Run it fast: layers that hold and compute only their blocks, and the verbs that make them."""

from .backends.cpu import release_memory
from .convert import compact
from .expand import expand
from .modules import BlockConv1d, BlockConv2d, BlockConv3d, BlockLinear, BlockModule, Execution
from .plan import Plan
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
    "Plan",
    "compact",
    "expand",
    "release_memory",
]
