"""Parameter and mask of a pruned tensor, wherever its module keeps them, and their product."""

from __future__ import annotations

from torch import Tensor, nn

from .._torch import replicated

#: Types of parameters that are neither fake nor sharded.
PLAIN = (nn.Parameter, Tensor)


def operands(module: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    """Parameter and mask of a pruned tensor.

    Raises:
        RuntimeError: if the tensor was replaced, or the module is no longer the one that was pruned.
    """
    if name in module._parameters:
        raise RuntimeError(
            f"{type(module).__name__}.{name} is pruned ({name}_orig * {name}_mask), and another parameter was put in "
            f"its place: call sao_prune.remove(model) or sao_prune.compact(model) before weights are replaced or "
            f"quantized (`del module.{name}` undoes the replacement)"
        )
    original = module._parameters.get(f"{name}_orig")
    mask = module._buffers.get(f"{name}_mask")
    if original is None or mask is None:
        # Sharding, replicas and parametrizations keep them as attributes.
        original, mask = getattr(module, f"{name}_orig", None), getattr(module, f"{name}_mask", None)
    if original is None or mask is None:
        missing = f"{name}_mask" if mask is None else f"{name}_orig"
        raise RuntimeError(
            f"{type(module).__name__} has the pruning hook of {name!r} but no {missing}: it was converted while it was "
            f"pruned; call sao_prune.remove(model) or sao_prune.compact(model) before converting or quantizing"
        )
    return original, mask


def product(original: Tensor, mask: Tensor) -> Tensor:
    """``original * mask``; where the parameter is distributed, its mask is taken to be the same on all ranks."""
    if type(original) not in PLAIN and hasattr(original, "device_mesh") and not hasattr(mask, "device_mesh"):
        mask = replicated(mask, original.device_mesh)
    return (mask if mask.dtype == original.dtype else mask.to(dtype=original.dtype)) * original
