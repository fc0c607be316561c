"""Gradients of entries that a mask leaves out: what the weight's gradient is as if it were dense.

The gradient of ``<name>_orig`` is masked, for it went through the product with the mask. That of the product itself,
which a module computes its output with, is not. It is written down for the passes of a single optimizer step.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn


class Listener:
    """Adds up the gradients of a masked weight.

    Attributes:
        gradient: their sum since it was made; ``None`` if there was none.
    """

    def __init__(self) -> None:
        self.gradient: Tensor | None = None

    def __call__(self, gradient: Tensor) -> None:
        """A hook of a tensor."""
        with torch.no_grad():
            gradient = gradient.detach().as_subclass(Tensor)
            self.gradient = gradient.clone() if self.gradient is None else self.gradient + gradient


_LISTENERS: WeakKeyDictionary[nn.Module, dict[str, Listener]] = WeakKeyDictionary()


def listen(module: nn.Module, name: str, listener: Listener) -> None:
    """From the next forward on tell a listener the dense gradients of a masked weight."""
    _LISTENERS.setdefault(module, {})[name] = listener


def stop_listening(module: nn.Module, name: str) -> None:
    """Undo `listen`, if it was done."""
    known = _LISTENERS.get(module, {})
    known.pop(name, None)
    if not known:
        _LISTENERS.pop(module, None)


def heard(module: nn.Module, name: str, weight: Tensor) -> Tensor:
    """A masked weight as it is, and its gradient told to whoever listens."""
    if _LISTENERS and weight.requires_grad:
        listener = _LISTENERS.get(module, {}).get(name)
        if listener is not None:
            weight.register_hook(listener)
    return weight
