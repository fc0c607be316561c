"""How a block operator is registered with torch: schema, fake tensors, autograd in terms of operators.

The derivatives of an operator are a second operator, ``<name>_backward``; that one's own derivatives are those of the
reference, to any order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import after_autograd, dispatch_modes, function_modes, is_fake, transforms_active
from .permutation import dense

_LIBRARY = torch.library.Library("sao_prune", "DEF")
_TAGS = (getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order), torch.Tag.pt2_compliant_tag)
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
    ends: tuple[int, int, int] = field(init=False)

    def __post_init__(self) -> None:
        first = len(self.inputs)
        second = first + len(self.constants)
        object.__setattr__(self, "ends", (first, second, second + len(self.attributes)))

    def split(self, arguments: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
        """Inputs, constants and attributes of a call's arguments."""
        first, second, third = self.ends
        return tuple(arguments[:first]), tuple(arguments[first:second]), tuple(arguments[second:third])

    def parts(self, arguments: Sequence[Any]) -> tuple[Any, ...]:
        """Gradient, inputs, constants, what was kept, attributes and mask of a call of the backward."""
        first, second, _ = self.ends
        third = second + 2 + self.kept
        tensors = arguments[1 : first + 1], arguments[first + 1 : second + 1], arguments[second + 1 : third]
        return arguments[0], *tensors, arguments[third:-1], tuple(arguments[-1])


class Operator:
    """A registered operator: through torch's dispatcher wherever something but plain tensors and modes is about, as
    compilers, fake tensors and counters are, else straight to its kernel, which is what the dispatcher would do.

    Args:
        name: in the namespace ``sao_prune``.
        schema: arguments and results.
        tensors: how many of the first arguments are tensors.
        kernel: computes a sequence of results, on real tensors; ``None`` for what is not there.
        fake: the results' metadata, likewise.
    """

    function: type[torch.autograd.Function]

    def __init__(
        self, name: str, schema: str, tensors: int, kernel: Callable[..., Any], fake: Callable[..., Any]
    ) -> None:
        self.name, self.tensors, self.kernel = name, tensors, kernel
        _LIBRARY.define(f"{name}{schema}", tags=_TAGS)
        for device in _DEVICES:
            _LIBRARY.impl(name, lambda *arguments: _given(kernel(*arguments), arguments[0]), device)

        def described(*arguments: Any) -> Any:
            _check_devices(arguments[:tensors])
            return _given(fake(*arguments), arguments[0])

        torch.library.register_fake(f"sao_prune::{name}", described, lib=_LIBRARY)
        self.overload = getattr(torch.ops.sao_prune, name).default

    def differentiable(self, function: type[torch.autograd.Function]) -> Operator:
        """Register the autograd of the operator: a function of a key set and its arguments."""
        self.function = function
        _LIBRARY.impl(self.name, self._with_autograd, "Autograd", with_keyset=True)
        return self

    def _with_autograd(self, keyset: Any, *arguments: Any) -> Any:
        if torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in arguments[: self.tensors]):
            return self.function.apply(keyset, *arguments)
        return self.below(keyset, arguments)

    def below(self, keyset: Any, arguments: Sequence[Any]) -> Any:
        """What comes after autograd: the rest of the dispatcher, or without a key set the kernel."""
        if keyset is None:
            return self.kernel(*arguments)
        return self.overload.redispatch(keyset & after_autograd, *arguments)

    def _dispatched(self, arguments: Sequence[Any]) -> Any:
        found = self.overload(*arguments)
        return (found,) if isinstance(found, Tensor) else found

    def __call__(self, *arguments: Any) -> Any:
        """The results; all arguments are positional."""
        if torch.compiler.is_compiling() or dispatch_modes() or function_modes() or transforms_active():
            return self._dispatched(arguments)
        needs = False
        for a in arguments[: self.tensors]:
            if a is not None:
                if type(a) not in _PLAIN or not (a.is_cpu or a.is_cuda) or a.is_neg():
                    return self._dispatched(arguments)
                needs = needs or a.requires_grad
        if needs and torch.is_grad_enabled():
            return self.function.apply(None, *arguments)
        return self.kernel(*arguments)


_PLAIN = (Tensor, nn.Parameter)


def _check_devices(tensors: Sequence[Tensor | None]) -> None:
    """Refuse operands on the meta device beside others: nobody would compute the result's values.

    Raises:
        RuntimeError: telling where they are.
    """
    devices = {str(t.device) for t in tensors if t is not None}
    if len(devices) > 1:
        raise RuntimeError(f"expected all operands on one device, got some on {' and '.join(sorted(devices))}")


