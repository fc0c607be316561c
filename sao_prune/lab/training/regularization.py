"""What makes a training harder on purpose: mixed images and softened labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.dataset import IGNORED, labelled
from .spec import TrainSpec


class Objective:
    """Images and labels as the network is to see them, and the loss.

    With ``spec.cutmix`` a batch is cut and mixed with that probability (Yun et al. 2019, alpha 1); with ``spec.mixup``
    every other batch is blended (Zhang et al. 2018). An image is mixed with its mirror position in the batch; the last
    one of an odd batch stays whole.

    Args:
        spec: ``cutmix``, ``mixup`` and ``label_smoothing`` of it count.
        classes: how many labels there are.

    Example:
        >>> import torch
        >>> spec = TrainSpec(epochs=1, batch_size=4, mixup=1.0)
        >>> objective = Objective(spec, classes=2)
        >>> x, target = objective.mix(torch.rand(4, 1, 2, 2), torch.tensor([0, 1, 0, 1]), torch.Generator())
        >>> target.shape, target.sum(1).tolist()
        (torch.Size([4, 2]), [1.0, 1.0, 1.0, 1.0])
    """

    def __init__(self, spec: TrainSpec, classes: int) -> None:
        self._smoothing, self._classes = spec.label_smoothing, classes
        self._mixup: Any = None
        if spec.mixup or spec.cutmix:
            from timm.data import Mixup

            self._mixup = Mixup(
                mixup_alpha=spec.mixup,
                cutmix_alpha=1.0 if spec.cutmix else 0.0,
                prob=1.0 if spec.mixup else spec.cutmix,
                switch_prob=spec.cutmix,
                label_smoothing=spec.label_smoothing,
                num_classes=classes,
            )

    def mix(self, x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Mix a batch, in place where it is mixed; without mixing both come back as they are.

        Args:
            x: images ``(B, C, H, W)``.
            y: labels ``(B,)``.
            generator: decides how; the global random states are left as they were.

        Returns:
            Images, and targets ``(B, classes)`` that sum to one a row.
        """
        if self._mixup is None:
            return x, y
        even = len(x) // 2 * 2
        # timm draws from numpy's global generator.
        before = np.random.get_state()  # noqa: NPY002
        np.random.seed(int(torch.randint(2**32, (1,), generator=generator)))  # noqa: NPY002
        try:
            mixed, target = self._mixup(x[:even], y[:even])
        finally:
            np.random.set_state(before)  # noqa: NPY002
        if even < len(x):
            from timm.data.mixup import mixup_target

            mixed = torch.cat([mixed, x[even:]])
            target = torch.cat([target, mixup_target(y[even:], self._classes, smoothing=self._smoothing)])
        return mixed, target

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy summed over the batch, nats; ``target`` is what `mix` gave.

        Of a sequence, the mean over its steps that have a label.
        """
        # Soft targets are smoothed already.
        smoothing = 0.0 if target.is_floating_point() else self._smoothing
        loss = F.cross_entropy(logits.float(), target, reduction="sum", label_smoothing=smoothing, ignore_index=IGNORED)
        return loss if target.dim() == 1 or target.is_floating_point() else loss * len(target) / labelled(target)
