"""The order in which a model uses its parameters, observed in one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map


class _UseRecorder(TorchFunctionMode):
    """Notes the first use of each watched tensor in any torch function, whoever calls it."""

    def __init__(self, watched: Iterable[Tensor]) -> None:
        super().__init__()
        self._watched = {id(t) for t in watched}
        self.order: list[int] = []

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") != "__get__":
            for leaf in tree_leaves((args, kwargs)):
                if id(leaf) in self._watched:
                    self._watched.discard(id(leaf))
                    self.order.append(id(leaf))
        return func(*args, **(kwargs or {}))


def call(model: nn.Module, example_input: Any) -> Any:
    """Run a model on a tensor, a tuple of positional or a mapping of keyword arguments, moved to its device."""
    device = next((t.device for t in model.parameters()), torch.device("cpu"))
    moved = tree_map(lambda t: t.to(device) if isinstance(t, Tensor) else t, example_input)
    if isinstance(moved, Mapping):
        return model(**moved)
    return model(*moved) if isinstance(moved, (tuple, list)) else model(moved)


def first_use_order(model: nn.Module, parameters: list[nn.Parameter], example_input: Any) -> list[int]:
    """The ids of ``parameters`` in the order of their first use; unused ones are missing.

    Runs the model once in eval mode without gradients and restores every module's mode.

    Raises:
        ValueError: if the model fails on the example input.
    """
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        devices = sorted({p.device.index or 0 for p in parameters if p.is_cuda})
        with torch.random.fork_rng(devices=devices), torch.no_grad(), _UseRecorder(parameters) as recorder:
            call(model, example_input)
    except Exception as error:
        raise ValueError(f"the model does not run on the example input: {error}") from error
    finally:
        for module, mode in training.items():
            module.training = mode
    return recorder.order
