"""Lazy layers: they get their shapes from an example input."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from .trace import copied, evaluating, run


def _is_lazy(model: nn.Module) -> bool:
    """Whether a model has parameters without a shape."""
    return any(isinstance(p, nn.parameter.UninitializedParameter) for p in model.parameters())


def initialised(model: nn.Module, example_input: Any) -> nn.Module:
    """The model itself or, where it has lazy layers and an example input is given, a copy that has run on it.

    Args:
        model: any module; it stays as it is.
        example_input: as for `call`, or ``None``.

    Returns:
        The model or the copy.

    Raises:
        ValueError: if the model cannot be copied, or fails on the example input.

    Example:
        >>> net = nn.Sequential(nn.LazyLinear(4))
        >>> initialised(net, torch.ones(1, 3))[0].weight.shape, _is_lazy(net)
        (torch.Size([4, 3]), True)
    """
    if example_input is None or not _is_lazy(model):
        return model
    # torch copies lazy parameters, but not lazy buffers.
    lazy = [b for b in model.buffers() if isinstance(b, nn.parameter.UninitializedBuffer)]
    empty: Any = nn.parameter.UninitializedBuffer
    memo = {id(b): empty(device=b.device, dtype=b.dtype) for b in lazy}
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} has lazy layers and cannot be copied ({error}): run it once first"
        ) from error
    with torch.random.fork_rng():
        initialise_(copied, example_input)
    return copied


def initialise_(model: nn.Module, example_input: Any) -> None:
    """Run a model with lazy layers once, in eval mode, so that they are lazy no more; others are left as they are.

    Args:
        model: any module, changed in place.
        example_input: as for `call`; without one nothing is done.

    Raises:
        ValueError: if the model fails on the example input.

    Example:
        >>> net = nn.Sequential(nn.LazyLinear(4))
        >>> initialise_(net, torch.ones(1, 3))
        >>> _is_lazy(net)
        False
    """
    if example_input is not None and _is_lazy(model):
        with evaluating(model), torch.no_grad():
            run(model, copied(example_input))
