"""MaxMin: the activation that keeps norms."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MaxMin(nn.Module):
    """Split the channels into halves ``a, b`` and return ``max(a, b), min(a, b)`` (Anil et al., ICML 2019).

    Its Jacobian is a permutation matrix wherever ``a != b``, so norms and gradients pass unchanged.

    Args:
        dim: the channel dimension.

    Raises:
        ValueError: in ``forward``, if the number of channels is odd.

    Example:
        >>> import torch
        >>> MaxMin()(torch.tensor([[1.0, 5.0, 3.0, 2.0]])).tolist()
        [[3.0, 5.0, 1.0, 2.0]]
    """

    def __init__(self, dim: int = 1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[self.dim] % 2:
            raise ValueError(
                f"MaxMin pairs channels up, but dimension {self.dim} has {x.shape[self.dim]}, an odd number"
            )
        a, b = x.chunk(2, self.dim)
        return torch.cat([torch.maximum(a, b), torch.minimum(a, b)], self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"
