"""What a model does on an example input: which layers it calls, with what, and what comes out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._torch import tree_leaves, without_functions
from ..discovery import call
from ..discovery.trace import copied, evaluating, keeping_buffers, run
from .modules import BlockModule, NativeMaxPool2d

# Marks a dense layer whose weight lay otherwise before.
_CHANGED = "_was_contiguous"


@dataclass(frozen=True)
class Calls:
    """Inputs of the first call of each layer and the number of its calls, by the id of the module; of recurrent layers
    all arguments."""

    output: Any = None
    inputs: dict[int, Tensor] = field(default_factory=dict)
    count: dict[int, int] = field(default_factory=dict)
    arguments: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)


def record_calls(model: nn.Module, watched: Iterable[nn.Module], example_input: Any) -> Calls:
    """Run a model once in eval mode without gradients; modes, buffers, random state and the input are kept.

    Raises:
        ValueError: if the model fails on the example input.
    """
    inputs: dict[int, Tensor] = {}
    count: dict[int, int] = {}
    arguments: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        if isinstance(module, nn.RNNBase):
            arguments.setdefault(id(module), (args, named))
        x = args[0] if args else next(iter(named.values()), None)
        if isinstance(x, Tensor):
            # Only shape, type and memory order matter: keep no activation alive. Nobody is to take it for a use.
            with without_functions():
                inputs.setdefault(id(module), torch.empty_like(x, device="meta"))
        count[id(module)] = count.get(id(module), 0) + 1

    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in watched]
    try:
        with _evaluating(model), torch.no_grad():
            output = run(model, copied(example_input))
    finally:
        for hook in hooks:
            hook.remove()
    return Calls(output, inputs, count, arguments)


def run_model(model: nn.Module, example_input: Any, mode: Literal["train", "infer"]) -> None:
    """Run a model once, with ``"train"`` backwards too; nothing of the model changes, gradients included."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    with _evaluating(model), torch.set_grad_enabled(mode == "train"):
        output = call(model, copied(example_input))
        parts = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
        if parts and parameters:
            torch.autograd.grad(parts, parameters, [torch.ones_like(t) for t in parts], allow_unused=True)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode; every module's own mode, buffers and the random state come back."""
    with evaluating(model), keeping_buffers(model), torch.random.fork_rng(devices=[]):
        yield


def to_channels_last(model: nn.Module) -> list[nn.Module]:
    """Lay the dense 2-D convolution weights out channels last, in place, and let the kernels pool; returns the modules
    that were not so before.

    Weights that are shared with other processes stay where they are.
    """
    changed: list[nn.Module] = []
    for module in model.modules():
        weight = module._parameters.get("weight")
        if NativeMaxPool2d.suits(module):
            module.__class__ = NativeMaxPool2d
            changed.append(module)
        if isinstance(module, nn.Conv2d) and not isinstance(module, BlockModule) and weight is not None:
            if weight.is_contiguous(memory_format=torch.channels_last) or weight.is_shared():
                continue
            module.__dict__[_CHANGED] = True
            changed.append(module)
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    return changed


def to_contiguous(changed: Iterable[nn.Module]) -> None:
    """Undo `to_channels_last` for those of the layers that it has changed."""
    for module in changed:
        weight = module._parameters.get("weight")
        if type(module) is NativeMaxPool2d:
            module.__class__ = nn.MaxPool2d  # type: ignore[assignment]
        if module.__dict__.pop(_CHANGED, False) and weight is not None:
            weight.data = weight.data.contiguous()