def define(d: Definition) -> Operator:
    """Register an operator and its backward; returns the first. Results are a sequence, ``None`` where not asked for;
    through the dispatcher a tensor, or several, without elements there."""
    results = ", ".join(["Tensor"] * (1 + d.kept))
    gradients = ", ".join(["Tensor"] * len(d.inputs))
    own = ", ".join((*d.inputs, *d.constants))
    attributes = "".join(f", {a}" for a in d.attributes)
    stored = "".join(f", Tensor? kept{i}" for i in range(d.kept + 1))
    tensors = len(d.inputs) + len(d.constants)
    schema = f"(Tensor grad, {own}{stored}{attributes}, bool[] mask) -> ({gradients})"
    backward = Operator(f"{d.name}_backward", schema, tensors + d.kept + 2, *_backward_kernel(d))
    backward.differentiable(_backward_function(d, backward))
    schema = f"({own}{attributes}, bool keep=False) -> ({results})"
    forward = Operator(d.name, schema, tensors, *_forward_kernel(d))
    return forward.differentiable(_forward_function(d, forward, backward))


def _owned(t: Tensor) -> Tensor:
    """The tensor as no view of another: views made in an operator could not be changed in place afterwards."""
    if not t._is_view() or is_fake(t):
        return t
    return t.new_empty(0).set_(t.untyped_storage(), t.storage_offset(), t.shape, t.stride())


def _given(tensors: Sequence[Tensor | None], like: Tensor) -> Any:
    """Operators return tensors, a single one alone: one without elements for what is not there."""
    found = tuple(like.new_empty(0) if t is None else t for t in tensors)
    return found if len(found) > 1 else found[0]


def _forward_kernel(d: Definition) -> tuple[Callable[..., Any], Callable[..., Any]]:
    last = d.ends[-1]

    def kernel(*arguments: Any) -> Any:
        keep = len(arguments) > last and arguments[last]
        return tuple([None if t is None else _owned(t) for t in d.forward(*d.split(arguments), keep)])

    def fake(*arguments: Any) -> Any:
        return d.fake(*d.split(arguments), len(arguments) > last and arguments[last])

    return kernel, fake


def _forward_function(d: Definition, forward: Operator, backward: Operator) -> type[torch.autograd.Function]:
    own, last, nothing = d.ends[0], d.ends[-1], (None,) * d.kept

    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *arguments: Any) -> Any:  # type: ignore[override]
            inputs, constants, attributes = d.split(arguments)
            keep = d.keeps(*attributes)
            found = forward.below(keyset, (*arguments[:last], keep))
            results = (found,) if isinstance(found, Tensor) else tuple(found)
            y = results[0] if d.result(*attributes) else None
            ctx.save_for_backward(*inputs, *constants, y, *(results[1:] if keep else nothing))
            ctx.attributes = attributes
            others = [t for t in results[1:] if t is not None]
            if others:
                ctx.mark_non_differentiable(*others)
            ctx.set_materialize_grads(False)
            return found

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:  # type: ignore[override]
            needed = ctx.needs_input_grad
            if grads[0] is None:
                return (None,) * len(needed)
            mask = list(needed[1 : 1 + own])
            found = backward(grads[0], *ctx.saved_tensors, *ctx.attributes, mask)
            gradients = found if all(mask) else [g if need else None for g, need in zip(found, mask)]
            return None, *gradients, *(None,) * (len(needed) - 1 - own)

    return Forward


def _backward_kernel(d: Definition) -> tuple[Callable[..., Any], Callable[..., Any]]:
    parts = d.parts

    def kernel(*arguments: Any) -> Any:
        dx, *others = d.backward(*parts(arguments))
        x = arguments[1]
        if dx is not None:
            dx = dx if dx.stride() == x.stride() else torch.empty_like(x).copy_(dx)
        return dx, *[None if g is None else dense(g) for g in others]

    def fake(*arguments: Any) -> Any:
        _, inputs, _, _, _, mask = parts(arguments)
        dx = torch.empty_like(inputs[0])
        shaped = [dx, *(None if t is None else t.new_empty(t.shape) for t in inputs[1:])]
        return [t if need else None for t, need in zip(shaped, mask)]

    return kernel, fake


def _backward_function(d: Definition, backward: Operator) -> type[torch.autograd.Function]:
    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *arguments: Any) -> Any:  # type: ignore[override]
            grad, inputs, constants, _, ctx.attributes, ctx.mask = d.parts(arguments)
            ctx.save_for_backward(grad, *inputs, *constants)
            ctx.others = len(arguments) - 1 - len(d.inputs)
            return backward.below(keyset, arguments)

        @staticmethod
        def backward(ctx: Any, *outer: Tensor) -> Any:  # type: ignore[override]
            grad, *own = ctx.saved_tensors
            inputs, constants, _ = d.split(own)
            found = _second(
                lambda *tensors: d.reference(tensors, constants, ctx.attributes), grad, inputs, ctx.mask, outer
            )
            return None, *found, *[None] * ctx.others

    return Backward


def _second(
    reference: Callable[..., Tensor],
    grad: Tensor,
    inputs: Sequence[Tensor | None],
    mask: Sequence[bool],
    outer: Sequence[Tensor],
) -> list[Tensor | None]:
    """Derivatives of ``vjp(reference)(inputs)(grad)`` by ``grad`` and the inputs, given those of its results."""
    with torch.enable_grad():
        # Views of their own: the gradient may depend on the inputs itself, and that path is not to be walked here.
        sources = [t if t is None else t.view_as(t) if t.requires_grad else t.detach() for t in (grad, *inputs)]
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
