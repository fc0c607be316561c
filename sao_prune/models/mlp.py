"""Multilayer perceptrons of any depth: MLP-N and MLP-7 (thesis tables 3.3 and 3.4)."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from .registry import refuse_pretrained, register_model, without_timm_options

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "linear": nn.Identity,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
}


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


class SaoMLP(nn.Module):
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
        _check_sizes(widths=widths, num_classes=[num_classes], img_size=[img_size], in_chans=[in_chans])
        act = _activation(activation)
        sizes = [in_chans * img_size * img_size, *widths]
        self.flatten = nn.Flatten()
        self.layers = nn.Sequential(*(HiddenLayer(m, n, act, skip=skips and m == n) for m, n in pairwise(sizes)))
        self.num_features = self.head_hidden_size = sizes[-1]
        self.num_classes = num_classes
        self.head: nn.Module = nn.Linear(sizes[-1], num_classes)
        self.pretrained_cfg = {
            "input_size": (in_chans, img_size, img_size),
            "num_classes": num_classes,
            "first_conv": "layers.0.fc",
            "classifier": "head",
        }

    def get_classifier(self) -> nn.Module:
        """The classifier, as timm asks for it."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier for ``num_classes`` classes; 0 leaves the features as they are (timm's convention)."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        """Activations of the last hidden layer, shape ``(batch, widths[-1])``."""
        return self.layers(self.flatten(x))  # type: ignore[no-any-return]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of features, or the features themselves if ``pre_logits``."""
        return x if pre_logits else self.head(x)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


@register_model
def sao_mlp(pretrained: bool = False, depth: int = 50, **options: Any) -> SaoMLP:
    """MLP-N: 1024-512-256-(256 x (N-1))-10 (thesis table 3.4); ``depth`` is N, other options are `SaoMLP`'s.

    Raises:
        ValueError: if ``depth`` is not a positive integer or ``pretrained`` is asked for.

    Example:
        >>> model = sao_mlp(depth=50)
        >>> sum(p.numel() for p in model.parameters() if p.dim() == 2)
        3869184
    """
    refuse_pretrained("sao_mlp", pretrained)
    if not isinstance(depth, int) or isinstance(depth, bool) or depth < 1:
        raise ValueError(f"depth must be a positive integer, got {depth!r}")
    return SaoMLP(widths=(512, *([256] * depth)), **without_timm_options(options))


@register_model
def sao_mlp7(pretrained: bool = False, **options: Any) -> SaoMLP:
    """MLP-7: 1024-100-(100 x 5)-10 (thesis table 3.3); options are `SaoMLP`'s.

    Example:
        >>> len(sao_mlp7(activation="relu").layers)
        6
    """
    refuse_pretrained("sao_mlp7", pretrained)
    return SaoMLP(widths=(100,) * 6, **without_timm_options(options))


def _activation(name: str) -> Callable[[], nn.Module]:
    if name not in ACTIVATIONS:
        near = difflib.get_close_matches(str(name), ACTIVATIONS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown activation {name!r}; allowed: {', '.join(ACTIVATIONS)}{hint}")
    return ACTIVATIONS[name]


def _check_sizes(**sizes: Sequence[int]) -> None:
    for key, values in sizes.items():
        if not values or not all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in values):
            raise ValueError(f"{key} must be positive whole numbers, got {list(values)}")
