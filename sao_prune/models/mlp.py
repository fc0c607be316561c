"""Multilayer perceptrons of any depth: MLP-N and MLP-7 (thesis tables 3.3 and 3.4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from .classifier import ImageClassifier
from .options import activation_named, check_sizes
from .registry import refuse_pretrained, register_model, without_timm_options


class HiddenLayer(nn.Module):
    """A linear layer and its activation, with the input added before the activation if ``skip``."""

    def __init__(self, fan_in: int, fan_out: int, activation: Callable[[], nn.Module], skip: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(fan_in, fan_out)
        self.act = activation()
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        return self.act(h + x if self.skip else h)  # type: ignore[no-any-return]


class SaoMLP(ImageClassifier):
    """A plain MLP over flattened images: hidden layers of the given widths, then a linear classifier.

    Args:
        widths: hidden widths, first to last.
        activation: one of ``linear, tanh, relu, silu, gelu``, after every hidden layer.
        skips: add a layer's input to its pre-activation wherever the two have the same width (thesis section 4.2.3).
        img_size: height and width of the images.

    Shape:
        ``(batch, in_chans, img_size, img_size)`` or ``(batch, pixels)`` to ``(batch, num_classes)``.

    Raises:
        ValueError: for an unknown activation or a size below one.

    Example:
        >>> import torch
        >>> SaoMLP(widths=(8, 8), img_size=4)(torch.zeros(2, 1, 4, 4)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        widths: Sequence[int],
        activation: str = "tanh",
        skips: bool = False,
        num_classes: int = 10,
        img_size: int = 32,
        in_chans: int = 1,
    ) -> None:
        super().__init__()
        if not widths:
            raise ValueError("widths must name at least one hidden layer, got none")
        check_sizes(**{f"widths[{index}]": width for index, width in enumerate(widths)})
        check_sizes(img_size=img_size, in_chans=in_chans)
        act = activation_named(activation)
        sizes = [in_chans * img_size * img_size, *widths]
        self.flatten = nn.Flatten()
        self.layers = nn.Sequential(*(HiddenLayer(m, n, act, skip=skips and m == n) for m, n in pairwise(sizes)))
        self.add_head(sizes[-1], num_classes, (in_chans, img_size, img_size), "layers.0.fc")

    def forward_features(self, x: Tensor) -> Tensor:
        """Activations of the last hidden layer, shape ``(batch, widths[-1])``."""
        return self.layers(self.flatten(x))  # type: ignore[no-any-return]


@register_model
def sao_mlp(pretrained: bool = False, depth: int = 50, width: int = 256, **options: Any) -> SaoMLP:
    """MLP-N: 1024-512-256-(256 x (N-1))-10 (thesis table 3.4).

    In general pixels-2W-W-(W x (N-1))-classes. With degree d on every layer but the last, that is
    ``(N + 2) W d + 10 W`` weights. The thesis gives no widths for its reallocation of one budget over depths, but
    W = 432 on 24 x 24 colour images, 1728-864-432-.., has all five parameter counts of its table 4.3: 2.43, 2.52,
    2.43, 2.38 and 2.36 million for N/d of 4/dense, 25/216, 50/108, 100/54 and 200/27.

    Args:
        pretrained: refused, there are no weights.
        depth: the thesis's N, so there are N + 1 hidden layers.
        width: W, of all hidden layers but the first, which has twice as many.
        **options: `SaoMLP`'s, but ``widths``.

    Returns:
        The network, with the weights that torch draws.

    Raises:
        ValueError: if ``depth`` or ``width`` is not a positive integer or ``pretrained`` is asked for.

    Example:
        >>> model = sao_mlp(depth=50)
        >>> sum(p.numel() for p in model.parameters() if p.dim() == 2)
        3869184
    """
    refuse_pretrained("sao_mlp", pretrained)
    check_sizes(depth=depth, width=width)
    if "widths" in options:
        raise ValueError("sao_mlp has its widths from depth and width; for others build sao_prune.models.SaoMLP")
    return SaoMLP(widths=(2 * width, *([width] * depth)), **without_timm_options(options))


@register_model
def sao_mlp7(pretrained: bool = False, **options: Any) -> SaoMLP:
    """MLP-7: 1024-100-(100 x 5)-10 (thesis table 3.3).

    Args:
        pretrained: refused, there are no weights.
        **options: `SaoMLP`'s.

    Returns:
        The network, with the weights that torch draws.

    Example:
        >>> len(sao_mlp7(activation="relu").layers)
        6
    """
    refuse_pretrained("sao_mlp7", pretrained)
    return SaoMLP(widths=(100,) * 6, **without_timm_options(options))
