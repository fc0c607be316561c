"""The optimizers that train a model: within their wrappers, and what they keep of a parameter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_DEEPEST = 16  # wrappers around an optimizer


def optimizers_of(given: Any) -> tuple[torch.optim.Optimizer, ...]:
    """What trains: the optimizers within wrappers, each once.

    Args:
        given: an optimizer, a wrapper of one, several of them in a list, or ``None``.

    Raises:
        TypeError: for anything else.
    """
    found = () if given is None else _optimizers_in(given)
    return tuple({id(optimizer): optimizer for optimizer in found}.values())


def _optimizers_in(given: Any) -> tuple[torch.optim.Optimizer, ...]:
    inner = given
    for _ in range(_DEEPEST):
        inner = getattr(inner, "optimizer", None) or getattr(inner, "_base_optimizer", None) or inner
    if isinstance(inner, Iterable) and not isinstance(inner, str | Mapping | Tensor):
        return tuple(optimizer for one in inner for optimizer in _optimizers_in(one))
    if isinstance(inner, type) or not isinstance(getattr(inner, "state", None), Mapping):
        raise TypeError(
            "step takes a torch optimizer, a wrapper of one, or several of them in a list, whose states it makes zero "
            f"where entries vanish; got {given!r}"
        )
    return (inner,)


def forget_curvature(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Begin L-BFGS anew: its history is of a function of other entries, and leads back to them."""
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.state.clear()


def state_of(optimizers: Sequence[torch.optim.Optimizer], parameter: nn.Parameter) -> list[Tensor]:
    """The optimizers' tensors of a parameter's own shape."""
    states = [optimizer.state.get(parameter) or {} for optimizer in optimizers]
    return [v for state in states for v in state.values() if isinstance(v, Tensor) and v.shape == parameter.shape]
