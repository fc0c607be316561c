"""Results that a layer has yet to compute, so that the norm and the activation behind it join it in one kernel, and the
next layer too."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.utils._pytree import tree_leaves, tree_map_only

from .native import NOTHING, SWITCH, After, Norm
from .steps import LINEAR, Step, does_nothing, is_known, step

_Compute = Callable[[After], Tensor]

# What asks for gradients of a tensor itself.
_OF_GRAPH = {
    Tensor.register_hook,
    Tensor.register_post_accumulate_grad_hook,
    Tensor.retain_grad,
    *(getattr(Tensor, name).__get__ for name in ("grad", "retains_grad")),
    torch.autograd.grad,
}


def is_watched(modules: Iterable[nn.Module]) -> bool:
    """Whether anyone sees what goes into or comes out of the modules, or may do so in compiled code."""
    everywhere = torch.nn.modules.module
    if (
        everywhere._global_forward_hooks
        or everywhere._global_forward_pre_hooks
        or everywhere._global_backward_hooks
        or everywhere._global_backward_pre_hooks
        or _has_compiled()
    ):
        return True
    return any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks or m._compiled_call_impl
        for m in modules
    )


def _has_compiled() -> bool:
    """Whether this process has used `torch.compile`: compiled code takes a result that is put off without its history,
    and gradients end there, unnoticed."""
    frames = sys.modules.get("torch._dynamo.eval_frame")
    return frames is not None and any(getattr(frames, "cached_backends", {0: True}).values())


class TooLate(RuntimeError):
    """A result that was put off cannot be had any more."""


class Deferred(Tensor):
    """A tensor that is computed when something is done with it.

    What its layer expects to follow is added to what its kernel does; after the last of that the result is an ordinary
    tensor, or that of the next layer. Anything else makes it compute what it stands for, as if nothing had been put
    off. If that cannot be had any more, because an input has been changed in place, it says so. Changes that do not
    count as such go unnoticed: those in inference mode, through ``.data``, of memory shared with NumPy. There it relies
    on the model's running as it did when it was made compact.
    """

    _plan: _Plan
    _after: After
    _expected: tuple[str, ...]
    _gradients: bool
    _value: Tensor | None
    _followed: bool

    @staticmethod
    def of(
        compute: _Compute,
        expected: tuple[str, ...],
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        sources: tuple[Tensor, ...],
        channels: int = 1,
        origin: Any = None,
    ) -> Deferred:
        """The result of ``compute``.

        Args:
            compute: what gives the result, given what follows.
            expected: names of the steps that follow.
            shape: the result's.
            strides: the result's.
            sources: the tensors that it is computed from.
            channels: the dimension of the layer's channels, for a norm to be able to join.
            origin: what the next layer has to know to compute this one too; ``None``: it cannot.
        """
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        return _deferred(
            _Plan(compute, shape, strides, channels, modes, sources, _versions(sources), origin), NOTHING, expected
        )

    def value(self) -> Tensor:
        """The tensor itself."""
        if self._value is None:
            self._settle(self._alone())
        # A custom autograd function may have made this wrapper its result.
        assert self._value is not None
        return _Through.apply(self, self._value) if self._is_attached() else self._value

    def origin(self) -> tuple[Any, str] | None:
        """What a linear layer that reads this needs to compute it as well, and the activation; or nothing."""
        plan = self._plan
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        if self._expected != (LINEAR,) or self._value is not None or plan.modes != modes or self._is_attached():
            return None
        plan.check()
        return None if plan.origin is None else (plan.origin, self._after.act)

    def taken(self) -> None:
        """Another layer has computed this on the way: there are no gradients of it."""
        self._followed = True

    def _settle(self, value: Tensor) -> None:
        """The value is known: keep nothing that it came from."""
        self._value = value
        self._plan = replace(self._plan, compute=_done, sources=(), versions=(), origin=None)

    def _alone(self) -> Tensor:
        """The tensor itself, not kept."""
        if self._value is not None:
            return self._value
        gradients, inference = self._plan.modes
        with torch.inference_mode(inference), torch.set_grad_enabled(gradients):
            return self._plan.result(self._after)

    def _is_attached(self) -> bool:
        with torch._C.DisableTorchFunctionSubclass():
            return self.grad_fn is not None or self.requires_grad != self._gradients

    def _follow(self, found: Step) -> Tensor | None:
        """The result of a step that was expected, or nothing."""
        plan = self._plan
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        if self._expected[:1] != (found.name,) or plan.modes != modes or self._is_attached():
            return None
        if found.norm is None:
            after = After(self._after.norm, found.name)
        else:
            if plan.channels != 1 or not found.norm.suits(plan.shape[1], math.prod(plan.shape) // plan.shape[1]):
                return None
            after, plan = After(found.norm), plan.with_norm(found.norm)
            if found.norm.training and len(self._expected) > 1:
                plan.result(replace(after, begun=True))  # the running averages change now, and once
        self._followed = True
        last = len(self._expected) == 1 or found.in_place
        result = plan.result(after) if last else _deferred(plan, after, self._expected[1:])
        if found.in_place:
            self._settle(result)
        return result

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if is_known(func):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        first = args[0] if args else None
        if type(first) is Deferred and first._value is None:
            found = step(func, args, kwargs)
            if found is not None and (result := first._follow(found)) is not None:
                return result
            if does_nothing(func, args, kwargs):
                return first
        if func in _OF_GRAPH and any(type(t) is Deferred and t._followed for t in tree_leaves((args, kwargs))):
            raise TooLate(
                "a layer's result has been used within a kernel, so there are no gradients of it: ask for them, or "
                f"hook it, before it is used, or run the model with {SWITCH}=0"
            )
        args, kwargs = tree_map_only(Deferred, Deferred.value, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        # Below autograd, where a value has no history that others could use.
        args, kwargs = tree_map_only(Deferred, Deferred._alone, (args, kwargs or {}))
        return func(*args, **kwargs)


def _done(after: After) -> Tensor:
    raise AssertionError("the value is there")


@dataclass(eq=False, slots=True)
class _Plan:
    """How a result is computed: by what, its layout, in which modes, from what, and how often that had been changed."""

    compute: _Compute
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    channels: int
    modes: tuple[bool, bool]
    sources: tuple[Tensor, ...]
    versions: tuple[int, ...]
    origin: Any = None

    def check(self) -> None:
        """The layer can still compute its result."""
        if _versions(self.sources) != self.versions:
            raise TooLate(
                "a layer's result is wanted that was put off, and the layer's input or weight has been changed in "
                f"place since: use the result earlier, or run the model with {SWITCH}=0"
            )

    def result(self, after: After) -> Tensor:
        self.check()
        return self.compute(after)

    def with_norm(self, norm: Norm) -> _Plan:
        """With a norm's tensors among the sources, but for running averages that it changes itself."""
        own = [norm.weight, norm.bias]
        own += [] if norm.training else [norm.running_mean, norm.running_var]
        new = tuple(t for t in own if t is not None)
        return replace(self, sources=self.sources + new, versions=self.versions + _versions(new))


