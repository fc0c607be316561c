"""The operators ``torch.ops.sao_prune``: `functional`, computed by the backend that suits the operands.

Compilers leave an operator whole and every dispatch mode sees it. A layer's sets are tensors among its operands, so the
result always follows the buffers that the call is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import functional
from .backends import cpu, cuda, registry
from .backends import torch as plain
from .dispatch import Definition, Operator, define
from .functional import MATRIX, Geometry, keeps_derivative
from .layout import Layout, layout_of
from .operands import (
    check_activation,
    check_averages,
    check_memory,
    check_results,
    packed,
    packed_behind,
    unpacked,
)
from .permutation import is_channels_last, is_column_major

Found = Sequence[Tensor | None]


def _is_native(backend: str, x: Tensor, weight: Tensor, geometry: Geometry, *others: Tensor | None) -> bool:
    """Whether the compiled kernels serve such a product."""
    if backend != "cpu" or not cpu.ready(x, weight, *others):
        return False
    return not geometry.stride or cpu.suits(weight.shape[3:], geometry, is_channels_last(x))


def backend_for(backend: str, x: Tensor, weight: Tensor, geometry: Geometry, *others: Tensor | None) -> Any:
    """The backend that serves these operands: one that a user has registered, or one of the library's."""
    own = registry.suited(x, weight, geometry, *others)
    if own is not None:
        return own
    if _is_native(backend, x, weight, geometry, *others):
        return cpu
    return cuda if (x.is_cuda or backend == "triton") and cuda.suits(x, weight, geometry, *others) else plain


# ---- block_linear(x, blocks, bias, row_set, col_set, activation, backend) -------------------------------------------
# ---- block_conv(x, blocks, bias, row_set, col_set, activation, backend, stride, padding, dilation, merge) -----------


def _where(sets: Any, options: Sequence[Any]) -> tuple[Layout, Geometry]:
    """Layout and geometry by the sets and ``stride, padding, dilation, merge``, which a linear layer has not."""
    rows, cols = sets
    if not options:
        return layout_of(rows, cols), MATRIX
    return layout_of(rows, cols, options[3]), Geometry.of(*options[:3])


def _product(inputs: Any, sets: Any, attributes: Any, keep: bool) -> Found:
    (x, blocks, bias), (activation, backend, *options) = inputs, attributes
    check_activation(activation)
    layout, where = _where(sets, options)
    weight = packed(layout, x, blocks, bias, where)
    room = backend_for(backend, x, weight, where, bias)
    keep = keep and keeps_derivative(activation)
    return room.forward(x, weight, bias, layout, where, activation, keep)  # type: ignore[no-any-return]


def _product_backward(
    grad: Tensor, inputs: Any, sets: Any, kept: Any, attributes: Any, mask: tuple[bool, ...]
) -> Found:
    (x, blocks, _), (activation, backend, *options) = inputs, attributes
    layout, where = _where(sets, options)
    weight, values = packed(layout, x, blocks, None, where), kept[0] if kept[0] is not None else kept[1]
    check_results(x, layout, weight, where, grad, values)
    room = backend_for(backend, x, weight, where, grad, values)
    dx, dw, db = room.backward(grad, x, weight, layout, where, mask, activation, values)
    return dx, unpacked(layout, dw, blocks), db


def _result(inputs: Any, sets: Any, options: Sequence[Any]) -> Tensor:
    """A tensor like the result."""
    geometry = Geometry.of(*options[:3]) if options else MATRIX
    kernel = tuple(inputs[1].shape[inputs[1].dim() - len(geometry.stride) :])
    return plain.room_for(inputs[0], sets[0].shape[0], kernel, geometry)


def _product_fake(inputs: Any, sets: Any, attributes: Any, keep: bool) -> Found:
    y = _result(inputs, sets, attributes[2:])
    return y, torch.empty_like(y) if keep and keeps_derivative(attributes[0]) else None


def _product_reference(inputs: Any, sets: Any, attributes: Any) -> Tensor:
    activation, _, *options = attributes
    (x, blocks, bias), (layout, where) = inputs, _where(sets, options)
    return functional.block_conv(x, blocks, bias, layout, where, activation)


_OPERANDS = ("Tensor x", "Tensor blocks", "Tensor? bias")
_SETS = ("Tensor row_set", "Tensor col_set")
_HOW = ("str activation", "str backend")
_CONV = ("SymInt[] stride", "SymInt[] padding", "SymInt[] dilation", "int merge")


