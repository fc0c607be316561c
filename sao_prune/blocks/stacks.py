"""The operators ``block_stack2`` to ``block_stack8``: linear layers one behind the other, each with an activation that
its result tells the derivative of. A call of one costs little more Python than a call of a single layer.

More than eight do not fit: torch's dispatcher takes 64 arguments.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from . import functional
from .backends import cpu, registry
from .backends import torch as plain
from .dispatch import Definition, Operator, define
from .functional import MATRIX
from .layout import Layout, layout_of
from .operands import check_results, packed, packed_behind, unpacked
from .operators import Found, backend_for

MOST = 8
#: Activations that a stack can have; the last layer may have none.
ACTIVATIONS = ("relu", "tanh")


def _layouts(sets: Sequence[Tensor]) -> Iterator[Layout]:
    for row_set, col_set in zip(sets[::2], sets[1::2]):
        yield layout_of(row_set, col_set)


def _packed(x: Tensor, values: Sequence[Any], layouts: Sequence[Layout], activations: Sequence[str]) -> list[Tensor]:
    """The matrices of every layer, once it is sure that the layers belong together."""
    if len(activations) != len(layouts) or not all(a in ("", *ACTIVATIONS) for a in activations):
        known = " and ".join(map(repr, ACTIVATIONS))
        raise RuntimeError(f"expected {len(layouts)} activations, each {known} or '', got {activations}")
    first, *rest = layouts
    weights = [packed(first, x, values[0], values[1], MATRIX)]
    for before, layout, blocks, bias in zip(layouts, rest, values[2::2], values[3::2]):
        weights.append(packed_behind(before, layout, x, blocks, bias))
    return weights


def _is_native(backend: str, x: Tensor, *others: Tensor | None) -> bool:
    """Whether the compiled kernels take the whole stack, and no registered backend a part of it."""
    return backend == "cpu" and not registry.registered() and cpu.stack_suits(x) and cpu.ready(x, *others)


def _stack(inputs: Any, sets: Any, attributes: Any, keep: bool) -> Found:
    (x, *values), (activations, backend) = inputs, attributes
    layouts = list(_layouts(sets))
    weights = _packed(x, values, layouts, activations)
    if _is_native(backend, x, *weights, *values[1::2]):
        *others, y = cpu.stack_forward(x, weights, values[1::2], layouts, activations, keep)
        return y, *others
    results: list[Tensor] = []
    for layout, weight, bias, activation in zip(layouts, weights, values[1::2], activations):
        room = backend_for(backend, x, weight, MATRIX, bias)
        x = room.forward(x, weight, bias, layout, MATRIX, activation, False)[0]
        results.append(x)
    inner = results[:-1]
    return (x, *inner) if keep else (x, *[None] * len(inner))


def _stack_backward(grad: Tensor, inputs: Any, sets: Any, kept: Any, attributes: Any, mask: tuple[bool, ...]) -> Found:
    (x, *values), (activations, backend), (y, *inner) = inputs, attributes, kept
    layouts, results = list(_layouts(sets)), [*inner, y]
    weights = _packed(x, values, layouts, activations)
    for layout, weight, result in zip(layouts, weights, results):
        check_results(x, layout, weight, MATRIX, result)
    check_results(x, layouts[-1], weights[-1], MATRIX, grad)
    found: list[Tensor | None] = [None] * len(inputs)
    if _is_native(backend, x, *weights, grad, *results):
        found[0], dw, found[2::2] = cpu.stack_backward(grad, x, weights, results, layouts, activations, mask)
        found[1::2] = [unpacked(*each) for each in zip(layouts, dw, values[::2])]
        return found
    operands = [x, *inner]
    for i in reversed(range(len(layouts))):
        own = 2 * i + 1
        needs = any(mask[:own]), mask[own], mask[own + 1]
        if not any(needs):
            break
        layout, operand, weight, activation = layouts[i], operands[i], weights[i], activations[i]
        result = results[i] if activation else None
        room = backend_for(backend, operand, weight, MATRIX, grad, result)
        dx, dw, db = room.backward(grad, operand, weight, layout, MATRIX, needs, activation, result)
        found[own], found[own + 1] = unpacked(layout, dw, values[2 * i]), db
        if dx is None:
            break
        grad = dx
    else:
        found[0] = grad
    return found


def _fake(inputs: Any, sets: Any, attributes: Any, keep: bool) -> Found:
    results = [plain.room_for(inputs[0], rows.shape[0], (), MATRIX) for rows in sets[::2]]
    inner = results[:-1]
    return results[-1], *(inner if keep else [None] * len(inner))


def _reference(inputs: Any, sets: Any, attributes: Any) -> Tensor:
    x, *values = inputs
    for layout, blocks, bias, activation in zip(_layouts(sets), values[::2], values[1::2], attributes[0]):
        x = functional.block_linear(x, blocks, bias, layout, activation)
    return x  # type: ignore[no-any-return]


def _define_stack(count: int) -> Operator:
    values = [name for i in range(count) for name in (f"Tensor blocks{i}", f"Tensor? bias{i}")]
    return define(
        Definition(
            f"block_stack{count}",
            ("Tensor x", *values),
            tuple(name for i in range(count) for name in (f"Tensor row_set{i}", f"Tensor col_set{i}")),
            ("str[] activations", "str backend"),
            count - 1,
            _stack,
            _stack_backward,
            _fake,
            _reference,
            result=lambda *attributes: True,
        )
    )


OPERATORS = {count: _define_stack(count) for count in range(2, MOST + 1)}


def block_stack(
    x: Tensor,
    values: Sequence[tuple[Tensor, Tensor | None]],
    sets: Sequence[tuple[Tensor, Tensor]],
    activations: Sequence[str],
    backend: str,
) -> Tensor:
    """Linear layers one behind the other.

    Args:
        x: shape ``(..., n)``.
        values: blocks and bias of each layer, two to eight of them.
        sets: buffers of each.
        activations: of each; `ACTIVATIONS`, of the last also ``""``.
        backend: as for the other operators.

    Returns:
        The last one's result.
    """
    given = [t for pair in values for t in pair], [t for pair in sets for t in pair]
    y: Tensor = OPERATORS[len(values)](x, *given[0], *given[1], list(activations), backend)[0]
    return y
