"""Layers that hold and compute only their blocks."""

from .attention import BlockAttention
from .base import BlockModule, Execution, block_slots, blocks_shape, joined_topology, stack_blocks
from .composite import BlockComposite, Matrix, child_name
from .conv import BlockConv, BlockConv1d, BlockConv2d, BlockConv3d, BlockConvNd
from .conv_transpose import (
    BlockConvTranspose,
    BlockConvTranspose1d,
    BlockConvTranspose2d,
    BlockConvTranspose3d,
    turned,
)
from .experts import BlockExperts
from .linear import BlockLinear
from .normed import NORMED, NormedConv2d
from .pooled import NativeMaxPool2d
from .recurrent import (
    BlockCell,
    BlockGRU,
    BlockGRUCell,
    BlockLSTM,
    BlockLSTMCell,
    BlockRNN,
    BlockRNNBase,
    BlockRNNCell,
)
from .standardised import BlockStdConv2d

__all__ = [
    "NORMED",
    "BlockAttention",
    "BlockCell",
    "BlockComposite",
    "BlockConv",
    "BlockConv1d",
    "BlockConv2d",
    "BlockConv3d",
    "BlockConvNd",
    "BlockConvTranspose",
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
    "BlockRNNBase",
    "BlockRNNCell",
    "BlockStdConv2d",
    "Execution",
    "Matrix",
    "NativeMaxPool2d",
    "NormedConv2d",
    "block_slots",
    "blocks_shape",
    "child_name",
    "joined_topology",
    "stack_blocks",
    "turned",
]
