"""How large the sets are: even, or uneven enough to hit a number of edges exactly."""

from __future__ import annotations

from functools import lru_cache
from math import isqrt

import torch
from torch import Tensor

_WINDOW = 64
_CANDIDATES = 16
_PAIRS = 6


def even_sizes(rows: int, cols: int, groups: int) -> tuple[Tensor, Tensor]:
    """Sizes of ``groups`` row sets and column sets that differ by at most one, larger ones first.

    With ``rows <= cols`` every row set is no larger than its column set (and the reverse), so every block can be
    semi-orthogonal.

    Args:
        rows: outputs ``m``.
        cols: inputs ``n``.
        groups: number of sets on each side.

    Returns:
        Sizes of the row sets and of the column sets, shape ``(groups,)`` each.

    Raises:
        ValueError: unless ``1 <= groups <= min(rows, cols)``.

    Example:
        >>> [s.tolist() for s in even_sizes(5, 7, 3)]
        [[2, 2, 1], [3, 2, 2]]
    """
    if rows < 1 or cols < 1 or not 1 <= groups <= min(rows, cols):
        raise ValueError(f"a {rows} x {cols} layer takes from 1 to {max(min(rows, cols), 0)} groups, got {groups}")
    number = torch.arange(groups, device="cpu")
    return rows // groups + (number < rows % groups), cols // groups + (number < cols % groups)


def exact_sizes(rows: int, cols: int, nnz: int) -> tuple[Tensor, Tensor]:
    """Set sizes with ``sum |R_i| |C_i|`` at or very near ``nnz``, every block semi-orthogonal.

    All sets but one stay even; the last one shrinks until the others hold about ``nnz`` edges, and what is missing
    is made up by moving nodes between pairs of sets (among equal ones a move of ``k`` rows and ``k`` columns adds
    ``2 k^2``). A square layer's blocks are square, so its count has the parity of its side, and above one half there
    are few partitions to choose from.

    Args:
        rows: outputs ``m``.
        cols: inputs ``n``.
        nnz: number of edges.

    Returns:
        Sizes of the row sets and of the column sets, of one length.

    Raises:
        ValueError: unless ``max(rows, cols) <= nnz <= rows * cols``.

    Example:
        >>> r, c = exact_sizes(64, 64, 1000)
        >>> int((r * c).sum()), int(r.sum()), int(c.sum())
        (1000, 64, 64)
    """
    if rows > cols:
        c, r = exact_sizes(cols, rows, nnz)
        return r, c
    if rows < 1 or not cols <= nnz <= rows * cols:
        raise ValueError(f"a {rows} x {cols} layer takes from {cols} to {rows * cols} edges, got {nnz}")
    return _exact_sizes(rows, cols, nnz)


@lru_cache(maxsize=1024)
def _exact_sizes(rows: int, cols: int, nnz: int) -> tuple[Tensor, Tensor]:
    fewest = -(-rows * cols // nnz)
    best = even_sizes(rows, cols, 1)
    error = rows * cols - nnz
    for groups in range(max(2, fewest - 1), min(fewest + 2, rows) + 1):
        for t, u in _odd_sets(rows, cols, groups, nnz):
            r, c = even_sizes(rows - t, cols - u, groups - 1)
            r, c = _make_up(r, c, nnz - t * u)
            missing = abs(nnz - t * u - int((r * c).sum()))
            if missing < error:
                error = missing
                best = torch.cat([r, r.new_tensor([t])]), torch.cat([c, c.new_tensor([u])])
            if error == 0:
                return best
    return best


def _even_nnz(rows: Tensor, cols: Tensor, groups: int) -> Tensor:
    """Edges of an even split of ``rows`` and ``cols``, elementwise."""
    q, x = rows // groups, rows % groups
    p, y = cols // groups, cols % groups
    return groups * q * p + q * y + p * x + torch.minimum(x, y)


def _odd_sets(rows: int, cols: int, groups: int, nnz: int) -> list[tuple[int, int]]:
    """The most promising ``t x u`` shapes of one odd set beside ``groups - 1`` nearly even ones."""
    t = torch.arange(1, rows - groups + 2, device="cpu")[:, None]
    u = (t * cols // rows) + torch.arange(-_WINDOW, _WINDOW + 1, device="cpu")
    legal = (u >= t) & (u <= t + cols - rows)
    missing = nnz - t * u - _even_nnz(rows - t, cols - u, groups - 1)
    left = missing.clamp(min=0)
    for _ in range(min((groups - 1) // 2, _PAIRS)):
        left = left - 2 * (left // 2).double().sqrt().floor().long() ** 2
    left = torch.where(missing >= 0, left, -missing)
    # Among equally good choices the most even one: the least that has to be made up.
    cost = torch.where(legal, left * (rows * cols + 1) + missing.abs(), torch.iinfo(torch.int64).max)
    best = torch.topk(cost.flatten(), min(_CANDIDATES, int(legal.sum())), largest=False).indices
    return [(i // u.shape[1] + 1, int(u.flatten()[i])) for i in best.tolist()]


def _make_up(r: Tensor, c: Tensor, nnz: int) -> tuple[Tensor, Tensor]:
    """Move ``k`` rows and columns from a set to one no smaller, pair by pair, until ``nnz`` edges are reached."""
    r, c = r.clone(), c.clone()
    missing = nnz - int((r * c).sum())
    order = torch.argsort(r + c, descending=True, stable=True)
    for grows, shrinks in order[: len(order) // 2 * 2].view(-1, 2)[:_PAIRS].tolist():
        surplus = int(r[grows] + c[grows] - r[shrinks] - c[shrinks])
        k = (isqrt(surplus * surplus + 8 * max(missing, 0)) - surplus) // 4
        k = min(k, int(r[shrinks]) - 1, int(c[shrinks]) - 1)
        if k > 0:
            r[grows], c[grows] = r[grows] + k, c[grows] + k
            r[shrinks], c[shrinks] = r[shrinks] - k, c[shrinks] - k
            missing -= k * surplus + 2 * k * k
    return r, c
