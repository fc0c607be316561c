"""Zeros that stay zero after pruning was made permanent."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._torch import identity
from .hooks import RefreshChildren


class FrozenZeros(RefreshChildren):
    """Masks the gradient of one parameter of a module, also in copies of it and after conversions.

    A gradient hook belongs to one tensor object: copying, unpickling and `torch.utils.swap_tensors`, with which
    ``module.to`` may replace parameters, lose it. As a forward pre-hook of the module this sees that it is there. It is
    of `RefreshChildren`'s kind so that it counts as a hook of this library, which `compact` takes along.
    """

    def __init__(self, name: str, mask: Tensor) -> None:
        self.name, self._kept = name, mask.detach() != 0
        self._watched = 0

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        if torch.compiler.is_compiling():
            return
        weight = module._parameters.get(self.name)
        if weight is None or not weight.requires_grad or weight.shape != self._kept.shape:
            return
        if self._watched == identity(weight):
            return
        self._watched = identity(weight)
        hooks = weight._backward_hooks or {}
        if any(hook == self._mask_gradient for hook in hooks.values()):
            # Swapped: the hooks are listed, but torch calls those of the tensor that was taken in exchange.
            weight._backward_hooks = hooks
        else:
            weight.register_hook(self._mask_gradient)

    def holds(self, weight: Tensor) -> bool:
        """Whether a parameter has only zeros where its gradient is masked."""
        return weight.shape == self._kept.shape and not bool(
            (weight.detach() != 0)[~self._kept.to(weight.device)].any()
        )

    def let_go(self, module: nn.Module) -> None:
        """Mask its gradient no more, until it is called again."""
        hooks = getattr(module._parameters.get(self.name), "_backward_hooks", None) or {}
        for key in [key for key, hook in hooks.items() if hook == self._mask_gradient]:
            del hooks[key]
        self._watched = 0

    def _mask_gradient(self, gradient: Tensor) -> Tensor:
        if self._kept.device != gradient.device:
            self._kept = self._kept.to(gradient.device)
        return gradient * self._kept


def freeze(module: nn.Module, name: str, mask: Tensor) -> None:
    """Keep one parameter's zeros through training: its gradient is zero where the mask is.

    Args:
        module: whose parameter it is.
        name: of the parameter.
        mask: zeros where its gradient is to be zero, of its shape.

    Example:
        >>> layer = nn.Linear(2, 2, bias=False)
        >>> freeze(layer, "weight", torch.eye(2))
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> layer.weight.grad.tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    hook = FrozenZeros(name, mask)
    module.register_forward_pre_hook(hook)
    hook(module, ())


def thaw(module: nn.Module, name: str) -> None:
    """Undo `freeze`, if it was called: a parameter that gets a mask anew trains wherever that is one.

    Args:
        module: whose parameter it is.
        name: of the parameter.

    Example:
        >>> layer = nn.Linear(2, 2, bias=False)
        >>> freeze(layer, "weight", torch.eye(2))
        >>> thaw(layer, "weight")
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> layer.weight.grad.tolist()
        [[1.0, 1.0], [1.0, 1.0]]
    """
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, FrozenZeros) and hook.name == name:
            hook.let_go(module)
            del module._forward_pre_hooks[key]


def thaw_others(model: nn.Module) -> None:
    """Undo `freeze` for the parameters of a model that have other values by now than zeros there.

    Args:
        model: which has loaded a state, say.

    Example:
        >>> layer = nn.Linear(2, 2, bias=False)
        >>> freeze(layer, "weight", torch.eye(2))
        >>> thaw_others(layer)
        >>> len(layer._forward_pre_hooks)
        0
    """
    for module in model.modules():
        for hook in [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, FrozenZeros)]:
            weight = module._parameters.get(hook.name)
            if weight is not None and not hook.holds(weight):
                thaw(module, hook.name)
