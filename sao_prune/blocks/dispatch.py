"""How a block operator is registered with torch: schema, fake tensors, autograd in terms of operators.

The derivatives of an operator are a second operator, ``<name>_backward``; that one's own derivatives are those of the
reference, to any order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_LIBRARY = torch.library.Library("sao_prune", "DEF")
_AFTER_AUTOGRAD = torch._C._after_autograd_keyset
_TAGS = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)
_DEVICES = ("CPU", "CUDA")


@dataclass(frozen=True)
class Definition:
    """An operator of the form ``(*inputs, *constants, *attributes, keep) -> (y, *kept)``.

    Attributes:
        name: in the namespace ``sao_prune``.
        inputs: schema of the tensors to differentiate by.
        constants: schema of the other tensors.
        attributes: schema of the rest.
        kept: how many results there are besides ``y``, for the backward pass.
        forward: computes it, on real tensors; ``None`` results are returned without elements.
        backward: ``(grad, inputs, constants, kept, attributes, mask)`` to one gradient an input, ``None`` where not
            asked for.
        fake: the results' metadata.
        reference: ``(inputs, constants, attributes)`` to ``y``, differentiable to any order.
        keeps: whether the backward pass needs what ``keep`` gives, by the attributes.
        result: whether it needs ``y``, by the attributes.
    """

    name: str
    inputs: tuple[str, ...]
    constants: tuple[str, ...]
    attributes: tuple[str, ...]
    kept: int
    forward: Callable[..., Sequence[Tensor | None]]
    backward: Callable[..., Sequence[Tensor | None]]
    fake: Callable[..., Sequence[Tensor | None]]
    reference: Callable[..., Tensor]
    keeps: Callable[..., bool] = lambda *attributes: True
    result: Callable[..., bool] = lambda *attributes: False

    def split(self, arguments: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
        """Inputs, constants and attributes of a call's arguments."""
        first, second = len(self.inputs), len(self.inputs) + len(self.constants)
        return tuple(arguments[:first]), tuple(arguments[first:second]), tuple(arguments[second:])


def define(d: Definition) -> Any:
    """Register an operator and its backward; returns the first, to be called with positional arguments."""
    results = ", ".join(["Tensor"] * (1 + d.kept))
    gradients = ", ".join(["Tensor"] * len(d.inputs))
    own = ", ".join((*d.inputs, *d.constants))
    attributes = "".join(f", {a}" for a in d.attributes)
    stored = "".join(f", Tensor? kept{i}" for i in range(d.kept + 1))
    keep = ", bool keep=False"
    _register(d.name, f"({own}{attributes}{keep}) -> ({results})", *_forward_of(d))
    backward = f"{d.name}_backward"
    _register(backward, f"(Tensor grad, {own}{stored}{attributes}, bool[] mask) -> ({gradients})", *_backward_of(d))
    return _find(d.name)


def _find(name: str) -> Any:
    return getattr(torch.ops.sao_prune, name).default


def _register(
    name: str,
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    function: type[torch.autograd.Function],
) -> None:
    _LIBRARY.define(f"{name}{schema}", tags=_TAGS)
    for device in _DEVICES:
        _LIBRARY.impl(name, kernel, device)
    torch.library.register_fake(f"sao_prune::{name}", fake, lib=_LIBRARY)
    operator = _find(name)
    apply = function.apply

    def with_autograd(keyset: Any, *arguments: Any) -> Any:
        if torch.is_grad_enabled():
            for a in arguments:
                if isinstance(a, Tensor) and a.requires_grad:
                    return apply(keyset, *arguments)
        return operator.redispatch(keyset & _AFTER_AUTOGRAD, *arguments)

    _LIBRARY.impl(name, with_autograd, "Autograd", with_keyset=True)


def _owned(t: Tensor) -> Tensor:
    """The tensor as no view of another: views made in an operator could not be changed in place afterwards."""
    if not t._is_view() or isinstance(t, FakeTensor):
        return t
    return t.new_empty(0).set_(t.untyped_storage(), t.storage_offset(), t.shape, t.stride())


def _given(tensors: Sequence[Tensor | None], like: Tensor) -> Any:
    """Operators return tensors, a single one alone: one without elements for what is not there."""
    found = tuple(like.new_empty(0) if t is None else _owned(t) for t in tensors)
    return found if len(found) > 1 else found[0]


