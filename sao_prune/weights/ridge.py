"""A dense matrix fitted to new inputs, with as much freedom as the data support."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_RIDGES = tuple(10.0**e for e in range(-4, 3))


def refitted(weight: Tensor, pairs: Iterable[tuple[Tensor, Tensor]], *, centred: bool) -> Tensor:
    """The matrix near ``weight`` that gives the wanted outputs, by ridge regression on what is missing.

    ``W + E[(y - W x) x^T] (E[x x^T] + lambda I)^-1``, with the ``lambda`` of the least generalised cross-validation
    error (Golub, Heath and Wahba 1979, doi:10.1080/00401706.1979.10489751) among a few decades and infinity, which
    leaves the matrix as it is: where rows are too few to tell, nothing changes.

    Args:
        weight: ``(m, n)``.
        pairs: inputs ``(rows, n)`` and wanted outputs ``(rows, m)``, chunk by chunk.
        centred: whether the means were taken off, which costs a degree of freedom.

    Returns:
        ``(m, n)``, like ``weight``.

    Raises:
        ValueError: without any row.

    Example:
        >>> x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
        >>> fitted = refitted(torch.zeros(1, 3), [(x, x[:, :1])], centred=False)
        >>> torch.allclose(fitted, torch.tensor([[1.0, 0, 0]]), atol=1e-3)
        True
    """
    gram = weight.new_zeros(weight.shape[1], weight.shape[1], dtype=torch.float64)
    cross, squares, count = weight.new_zeros(weight.shape, dtype=torch.float64), 0.0, 0
    for x, wanted in pairs:
        missed = (wanted - x @ weight.T).double()
        gram += x.double().T @ x.double()
        cross += missed.T @ x.double()
        squares += float(missed.square().sum())
        count += len(x)
    if not count:
        raise ValueError("a fit needs at least one row of inputs")
    values, basis = torch.linalg.eigh(gram / count)
    values, turned = values.clamp(min=0), cross / count @ basis
    mean, energy = float(values.mean()), turned.square().sum(0)
    free = count - int(centred)
    if not mean > 0 or free < 2:
        return weight.clone()
    best, chosen = squares / count / (free / count) ** 2, None
    for ridge in _RIDGES:
        shrunk = values + ridge * mean
        left = squares / count - float((energy * (2 / shrunk - values / shrunk.square())).sum())
        freedom = (free - float((values / shrunk).sum())) / count
        if freedom > 0 and left / freedom**2 < best:
            best, chosen = left / freedom**2, shrunk
    return weight.clone() if chosen is None else weight + (turned / chosen @ basis.T).to(weight)
