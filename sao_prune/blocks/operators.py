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
from .dispatch import Definition, define
from .functional import Geometry, keeps_derivative
from .layout import Layout, layout_of

Found = Sequence[Tensor | None]
_SETS = ("Tensor row_set", "Tensor col_set")


def _native(backend: str, *tensors: Tensor | None) -> bool:
    return backend == "cpu" and cpu.ready(*tensors)


def _linear_room(backend: str, x: Tensor, weight: Tensor, *others: Tensor | None) -> Any:
    """The backend that serves these operands."""
    if registry.registered() and (own := registry.linear_backend(x, weight, *others)) is not None:
        return own
    if _native(backend, x, weight, *others):
        return cpu
    return cuda if (x.is_cuda or backend == "triton") and cuda.suits_linear(x, weight, *others) else plain


def _conv_room(backend: str, x: Tensor, weight: Tensor, geometry: Geometry, *others: Tensor | None) -> Any:
    if registry.registered() and (own := registry.conv_backend(x, weight, geometry, *others)) is not None:
        return own
    if _suited(backend, x, weight, geometry, *others):
        return cpu
    return cuda if (x.is_cuda or backend == "triton") and cuda.suits_conv(x, weight, *others) else plain


def _saves_result(activation: str, *_: Any) -> bool:
    return activation in ("relu", "tanh")


def _check_memory(*tensors: Tensor | None) -> None:
    """Refuse tensors whose memory has been freed, as that of sharded parameters is: torch itself would read it."""
    for t in tensors:
        if t is not None and t.numel():
            last = t.numel() - 1 if t.is_contiguous() else sum((n - 1) * s for n, s in zip(t.shape, t.stride()))
            if t.untyped_storage().nbytes() < (t.storage_offset() + last + 1) * t.element_size():
                raise RuntimeError(f"the memory of an operand of shape {tuple(t.shape)} has been freed")


def _packed(layout: Layout, x: Tensor, blocks: Tensor, bias: Tensor | None, where: Geometry | None = None) -> Tensor:
    """The blocks as matrices, once it is sure that the operands are those of one layer."""
    _check_memory(x, blocks, bias)
    weight = layout.pack(blocks)
    space = weight.dim() - 3
    if space if where is None else {len(where.stride), len(where.padding), len(where.dilation), x.dim() - 2} != {space}:
        given = f"an input of shape {tuple(x.shape)}, blocks of shape {tuple(blocks.shape)}"
        raise RuntimeError(
            f"expected as many dimensions of space everywhere, got {given}" + (f", {where}" if where else "")
        )
    if blocks.dtype is not x.dtype or (bias is not None and bias.dtype is not x.dtype):
        types = [str(t.dtype) for t in (x, blocks, bias) if t is not None]
        raise RuntimeError(f"expected operands of one type, got {', '.join(types)}")
    layout.check(x, -1 if where is None else 1, bias)
    return weight


def _check_results(
    x: Tensor, channels: int, where: Geometry | None, kernel: Sequence[int], *like: Tensor | None
) -> None:
    """Refuse gradients, and tensors kept for the backward pass, that are not like the result."""
    if where is None:
        shape = *x.shape[:-1], channels
    else:
        shape = x.shape[0], channels, *where.output(x.shape[2:], kernel)
    for t in like:
        if t is None:
            continue
        if t.shape != shape:
            raise RuntimeError(f"expected a gradient of the result's shape {tuple(shape)}, got {tuple(t.shape)}")
        if not cpu.is_there(t):
            raise RuntimeError(f"the memory of a gradient of shape {tuple(t.shape)} has been freed")


# ---- block_linear(x, blocks, bias, row_set, col_set, activation, backend) -----------------------------------------


def _linear(inputs: Any, sets: Any, attributes: Any, keep: bool) -> Found:
    (x, blocks, bias), (activation, backend) = inputs, attributes
    layout = layout_of(*sets)
    weight = _packed(layout, x, blocks, bias)
    room = _linear_room(backend, x, weight, bias)
    return room.linear_forward(x, weight, bias, layout, activation, keep)


