"""Random biregular connected supports: expander graphs, as in X-Net (Prabhu et al., ECCV 2018)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_ROUNDS = 1000


def expander(rows: int, cols: int, nnz: int, generator: torch.Generator | None = None) -> Tensor:
    """A random connected support whose degrees differ by at most one on each side; no two of its blocks need agree.

    Args:
        rows: outputs ``m``.
        cols: inputs ``n``.
        nnz: number of edges, ``m + n - 1 .. m n``: fewer cannot be connected.
        generator: of the graph; without one, `torch.initial_seed` decides.

    Returns:
        Boolean mask, shape ``(rows, cols)``.

    Raises:
        ValueError: if ``nnz`` is out of range.

    Example:
        >>> import torch
        >>> mask = expander(8, 16, 48, torch.Generator().manual_seed(0))
        >>> mask.sum(1).unique().tolist(), mask.sum(0).unique().tolist()
        ([6], [3])
    """
    if rows < 1 or cols < 1 or not rows + cols - 1 <= nnz <= rows * cols:
        raise ValueError(
            f"a connected {rows} x {cols} support has from {rows + cols - 1} to {rows * cols} edges, got {nnz}; "
            "ask for less sparsity, or for a block topology, which need not be connected"
        )
    drawn = torch.randint(2**62, (1,), generator=generator, device="cpu") if generator else torch.initial_seed()
    random = np.random.default_rng(int(drawn) % 2**63)
    dense = 2 * nnz > rows * cols
    edges = _simple_graph(rows, cols, rows * cols - nnz if dense else nnz, random)
    mask = np.zeros((rows, cols), dtype=bool)
    mask[edges[0], edges[1]] = True
    return torch.from_numpy(_connect(~mask if dense else mask, random))


def _degrees(nodes: int, nnz: int, random: np.random.Generator) -> np.ndarray:
    degrees = np.full(nodes, nnz // nodes)
    degrees[random.permutation(nodes)[: nnz % nodes]] += 1
    return degrees


def _simple_graph(rows: int, cols: int, nnz: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The configuration model: pair edge ends at random, then swap the ends of double edges until none is left."""
    row = np.repeat(np.arange(rows), _degrees(rows, nnz, random))
    col = random.permutation(np.repeat(np.arange(cols), _degrees(cols, nnz, random)))
    for _ in range(_ROUNDS):
        _, first = np.unique(row * cols + col, return_index=True)
        double = np.setdiff1d(np.arange(nnz), first, assume_unique=True)
        if not len(double):
            return row, col
        partner = random.integers(nnz, size=len(double))
        for a, b in zip(double.tolist(), partner.tolist()):
            col[a], col[b] = col[b], col[a]
    raise RuntimeError(f"no simple {rows} x {cols} graph with {nnz} edges found in {_ROUNDS} rounds")


def _connect(mask: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Join components by exchanging the ends of two edges, which keeps all degrees."""
    rows, cols = mask.shape
    labels = _labels(mask)
    for _ in range(_ROUNDS * (rows + cols)):
        if labels.max() == 0:
            return mask
        row, col = np.nonzero(mask)
        a = random.integers(len(row))
        others = np.flatnonzero(labels[row] != labels[row[a]])
        if not len(others):
            break
        b = others[random.integers(len(others))]
        swapped = mask.copy()
        swapped[[row[a], row[b]], [col[a], col[b]]] = False
        swapped[[row[a], row[b]], [col[b], col[a]]] = True
        after = _labels(swapped)
        if after.max() < labels.max():
            mask, labels = swapped, after
    raise RuntimeError(f"no connected {rows} x {cols} graph with these degrees found")


def _labels(mask: np.ndarray) -> np.ndarray:
    # Imported here because `import sao_prune` would take half as long again with it.
    import scipy.sparse
    import scipy.sparse.csgraph

    biadjacency = scipy.sparse.csr_matrix(mask)
    adjacency = scipy.sparse.bmat([[None, biadjacency], [biadjacency.T, None]], format="csr")
    labels: np.ndarray = scipy.sparse.csgraph.connected_components(adjacency, directed=False)[1]
    return labels
