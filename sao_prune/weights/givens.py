"""EOI: exactly orthogonal matrices of any density from random Givens rotations (Nowak et al., ICML 2024)."""

from __future__ import annotations

from math import pi

import numpy as np
import torch
from torch import Tensor


def givens_matrix(rows: int, cols: int, nnz: int, generator: torch.Generator, *, gain: float = 1.0) -> Tensor:
    """A (semi-)orthogonal matrix with about ``nnz`` non-zeros: random rotations of a permutation, until it has them.

    Rotations in random planes act on the longer side one after another. Supports are counted on bit sets, and the
    rotations that do not touch one another run together, so the result is that of the plain loop at a fraction of its
    time. Degrees are irregular and the support is no block topology.

    Args:
        rows: outputs ``m``.
        cols: inputs ``n``.
        nnz: ``min(m, n) .. m n``; overshot by at most one rotation.
        generator: of planes and angles.
        gain: every singular value.

    Returns:
        float32, shape ``(rows, cols)``; its support is ``!= 0``.

    Raises:
        ValueError: if ``nnz`` is out of range.

    Example:
        >>> import torch
        >>> q = givens_matrix(16, 16, 64, torch.Generator().manual_seed(0))
        >>> torch.allclose(q @ q.T, torch.eye(16), atol=1e-6), 64 <= int((q != 0).sum()) < 80
        (True, True)
    """
    if rows < cols:
        return givens_matrix(cols, rows, nnz, generator, gain=gain).T.contiguous()
    if cols < 1 or not cols <= nnz <= rows * cols:
        raise ValueError(f"an orthogonal {rows} x {cols} matrix has from {cols} to {rows * cols} non-zeros, got {nnz}")
    seed = int(torch.randint(2**62, (1,), generator=generator, device="cpu"))
    random = np.random.default_rng(seed)
    planes, supports = _planes(rows, cols, nnz, random)
    angles = random.uniform(0, 2 * pi, len(planes))
    matrix = np.zeros((rows, cols))
    matrix[np.arange(cols), np.arange(cols)] = 1
    for batch in _levels(planes, rows):
        first, second = planes[batch, 0], planes[batch, 1]
        c, s = np.cos(angles[batch])[:, None], np.sin(angles[batch])[:, None]
        upper, lower = matrix[first], matrix[second]
        matrix[first], matrix[second] = c * upper - s * lower, s * upper + c * lower
    # A product of many sines may underflow in float32; such entries stay in the support.
    out = (gain * matrix).astype(np.float32)
    lost = _unpack(supports, cols) & (out == 0)
    out[lost] = np.finfo(np.float32).tiny
    values = torch.from_numpy(out)[torch.from_numpy(random.permutation(rows))]
    return values[:, torch.from_numpy(random.permutation(cols))].contiguous()


def _planes(rows: int, cols: int, nnz: int, random: np.random.Generator) -> tuple[np.ndarray, list[int]]:
    """Random pairs of rows, as many as it takes, and the supports they leave, one bit set a row."""
    supports = [1 << i if i < cols else 0 for i in range(rows)]
    sizes = [int(i < cols) for i in range(rows)]
    filled, planes = cols, []
    while filled < nnz:
        firsts = random.integers(rows, size=rows)
        seconds = (firsts + random.integers(1, rows, size=rows)) % rows
        for i, j in zip(firsts.tolist(), seconds.tolist()):
            union = supports[i] | supports[j]
            size = union.bit_count()
            filled += 2 * size - sizes[i] - sizes[j]
            supports[i] = supports[j] = union
            sizes[i] = sizes[j] = size
            planes.append((i, j))
            if filled >= nnz:
                break
    return np.array(planes, dtype=np.int64).reshape(-1, 2), supports


def _levels(planes: np.ndarray, rows: int) -> list[np.ndarray]:
    """Batches of rotations that touch no row twice, in an order that respects every row's own."""
    level = [0] * rows
    batches: list[list[int]] = []
    for index, (i, j) in enumerate(planes.tolist()):
        at = max(level[i], level[j])
        level[i] = level[j] = at + 1
        if at == len(batches):
            batches.append([])
        batches[at].append(index)
    return [np.array(batch) for batch in batches]


def _unpack(supports: list[int], cols: int) -> np.ndarray:
    width = (cols + 7) // 8
    raw = np.frombuffer(b"".join(s.to_bytes(width, "little") for s in supports), dtype=np.uint8)
    return np.unpackbits(raw.reshape(len(supports), width), axis=1, count=cols, bitorder="little").astype(bool)