def _linear_backward(grad: Tensor, inputs: Any, sets: Any, kept: Any, attributes: Any, mask: tuple[bool, ...]) -> Found:
    (x, blocks, _), (activation, backend) = inputs, attributes
    layout, values = layout_of(*sets), kept[0] if kept[0] is not None else kept[1]
    weight = _packed(layout, x, blocks, None)
    _check_results(x, layout.channels, None, (), grad, values)
    room = _linear_room(backend, x, weight, grad, values)
    dx, dw, db = room.linear_backward(grad, x, weight, layout, mask, activation, values)
    return dx, None if dw is None else layout.unpack(dw, blocks.shape), db


def _linear_fake(inputs: Any, sets: Any, attributes: Any, keep: bool) -> Found:
    y = plain.empty_linear(inputs[0], sets[0].shape[0])
    return y, torch.empty_like(y) if keep and keeps_derivative(attributes[0]) else None


def _linear_reference(inputs: Any, sets: Any, attributes: Any) -> Tensor:
    x, blocks, bias = inputs
    return functional.block_linear(x, blocks, bias, layout_of(*sets), attributes[0])


block_linear = define(
    Definition(
        "block_linear",
        ("Tensor x", "Tensor blocks", "Tensor? bias"),
        _SETS,
        ("str activation", "str backend"),
        1,
        _linear,
        _linear_backward,
        _linear_fake,
        _linear_reference,
        keeps=lambda activation, backend: keeps_derivative(activation),
        result=_saves_result,
    )
)


# ---- block_conv(x, blocks, bias, row_set, col_set, activation, backend, stride, padding, dilation, merge) -----------


def _suited(backend: str, x: Tensor, weight: Tensor, geometry: Geometry, *others: Tensor | None) -> bool:
    return _native(backend, x, weight, *others) and cpu.suits_conv(weight.shape[3:], geometry)


def _conv(inputs: Any, sets: Any, attributes: Any, keep: bool) -> Found:
    (x, blocks, bias), (activation, backend, *geometry, merge) = inputs, attributes
    layout, where = layout_of(sets[0], sets[1], merge), Geometry.of(*geometry)
    weight = _packed(layout, x, blocks, bias, where)
    room = _conv_room(backend, x, weight, where, bias)
    return room.conv_forward(x, weight, bias, layout, where, activation, keep)


def _conv_backward(grad: Tensor, inputs: Any, sets: Any, kept: Any, attributes: Any, mask: tuple[bool, ...]) -> Found:
    (x, blocks, _), (activation, backend, *geometry, merge) = inputs, attributes
    layout, where = layout_of(sets[0], sets[1], merge), Geometry.of(*geometry)
    weight, values = _packed(layout, x, blocks, None, where), kept[0] if kept[0] is not None else kept[1]
    _check_results(x, layout.channels, where, weight.shape[3:], grad, values)
    room = _conv_room(backend, x, weight, where, grad, values)
    dx, dw, db = room.conv_backward(grad, x, weight, layout, where, mask, activation, values)
    return dx, None if dw is None else layout.unpack(dw, blocks.shape), db


def _conv_fake(inputs: Any, sets: Any, attributes: Any, keep: bool) -> Found:
    x, blocks, _ = inputs
    y = _conv_result(x, blocks, sets, Geometry.of(*attributes[2:5]))
    return y, torch.empty_like(y) if keep and keeps_derivative(attributes[0]) else None


def _conv_result(x: Tensor, blocks: Tensor, sets: Any, geometry: Geometry) -> Tensor:
    kernel = tuple(blocks.shape[blocks.dim() - (x.dim() - 2) :])
    return plain.empty_conv(x, sets[0].shape[0], kernel, geometry)


def _conv_reference(inputs: Any, sets: Any, attributes: Any) -> Tensor:
    activation, _, *geometry, merge = attributes
    x, blocks, bias = inputs
    layout = layout_of(sets[0], sets[1], merge)
    return functional.block_conv(x, blocks, bias, layout, Geometry.of(*geometry), activation)


