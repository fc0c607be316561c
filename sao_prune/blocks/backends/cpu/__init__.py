"""Kernels for small blocks, compiled by the machine's own C compiler where it has one; never needed, only faster."""

from __future__ import annotations

from .build import SWITCH, cache_folder, is_switched_off, library, processor, version, why_unavailable
from .launch import is_there, ready
from .linear import backward, forward, suits
from .memory import release_memory
from .mlp import mlp_backward, mlp_forward
from .norm import affine, conv_norm_backward, conv_norm_forward, conv_normed, norm_backward, norm_forward
from .pool import pool_backward, pool_forward
from .stack import stack_backward, stack_forward, stack_suits

__all__ = [
    "SWITCH",
    "affine",
    "backward",
    "cache_folder",
    "conv_norm_backward",
    "conv_norm_forward",
    "conv_normed",
    "forward",
    "is_switched_off",
    "is_there",
    "library",
    "mlp_backward",
    "mlp_forward",
    "norm_backward",
    "norm_forward",
    "pool_backward",
    "pool_forward",
    "processor",
    "ready",
    "release_memory",
    "stack_backward",
    "stack_forward",
    "stack_suits",
    "suits",
    "version",
    "why_unavailable",
]
