"""The operator ``torch.ops.sao_prune.batch_norm``: a batch norm and the activation behind it, in single passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import functional
from .backends import cpu
from .backends import torch as plain
from .dispatch import Definition, define
from .operands import check_activation, check_averages, check_memory
from .permutation import dense, is_column_major

Found = Sequence[Tensor | None]


def _operands(inputs: Any, constants: Any, grad: Tensor | None = None) -> None:
    """Refuse what does not belong together.

    Raises:
        RuntimeError: telling what was given.
    """
    z: Tensor = inputs[0]
    numbers = *inputs[1:], *constants
    check_memory(z, *numbers, grad)
    check_averages(*constants)
    for t in numbers:
        if t is not None and t.shape != z.shape[1:2]:
            raise RuntimeError(f"expected one number a channel of {tuple(z.shape)}, got shape {tuple(t.shape)}")
    if grad is not None and grad.shape != z.shape:
        raise RuntimeError(f"expected a gradient of shape {tuple(z.shape)}, got {tuple(grad.shape)}")


def _laid(z: Tensor) -> Tensor:
    """In an order that the kernels know: planes, pixels or columns."""
    pixels = z.dim() == 4 and z.is_contiguous(memory_format=torch.channels_last)
    return z if pixels or (z.dim() == 2 and is_column_major(z)) else dense(z)


def _is_native(z: Tensor, *others: Tensor | None) -> bool:
    return z.dim() > 1 and z.numel() > 0 and cpu.ready(z, *others)


def _norm(inputs: Any, constants: Any, attributes: Any, keep: bool) -> Found:
    (z, gain, offset), (mean, variance), (activation, eps) = inputs, constants, attributes
    check_activation(activation)
    _operands(inputs, constants)
    room = cpu if _is_native(z, gain, offset, mean, variance) else plain
    return room.norm_forward(_laid(z), gain, offset, mean, variance, eps, activation)


def _norm_backward(
    grad: Tensor, inputs: Any, constants: Any, kept: Any, attributes: Any, mask: tuple[bool, ...]
) -> Found:
    (z, gain, offset), (_, mean, variance), (activation, eps) = inputs, kept, attributes
    _operands(inputs, (mean, variance), grad)
    room = cpu if _is_native(z, grad, gain, offset, mean, variance) else plain
    found = room.norm_backward(grad, _laid(z), gain, offset, mean, variance, constants[0] is None, eps, activation)
    return [g if need else None for g, need in zip(found, mask)]


def _norm_fake(inputs: Any, constants: Any, attributes: Any, keep: bool) -> Found:
    z = inputs[0]
    return torch.empty_like(_laid(z)), z.new_empty(z.shape[1]), z.new_empty(z.shape[1])


def _norm_reference(inputs: Any, constants: Any, attributes: Any) -> Tensor:
    (z, gain, offset), (mean, variance), (activation, eps) = inputs, constants, attributes
    y = torch.nn.functional.batch_norm(z, mean, variance, gain, offset, mean is None, 0.0, eps)
    return functional.ACTIVATIONS[activation](y)


batch_norm = define(
    Definition(
        "batch_norm",
        ("Tensor z", "Tensor? gain", "Tensor? offset"),
        ("Tensor? mean", "Tensor? variance"),
        ("str activation", "float eps"),
        2,
        _norm,
        _norm_backward,
        _norm_fake,
        _norm_reference,
    )
)
