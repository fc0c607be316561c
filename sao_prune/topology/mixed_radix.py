"""RadiX-Net: supports from mixed-radix numbers (Robinett and Kepner, 2019)."""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor


def radix(rows: int, cols: int, degree: int, place: int = 0) -> Tensor:
    """A RadiX-Net layer: node ``j`` sees ``j + t v`` for the digits ``t`` below the degree, ``v`` a place value.

    The place values of consecutive layers are ``1, d, d^2, ..`` and the last ``size / d``, so that a run of layers
    spells out every node once: everything reaches everything, by equally many paths where ``d`` is a root of the size.
    Nodes are counted modulo ``gcd(rows, cols)``; each stands for ``rows / gcd`` outputs and ``cols / gcd`` inputs
    (the Kronecker product with an all-ones matrix). Draws nothing.

    Args:
        rows: outputs ``m``.
        cols: inputs ``n``.
        degree: digits, ``1 .. gcd(rows, cols)``; an output sees ``degree * cols / gcd`` inputs.
        place: number of the layer in its chain.

    Returns:
        Boolean mask, shape ``(rows, cols)``.

    Raises:
        ValueError: if the degree is out of range or ``place`` is negative.

    Example:
        >>> radix(4, 4, 2, place=0).int().tolist()
        [[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1], [1, 0, 0, 1]]
        >>> radix(4, 4, 2, place=1).int().tolist()
        [[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]]
    """
    size = gcd(rows, cols)
    if rows < 1 or cols < 1 or not 1 <= degree <= size:
        raise ValueError(f"a {rows} x {cols} RadiX-Net layer has a degree from 1 to {size}, got {degree}")
    if place < 0:
        raise ValueError(f"place counts layers from 0, got {place}")
    places = _places(size, degree)
    value = min(degree ** (place % places), size // degree)
    node = torch.arange(size, device="cpu")
    mask = torch.zeros(size, size, dtype=torch.bool, device="cpu")
    for digit in range(degree):
        mask[node, (node + digit * value) % size] = True
    return mask.repeat_interleave(rows // size, 0).repeat_interleave(cols // size, 1)


def _places(size: int, degree: int) -> int:
    """Number of digits that a number below ``size`` has."""
    places, reached = 1, max(degree, 2)
    while reached < size and degree > 1:
        places, reached = places + 1, reached * degree
    return places
