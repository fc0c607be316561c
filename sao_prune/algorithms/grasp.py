"""GraSP: keep the weights without which least gradient would flow."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from numbers import Real
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .base import register
from .saliency import DataSaliency, gradients, seeded


@register
@dataclass(frozen=True, eq=False)
class GraSP(DataSaliency):
    """Gradient signal preservation (Wang, Zhang and Grosse, ICLR 2020).

    Without weight ``w`` the squared norm of the gradient ``g`` changes by ``-2 w (H g)`` to first order, ``H`` the
    Hessian of the mean loss: units with the highest ``-w (H g)`` go, those whose removal takes most gradient away stay.
    ``g`` is over all weights that are trained, pruned or not, without biases and norms. The paper takes ten examples a
    class.

    Attributes:
        inputs: examples along dimension 0: a tensor, a tuple of positional or a mapping of keyword arguments.
        targets: as many targets.
        loss: ``(outputs, targets)`` to the mean loss over the examples.
        batch_size: examples a forward pass; with batch norm, also the examples that are normalised together.
        temperature: outputs are divided by it; 200 in the paper, which makes the loss all but quadratic.

    Raises:
        TypeError: for data that is no tensor.
        ValueError: for inputs and targets of different number, or a temperature out of range.

    Example:
        >>> import torch, sao_prune
        >>> net = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(4)))
        >>> x, y = torch.randn(32, 8), torch.arange(32) % 8
        >>> sao_prune.apply(net, sparsity=0.75, method=sao_prune.GraSP(inputs=x, targets=y)).nnz
        32
    """

    name: ClassVar[str] = "grasp"

    temperature: float = 200.0

    def __post_init__(self) -> None:
        super().__post_init__()
        value = self.temperature
        if isinstance(value, bool) or not isinstance(value, Real) or not isfinite(value) or value <= 0:
            raise ValueError(f"temperature must be a positive finite number, got {value!r}")

    def _scores(self, model: nn.Module, copied: nn.Module, weights: list[nn.Parameter], seed: int) -> list[Tensor]:
        trained = {name for name, p in model.named_parameters() if p.requires_grad and p.dim() > 1}
        own = {id(w) for w in weights}
        flow = [p for name, p in copied.named_parameters() if name in trained or id(p) in own]
        for parameter in flow:
            parameter.requires_grad_(True)
        total = [torch.zeros_like(p) for p in flow]
        # Both passes draw the same dropout. Fused attention has no second derivative.
        with seeded(weights, seed), sdpa_kernel(SDPBackend.MATH):
            for loss in self._losses(copied, self.temperature):
                for sums, gradient in zip(total, gradients(loss, flow)):
                    sums += gradient
        products = [torch.zeros_like(w) for w in weights]
        with seeded(weights, seed), sdpa_kernel(SDPBackend.MATH):
            for loss in self._losses(copied, self.temperature):
                partial = gradients(loss, flow, create_graph=True)
                along = torch.stack([(g * whole).sum() for g, whole in zip(partial, total)]).sum()
                for sums, product in zip(products, gradients(along, weights)):
                    sums += product
        return [w.detach() * p for w, p in zip(weights, products)]
