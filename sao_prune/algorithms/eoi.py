"""EOI: exact orthogonality at any density, by Givens rotations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..allocation import Allocation
from ..seeds import named_generator
from ..weights import givens_matrix
from .base import Method, register
from .draw import Draw, Values
from .sao import check_gain


@register
@dataclass(frozen=True)
class EOI(Method):
    """Exact orthogonal initialisation (Nowak et al., ICML 2024): random Givens rotations until the density is reached.

    Every weight is exactly (semi-)orthogonal at any density that has room for it; degrees are irregular, inputs may be
    left without an edge, and nothing in the support makes it run faster. Convolutions get the matrix as their centre
    tap.

    Attributes:
        gain: every non-zero singular value of every matrix.

    Example:
        >>> import torch, sao_prune
        >>> layer = torch.nn.Sequential(torch.nn.Linear(32, 32))
        >>> _ = sao_prune.apply(layer, sparsity=0.8, method="eoi", skip_first=False, skip_last=False, seed=0)
        >>> values = torch.linalg.svdvals(layer[0].weight)
        >>> bool((values - 1).abs().max() < 1e-5)
        True
    """

    name: ClassVar[str] = "eoi"

    gain: float = 1.0

    def __post_init__(self) -> None:
        check_gain(self.gain)

    @property
    def origin(self) -> Values:
        """All values are new."""
        return "drawn"

    def draw(self, allocations: Sequence[Allocation], weights: Sequence[Tensor], seed: int) -> list[Draw]:
        """One matrix a part; its non-zeros are the support."""
        draws = []
        for allocation in allocations:
            weight = allocation.weight
            rows, cols = weight.matrix
            nnz = min(max(round(allocation.density * rows * cols), min(rows, cols)), rows * cols)
            matrices = torch.stack(
                [
                    givens_matrix(rows, cols, nnz, named_generator(seed, "values", weight.name, part), gain=self.gain)
                    for part in range(weight.parts)
                ]
            )
            draws.append(Draw(weight, units=matrices != 0, matrices=matrices))
        return draws
