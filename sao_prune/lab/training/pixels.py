"""A network as an attacker meets it: on images in [0, 1]."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..data import Dataset

GREY_LEVELS = 255.0


class OnPixels(nn.Module):
    """A network on images in [0, 1], which are standardised as a data set does it on the way.

    Args:
        model: takes standardised images.
        data: whose means and deviations.

    Attributes:
        lipschitz: how far (l2) standardised images are apart for every unit that the images are.

    Example:
        >>> x, y = torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1), torch.tensor([0, 1])
        >>> network = OnPixels(nn.Flatten(), Dataset("two", ("a", "b"), x, y, x, y))
        >>> network(torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1)).flatten().tolist(), network.lipschitz
        ([-1.0, 1.0], 2.0)
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, data: Dataset) -> None:
        super().__init__()
        self.model = model
        shape = (len(data.mean), 1, 1)
        for name in ("mean", "std"):
            values = torch.tensor(getattr(data, name), device=data.device) / GREY_LEVELS
            self.register_buffer(name, values.reshape(shape))
        self.lipschitz = GREY_LEVELS / min(data.std)

    def standardised(self, pixels: Tensor) -> Tensor:
        """What the network sees of images in [0, 1]."""
        return (pixels - self.mean) / self.std

    def pixels(self, standardised: Tensor) -> Tensor:
        """Images in [0, 1] of what the network sees of them."""
        return (standardised * self.std + self.mean).clamp(0, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model(self.standardised(pixels))  # type: ignore[no-any-return]
