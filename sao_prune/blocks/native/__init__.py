"""Kernels for small blocks, compiled by the machine's own C compiler where it has one; never needed, only faster."""

from __future__ import annotations

from .after import After, Norm
from .build import SWITCH, library
from .launch import ready
from .memory import release_memory
from .ops import NOTHING, native_conv, native_matmul, native_plane_matmul, suits_conv
from .pair import Half, native_pair, suit_pair

__all__ = [
    "NOTHING",
    "SWITCH",
    "After",
    "Half",
    "Norm",
    "library",
    "native_conv",
    "native_matmul",
    "native_pair",
    "native_plane_matmul",
    "ready",
    "release_memory",
    "suit_pair",
    "suits_conv",
]
