"""Losses that make certificates large, for networks whose Lipschitz constants are known."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from ...analysis import certified_radii, margin_constants
from ..data import Dataset
from .pixels import GREY_LEVELS, OnPixels
from .regularization import Objective
from .spec import LossSpec, TrainSpec

# Of the power method for layers that are not held; enough for a loss, certificates are computed exactly.
_ITERATIONS = 20
# Share of eps that EMMA moves a logit by at least.
_LEAST = 0.01


class CertifiedLoss:
    """Cross-entropy with an eye on how far (l2) an input could move before its prediction may change.

    ``emma`` (efficient margin maximisation; Hu et al., NeurIPS 2023, https://arxiv.org/abs/2301.12549): the
    cross-entropy of logits that have each risen as far as they can within ``eps``, or within what makes them equal to
    the right one. ``certificate`` (certificate regularisation; Singla et al., ICLR 2022,
    https://arxiv.org/abs/2108.04062): less ``weight`` times the certified radius.

    Args:
        spec: which, and its constant.
        model: a chain of layers with known bounds; the loss must come after its forward.
        data: whose images, standardised, it sees.
        smoothing: of labels.

    Example:
        >>> import torch
        >>> x, y = torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1), torch.tensor([0, 1])
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
        >>> loss = CertifiedLoss(LossSpec("emma", eps=36), model, Dataset("two", ("a", "b"), x, y, x, y))
        >>> logits = model(torch.ones(2, 1))
        >>> bool(loss(logits, y) > F.cross_entropy(logits, y, reduction="sum"))
        True
    """

    def __init__(self, spec: LossSpec, model: nn.Module, data: Dataset, smoothing: float = 0.0) -> None:
        self._spec, self._model, self._smoothing = spec, model, smoothing
        self._scale = OnPixels(model, data).lipschitz

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss summed over the batch, from its logits and labels."""
        if labels.is_floating_point():
            # Of no label: a process that has no image of this batch.
            return logits.sum() * 0
        logits = logits.float()
        constants = self._scale * margin_constants(self._model, _ITERATIONS)
        if self._spec.eps is not None:
            logits = _risen(logits, labels, constants[labels], self._spec.eps / GREY_LEVELS)
        loss = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=self._smoothing)
        if self._spec.weight is not None:
            loss = loss - self._spec.weight * certified_radii(logits, labels, constants).sum()
        return loss


def training_loss(
    spec: TrainSpec, model: nn.Module, data: Dataset, objective: Objective
) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss that a training asks for, from logits and targets, summed over the batch.

    Args:
        spec: of the training.
        model: that is trained.
        data: that it is trained with.
        objective: which knows the cross-entropy.
    """
    return CertifiedLoss(spec.loss, model, data, spec.label_smoothing) if spec.loss.is_certified else objective.loss


def _risen(logits: Tensor, labels: Tensor, constants: Tensor, eps: float) -> Tensor:
    behind = (logits.gather(1, labels[:, None]) - logits).detach()
    radii = (behind / constants.detach().clamp(min=1e-12)).clamp(_LEAST * eps, eps)
    return logits + radii * constants