def _define_product(name: str, *options: str) -> Operator:
    return define(
        Definition(
            name,
            _OPERANDS,
            _SETS,
            (*_HOW, *options),
            1,
            _product,
            _product_backward,
            _product_fake,
            _product_reference,
            keeps=lambda activation, *_: keeps_derivative(activation),
            result=lambda activation, *_: activation in ("relu", "tanh"),
        )
    )


block_linear = _define_product("block_linear")
block_conv = _define_product("block_conv", *_CONV)


# ---- block_conv_norm(x, blocks, bias, gain, offset, row_set, col_set, mean, variance, activation, backend, eps, ..) --
# Results: y, what is normed if it is to be kept, and the mean and biased variance of the batch if it is normed by them.


def _normed_operands(inputs: Any, constants: Any, options: Any) -> tuple[Layout, Geometry, Tensor]:
    """Layout, geometry and matrices, once it is sure that the operands belong together."""
    (x, blocks, bias, gain, offset), (*sets, mean, variance) = inputs, constants
    layout, where = _where(sets, options)
    weight = packed(layout, x, blocks, bias, where)
    check_averages(mean, variance)
    for numbers in (gain, offset, mean, variance):
        check_memory(numbers)
        layout.check_bias(numbers)
    return layout, where, weight


def _norm(inputs: Any, constants: Any, attributes: Any, keep: bool) -> Found:
    (x, _, bias, gain, offset), (*_, mean, variance) = inputs, constants
    activation, backend, eps, *options = attributes
    check_activation(activation)
    layout, where, weight = _normed_operands(inputs, constants, options)
    room = backend_for(backend, x, weight, where, bias, gain, offset, mean, variance)
    if mean is not None and not keep:
        if room is cpu:
            y = cpu.conv_normed(x, weight, bias, gain, offset, mean, variance, layout, where, eps, activation)
            return y, None, None, None
        # The norm is one more factor of the weight.
        scale, shift, _ = cpu.affine(gain, offset, mean, variance, eps)
        weight = weight * layout.bias(scale).view(layout.groups, layout.rows, *[1] * (weight.dim() - 2))
        bias = shift if bias is None else torch.addcmul(shift, bias, scale)
        return room.forward(x, weight, bias, layout, where, activation, False)[0], None, None, None
    if room is cpu:
        found = cpu.conv_norm_forward(x, weight, bias, gain, offset, mean, variance, layout, where, eps, activation)
    else:
        z, _ = room.forward(x, weight, bias, layout, where, "", False)
        y, *moments = plain.norm_forward(z, gain, offset, mean, variance, eps, activation)
        found = y, z, *moments
    return found if keep else (found[0], None, *found[2:])


def _norm_backward(
    grad: Tensor, inputs: Any, constants: Any, kept: Any, attributes: Any, mask: tuple[bool, ...]
) -> Found:
    (x, blocks, bias, gain, offset), (_, z, mean, variance) = inputs, kept
    activation, backend, eps, *options = attributes
    training = constants[2] is None
    layout, where, weight = _normed_operands(inputs, (*constants[:2], mean, variance), options)
    check_results(x, layout, weight, where, grad, z)
    room = backend_for(backend, x, weight, where, grad, bias, gain, offset, z, mean, variance)
    if room is cpu:
        dx, dw, *rest = cpu.conv_norm_backward(
            grad, x, weight, gain, offset, z, mean, variance, layout, where, eps, activation, training, mask
        )
        return dx, unpacked(layout, dw, blocks), *rest
    dz, dgain, doffset = plain.norm_backward(grad, z, gain, offset, mean, variance, training, eps, activation)
    assert dz is not None
    dx, dw, db = room.backward(dz, x, weight, layout, where, mask[:3], "", None)
    gradients = dx, unpacked(layout, dw, blocks), db, dgain, doffset
    return [g if need else None for g, need in zip(gradients, mask)]


def _norm_fake(inputs: Any, constants: Any, attributes: Any, keep: bool) -> Found:
    y = _result(inputs, constants, attributes[3:])
    channels = constants[0].shape[0]
    averages = [y.new_empty(channels) if keep or constants[2] is None else None for _ in range(2)]
    return y, torch.empty_like(y) if keep else None, *averages


def _norm_reference(inputs: Any, constants: Any, attributes: Any) -> Tensor:
    activation, _, eps, *options = attributes
    layout, where = _where(constants[:2], options)
    (x, blocks, bias, gain, offset), (mean, variance) = inputs, constants[2:]
    return functional.block_conv_norm(x, blocks, bias, gain, offset, mean, variance, layout, where, eps, activation)


