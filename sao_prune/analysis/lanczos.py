"""Golub-Kahan-Lanczos bidiagonalisation: singular values of a map that is only known by its products."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .operators import LinearMap


@dataclass(frozen=True)
class Quadrature:
    """Nodes (approximate singular values, descending) and weights (summing to 1) of the spectral measure of a start."""

    nodes: Tensor
    weights: Tensor


def bidiagonalise(op: LinearMap, start: Tensor, steps: int) -> Quadrature:
    """``steps`` Lanczos steps from ``start``, with full reorthogonalisation (Golub and Kahan 1965).

    Memory is ``steps * (inputs + outputs)`` numbers.

    Args:
        op: the map.
        start: shape ``(side,)``: outputs if there are no more of them than inputs, inputs otherwise.
        steps: at most ``op.side``.
    """
    first, second = (op.adjoint, op.forward) if op.outputs <= op.inputs else (op.forward, op.adjoint)
    steps = min(steps, op.side)
    u = start / start.norm()
    left: list[Tensor] = [u]
    right: list[Tensor] = []
    alphas: list[float] = []
    betas: list[float] = []
    scale = 0.0
    beta = 0.0
    for _ in range(steps):
        r = first(left[-1])
        if right:
            r = r - beta * right[-1]
        r = _orthogonalise(r, right)
        alpha = float(r.norm())
        scale = max(scale, alpha)
        alphas.append(alpha)
        if alpha <= _tiny(op.dtype) * scale:
            break
        right.append(r / alpha)
        p = _orthogonalise(second(right[-1]) - alpha * left[-1], left)
        beta = float(p.norm())
        if beta <= _tiny(op.dtype) * scale or len(alphas) == steps:
            break
        betas.append(beta)
        left.append(p / beta)
    size = len(alphas)
    bidiagonal = torch.diag(torch.tensor(alphas, dtype=torch.float64, device="cpu"))
    for index, value in enumerate(betas[: size - 1]):
        bidiagonal[index + 1, index] = value
    vectors, nodes, _ = torch.linalg.svd(bidiagonal)
    return Quadrature(nodes, vectors[0] ** 2)


def _orthogonalise(vector: Tensor, basis: list[Tensor]) -> Tensor:
    if basis:
        stacked = torch.stack(basis)
        for _ in range(2):
            vector = vector - stacked.T @ (stacked @ vector)
    return vector


def _tiny(dtype: torch.dtype) -> float:
    return 10 * float(torch.finfo(dtype).eps)