_CONV = ("SymInt[] stride", "SymInt[] padding", "SymInt[] dilation", "int merge")
block_conv = define(
    Definition(
        "block_conv",
        ("Tensor x", "Tensor blocks", "Tensor? bias"),
        _SETS,
        ("str activation", "str backend", *_CONV),
        1,
        _conv,
        _conv_backward,
        _conv_fake,
        _conv_reference,
        keeps=lambda activation, *_: keeps_derivative(activation),
        result=_saves_result,
    )
)


# ---- block_conv_norm(x, blocks, bias, gain, offset, row_set, col_set, mean, variance, activation, backend, eps, ..) --
# Results: y, what is normed if it is to be kept, and the mean and biased variance of the batch if it is normed by them.


def _norm(inputs: Any, constants: Any, attributes: Any, keep: bool) -> Found:
    (x, blocks, bias, gain, offset), (*sets, mean, variance) = inputs, constants
    activation, backend, eps, *geometry, merge = attributes
    layout, where = layout_of(sets[0], sets[1], merge), Geometry.of(*geometry)
    weight = _packed(layout, x, blocks, bias, where)
    _check_memory(gain, offset, mean, variance)
    for numbers in (gain, offset, mean, variance):
        layout.check_bias(numbers)
    native = _suited(backend, x, weight, where, bias, gain, offset, mean, variance)
    if mean is not None and not keep:
        # The norm is one more factor of the weight.
        scale, shift, _ = cpu.affine(gain, offset, mean, variance, eps)
        weight = weight * layout.bias(scale).view(layout.groups, layout.rows, *[1] * (weight.dim() - 2))
        bias = shift if bias is None else torch.addcmul(shift, bias, scale)
        room = cpu if native else plain
        return room.conv_forward(x, weight, bias, layout, where, activation, False)[0], None, None, None
    if native:
        averages = mean, variance
        found = cpu.conv_norm_forward(x, weight, bias, gain, offset, *averages, layout, where, eps, activation)
    else:
        z, _ = plain.conv_forward(x, weight, bias, layout, where, "", False)
        if mean is None:
            variance, mean = torch.var_mean(z, [d for d in range(z.dim()) if d != 1], correction=0)
        else:
            mean, variance = mean.clone(), variance.clone()
        y = torch.nn.functional.batch_norm(z, mean, variance, gain, offset, False, 0.0, eps)
        found = functional.ACTIVATIONS[activation](y), z, mean, variance
    return found if keep else (found[0], None, *found[2:])


def _norm_backward(
    grad: Tensor, inputs: Any, constants: Any, kept: Any, attributes: Any, mask: tuple[bool, ...]
) -> Found:
    (x, blocks, bias, gain, offset), sets, (_, z, mean, variance) = inputs, constants[:2], kept
    activation, backend, eps, *geometry, merge = attributes
    layout, where = layout_of(sets[0], sets[1], merge), Geometry.of(*geometry)
    weight, training = _packed(layout, x, blocks, bias, where), constants[2] is None
    _check_results(x, layout.channels, where, weight.shape[3:], grad, z)
    _check_memory(gain, offset, mean, variance)
    for numbers in (gain, offset, mean, variance):
        layout.check_bias(numbers)
    if _suited(backend, x, weight, where, grad, bias, gain, offset, z, mean, variance):
        dx, dw, *rest = cpu.conv_norm_backward(
            grad, x, weight, gain, offset, z, mean, variance, layout, where, eps, activation, training, mask
        )
        return dx, None if dw is None else layout.unpack(dw, blocks.shape), *rest
    dz, dgain, doffset = plain.norm_backward(grad, z, gain, offset, mean, variance, training, eps, activation)
    assert dz is not None
    dx, dw, db = plain.conv_backward(dz, x, weight, layout, where, mask[:3], "", None)
    gradients = dx, None if dw is None else layout.unpack(dw, blocks.shape), db, dgain, doffset
    return [g if need else None for g, need in zip(gradients, mask)]


def _norm_fake(inputs: Any, constants: Any, attributes: Any, keep: bool) -> Found:
    x, blocks = inputs[:2]
    y = _conv_result(x, blocks, constants, Geometry.of(*attributes[3:6]))
    channels = constants[0].shape[0]
    averages = [x.new_empty(channels) if keep or constants[2] is None else None for _ in range(2)]
    return y, torch.empty_like(y) if keep else None, *averages


