"""Which tensors of a module are weights to prune, how each consists of matrices, and what forbids pruning one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize

from .._torch import ConvNd
from .weight import ALREADY_PRUNED, RAW, PrunableWeight

_GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}
_CELL_GATES = {nn.LSTMCell: 4, nn.GRUCell: 3, nn.RNNCell: 1}
_STANDARDISED = ("StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame", "WeightStandardizedConv2d")
# Experts that do not say so by `is_transposed`, but multiply inputs by weights (in, out).
_TRANSPOSED_EXPERTS = ("Llama4TextExperts", "AriaGroupedExpertsGemm")
_COMPUTED = "its {} is computed from other parameters (parametrization, weight or spectral norm)"
LAZY = "not initialised yet (lazy): give example_input=, or run the model once"


class Packed(nn.Module):
    """Base of layers whose parameters hold a weight in another form, block layers for one: none of them is to prune."""


class Stored(NamedTuple):
    """How a module stores one weight; see `PrunableWeight` for the fields."""

    tensor: str
    parts: int = 1
    transposed: bool = False
    stacked: bool = False


def stored_weights(module: nn.Module) -> Iterator[Stored]:
    """The weights of one module, by what kind of module it is; some of the names may be ``None`` there.

    Linear layers (those of transformers' ``Conv1D`` too, which stores ``(in, out)``), convolutions, the projections of
    `torch.nn.MultiheadAttention`, recurrent layers and cells, and experts held in one parameter.
    """
    if isinstance(module, nn.Linear):
        yield Stored("weight")
    elif isinstance(module, ConvNd):
        yield Stored("weight", module.groups, module.transposed)
    elif isinstance(module, nn.MultiheadAttention):
        yield Stored("in_proj_weight", 3)
        yield from (Stored(f"{letter}_proj_weight") for letter in "qkv")
    elif isinstance(module, nn.RNNBase):
        gates = _GATES.get(module.mode, 1)
        for name in module._flat_weights_names:
            if name.startswith("weight_"):
                yield Stored(name, 1 if name.startswith("weight_hr") else gates)
    elif isinstance(module, nn.RNNCellBase):
        gates = next((g for cell, g in _CELL_GATES.items() if isinstance(module, cell)), 1)
        yield Stored("weight_ih", gates)
        yield Stored("weight_hh", gates)
    elif _is_transposed_linear(module):
        yield Stored("weight", transposed=True)
    else:
        yield from _experts(module)


def _is_transposed_linear(module: nn.Module) -> bool:
    """Whether it is transformers' ``Conv1D``, a linear layer; a model can only hold one if that library is loaded."""
    library = sys.modules.get("transformers.pytorch_utils")
    kind = getattr(library, "Conv1D", None)
    return isinstance(kind, type) and isinstance(module, kind)


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds the experts of a mixture, by its class's name: ``MixtralExperts``, ``Qwen3MoeExperts``."""
    names = [c.__name__ for c in type(module).__mro__]
    return any(n.endswith("Experts") or n in _TRANSPOSED_EXPERTS for n in names) or "DbrxExpertGLU" in names


def _experts(module: nn.Module) -> Iterator[Stored]:
    """Parameters ``(experts, out, in)``, one matrix an expert; ``(experts, in, out)`` where the class is known to."""
    if not is_experts(module):
        return
    names = [c.__name__ for c in type(module).__mro__]
    if "DbrxExpertGLU" in names:
        yield from (Stored(t, module.moe_num_experts, t == "w2") for t in ("w1", "v1", "w2"))  # type: ignore[arg-type]
        return
    transposed = getattr(module, "is_transposed", False) is True or any(n in _TRANSPOSED_EXPERTS for n in names)
    tensors = {unmasked_name(module, name): parameter for name, parameter in module._parameters.items()}
    # Where the parameter is computed from others, its mask is still there.
    masks = {name.removesuffix("_mask"): mask for name, mask in module._buffers.items() if name.endswith("_mask")}
    for tensor, values in {**masks, **tensors}.items():
        if values is not None and values.dim() == 3:
            yield Stored(tensor, values.shape[0], transposed, stacked=True)


def is_standardised(module: nn.Module) -> bool:
    """Whether a module is a convolution that standardises its weight, by its class's name in timm or transformers.

    Args:
        module: any module.

    Returns:
        Whether it does.

    Example:
        >>> is_standardised(nn.Conv2d(4, 4, 3))
        False
    """
    return isinstance(module, nn.Conv2d) and any(c.__name__ in _STANDARDISED for c in type(module).__mro__)


def known_weights(path: str, module: nn.Module) -> Iterator[PrunableWeight]:
    """Records of one module's weights, with the reason where one cannot be pruned."""
    kind = type(module).__name__
    for stored in stored_weights(module):
        weight = parameter_of(module, stored.tensor)
        if weight is None:
            mask = module._buffers.get(f"{stored.tensor}_mask")
            if mask is not None and parametrize.is_parametrized(module, f"{stored.tensor}_orig"):
                plain = kind.removeprefix("Parametrized")
                yield PrunableWeight(
                    path, kind=plain, shape=tuple(mask.shape), reason=ALREADY_PRUNED, **stored._asdict()
                )
            elif parametrize.is_parametrized(module, stored.tensor) or hasattr(module, f"{stored.tensor}_g"):
                yield PrunableWeight(path, stored.tensor, kind, (), reason=_COMPUTED.format(stored.tensor))
            continue
        lazy = isinstance(weight, nn.parameter.UninitializedParameter)
        shape = () if lazy else tuple(weight.shape)
        found = PrunableWeight(path, kind=kind, shape=shape, **stored._asdict(), standardised=is_standardised(module))
        yield _with_reason(module, weight, found)


def raw_weight(path: str, tensor: str, module: nn.Module, parameter: nn.Parameter) -> PrunableWeight:
    """The record of a parameter in no known layer: a matrix or, with more than two dimensions, a stack of them."""
    shape = tuple(parameter.shape)
    stacked = len(shape) > 2
    parts = prod(shape[:-2]) if stacked else 1
    return _with_reason(module, parameter, PrunableWeight(path, tensor, RAW, shape, parts, stacked=stacked))


def parameter_of(module: nn.Module, tensor: str) -> nn.Parameter | None:
    """The parameter behind a name, also where torch's prune has put it under ``<name>_orig``."""
    own = module._parameters.get(tensor)
    return own if own is not None else module._parameters.get(f"{tensor}_orig")


def unmasked_name(module: nn.Module, name: str) -> str:
    """The name that a parameter had before torch's prune; its own, if it is not pruned."""
    plain = name.removesuffix("_orig")
    return plain if f"{plain}_mask" in module._buffers else name


def _with_reason(module: nn.Module, weight: nn.Parameter, found: PrunableWeight) -> PrunableWeight:
    return replace(found, reason=_obstacle(module, weight, found))


def _obstacle(module: nn.Module, weight: nn.Parameter, found: PrunableWeight) -> str | None:
    if not found.shape:
        return LAZY
    if found.tensor not in module._parameters:
        masked = f"{found.tensor}_mask" in module._buffers
        return ALREADY_PRUNED if masked else _COMPUTED.format(found.tensor)
    if not weight.is_floating_point():
        return f"not a floating-point weight ({weight.dtype})"
    if len(found.shape) < 2 or not found.parts or (not found.stacked and found.shape[0] % found.parts):
        return f"not a matrix: shape {found.shape}"
    if isinstance(module, ConvNd) and found.parts > 1 and min(found.matrix) == 1:
        return "depthwise"
    if min(found.matrix) < 2:
        return f"too small: {found.matrix[0]} x {found.matrix[1]}"
    if found.stacked and not _has_view(weight, found):
        return "its matrices lie scattered in memory: make it contiguous first"
    return None


def _has_view(weight: nn.Parameter, found: PrunableWeight) -> bool:
    try:
        with torch.no_grad():
            found.matrices(weight)
    except RuntimeError:
        return False
    return True
