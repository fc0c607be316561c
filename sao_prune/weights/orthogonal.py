"""Haar-distributed (semi-)orthogonal matrices, many at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def haar(gaussian: Tensor) -> Tensor:
    """Turn standard normal matrices into Haar-distributed (semi-)orthogonal ones of the same shape.

    The orthogonal factor of a Gaussian matrix is a product of independent Householder reflectors (Stewart 1980), so
    the reflectors are drawn directly and no factorisation is needed; signs are those that make R's diagonal positive.

    Args:
        gaussian: shape ``(batch, r, c)``, independent standard normal entries, float32 or float64.

    Returns:
        Shape ``(batch, r, c)``; orthonormal rows where ``r <= c``, orthonormal columns where ``r >= c``.

    Example:
        >>> import torch
        >>> q = haar(torch.randn(5, 3, 4, dtype=torch.float64))
        >>> torch.allclose(q @ q.mT, torch.eye(3, dtype=torch.float64).expand(5, 3, 3))
        True
    """
    if gaussian.shape[-2] < gaussian.shape[-1]:
        return haar(gaussian.mT).mT
    reflectors = gaussian.tril()
    norm = torch.linalg.vector_norm(reflectors, dim=-2)
    # A column of zeros has no direction: rare, but a single float32 draw is zero once in about 2^24.
    void = norm == 0
    head = gaussian.diagonal(dim1=-2, dim2=-1).masked_fill(void, 1)
    norm = norm.masked_fill(void, 1)
    sign = torch.where(head < 0, -1.0, 1.0).to(gaussian.dtype)
    pivot = head + sign * norm
    tau = sign * pivot / norm
    reflectors = reflectors / pivot.unsqueeze(-2)
    reflectors.diagonal(dim1=-2, dim2=-1).fill_(1)
    return torch.linalg.householder_product(reflectors, tau) * -sign.unsqueeze(-2)


def haar_like(gaussians: list[Tensor]) -> list[Tensor]:
    """`haar` of every tensor ``(batch, r, c)`` in the list, with one batched product for each block shape."""
    by_shape: dict[tuple[int, int], list[int]] = {}
    for index, gaussian in enumerate(gaussians):
        by_shape.setdefault((gaussian.shape[1], gaussian.shape[2]), []).append(index)
    out: list[Tensor] = list(gaussians)
    for members in by_shape.values():
        batch = haar(torch.cat([gaussians[i] for i in members]) if len(members) > 1 else gaussians[members[0]])
        for index, part in zip(members, batch.split([gaussians[i].shape[0] for i in members])):
            out[index] = part
    return out
