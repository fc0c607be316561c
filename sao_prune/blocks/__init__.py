"""Run it fast: layers that hold and compute only their blocks, and the verbs that make them."""

from .backends.cpu import release_memory
from .convert import compact
from .expand import expand
from .modules import (
    BlockAttention,
    BlockConv1d,
    BlockConv2d,
    BlockConv3d,
    BlockExperts,
    BlockGRU,
    BlockGRUCell,
    BlockLinear,
    BlockLSTM,
    BlockLSTMCell,
    BlockModule,
    BlockRNN,
    BlockRNNCell,
    BlockStdConv2d,
    Execution,
)
from .plan import Plan
from .report import CompactRecord, CompactReport

__all__ = [
    "BlockAttention",
    "BlockConv1d",
    "BlockConv2d",
    "BlockConv3d",
    "BlockExperts",
    "BlockGRU",
    "BlockGRUCell",
    "BlockLSTM",
    "BlockLSTMCell",
    "BlockLinear",
    "BlockModule",
    "BlockRNN",
    "BlockRNNCell",
    "BlockStdConv2d",
    "CompactRecord",
    "CompactReport",
    "Execution",
    "Plan",
    "compact",
    "expand",
    "release_memory",
]
