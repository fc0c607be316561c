"""What shares memory with a masked weight, such as ``weight.data`` or ``weight[:2]``: writes to it are writes to that.

A write through a view leaves no trace that compiled code looks for, and none at all once the next forward has computed
the weight anew. So views of a masked weight are tensors that see, after every function of torch that takes them,
whether it wrote to them, and let it reach the parameter at once, or raise.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from .._torch import is_alias, tracing_state, tree_leaves, tree_map, under_transforms, without_subclasses

_BY_VIEW = (
    "view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "ravel", "t", "transpose", "permute",
    "swapaxes", "swapdims", "movedim", "moveaxis", "narrow", "select", "squeeze", "unsqueeze", "expand", "expand_as",
    "diagonal", "unfold", "split", "split_with_sizes", "chunk", "tensor_split", "hsplit", "vsplit", "dsplit", "unbind",
    "as_strided", "detach", "adjoint", "__getitem__", "__iter__",
)  # fmt: skip


class Source(Protocol):
    """A masked weight, as its views know it."""

    def note_write(self) -> None:
        """Let what was written to it through a view reach the parameter, or raise."""


class WeightView(Tensor):
    """A view of a masked weight. Results that share its memory are views too, all others ordinary tensors.

    Copies and pickles are ordinary tensors; so is a parameter that is made of it.
    """

    _source: Source | None = None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with without_subclasses():
            views = [(v, v._version) for v in tree_leaves((args, kwargs)) if isinstance(v, WeightView)]
            try:
                result = func(*args, **kwargs)
            finally:
                for view, version in views:
                    if view._version != version and view._source is not None:
                        view._source.note_write()
            if isinstance(result, np.ndarray):
                return _sealed(result, views[0][0]) if views else result
            if not isinstance(result, (Tensor, tuple, list)):
                return result
            for view, _ in views:
                if view._source is not None:
                    result = lend(view._source, view, result)
            return result

    @property
    def _is_param(self) -> bool:
        return False

    @_is_param.setter
    def _is_param(self, value: bool) -> None:
        # Set by nn.Parameter(view): an ordinary one, which an optimizer may write to.
        self.__class__ = nn.Parameter  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(_plain(self), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _plain(self).__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(_plain(self))


def _plain(view: Tensor) -> Tensor:
    with without_subclasses():
        return view.as_subclass(Tensor)


def lend(source: Source, origin: Tensor, result: Any) -> Any:
    """The tensors of a result as `WeightView`, where they share memory with ``origin``."""
    if torch.compiler.is_compiling() or tracing_state() is not None or under_transforms():
        return result

    def wrap(tensor: Any) -> Any:
        if type(tensor) is not Tensor or not is_alias(tensor, origin):
            return tensor
        view = tensor.as_subclass(WeightView)
        view._source = source
        return view

    return wrap(result) if isinstance(result, Tensor) else tree_map(wrap, result)


def _sealed(array: Any, origin: Tensor) -> Any:
    """The array of a tensor, read-only where it shares memory with it: torch would know nothing of a write to that."""
    if array.ctypes.data == origin.data_ptr():
        array.flags.writeable = False
    return array


def lends(cls: type[Tensor]) -> type[Tensor]:
    """Class decorator: what a masked weight gives away of its memory are `WeightView`."""

    def lending(call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            return lend(self, self, call(self, *args, **kwargs))

        method.__name__, method.__qualname__ = name, f"{cls.__name__}.{name}"
        method.__doc__ = f"As `torch.Tensor.{name}`; what is written to the result is written to the weight."
        return method

    for name in _BY_VIEW:
        setattr(cls, name, lending(getattr(Tensor, name), name))
    cls.numpy, cls.__array__ = _numpy, _array  # type: ignore[assignment, method-assign]
    # Not torch's own properties, which compilers cannot trace from here; weights are real, so that H is T.
    for name in ("T", "mT", "H", "mH"):
        setattr(cls, name, property(_reversed if name == "T" else _transposed))
    return cls


def _numpy(weight: Any, *, force: bool = False) -> Any:
    """As `torch.Tensor.numpy`; the array is read-only."""
    return _sealed(Tensor.numpy(weight, force=force), weight)


def _array(weight: Any, dtype: Any = None, copy: bool | None = None) -> Any:
    """As `torch.Tensor.__array__`, by numpy's protocol; an array that shares memory is read-only."""
    return np.array(_numpy(weight), dtype=dtype, copy=copy)


def _reversed(weight: Any) -> Any:
    return weight.permute(tuple(reversed(range(weight.dim()))))


def _transposed(weight: Any) -> Any:
    return weight.transpose(-2, -1)
