"""Weights that accelerate keeps elsewhere: it loads a module's tensors inside its forward, after all pre-hooks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


def is_offloaded(module: nn.Module, tensor: Tensor) -> bool:
    """Whether a tensor is a placeholder whose values come with the module's forward."""
    return tensor.is_meta and "_hf_hook" in module.__dict__


def offloaded(module: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """The values of a tensor on the device that the module runs on; the tensor itself if it is not offloaded."""
    for hook in _hooks(module.__dict__.get("_hf_hook")):
        values = getattr(hook, "weights_map", None)
        if values is not None and tensor.is_meta:
            loaded: Tensor = values[name]
            return loaded.to(hook.execution_device)
    return tensor


def _hooks(hook: Any) -> Iterator[Any]:
    """A hook and those that it consists of."""
    if hook is not None:
        yield hook
        for part in getattr(hook, "hooks", ()):
            yield from _hooks(part)


class Unload:
    """Forward hook, for one pass: takes the masked weight away again, as accelerate does with its operands."""

    def __init__(self, name: str, placeholder: Tensor) -> None:
        self._name, self._placeholder = name, placeholder

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        module.__dict__[self._name] = self._placeholder
        for key, hook in list(module._forward_hooks.items()):
            if hook is self:
                del module._forward_hooks[key]
