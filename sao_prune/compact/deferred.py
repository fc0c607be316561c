"""Results that a layer has yet to compute, so that the norm and the activation behind it join it in one kernel."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from .native import NOTHING, After, Norm

_Compute = Callable[[After], Tensor]
_NORM = "batch_norm"

_ACTS: dict[Any, str] = {
    F.relu: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    Tensor.relu: "relu",
    Tensor.relu_: "relu",
    F.gelu: "gelu",
    F.silu: "silu",
    F.tanh: "tanh",
    torch.tanh: "tanh",
    Tensor.tanh: "tanh",
}
_IN_PLACE = (torch.relu_, Tensor.relu_)

# What is known of a result before it is there.
_KNOWN = {
    *(
        getattr(Tensor, name).__get__
        for name in ("shape", "ndim", "dtype", "device", "layout", "requires_grad", "is_sparse", "is_quantized")
    ),
    *(getattr(Tensor, name).__get__ for name in ("is_cuda", "is_mkldnn", "is_meta")),
    Tensor.size,
    Tensor.dim,
    Tensor.stride,
    Tensor.numel,
    Tensor.nelement,
    Tensor.is_contiguous,
    Tensor.is_floating_point,
    Tensor.is_complex,
    torch.is_floating_point,
    torch.is_complex,
    torch.numel,
}


@dataclass(frozen=True)
class Step:
    """A function that may join a layer's kernel.

    Attributes:
        name: ``"batch_norm"`` or an activation.
        in_place: whether it changes the tensor that it is given.
        norm: the arguments of a norm.
    """

    name: str
    in_place: bool = False
    norm: Norm | None = None


def step(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Step | None:
    """What a call does to its first argument, if that may join a layer's kernel."""
    if function is F.batch_norm:
        return Step(_NORM, norm=_norm(*args[1:], **kwargs)) if args else None
    name = _ACTS.get(function)
    if name is None or not args or (name == "gelu" and "none" not in (*args[1:], kwargs.get("approximate", "none"))):
        return None
    in_place = function in _IN_PLACE or bool(args[1:2] == (True,) or kwargs.get("inplace"))
    return Step(name, in_place)


def _norm(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Norm:
    return Norm(running_mean, running_var, weight, bias, training, momentum, eps)


def is_known(function: Any) -> bool:
    """Whether a function tells only what is known of a result before it is there, such as its shape."""
    return function in _KNOWN


def is_watched(modules: Iterable[nn.Module]) -> bool:
    """Whether anyone sees what goes into or comes out of the modules."""
    everywhere = torch.nn.modules.module
    if (
        everywhere._global_forward_hooks
        or everywhere._global_forward_pre_hooks
        or everywhere._global_backward_hooks
        or everywhere._global_backward_pre_hooks
    ):
        return True
    return any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in modules)


class TooLate(RuntimeError):
    """A result that was put off cannot be had any more."""


class Deferred(Tensor):
    """A tensor that is computed when something is done with it.

    What its layer expects to follow is added to what its kernel does; after the last of that the result is an ordinary
    tensor. Anything else makes it compute what it stands for, as if nothing had been deferred.
    """

    _compute: _Compute
    _after: After
    _expected: tuple[str, ...]
    _channels: int
    _sources: tuple[Tensor, ...]
    _versions: tuple[int, ...]
    _gradients: bool
    _value: Tensor | None

    @staticmethod
    def of(
        compute: _Compute,
        expected: tuple[str, ...],
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        sources: tuple[Tensor, ...],
        channels: int = 1,
    ) -> Deferred:
        """The result of ``compute``.

        Args:
            compute: what gives the result, given what follows.
            expected: names of the steps that follow.
            shape: the result's.
            strides: the result's.
            sources: the tensors that it is computed from.
            channels: the dimension of the layer's channels, for a norm to be able to join.
        """
        gradients = torch.is_grad_enabled()
        new = _empty(shape, strides, sources[0], gradients and any(t.requires_grad for t in sources))
        return new._fill(compute, NOTHING, expected, channels, sources, _versions(sources), gradients)

    def _fill(
        self,
        compute: _Compute,
        after: After,
        expected: tuple[str, ...],
        channels: int,
        sources: tuple[Tensor, ...],
        versions: tuple[int, ...],
        gradients: bool,
    ) -> Deferred:
        self._compute, self._after, self._expected, self._channels = compute, after, expected, channels
        self._sources, self._versions, self._gradients, self._value = sources, versions, gradients, None
        return self

    def value(self) -> Tensor:
        """The tensor itself."""
        if self._value is None:
            with torch.set_grad_enabled(self._gradients):
                self._value = self._result(self._after)
        return self._value

    def _result(self, after: After) -> Tensor:
        if _versions(self._sources) != self._versions:
            raise TooLate(
                "a layer's result is wanted that was put off, and the layer's input or weight has been changed in "
                "place since: use the result earlier, or run the model with SAO_PRUNE_NATIVE=0"
            )
        return self._compute(after)

    def _follow(self, found: Step) -> Tensor | None:
        """The result of a step that was expected, or nothing."""
        if self._value is not None or self._expected[:1] != (found.name,) or self._gradients != torch.is_grad_enabled():
            return None
        sources = self._sources
        if found.norm is not None:
            shape = self.size()
            if self._channels != 1 or not found.norm.suits(shape[1], shape.numel() // shape[1]):
                return None
            after = After(found.norm)
            sources += tuple(t for t in (found.norm.weight, found.norm.bias) if t is not None)
        else:
            after = replace(self._after, act=found.name)
        if len(self._expected) == 1:
            result = self._result(after)
        else:
            wants = self._gradients and any(t.requires_grad for t in sources)
            new = _empty(tuple(self.size()), self.stride(), sources[0], wants)
            versions = self._versions + _versions(sources[len(self._sources) :])
            result = new._fill(
                self._compute, after, self._expected[1:], self._channels, sources, versions, self._gradients
            )
        if found.in_place:
            self._value = result
        return result

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _KNOWN:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        first = args[0] if args else None
        if type(first) is Deferred and first._value is None:
            found = step(func, args, kwargs)
            if found is not None:
                with torch._C.DisableTorchFunctionSubclass():
                    result = first._follow(found)
                if result is not None:
                    return result
        args, kwargs = tree_map_only(Deferred, Deferred.value, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map_only(Deferred, Deferred.value, (args, kwargs or {}))
        return func(*args, **kwargs)


def _empty(shape: tuple[int, ...], strides: tuple[int, ...], like: Tensor, requires_grad: bool) -> Deferred:
    new: Deferred = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
        Deferred, shape, strides=strides, dtype=like.dtype, device=like.device, requires_grad=requires_grad
    )
    if requires_grad:
        with torch._C.DisableTorchFunctionSubclass():
            new.register_hook(_lost)
    return new


def _lost(grad: Tensor) -> None:
    raise TooLate(
        "a gradient reached a result that was put off: a custom autograd function took it without torch's dispatch; "
        "run the model with SAO_PRUNE_NATIVE=0, or compact it anew with that function in place"
    )


def _versions(tensors: tuple[Tensor, ...]) -> tuple[int, ...]:
    """How often each was changed in place; those of inference mode do not count."""
    return tuple(-1 if t.is_inference() else t._version for t in tensors)


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
