"""Where the outputs of layers go: through which norms and permutations, and what they are added to in the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .streams import Sink, Step
from .uses import Use, attention_arguments, find_use

_TURNS = {
    torch.Tensor.mT.__get__,  # type: ignore[attr-defined]
    torch.Tensor.T.__get__,  # type: ignore[attr-defined]
    *(
        f
        for name in ("transpose", "permute", "swapaxes", "movedim")
        for f in (getattr(torch, name), getattr(Tensor, name))
    ),
}
_SAME = {F.dropout, torch.dropout, Tensor.contiguous, Tensor.clone, torch.clone, Tensor.to, Tensor.float}
_SUMS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__}
_PRODUCTS = {torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__}


class Tracer(TorchFunctionMode):
    """Follows the outputs of weights while a model runs on a few examples.

    A sum is found behind batch norms in eval mode, permutations of dimensions, dropout and factors that are parameters.

    Args:
        weights: ids of the weights to follow.
        parameters: of the model.

    Attributes:
        sinks: what became of the output of each weight's first use.
        last: id of the weight that was used last of all, followed or not, if it is that of a linear layer.
    """

    def __init__(self, weights: Iterable[int], parameters: Iterable[Tensor]) -> None:
        super().__init__()
        self._weights = frozenset(weights)
        self._storages = {p.untyped_storage().data_ptr() for p in parameters}
        self._held: list[Tensor] = []
        self._made: dict[int, int] = {}
        self._used: dict[int, int] = {}
        self._from: dict[int, int] = {}
        self._calls = 0
        self.sinks: dict[int, Sink] = {}
        self.last: int | None = None

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        number, self._calls = self._calls, self._calls + 1
        use = find_use(func, args, kwargs)
        output = func(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            weight = attention_arguments(args, kwargs)["out_proj_weight"]
            self._start(id(weight), output[0], number)
        elif use is not None and use.variance is None:
            self._start(use.key, output, number)
            self.last = use.key if func is F.linear and not use.inputs_first else None
        elif isinstance(output, Tensor):
            self._follow(func, args, kwargs, output, use)
        if isinstance(output, Tensor):
            self._held.append(output)
            self._made[id(output)] = number
        return output

    def _start(self, key: int, output: Tensor, number: int) -> None:
        self.last = None
        if key in self._weights and key not in self.sinks:
            self._held.append(output)
            self.sinks[key], self._used[key], self._from[id(output)] = Sink(), number, key

    def _follow(self, func: Callable[..., Any], args: Any, kwargs: Any, output: Tensor, use: Use | None) -> None:
        if func in _SUMS:
            if not kwargs and len(args) == 2:
                for one, other in (args, args[::-1]):
                    self._end(one, other)
            return
        places = [x for x in args if isinstance(x, Tensor) and id(x) in self._from]
        if use is not None and id(use.inputs[0]) in self._from:
            places = [use.inputs[0]]
        if len(places) != 1:
            return
        (came,), step = places, None
        key = self._from[id(came)]
        if use is not None:
            step = _divided(_norm_factor(use, came, output))
            self.sinks[key] = replace(self.sinks[key], norm=use.key)
        elif func in _TURNS and args[0] is came:
            step = _turned_back(func, args[1:], kwargs, came)
        elif func in _SAME and args[0] is came and output.shape == came.shape and torch.equal(output, came):
            self._from[id(output)] = key
            return
        elif func in _PRODUCTS and len(args) == 2 and output.shape == came.shape:
            factor = args[0] if args[1] is came else args[1]
            if isinstance(factor, Tensor) and factor.untyped_storage().data_ptr() in self._storages:
                step = _divided(factor.detach().clone())
        if step is not None:
            self.sinks[key] = replace(self.sinks[key], back=(step, *self.sinks[key].back))
            self._from[id(output)] = key

    def _end(self, branch: Any, stream: Any) -> None:
        if not isinstance(branch, Tensor) or not isinstance(stream, Tensor) or branch.shape != stream.shape:
            return
        key, number = self._from.get(id(branch)), self._made.get(id(stream))
        if key is not None and number is not None and number < self._used[key] and self.sinks[key].call is None:
            self.sinks[key] = replace(self.sinks[key], call=number)


def _norm_factor(use: Use, came: Tensor, output: Tensor) -> Tensor:
    """What a batch norm in eval mode multiplies each channel by, ``(channels, 1, ..)``."""
    assert use.variance is not None
    factor = (use.variance + use.eps).rsqrt() * (1 if use.scale is None else use.scale)
    return factor.detach().view(-1, *(1,) * (came.dim() - 2))


def _divided(factor: Tensor) -> Step:
    """Division by a factor; where that is zero nothing can be made up for, and the result is zero."""
    inverse = torch.where(factor.abs() > 1e-6 * factor.abs().max(), 1 / factor, torch.zeros_like(factor))
    return lambda x: x * inverse


def _turned_back(func: Callable[..., Any], rest: Any, kwargs: Any, came: Tensor) -> Step | None:
    """The permutation that undoes a call, read off the strides of what it makes of a contiguous tensor."""
    sizes = torch.arange(2, came.dim() + 2).tolist()
    probe = torch.empty(sizes, device="meta")
    turned = func(probe, *rest, **kwargs)
    if sorted(turned.shape) != sizes:
        return None
    order = [size - 2 for size in turned.shape]
    inverse = [order.index(d) for d in range(len(order))]
    return lambda x: x.permute(inverse)
