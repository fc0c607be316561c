"""The bipartite graph of a mask: its components, its spectrum and how far it is from Ramanujan."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, Literal, overload

import numpy as np
import torch
from torch import Tensor

from .masks import MaskLike, as_dense, as_sparse, as_topology, refuse_if_too_large

if TYPE_CHECKING:
    import scipy.sparse

Definition = Literal["distinct", "standard"]

_SAME = 1e-6
_DENSE_SIDE = 64


@dataclass(frozen=True)
class RamanujanGap:
    """How far below (positive) or above (negative) its bound the second eigenvalue lies, by both definitions.

    ``distinct`` is the thesis's: ``2 sqrt(lambda_1 - 1) - lambda_2`` with the second *distinct* eigenvalue (section
    4.1.1). ``standard`` is that of Marcus, Spielman and Srivastava: ``sqrt(c - 1) + sqrt(d - 1) - lambda_2`` with
    multiplicities counted; for an irregular mask ``c`` and ``d`` are the mean degrees of the connected nodes.
    """

    distinct: float
    standard: float
    lambda_1: float
    lambda_2_distinct: float
    lambda_2: float

    def __str__(self) -> str:
        return (
            f"Ramanujan gap {self.distinct:+.3f} (distinct: lambda_2 = {self.lambda_2_distinct:.3f}), "
            f"{self.standard:+.3f} (standard: lambda_2 = {self.lambda_2:.3f}); lambda_1 = {self.lambda_1:.3f}"
        )


@overload
def ramanujan_gap(mask: MaskLike, definition: None = None) -> RamanujanGap: ...
@overload
def ramanujan_gap(mask: MaskLike, definition: Definition) -> float: ...
def ramanujan_gap(mask: MaskLike, definition: Definition | None = None) -> RamanujanGap | float:
    """The Ramanujan gap of a mask, by both definitions side by side, or by the one named.

    By the standard definition a block topology with more than one block is not Ramanujan: its largest eigenvalue
    belongs to every block. Closed form for block topologies, Lanczos on each component otherwise.

    Args:
        mask: a `BlockTopology`, or zeros and ones of shape ``(m, n)`` or ``(m, n, *kernel)``.
        definition: ``"distinct"`` (thesis section 4.1.1) or ``"standard"``; ``None`` for both.

    Returns:
        A `RamanujanGap` with both, or the number of the definition that is named: positive where the mask is Ramanujan.

    Raises:
        ValueError: for an unknown definition, a mask with other values, or one without edges.

    Example:
        >>> import torch
        >>> from sao_prune.topology import interleaved
        >>> gap = ramanujan_gap(interleaved(128, 128, 32))
        >>> round(gap.distinct, 3), round(gap.standard, 3)
        (3.464, -0.536)
    """
    if definition not in (None, "distinct", "standard"):
        raise ValueError(f"definition is 'distinct', 'standard' or None for both, got {definition!r}")
    largest = _leading_values(mask)
    lambda_1 = largest[0]
    below = [value for value in largest if value < lambda_1 * (1 - _SAME)]
    distinct = below[0] if below else 0.0
    second = largest[1] if len(largest) > 1 else 0.0
    edges = as_dense(mask)
    c, d = (float(degree[degree > 0].double().mean()) for degree in (edges.sum(1), edges.sum(0)))
    gap = RamanujanGap(
        distinct=2 * sqrt(max(lambda_1 - 1, 0.0)) - distinct,
        standard=sqrt(c - 1) + sqrt(d - 1) - second,
        lambda_1=lambda_1,
        lambda_2_distinct=distinct,
        lambda_2=second,
    )
    return gap if definition is None else float(getattr(gap, definition))


def components(mask: MaskLike) -> tuple[Tensor, Tensor]:
    """Connected component of every output and every input, numbered from 0; lone nodes are components too.

    Args:
        mask: a `BlockTopology`, or zeros and ones of shape ``(m, n)`` or ``(m, n, *kernel)``.

    Returns:
        Two integer tensors of shapes ``(m,)`` and ``(n,)``.

    Example:
        >>> import torch
        >>> [c.tolist() for c in components(torch.eye(2))]
        [[0, 1], [0, 1]]
    """
    import scipy.sparse
    import scipy.sparse.csgraph

    biadjacency = as_sparse(mask)
    rows = biadjacency.shape[0]
    adjacency = scipy.sparse.bmat([[None, biadjacency], [biadjacency.T, None]], format="csr")
    labels = torch.from_numpy(scipy.sparse.csgraph.connected_components(adjacency, directed=False)[1]).long()
    return labels[:rows], labels[rows:]


def component_count(mask: MaskLike) -> int:
    """Number of connected components of a mask's graph; a node without edges is one.

    Args:
        mask: a `BlockTopology`, or zeros and ones of shape ``(m, n)`` or ``(m, n, *kernel)``.

    Returns:
        The number.

    Example:
        >>> from sao_prune.topology import interleaved
        >>> component_count(interleaved(8, 8, 4))
        4
    """
    rows, cols = components(mask)
    return int(torch.cat([rows, cols]).max()) + 1


def is_connected(mask: MaskLike) -> bool:
    """Whether a path joins every two nodes of the mask's graph.

    Args:
        mask: a `BlockTopology`, or zeros and ones of shape ``(m, n)`` or ``(m, n, *kernel)``.

    Returns:
        Whether one does.

    Example:
        >>> import torch
        >>> is_connected(torch.ones(2, 3)), is_connected(torch.eye(2))
        (True, False)
    """
    return component_count(mask) == 1


def spectrum(mask: MaskLike, k: int | None = None) -> Tensor:
    """Singular values of a mask, descending, float64; closed form for block topologies.

    The adjacency matrix's eigenvalues are plus and minus these, and ``|m - n|`` zeros (`adjacency_eigenvalues`).

    Args:
        mask: a `BlockTopology`, or zeros and ones of shape ``(m, n)`` or ``(m, n, *kernel)``.
        k: only the largest ``k``, by Lanczos where that is cheaper; ``None`` for all ``min(m, n)``.

    Returns:
        Shape ``(k,)``, or ``(min(m, n),)``.

    Raises:
        SpectrumTooLargeError: if all of them need more memory than `masks.MEMORY_LIMIT`.
        ValueError: if ``k`` is not in ``1 .. min(m, n)`` or the mask holds other values than 0 and 1.

    Example:
        >>> import torch
        >>> spectrum(torch.ones(2, 8)).round(decimals=6).tolist()
        [4.0, 0.0]
    """
    topology = as_topology(mask)
    if topology is not None:
        values = topology.spectrum()
        _check_k(k, len(values))
        return values[:k]
    matrix = as_sparse(mask)
    side = min(matrix.shape)
    _check_k(k, side)
    if k is None or k > side // 4 or side <= _DENSE_SIDE:
        refuse_if_too_large(matrix.shape, "pass k= for the largest singular values only")
        return torch.linalg.svdvals(torch.from_numpy(matrix.toarray()))[:k]
    return torch.from_numpy(_lanczos(matrix, k))


def adjacency_eigenvalues(mask: MaskLike) -> Tensor:
    """Eigenvalues of ``[[0, M^T], [M, 0]]``, descending, float64, shape ``(m + n,)`` (thesis section 2.4.2).

    Args:
        mask: a `BlockTopology`, or zeros and ones of shape ``(m, n)`` or ``(m, n, *kernel)``.

    Returns:
        The eigenvalues.

    Example:
        >>> import torch
        >>> adjacency_eigenvalues(torch.ones(1, 4)).tolist()
        [2.0, 0.0, 0.0, 0.0, -2.0]
    """
    values = spectrum(mask)
    rows, cols = mask.shape[:2]
    zeros = values.new_zeros(abs(rows - cols))
    return torch.cat([values, zeros, -values.flip(0)]) + 0.0


def _check_k(k: int | None, side: int) -> None:
    if k is not None and not 1 <= k <= side:
        raise ValueError(f"k is the number of singular values, 1 .. {side} for this mask, got {k}")


def _leading_values(mask: MaskLike) -> list[float]:
    """The two largest singular values of every component, all together, descending: enough for both definitions."""
    topology = as_topology(mask)
    if topology is not None:
        if topology.nnz == 0:
            raise ValueError("the mask has no edges, so it has no Ramanujan gap")
        values = topology.spectrum().tolist()
        return [v for i, v in enumerate(values) if i <= topology.groups]
    matrix = as_sparse(mask)
    rows, cols = (label.numpy() for label in components(mask))
    order = np.argsort(rows, kind="stable")
    starts = np.flatnonzero(np.diff(rows[order], prepend=-1))
    leading: list[float] = []
    for members in np.split(order, starts[1:]):
        inside = np.flatnonzero(cols == rows[members[0]])
        if len(inside):
            leading.extend(_two_largest(matrix[members][:, inside]))
    return sorted(leading, reverse=True)


def _two_largest(matrix: scipy.sparse.csr_matrix) -> list[float]:
    if min(matrix.shape) <= _DENSE_SIDE:
        return [float(v) for v in np.linalg.svd(matrix.toarray(), compute_uv=False)[:2]]
    return [float(v) for v in _lanczos(matrix, 2)]


def _lanczos(matrix: scipy.sparse.csr_matrix, k: int) -> np.ndarray:
    """The ``k`` largest singular values, descending, by ARPACK from a fixed start."""
    import scipy.sparse.linalg

    start = np.random.default_rng(0).standard_normal(min(matrix.shape))
    values = scipy.sparse.linalg.svds(matrix, k=k, v0=start, return_singular_vectors=False)
    return np.sort(values)[::-1].copy()
