"""What may follow a layer's result within its kernel, as the functions that torch calls for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .native import Norm

NORM = "batch_norm"
LINEAR = "linear"

_ACTS: dict[Any, str] = {
    F.relu: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    Tensor.relu: "relu",
    Tensor.relu_: "relu",
    F.gelu: "gelu",
    F.silu: "silu",
    F.tanh: "tanh",
    torch.tanh: "tanh",
    Tensor.tanh: "tanh",
}
_IN_PLACE = (torch.relu_, Tensor.relu_)

# What is known of a result before it is there.
_KNOWN = {
    *(
        getattr(Tensor, name).__get__
        for name in ("shape", "ndim", "dtype", "device", "layout", "requires_grad", "is_sparse", "is_quantized")
    ),
    *(getattr(Tensor, name).__get__ for name in ("is_cuda", "is_mkldnn", "is_meta")),
    Tensor.size,
    Tensor.dim,
    Tensor.stride,
    Tensor.numel,
    Tensor.nelement,
    Tensor.is_contiguous,
    Tensor.is_floating_point,
    Tensor.is_complex,
    torch.is_floating_point,
    torch.is_complex,
    torch.numel,
}


@dataclass(frozen=True)
class Step:
    """A function that may join a layer's kernel.

    Attributes:
        name: ``"batch_norm"`` or an activation.
        in_place: whether it changes the tensor that it is given.
        norm: the arguments of a norm.
    """

    name: str
    in_place: bool = False
    norm: Norm | None = None


_STEPS = {(name, in_place): Step(name, in_place) for name in set(_ACTS.values()) for in_place in (False, True)}


def step(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Step | None:
    """What a call does to its first argument, if that may join a layer's kernel."""
    if function is F.batch_norm:
        return Step(NORM, norm=_norm(*args[1:], **kwargs)) if args else None
    name = _ACTS.get(function)
    if name is None or not args or kwargs.keys() - {"inplace", "approximate"}:
        return None
    if name == "gelu" and kwargs.get("approximate", "none") != "none":
        return None
    return _STEPS[name, function in _IN_PLACE or bool(args[1:2] == (True,) or kwargs.get("inplace"))]


def _norm(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Norm:
    return Norm(running_mean, running_var, weight, bias, training, momentum, eps)


def does_nothing(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call is a dropout that gives back what it is given."""
    return function is F.dropout and _keeps(*args[1:], **kwargs)


def _keeps(p: float = 0.5, training: bool = True, inplace: bool = False) -> bool:
    return not training or p == 0


def is_known(function: Any) -> bool:
    """Whether a function tells only what is known of a result before it is there, such as its shape."""
    return function in _KNOWN
