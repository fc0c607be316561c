"""Kernels for small blocks, compiled by the machine's own C compiler where it has one; never needed, only faster."""

from __future__ import annotations

from .build import SWITCH, cache_folder, is_switched_off, library, processor, why_unavailable
from .launch import is_there, ready
from .linear import conv_backward, conv_forward, linear_backward, linear_forward, suits_conv
from .memory import release_memory
from .mlp import mlp_backward, mlp_forward
from .norm import affine, conv_norm_backward, conv_norm_forward

__all__ = [
    "SWITCH",
    "affine",
    "cache_folder",
    "conv_backward",
    "conv_forward",
    "conv_norm_backward",
    "conv_norm_forward",
    "is_switched_off",
    "is_there",
    "library",
    "linear_backward",
    "linear_forward",
    "mlp_backward",
    "mlp_forward",
    "processor",
    "ready",
    "release_memory",
    "suits_conv",
    "why_unavailable",
]