class _Through(torch.autograd.Function):
    """A value in place of the wrapper that stands for it in the graph."""

    @staticmethod
    def forward(ctx: FunctionCtx, wrapper: Tensor, value: Tensor) -> Tensor:  # type: ignore[override]
        return value.view_as(value)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


def _deferred(plan: _Plan, after: After, expected: tuple[str, ...]) -> Deferred:
    like, wants = plan.sources[0], plan.modes[0] and any(t.requires_grad for t in plan.sources)
    new: Deferred = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
        Deferred, plan.shape, strides=plan.strides, dtype=like.dtype, device=like.device, requires_grad=wants
    )
    if wants:
        with torch._C.DisableTorchFunctionSubclass():
            new.register_hook(_lost)
    new._plan, new._after, new._expected = plan, after, expected
    new._gradients, new._value, new._followed = wants, None, False
    return new


def _lost(grad: Tensor) -> None:
    raise TooLate(
        "a gradient reached a result that was put off: a custom autograd function took it without torch's dispatch; "
        f"run the model with {SWITCH}=0, or compact it anew with that function in place"
    )


def _versions(tensors: tuple[Tensor, ...]) -> tuple[int, ...]:
    """How often each was changed in place; those of inference mode do not count."""
    return tuple(-1 if t.is_inference() else t._version for t in tensors)


@lru_cache(maxsize=1024)
def strides_of(shape: tuple[int, ...], innermost: int) -> tuple[int, ...]:
    """Strides of a tensor whose dimension ``innermost`` is innermost in memory, the others in their order.

    Example:
        >>> strides_of((2, 3, 4), 1)
        (12, 1, 3)
    """
    order = [i for i in range(len(shape)) if i != innermost] + [innermost]
    sizes = [shape[i] for i in order]
    steps = list(itertools.accumulate(reversed(sizes[1:]), int.__mul__, initial=1))[::-1]
    return tuple(steps[order.index(i)] for i in range(len(shape)))
