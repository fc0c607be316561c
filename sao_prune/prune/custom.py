"""Masks of the user's own on one tensor of one module."""

from __future__ import annotations

from torch import Tensor, nn

from .attachment import Snapshot, check_writable, last_hook, stored
from .hooks import MaskPruning, is_pruned_tensor, refresh


class CustomFromMaskPruning(MaskPruning):
    """A given mask on one tensor; `custom_from_mask` is the functional form."""

    @classmethod
    def apply(  # type: ignore[override]
        cls, module: nn.Module, name: str, mask: Tensor
    ) -> CustomFromMaskPruning:
        """Prune ``module.<name>`` where ``mask`` is zero."""
        original = _target(module, name, mask)
        snapshot = Snapshot([module])
        try:
            cls.register(module, name, mask.detach().to(original, copy=True))
            refresh(module)
        except BaseException:
            snapshot.restore()
            raise
        return last_hook(cls, module, name)


def custom_from_mask(module: nn.Module, name: str, mask: Tensor) -> nn.Module:
    """Prune one tensor of a module with a mask of your own, in place, as `torch.nn.utils.prune.custom_from_mask` does.

    What torch's own lacks: the model can be copied, the mask is kept by `sao_prune.save`, and if its zeros leave
    complete blocks, `sao_prune.compact` runs them.

    Args:
        module: any module.
        name: one of its parameters.
        mask: zeros and ones, of the parameter's shape; joined with a mask that is there already.

    Returns:
        The module, with ``<name>_orig`` and ``<name>_mask`` as `torch.nn.utils.prune` has them.

    Raises:
        TypeError: if ``mask`` is no tensor.
        ValueError: if there is no such parameter, it cannot be written, or the mask has another shape or other values.

    Example:
        >>> import torch, sao_prune
        >>> layer = sao_prune.prune.custom_from_mask(torch.nn.Linear(4, 4), "weight", torch.eye(4))
        >>> int(layer.weight_mask.sum())
        4
    """
    CustomFromMaskPruning.apply(module, name, mask)
    return module


def _target(module: nn.Module, name: str, mask: Tensor) -> Tensor:
    """The parameter that a mask of the user's own is for, as it is stored.

    Raises:
        TypeError: if the mask is no tensor, or the module none.
        ValueError: if it does not go with the parameter.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(module).__name__}")
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor of zeros and ones, got {type(mask).__name__}")
    if module._parameters.get(name) is None and not is_pruned_tensor(module, name):
        known = ", ".join(key for key, value in module._parameters.items() if value is not None) or "none"
        raise ValueError(f"{type(module).__name__} has no parameter {name!r}; it has: {known}")
    original = stored(module, name)
    check_writable(name, original)
    if mask.shape != original.shape:
        raise ValueError(f"the mask must have the shape of {name}, {tuple(original.shape)}, got {tuple(mask.shape)}")
    if mask.is_meta or not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("a mask holds only zeros and ones; got other values (a weight? pass `weight != 0`)")
    return original
