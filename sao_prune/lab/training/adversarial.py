"""Training images as an attacker would have them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ...analysis import perturb
from ..data import Dataset
from .pixels import GREY_LEVELS, OnPixels
from .spec import AdversarialSpec


class Adversary:
    """Moves every image of a batch up the loss before the network learns from it (Madry et al., ICLR 2018).

    The network is in evaluation mode meanwhile, so batch statistics stay those of the images that it learns from.

    Args:
        spec: how far, and in how many steps.
        model: takes standardised images.
        data: whose images.

    Example:
        >>> import torch
        >>> x, y = torch.arange(8, dtype=torch.uint8).reshape(2, 1, 2, 2), torch.tensor([0, 1])
        >>> data = Dataset("two", ("a", "b"), x, y, x, y)
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> loss = lambda logits: nn.functional.cross_entropy(logits, y)
        >>> moved = Adversary(AdversarialSpec("linf", 1.0), model, data)(data.standardise(x), loss, torch.rand(x.shape))
        >>> bool((moved - data.standardise(x)).abs().max() * data.std[0] <= 1.001)
        True
    """

    def __init__(self, spec: AdversarialSpec, model: nn.Module, data: Dataset) -> None:
        self._spec, self._network = spec, OnPixels(model, data)

    def __call__(self, x: Tensor, objective: Callable[[Tensor], Tensor], noise: Tensor) -> Tensor:
        """The moved images.

        Args:
            x: standardised images.
            objective: the loss of their logits.
            noise: uniform in [0, 1), of the shape of ``x``; the starts.
        """
        spec = self._spec
        size = None if spec.step_size is None else spec.step_size / GREY_LEVELS
        pixels = self._network.pixels(x)
        moved = perturb(self._network, pixels, objective, spec.threat(), spec.steps, noise, size)
        return self._network.standardised(moved)
