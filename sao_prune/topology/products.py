"""Products of Ramanujan graphs (RBGP; Vooturi, Varma and Kothapalli, 2020)."""

from __future__ import annotations

from math import gcd, isqrt, sqrt

import torch
from torch import Tensor

_TRIES = 200


def product(rows: int, cols: int, halvings: int, generator: torch.Generator | None = None) -> Tensor:
    """The Kronecker product of two sparse bipartite graphs, each grown from a complete one by 2-lifts.

    A 2-lift doubles both sides and keeps the degrees, so each halves the density. Its signs are drawn at random until
    the new eigenvalues keep the Ramanujan bound (Bilu and Linial 2006; signs that do always exist by Marcus, Spielman
    and Srivastava 2015); the best of some hundred draws is taken. The product has large eigenvalues that its factors'
    bounds do not forbid; `sao_prune.analysis.ramanujan_gap` tells how far it is from Ramanujan itself.

    Args:
        rows: outputs ``m``.
        cols: inputs ``n``.
        halvings: lifts in all; the density is ``2^-halvings``; at most as often as 2 divides both sides.
        generator: of the signs; without one, `torch.initial_seed` decides.

    Returns:
        Boolean mask, shape ``(rows, cols)``, every output with one degree and every input with one.

    Raises:
        ValueError: if there are more halvings than both sides allow, or fewer than none.

    Example:
        >>> import torch
        >>> mask = product(16, 32, 2, torch.Generator().manual_seed(0))
        >>> mask.double().mean().item(), mask.sum(1).unique().tolist()
        (0.25, [8])
    """
    most = max_halvings(rows, cols) if min(rows, cols) >= 1 else 0
    if not 0 <= halvings <= most:
        raise ValueError(
            f"a {rows} x {cols} product support can be halved from 0 to {most} times (2 must divide both sides as "
            f"often), got {halvings}"
        )
    generator = generator or torch.Generator().manual_seed(torch.initial_seed() % 2**63)
    base = rows >> halvings, cols >> halvings
    outer = _near_root(base[0]), _near_root(base[1])
    inner = base[0] // outer[0], base[1] // outer[1]
    # A factor of degree one would only fall apart, so all lifts go to the other one.
    first = halvings // 2 if min(outer) > 1 else 0
    return torch.kron(
        _lifted(*outer, first, generator).to(torch.uint8), _lifted(*inner, halvings - first, generator).to(torch.uint8)
    ).bool()


def max_halvings(rows: int, cols: int) -> int:
    """How often 2 divides both sides.

    Example:
        >>> max_halvings(24, 32)
        3
    """
    common = gcd(rows, cols)
    return (common & -common).bit_length() - 1


def _near_root(number: int) -> int:
    """The largest divisor that is no larger than the square root."""
    return next(d for d in range(isqrt(number), 0, -1) if number % d == 0)


def _lifted(rows: int, cols: int, lifts: int, generator: torch.Generator) -> Tensor:
    """The complete graph ``rows x cols``, lifted."""
    mask = torch.ones(rows, cols, dtype=torch.bool, device="cpu")
    # Below the degree itself too, or a graph of degree two would fall apart within its bound.
    bound = min(sqrt(rows - 1) + sqrt(cols - 1), sqrt(rows * cols) * (1 - 1e-9))
    for _ in range(lifts):
        best, least = mask.double(), float("inf")
        for _ in range(_TRIES):
            signs = torch.randint(0, 2, mask.shape, generator=generator, device="cpu").double() * 2 - 1
            signed = signs * mask
            largest = float(torch.linalg.matrix_norm(signed, ord=2))
            if largest < least - 1e-9:
                best, least = signed, largest
            if least <= bound:
                break
        plus, minus = best > 0, best < 0
        mask = torch.cat([torch.cat([plus, minus], 1), torch.cat([minus, plus], 1)])
    return mask
