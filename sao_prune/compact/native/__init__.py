"""Kernels for small blocks, compiled by the machine's own C compiler where it has one; never needed, only faster."""

from __future__ import annotations

from .build import library
from .ops import native_conv, native_matmul, native_plane_matmul, ready, suits_conv

__all__ = ["library", "native_conv", "native_matmul", "native_plane_matmul", "ready", "suits_conv"]