def _forward_of(d: Definition) -> tuple[Callable[..., Any], Callable[..., Any], type[torch.autograd.Function]]:
    def kernel(*arguments: Any) -> Any:
        *rest, keep = arguments if len(arguments) > _count(d) else (*arguments, False)
        return _given(d.forward(*d.split(rest), keep), arguments[0])

    def fake(*arguments: Any) -> Any:
        *rest, keep = arguments if len(arguments) > _count(d) else (*arguments, False)
        return _given(d.fake(*d.split(rest), keep), arguments[0])

    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *arguments: Any) -> Any:  # type: ignore[override]
            arguments = arguments[: _count(d)]
            inputs, constants, attributes = d.split(arguments)
            keep = d.keeps(*attributes)
            found = _find(d.name).redispatch(keyset & _AFTER_AUTOGRAD, *arguments, keep)
            y, *kept = found if d.kept else (found,)
            stored = (y if d.result(*attributes) else None, *(kept if keep else [None] * d.kept))
            ctx.save_for_backward(*inputs, *constants, *stored)
            ctx.attributes = attributes
            if kept:
                ctx.mark_non_differentiable(*kept)
            ctx.set_materialize_grads(False)
            return found

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:  # type: ignore[override]
            mask = list(ctx.needs_input_grad[1 : 1 + len(d.inputs)])
            rest = (None,) * (len(ctx.needs_input_grad) - 1 - len(d.inputs))
            if grads[0] is None:
                return None, *[None] * len(d.inputs), *rest
            found = _find(f"{d.name}_backward")(grads[0], *ctx.saved_tensors, *ctx.attributes, mask)
            return None, *[g if need else None for g, need in zip(found, mask)], *rest

    return kernel, fake, Forward


def _count(d: Definition) -> int:
    return len(d.inputs) + len(d.constants) + len(d.attributes)


def _backward_of(d: Definition) -> tuple[Callable[..., Any], Callable[..., Any], type[torch.autograd.Function]]:
    tensors = len(d.inputs) + len(d.constants)

    def parts(arguments: Sequence[Any]) -> Iterator[Any]:
        grad, *rest, mask = arguments
        own, stored, attributes = rest[:tensors], rest[tensors : tensors + d.kept + 1], rest[tensors + d.kept + 1 :]
        inputs, constants, _ = d.split(own)
        yield from (grad, inputs, constants, stored, tuple(attributes), tuple(mask))

    def kernel(*arguments: Any) -> Any:
        dx, *others = d.backward(*parts(arguments))
        x = arguments[1]
        if dx is not None and dx.stride() != x.stride():
            dx = torch.empty_like(x).copy_(dx)
        return _given((dx, *(None if g is None else g.contiguous() for g in others)), x)

    def fake(*arguments: Any) -> Any:
        _, inputs, _, _, _, mask = parts(arguments)
        dx = torch.empty_like(inputs[0])
        shaped = [dx, *(None if t is None else t.new_empty(t.shape) for t in inputs[1:])]
        return _given([t if need else None for t, need in zip(shaped, mask)], arguments[1])

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *arguments: Any) -> Any:  # type: ignore[override]
            ctx.save_for_backward(*arguments[: 1 + tensors])
            _, _, _, _, ctx.attributes, ctx.mask = parts(arguments)
            ctx.others = len(arguments) - 1 - len(d.inputs)
            return _find(f"{d.name}_backward").redispatch(keyset & _AFTER_AUTOGRAD, *arguments)

        @staticmethod
        def backward(ctx: Any, *outer: Tensor) -> Any:  # type: ignore[override]
            grad, *own = ctx.saved_tensors
            inputs, constants, _ = d.split(own)
            found = _second(
                lambda *tensors: d.reference(tensors, constants, ctx.attributes), grad, inputs, ctx.mask, outer
            )
            return None, *found, *[None] * ctx.others

    return kernel, fake, Backward


def _second(
    reference: Callable[..., Tensor],
    grad: Tensor,
    inputs: Sequence[Tensor | None],
    mask: Sequence[bool],
    outer: Sequence[Tensor],
) -> list[Tensor | None]:
    """Derivatives of ``vjp(reference)(inputs)(grad)`` by ``grad`` and the inputs, given those of its results."""
    with torch.enable_grad():
        sources = [t if t is None or t.requires_grad else t.detach() for t in (grad, *inputs)]
        wanted = [t for t, need in zip(sources[1:], mask) if need and t is not None]
        first = torch.autograd.grad(reference(*sources[1:]), wanted, sources[0], create_graph=True, allow_unused=True)
    asked = [o for o, need in zip(outer, mask) if need]
    pairs = [(f, o) for f, o in zip(first, asked) if f is not None and f.requires_grad]
    leaves = [t for t in sources if t is not None and t.requires_grad]
    found: Iterator[Tensor | None] = iter([None] * len(leaves))
    if pairs and leaves:
        results, weights = zip(*pairs)
        create = torch.is_grad_enabled()
        found = iter(torch.autograd.grad(results, leaves, weights, create_graph=create, allow_unused=True))
    return [next(found) if t is not None and t.requires_grad else None for t in sources]
