"""Options that the networks share, checked before a layer is built."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from numbers import Real

from torch import nn

from ..naming import nearest

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "linear": nn.Identity,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
}


def activation_named(name: str) -> Callable[[], nn.Module]:
    """What makes a module of this activation, none of them in place.

    Raises:
        ValueError: for a name that is not in `ACTIVATIONS`.

    Example:
        >>> activation_named("relu")()
        ReLU()
    """
    check_choice("activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]


def check_choice(option: str, value: object, allowed: Iterable[str]) -> None:
    """Refuse a name that is not among those allowed, with the nearest one that is.

    Raises:
        ValueError: for any other value.
    """
    names = list(allowed)
    if value not in names:
        raise ValueError(f"unknown {option} {value!r}{nearest(value, names)}; allowed: {', '.join(names)}")


def check_sizes(**sizes: int) -> None:
    """Refuse sizes that are not positive integers.

    Raises:
        ValueError: for the first of them.

    Example:
        >>> check_sizes(depth=8, width=0)
        Traceback (most recent call last):
        ...
        ValueError: width must be a positive integer, got 0
    """
    for option, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{option} must be a positive integer, got {value!r}")


def check_img_size(img_size: int, why: str, *, ge: int = 1, multiple: int = 1) -> None:
    """Refuse heights and widths of images that a network cannot take.

    Args:
        img_size: height and width, in pixels.
        why: the reason, for the message.
        ge: the smallest size.
        multiple: what the size must be a multiple of.

    Raises:
        ValueError: with what is allowed and why.
    """
    check_sizes(img_size=img_size)
    if img_size < ge:
        raise ValueError(f"img_size must be at least {ge} ({why}), got {img_size}")
    if img_size % multiple:
        raise ValueError(f"img_size must be a multiple of {multiple} ({why}), got {img_size}")


def check_rate(option: str, value: float) -> None:
    """Refuse what is no share in [0, 1).

    Raises:
        ValueError: for any other value.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) < 1:
        raise ValueError(f"{option} must be a number in [0, 1), got {value!r}")
