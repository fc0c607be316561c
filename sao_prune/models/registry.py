"""timm's model registry, used where timm is installed and not touched where it is not."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, TypeVar

from torch import nn

Entry = TypeVar("Entry", bound=Callable[..., nn.Module])

# What timm.create_model hands to every entry point; none of it means anything without pretrained weights.
_TIMM_ONLY = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")


def register_model(entry: Entry) -> Entry:
    """Make ``timm.create_model(entry.__name__)`` work, if timm is installed; returns ``entry`` unchanged.

    Example:
        >>> @register_model
        ... def tiny_linear(pretrained: bool = False, **options: object) -> nn.Module:
        ...     return nn.Linear(2, 2)
    """
    if find_spec("timm") is not None:
        from timm.models import register_model as timm_register

        timm_register(entry)
    return entry


def without_timm_options(options: dict[str, Any]) -> dict[str, Any]:
    """The options that a model's constructor should see: all but those that timm adds to every call."""
    return {key: value for key, value in options.items() if key not in _TIMM_ONLY}


def refuse_pretrained(name: str, pretrained: bool) -> None:
    """No network of the experiments has published weights.

    Raises:
        ValueError: if ``pretrained`` is true.
    """
    if pretrained:
        raise ValueError(f"{name} has no pretrained weights; create it with pretrained=False and train it")
