"""SNIP: keep the connections to which the loss is most sensitive."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from .base import register
from .saliency import DataSaliency, gradients, seeded


@register
@dataclass(frozen=True, eq=False)
class SNIP(DataSaliency):
    """Single-shot pruning by connection sensitivity (Lee, Ajanthan and Torr, ICLR 2019).

    A unit's score is the size of the loss's derivative by a gate on the whole unit: ``|sum g * w|`` over its weights,
    with ``g`` the gradient of the mean loss, in training mode. The paper takes one batch of the size that is trained
    with.

    Attributes:
        inputs: examples along dimension 0: a tensor, a tuple of positional or a mapping of keyword arguments.
        targets: as many targets.
        loss: ``(outputs, targets)`` to the mean loss over the examples.
        batch_size: examples a forward pass; with batch norm, also the examples that are normalised together.

    Raises:
        TypeError: for data that is no tensor.
        ValueError: for inputs and targets of different number.

    Example:
        >>> import torch, sao_prune
        >>> net = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(4)))
        >>> x, y = torch.randn(32, 8), torch.arange(32) % 8
        >>> sao_prune.apply(net, sparsity=0.75, method=sao_prune.SNIP(inputs=x, targets=y)).nnz
        32
    """

    name: ClassVar[str] = "snip"

    def _scores(self, model: nn.Module, copied: nn.Module, weights: list[nn.Parameter], seed: int) -> list[Tensor]:
        total = [torch.zeros_like(w) for w in weights]
        with seeded(weights, seed):
            for loss in self._losses(copied):
                for sums, gradient in zip(total, gradients(loss, weights)):
                    sums += gradient
        return [w.detach() * g for w, g in zip(weights, total)]

    def _rank(self, units: Tensor) -> Tensor:
        return units.abs()
