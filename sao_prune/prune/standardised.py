"""Masks on convolutions that standardise their weight, as those of BiT and NF-ResNets do.

Such a layer computes with ``g * (w - mean(w)) / sqrt(var(w) + eps)``, mean and variance over the fan-in of each output.
With zeros from a mask in ``w`` that would bring the zeros back, as ``-mean(w)``. Here the mask acts after
standardising, and the statistics are those of the kept entries alone: the layer is given

    ``c = mask * (w - mean of w over the kept entries)``,

whose mean over the whole fan-in is zero, so that its own forward only divides it by ``sqrt(sum(c^2) / N + eps)``, ``N``
the whole fan-in. What is dropped stays zero (to within rounding), and every output has the same sum of squares as in
the dense layer, ``N`` for StdConv and ``(gamma * gain)^2`` for ScaledStdConv: the scale is that of the kept fan-in. It
takes nothing but the kept entries and ``N``, so a compact layer computes the same from its blocks.

Outside of forward ``weight`` is ``weight_orig * weight_mask``, as everywhere. Standardising a layer with orthogonal
blocks leaves them nearly, not exactly, orthogonal up to a factor: rows lose their mean.

Reference: weight standardization (Qiao et al., 2019, https://arxiv.org/abs/1903.10520), scaled in NF-ResNets (Brock et
al., 2021, https://arxiv.org/abs/2101.08692).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod, PruningContainer

from ..discovery import is_standardised
from .derived import place
from .listening import heard
from .operands import operands


def _centred(weight: Tensor, mask: Tensor) -> Tensor:
    """``mask * (weight - mean)``, the mean of each output over its kept entries.

    Args:
        weight: ``(m, n, *kernel)``.
        mask: of the same shape.

    Example:
        >>> import torch
        >>> _centred(torch.tensor([[1.0, 3.0, 7.0]]), torch.tensor([[1.0, 1.0, 0.0]])).tolist()
        [[-1.0, 1.0, 0.0]]
    """
    mask = mask.to(weight)
    over = tuple(range(1, weight.dim()))
    count = mask.sum(over, keepdim=True).clamp(min=1)
    return mask * (weight - (mask * weight).sum(over, keepdim=True) / count)


class Centring:
    """Hook of a layer that standardises its weight: `_centred` in its place for the time of each forward."""

    def __init__(self, tensor: str) -> None:
        self.tensor = tensor
        self._product: Tensor | None = None

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        """Forward pre-hook, after the one that multiplies weight and mask.

        Raises:
            RuntimeError: if another pruning hook comes after it.
        """
        hooks = list(module._forward_pre_hooks.values())
        later = [h for h in hooks[hooks.index(self) :] if isinstance(h, BasePruningMethod)]
        if any(isinstance(h, PruningContainer) or type(h).__module__.startswith("torch.") for h in later):
            raise RuntimeError(
                f"{type(module).__name__}.{self.tensor} was pruned again by a function of torch, which knows nothing "
                "of its standardising: call sao_prune.remove(model) first, or take the functions of sao_prune.prune"
            )
        weight = module._parameters.get(self.tensor)
        if weight is not None:
            # Without a mask, after `remove`. An attribute goes before a parameter of the same name.
            module.__dict__[self.tensor] = _centred(weight, _support(weight))
        else:
            self._product = getattr(module, self.tensor)
            centre = _with_graph(*operands(module, self.tensor))
            place(module, self.tensor, heard(module, self.tensor, centre))
        if later:
            # A pruning hook of ours that has just moved behind this one, and has run.
            for key in [key for key, hook in module._forward_pre_hooks.items() if hook is self]:
                module._forward_pre_hooks[key] = module._forward_pre_hooks.pop(key)

    def restore(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """Forward hook: outside of forward the weight is the parameter, or the product of weight and mask."""
        if self.tensor in module._parameters:
            module.__dict__.pop(self.tensor, None)
        elif self._product is not None:
            place(module, self.tensor, self._product)
            self._product = None


def _with_graph(weight: Tensor, mask: Tensor) -> Tensor:
    """The centred weight, with a graph where the parameter asks for one: another thread may be training."""
    if torch.is_grad_enabled() or torch.is_inference_mode_enabled() or not weight.requires_grad:
        return _centred(weight, mask)
    with torch.enable_grad():
        return _centred(weight, mask)


def _support(weight: Tensor) -> Tensor:
    """Kernels that are not zero, as a mask."""
    units = (weight.detach() != 0).flatten(2).any(2)
    return units.view(*units.shape, *(1,) * (weight.dim() - 2)).expand_as(weight)


def follow_standardising(module: nn.Module, tensor: str) -> None:
    """Let the mask of a layer that standardises its weight act after standardising; others are left as they are."""
    if tensor != "weight" or not is_standardised(module):
        return
    _forget_standardising(module, tensor)
    hook = Centring(tensor)
    module.register_forward_pre_hook(hook)
    module.register_forward_hook(hook.restore)


def _forget_standardising(module: nn.Module, tensor: str) -> None:
    """Remove the hooks of `follow_standardising`."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            owner = getattr(hook, "__self__", hook)
            if isinstance(owner, Centring) and owner.tensor == tensor:
                del hooks[key]


@torch.no_grad()
def bake_standardising(module: nn.Module, tensor: str, mask: Tensor, *, keep_support: bool = False) -> None:
    """Give a layer whose mask was removed a plain weight with which its own forward computes what it did.

    Args:
        module: any layer; nothing is done where it does not standardise.
        tensor: the parameter, already a plain one.
        mask: that it had.
        keep_support: leave the hooks on, so that zeros stay zeros after standardising while the others are trained.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> bake_standardising(layer, "weight", torch.ones(2, 2))
    """
    if tensor == "weight" and is_standardised(module):
        weight = module._parameters[tensor]
        assert weight is not None
        weight.copy_(_centred(weight, mask))
        if not keep_support:
            _forget_standardising(module, tensor)
