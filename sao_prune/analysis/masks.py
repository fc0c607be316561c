"""What the instruments accept as a mask, and the checks they share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..topology import BlockTopology, NotBlockStructuredError

if TYPE_CHECKING:
    import scipy.sparse

MaskLike = Tensor | BlockTopology

_GIB = 2**30
#: The most memory, in bytes, that an exact spectrum may take before it is refused.
MEMORY_LIMIT = 4 * _GIB


class SpectrumTooLargeError(ValueError):
    """An exact spectrum that would not fit in memory; the message says how much it needs and what to do instead."""


def _check_mask(mask: Tensor) -> Tensor:
    """A mask as a boolean CPU matrix ``(outputs, inputs)``; kernels ``(m, n, *kernel)`` count as one edge each.

    Raises:
        ValueError: for fewer than two dimensions, no entries, values other than 0 and 1, or kernels that are partly
            kept.
    """
    if mask.dim() < 2 or mask.numel() == 0:
        raise ValueError(
            "a mask is a non-empty matrix (outputs, inputs) or (outputs, inputs, *kernel), "
            f"got shape {tuple(mask.shape)}"
        )
    edges = (mask != 0).cpu()
    if not torch.equal(edges.to(mask.dtype), mask.detach().cpu()):
        raise ValueError("a mask holds only zeros and ones; got other values (a weight? pass `weight != 0`)")
    if edges.dim() > 2:
        flat = edges.flatten(2)
        if not torch.equal(flat.any(2), flat.all(2)):
            raise ValueError(
                "some kernels are kept in part; the instruments work on whole kernels: pass `mask.flatten(2).any(2)`"
            )
        edges = flat.any(2)
    return edges


def as_topology(mask: MaskLike) -> BlockTopology | None:
    """The block topology of a mask, or ``None`` if its components are not complete blocks."""
    if isinstance(mask, BlockTopology):
        return mask
    try:
        return BlockTopology.from_mask(_check_mask(mask))
    except NotBlockStructuredError:
        return None


def as_dense(mask: MaskLike) -> Tensor:
    """A mask as a boolean matrix ``(outputs, inputs)``."""
    return mask.mask() if isinstance(mask, BlockTopology) else _check_mask(mask)


def as_sparse(mask: MaskLike) -> scipy.sparse.csr_matrix:
    """A mask as a float64 scipy CSR matrix ``(outputs, inputs)``."""
    import scipy.sparse

    edges = as_dense(mask)
    rows, cols = (index.numpy() for index in edges.nonzero(as_tuple=True))
    return scipy.sparse.csr_matrix((np.ones(len(rows)), (rows, cols)), shape=tuple(edges.shape))


def refuse_if_too_large(shape: tuple[int, ...], instead: str) -> None:
    """Refuse a dense float64 singular value decomposition that would take more than `MEMORY_LIMIT`.

    Raises:
        SpectrumTooLargeError: with the memory needed and ``instead``, what to do.
    """
    rows, cols = shape
    # LAPACK's values-only driver works in place on one copy, next to the matrix itself.
    needed = 2 * 8 * rows * cols
    if needed > MEMORY_LIMIT:
        raise SpectrumTooLargeError(
            f"the exact spectrum of a {rows} x {cols} matrix needs {needed / _GIB:.1f} GiB, "
            f"allowed are {MEMORY_LIMIT / _GIB:.1f} GiB (analysis.masks.MEMORY_LIMIT); {instead}"
        )
