"""Augmentations of a whole batch at once, every image with its own draw."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from ...seeds import base_seed

CROP_PADDING = 4
# One draw of a policy serves so many images: small enough for variety, large enough to be quick.
POLICY_CHUNK = 8


def augment(images: Tensor, choices: Iterable[str], generator: torch.Generator) -> Tensor:
    """Apply ``crop``, ``flip`` and ``autoaugment``, those that are chosen, in this order.

    Args:
        images: uint8, ``(N, C, H, W)``.
        generator: where all draws come from; of the CPU, for the same images on every device.

    Returns:
        New images of the same shape and type.

    Example:
        >>> x = torch.arange(16, dtype=torch.uint8).reshape(1, 1, 4, 4)
        >>> augment(x, ("flip",), torch.Generator().manual_seed(0)).shape
        torch.Size([1, 1, 4, 4])
    """
    chosen = set(choices)
    for name, function in _FUNCTIONS.items():
        if name in chosen:
            images = function(images, generator)
    return images


def random_crop(images: Tensor, generator: torch.Generator, padding: int = CROP_PADDING) -> Tensor:
    """A window of the original size, anywhere in the image padded with black."""
    side = 2 * padding + 1
    offsets = torch.randint(side, (2, len(images)), generator=generator, device=generator.device).to(images.device)
    height, width = images.shape[-2:]
    windows = F.pad(images, [padding] * 4).unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(len(images), device=images.device), :, offsets[0], offsets[1]]


def random_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Left and right exchanged with probability one half."""
    flipped = torch.randint(2, (len(images),), generator=generator, device=generator.device).bool().to(images.device)
    return torch.where(flipped[:, None, None, None], images.flip(-1), images)


def auto_augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """CIFAR-10's AutoAugment policy (Cubuk et al., CVPR 2019), one draw for every few images.

    torchvision's transform draws from the global generator, which is lent a seed of ``generator``'s and then restored.
    """
    from torchvision.transforms.v2 import AutoAugment, AutoAugmentPolicy

    policy = AutoAugment(AutoAugmentPolicy.CIFAR10)
    seed = base_seed(generator)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return torch.cat([policy(chunk) for chunk in images.split(POLICY_CHUNK)])


_FUNCTIONS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "crop": random_crop,
    "flip": random_flip,
    "autoaugment": auto_augment,
}
AUGMENTATIONS = tuple(_FUNCTIONS)