block_conv_norm = define(
    Definition(
        "block_conv_norm",
        (*_OPERANDS, "Tensor? gain", "Tensor? offset"),
        (*_SETS, "Tensor? mean", "Tensor? variance"),
        (*_HOW, "float eps", *_CONV),
        3,
        _norm,
        _norm_backward,
        _norm_fake,
        _norm_reference,
    )
)


# ---- block_mlp(x, blocks1, bias1, blocks2, bias2, row_set1, col_set1, row_set2, col_set2, activation, backend) -------


def _two(inputs: Any, sets: Any) -> tuple[Layout, Tensor, Layout, Tensor]:
    """Layouts and matrices of both layers."""
    x, blocks1, bias1, blocks2, bias2 = inputs
    layout1, layout2 = layout_of(*sets[:2]), layout_of(*sets[2:])
    w1 = packed(layout1, x, blocks1, bias1, MATRIX)
    return layout1, w1, layout2, packed_behind(layout1, layout2, x, blocks2, bias2)


def _is_fused(backend: str, x: Tensor, w1: Tensor, layout1: Layout, w2: Tensor, *others: Tensor | None) -> bool:
    """Whether the compiled kernels serve both layers at once, and no registered backend either of them."""
    # Its results are rows, or tokens that lie transposed.
    columns = x.dim() == 2 and is_column_major(x)
    if columns or not _is_native(backend, x, w1, MATRIX, w2, *others):
        return False
    if not registry.registered():
        return True
    hidden = plain.room_for(x, layout1.channels, (), MATRIX)
    return registry.suited(x, w1, MATRIX) is None and registry.suited(hidden, w2, MATRIX) is None


def _mlp(inputs: Any, sets: Any, attributes: Any, keep: bool) -> Found:
    (x, _, bias1, _, bias2), (activation, backend) = inputs, attributes
    check_activation(activation)
    layout1, w1, layout2, w2 = _two(inputs, sets)
    if _is_fused(backend, x, w1, layout1, w2, bias1, bias2):
        return (cpu.mlp_forward(x, w1, bias1, layout1, w2, bias2, layout2, activation),)
    first = backend_for(backend, x, w1, MATRIX, bias1)
    hidden, _ = first.forward(x, w1, bias1, layout1, MATRIX, activation, False)
    second = backend_for(backend, hidden, w2, MATRIX, bias2)
    return (second.forward(hidden, w2, bias2, layout2, MATRIX, "", False)[0],)


def _mlp_backward(grad: Tensor, inputs: Any, sets: Any, kept: Any, attributes: Any, mask: tuple[bool, ...]) -> Found:
    (x, blocks1, bias1, blocks2, bias2), (activation, backend) = inputs, attributes
    layout1, w1, layout2, w2 = _two(inputs, sets)
    check_results(x, layout2, w2, MATRIX, grad)
    if _is_fused(backend, x, w1, layout1, w2, grad, bias1, bias2):
        dx, dw1, db1, dw2, db2 = cpu.mlp_backward(grad, x, w1, bias1, layout1, w2, layout2, activation, mask)
    else:
        first = backend_for(backend, x, w1, MATRIX, bias1)
        hidden, values = first.forward(x, w1, bias1, layout1, MATRIX, activation, keeps_derivative(activation))
        second, needs = backend_for(backend, hidden, w2, MATRIX, grad), (any(mask[:3]), *mask[3:])
        dh, dw2, db2 = second.backward(grad, hidden, w2, layout2, MATRIX, needs, "", None)
        dx = dw1 = db1 = None
        if dh is not None:
            values = hidden if values is None else values
            dx, dw1, db1 = first.backward(dh, x, w1, layout1, MATRIX, mask[:3], activation, values)
    return dx, unpacked(layout1, dw1, blocks1), db1, unpacked(layout2, dw2, blocks2), db2


def _mlp_fake(inputs: Any, sets: Any, attributes: Any, keep: bool) -> Found:
    return (plain.room_for(inputs[0], sets[2].shape[0], (), MATRIX),)


def _mlp_reference(inputs: Any, sets: Any, attributes: Any) -> Tensor:
    x, blocks1, bias1, blocks2, bias2 = inputs
    first, second = layout_of(*sets[:2]), layout_of(*sets[2:])
    return functional.block_mlp(x, blocks1, bias1, first, blocks2, bias2, second, attributes[0])


block_mlp = define(
    Definition(
        "block_mlp",
        ("Tensor x", "Tensor blocks1", "Tensor? bias1", "Tensor blocks2", "Tensor? bias2"),
        ("Tensor row_set1", "Tensor col_set1", "Tensor row_set2", "Tensor col_set2"),
        _HOW,
        0,
        _mlp,
        _mlp_backward,
        _mlp_fake,
        _mlp_reference,
    )
)
