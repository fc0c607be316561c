"""Run it fast: layers that hold and compute only their blocks, and the verbs that make them."""

from .backends.cpu import release_memory
from .backends.registry import Backend
from .backends.registry import register as register_backend
from .backends.registry import unregister as unregister_backend
from .convert import compact
from .modules import (
    BlockAttention,
    BlockConv1d,
    BlockConv2d,
    BlockConv3d,
    BlockConvTranspose1d,
    BlockConvTranspose2d,
    BlockConvTranspose3d,
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
from .revert import expand

__all__ = [
    "Backend",
    "BlockAttention",
    "BlockConv1d",
    "BlockConv2d",
    "BlockConv3d",
    "BlockConvTranspose1d",
    "BlockConvTranspose2d",
    "BlockConvTranspose3d",
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
    "register_backend",
    "release_memory",
    "unregister_backend",
]