def _norm_reference(inputs: Any, constants: Any, attributes: Any) -> Tensor:
    activation, _, eps, *geometry, merge = attributes
    layout = layout_of(constants[0], constants[1], merge)
    own, averages, where = tuple(inputs), tuple(constants[2:]), Geometry.of(*geometry)
    x, blocks, bias, gain, offset = own
    mean, variance = averages
    return functional.block_conv_norm(x, blocks, bias, gain, offset, mean, variance, layout, where, eps, activation)


block_conv_norm = define(
    Definition(
        "block_conv_norm",
        ("Tensor x", "Tensor blocks", "Tensor? bias", "Tensor? gain", "Tensor? offset"),
        (*_SETS, "Tensor? mean", "Tensor? variance"),
        ("str activation", "str backend", "float eps", *_CONV),
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
    if layout1.channels != len(layout2.inputs.inverse):
        raise RuntimeError(f"{layout2.topology} does not take the {layout1.channels} results of {layout1.topology}")
    _check_memory(blocks2, bias2)
    layout2.check_bias(bias2)
    w2 = layout2.pack(blocks2)
    if w2.dim() != 3:
        raise RuntimeError(f"expected blocks of a linear layer, got shape {tuple(blocks2.shape)}")
    return layout1, _packed(layout1, x, blocks1, bias1), layout2, w2


def _mlp(inputs: Any, sets: Any, attributes: Any, keep: bool) -> Found:
    (x, _, bias1, _, bias2), (activation, backend) = inputs, attributes
    layout1, w1, layout2, w2 = _two(inputs, sets)
    if _native(backend, x, w1, bias1, w2, bias2):
        return (cpu.mlp_forward(x, w1, bias1, layout1, w2, bias2, layout2, activation),)
    hidden, _ = plain.linear_forward(x, w1, bias1, layout1, activation, False)
    return (plain.linear_forward(hidden, w2, bias2, layout2, "", False)[0],)


def _mlp_backward(grad: Tensor, inputs: Any, sets: Any, kept: Any, attributes: Any, mask: tuple[bool, ...]) -> Found:
    (x, blocks1, bias1, blocks2, bias2), (activation, backend) = inputs, attributes
    layout1, w1, layout2, w2 = _two(inputs, sets)
    _check_results(x, layout2.channels, None, (), grad)
    if _native(backend, grad, x, w1, bias1, w2, bias2):
        dx, dw1, db1, dw2, db2 = cpu.mlp_backward(grad, x, w1, bias1, layout1, w2, layout2, activation, mask)
    else:
        hidden, values = plain.linear_forward(x, w1, bias1, layout1, activation, keeps_derivative(activation))
        dh, dw2, db2 = plain.linear_backward(grad, hidden, w2, layout2, (any(mask[:3]), *mask[3:]), "", None)
        dx = dw1 = db1 = None
        if dh is not None:
            values = hidden if values is None else values
            dx, dw1, db1 = plain.linear_backward(dh, x, w1, layout1, mask[:3], activation, values)
    dw1 = None if dw1 is None else layout1.unpack(dw1, blocks1.shape)
    return dx, dw1, db1, None if dw2 is None else layout2.unpack(dw2, blocks2.shape), db2


def _mlp_fake(inputs: Any, sets: Any, attributes: Any, keep: bool) -> Found:
    return (plain.empty_linear(inputs[0], sets[2].shape[0]),)


def _mlp_reference(inputs: Any, sets: Any, attributes: Any) -> Tensor:
    x, blocks1, bias1, blocks2, bias2 = inputs
    first, second = layout_of(*sets[:2]), layout_of(*sets[2:])
    return functional.block_mlp(x, blocks1, bias1, first, blocks2, bias2, second, attributes[0])


block_mlp = define(
    Definition(
        "block_mlp",
        ("Tensor x", "Tensor blocks1", "Tensor? bias1", "Tensor blocks2", "Tensor? bias2"),
        ("Tensor row_set1", "Tensor col_set1", "Tensor row_set2", "Tensor col_set2"),
        ("str activation", "str backend"),
        0,
        _mlp,
        _mlp_backward,
        _mlp_fake,
        _mlp_reference,
    )
)
