"""The most isometric values on any given mask (approximate isometry; Lee et al., ICLR 2020)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor


@dataclass(frozen=True)
class ApproximateIsometry:
    """Values on a mask and how far they are from an isometry.

    Attributes:
        matrix: float32, shape ``(m, n)``.
        residual: ``|W W^T - I| / sqrt(side)`` in the Frobenius norm, gain left out, on the shorter side; 0 is
            exactly (semi-)orthogonal, 1 a zero matrix.
        iterations: of the optimizer.
    """

    matrix: Tensor
    residual: float
    iterations: int


def approximate_isometry(
    mask: Tensor, generator: torch.Generator, *, gain: float = 1.0, iterations: int = 200
) -> ApproximateIsometry:
    """Minimise ``|W W^T - I|`` over the values on a mask, by L-BFGS in float64 from random normal ones.

    A tall mask's ``W^T W`` is taken instead. On the mask of a block topology the minimum is zero. Elsewhere it is zero
    only if values vanish (two rows that share exactly one column are orthogonal only if one has a zero there), and a
    search may end with singular values of 0 among those of 1: ``residual`` tells.

    Args:
        mask: zeros and ones, shape ``(m, n)``.
        generator: of the first values.
        gain: factor on the result.
        iterations: at most so many.

    Returns:
        An `ApproximateIsometry`, its ``matrix`` zero off the mask.

    Raises:
        ValueError: if the mask is not 2-D, holds other values, or has no edges.

    Example:
        >>> import torch
        >>> from sao_prune.topology import interleaved
        >>> result = approximate_isometry(interleaved(8, 8, 2).mask(), torch.Generator().manual_seed(0))
        >>> result.residual < 1e-3
        True
    """
    if mask.dim() != 2 or not torch.equal((mask != 0).to(mask.dtype), mask) or not bool(mask.any()):
        raise ValueError(
            f"a mask is a 2-D matrix of zeros and ones with at least one edge, got shape {tuple(mask.shape)}"
        )
    if mask.shape[0] > mask.shape[1]:
        tall = approximate_isometry(mask.T, generator, gain=gain, iterations=iterations)
        return ApproximateIsometry(tall.matrix.T.contiguous(), tall.residual, tall.iterations)
    edges = mask.cpu().nonzero()
    side = mask.shape[0]
    values = torch.randn(len(edges), generator=generator, dtype=torch.float64, device="cpu")
    values /= mask.cpu().sum(1).double().sqrt()[edges[:, 0]]
    columns = _columns(edges, side)

    def loss_and_gradient(values: Tensor) -> tuple[Tensor, Tensor]:
        error = -torch.eye(side, dtype=torch.float64, device="cpu").flatten()
        for members, pairs in columns:
            w = values[members]
            error.index_add_(0, pairs.flatten(), (w[:, :, None] * w[:, None, :]).flatten())
        gradient = torch.empty_like(values)
        for members, pairs in columns:
            gradient[members] = 4 * (error[pairs] * values[members][:, None, :]).sum(2)
        return error.square().sum(), gradient

    loss, steps = _minimise(loss_and_gradient, values, iterations)
    matrix = torch.zeros(mask.shape, dtype=torch.float32, device="cpu")
    matrix[edges[:, 0], edges[:, 1]] = (gain * values).float()
    return ApproximateIsometry(matrix, sqrt(loss / side), steps)


def _minimise(
    loss_and_gradient: Callable[[Tensor], tuple[Tensor, Tensor]], values: Tensor, iterations: int
) -> tuple[float, int]:
    """L-BFGS with a strong Wolfe line search, in place; returns the least loss and the number of iterations."""
    values.requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [values], max_iter=iterations, history_size=10, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    @torch.no_grad()
    def closure() -> Tensor:
        loss, values.grad = loss_and_gradient(values)
        return loss

    optimizer.step(closure)
    values.requires_grad_(False)
    return float(loss_and_gradient(values)[0]), int(optimizer.state[values]["n_iter"])


def _columns(edges: Tensor, side: int) -> list[tuple[Tensor, Tensor]]:
    """Columns gathered by degree ``d``: their edges ``(columns, d)``, and where the pairs of those edges' rows meet in
    the flat ``side x side`` product, ``(columns, d, d)``. Sparse columns make that product cheap."""
    order = torch.argsort(edges[:, 1], stable=True)
    counts = torch.bincount(edges[:, 1])
    starts = counts.cumsum(0) - counts
    out = []
    for degree in counts[counts > 0].unique().tolist():
        members = order[starts[counts == degree][:, None] + torch.arange(degree, device="cpu")]
        rows = edges[members, 0]
        out.append((members, rows[:, :, None] * side + rows[:, None, :]))
    return out
