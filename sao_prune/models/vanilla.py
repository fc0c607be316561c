"""Vanilla CNN: convolutions and activations, nothing else, at any depth (thesis table 3.9)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from .classifier import ImageClassifier, global_pool
from .options import activation_named, check_choice, check_img_size, check_sizes
from .registry import refuse_pretrained, register_model, without_timm_options

HEADS = ("pool", "conv")


class VanillaCNN(ImageClassifier):
    """conv(W, 3, 1), conv(W, 3, 2), ``depth - 1`` times conv(W, 3, 1), then the mean over positions and a linear layer.

    So there are ``depth + 1`` convolutions, as the table has them. An activation follows each; zero padding, biases,
    neither normalisation nor skips. The constructor draws PyTorch's default weights; beyond 128 layers the thesis
    needs orthogonal ones. With ReLU each layer halves the mean square of its input unless they have gain ``sqrt(2)``.

    With ``head="conv"`` (CIFAR-100 and CINIC-10 in the thesis) two more convolutions of width W, kernel 3 and stride
    2, each with its activation, take the average pooling's place: a 32 x 32 image arrives there as 16 x 16 and leaves
    as 4 x 4. The table's classifier has W inputs for these data too, not 16 W, so it sees the mean over those 4 x 4
    positions.

    Args:
        depth: the thesis's N.
        width: channels of every convolution, the thesis's W.
        activation: one of ``linear, tanh, relu, silu, gelu``.
        head: ``"pool"`` or ``"conv"``.
        img_size: at least 2, with ``head="conv"`` at least 8, so that every stride has something to halve.

    Shape:
        ``(batch, in_chans, img_size, img_size)`` to ``(batch, num_classes)``.

    Raises:
        ValueError: for a size below one, an unknown activation or head, or an image that is too small.

    Example:
        >>> import torch
        >>> net = VanillaCNN(depth=2, width=4, head="conv")
        >>> x = torch.zeros(1, 3, 32, 32)
        >>> net.forward_features(x).shape, net(x).shape
        (torch.Size([1, 4, 4, 4]), torch.Size([1, 10]))
    """

    def __init__(
        self,
        depth: int = 32,
        width: int = 128,
        activation: str = "relu",
        head: str = "pool",
        num_classes: int = 10,
        in_chans: int = 3,
        img_size: int = 32,
    ) -> None:
        super().__init__()
        check_sizes(depth=depth, width=width, in_chans=in_chans)
        check_choice("head", head, HEADS)
        halvings = 1 if head == "pool" else 3
        check_img_size(img_size, f"it is halved {halvings} times", ge=2**halvings)
        strides = [1, 2, *[1] * (depth - 1), *[2] * (halvings - 1)]
        self.features = _convolutions(in_chans, width, strides, activation)
        self.pool = global_pool()
        self.add_head(width, num_classes, (in_chans, img_size, img_size), "features.0")

    def forward_features(self, x: Tensor) -> Tensor:
        """Output of the last convolution and its activation, shape ``(batch, width, h, h)``."""
        return self.features(x)  # type: ignore[no-any-return]

    def pooled(self, features: Tensor) -> Tensor:
        """The mean over positions, shape ``(batch, width)``."""
        return self.pool(features)  # type: ignore[no-any-return]


def _convolutions(in_chans: int, width: int, strides: list[int], name: str) -> nn.Sequential:
    act = activation_named(name)
    layers: list[nn.Module] = []
    for (fan_in, fan_out), stride in zip(pairwise([in_chans, *[width] * len(strides)]), strides):
        layers += [nn.Conv2d(fan_in, fan_out, 3, stride, padding=1), act()]
    return nn.Sequential(*layers)


@register_model
def sao_vanilla_cnn(pretrained: bool = False, depth: int = 32, width: int = 128, **options: Any) -> VanillaCNN:
    """Vanilla CNN of thesis table 3.9; the thesis has ``depth`` 8 to 768 and ``width`` 32 to 256.

    Args:
        pretrained: refused, there are no weights.
        depth: the thesis's N; there are N + 1 convolutions, N + 3 with ``head="conv"``.
        width: the thesis's W.
        **options: `VanillaCNN`'s: ``activation``, ``head``, ..

    Returns:
        The network, with the weights that torch draws.

    Example:
        >>> len([p for p in sao_vanilla_cnn(depth=32, width=8).parameters() if p.dim() == 4])
        33
    """
    refuse_pretrained("sao_vanilla_cnn", pretrained)
    return VanillaCNN(depth=depth, width=width, **without_timm_options(options))
