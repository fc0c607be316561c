"""The derived weight of a pruned module: ``<name>_orig * <name>_mask``, what its forward computes with.

It is computed anew for every forward, from what the parameter and the mask hold then. It is a plain tensor wherever
tensors cannot be subclassed (fake, functional and distributed tensors); elsewhere it can be copied and pickled, and it
knows whether anybody wrote to it: such a write reaches the parameter where the mask is one, or raises. In-place
methods, assignments to ``data`` and writes through views and aliases (``weight.data.copy_``, `WeightView`) do so at
once. What is written to its memory otherwise (functions that make a view of it, ``torch.flatten(weight).zero_()``; the
array of ``weight.detach().numpy()``) is found at the next forward, copy, state dict or verb, by the version that torch
counts; compiled code does not look at it, and of arrays torch knows nothing.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import disabled_torch_function, set_grad_enabled, version
from .alias import lend, lends
from .listening import heard
from .offload import offloaded
from .operands import PLAIN, operands, product

_DATA: Any = Tensor.data
_STALE = -1
_INSTEAD = "call sao_prune.remove(model) first, or write to {0}_orig; nothing was written"


@lends
class MaskedWeight(Tensor):
    """The product of weight and mask: an ordinary tensor in the graph that can be copied, pickled and written to.

    A plain non-leaf tensor refuses `copy.deepcopy`, which would break model averaging and every other tool that
    copies a pruned model. The copy is detached; the next forward pass computes it anew.
    """

    __torch_function__ = disabled_torch_function  # type: ignore[assignment]

    _owner: weakref.ref[nn.Module] | None = None
    #: The owner, where compiled code computed this: it makes no weak references.
    _module: nn.Module | None = None
    _name = ""
    #: Version of the parameter that this was computed from; `None` if unknown.
    _origin: int | None = None
    #: Its own version when it was computed.
    _version_then = 0
    _assigned = False
    _lent: Tensor | None = None
    _lent_version = 0
    #: What the module computes with since this was found to be out of date.
    _successor: MaskedWeight | None = None

    @property
    def written(self) -> bool:
        """Whether anybody wrote to it since it was computed."""
        lent = self._lent
        if self._assigned or self._version != self._version_then:
            return True
        return lent is not None and lent._version != self._lent_version

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """An alias outside the graph; what is written there counts as written here."""
        if torch.compiler.is_compiling():
            return Tensor.detach(self)
        current = self._renewed()
        if current is not self:
            return current.data
        if self._lent is None:
            self._lent = _DATA.__get__(self)
            self._lent_version = self._lent._version
        lent: Tensor = lend(self, self._lent, self._lent)
        return lent

    @data.setter
    def data(self, value: Tensor) -> None:
        if self._successor is not None:
            self._successor.data = value
            return
        self._refuse_if_left_behind()
        owner = self._current_owner()
        _DATA.__set__(self, value)
        self._assigned, self._lent = True, None
        if owner is not None:
            settle(owner, self._name)

    @property
    def stands_for(self) -> nn.Parameter | None:
        """The parameter that it is computed from; ``None`` if its module is gone."""
        owner = self._module if self._owner is None else self._owner()
        return None if owner is None else owner._parameters.get(f"{self._name}_orig")

    def note_write(self) -> None:
        """Let what was written through a view reach the parameter.

        Raises:
            RuntimeError: if it cannot, or the module has computed another weight since the view was made.
        """
        self._refuse_if_left_behind()
        owner = self._current_owner()
        self._assigned = True
        if owner is not None:
            settle(owner, self._name)

    def _refuse_if_left_behind(self) -> None:
        owner = self._module if self._owner is None else self._owner()
        if owner is None or owner.__dict__.get(self._name) is self or f"{self._name}_mask" not in owner._buffers:
            return
        raise RuntimeError(
            f"this {self._name} was computed for an earlier forward of a pruned {type(owner).__name__}: take it "
            "from the module again before writing to it"
        )

    def refill_(self, original: Tensor) -> None:
        """Take over a parameter that is zero where the mask is, without allocating; that is no write."""
        Tensor.copy_(self, original)
        self._version_then, self._origin = self._version, version(original)

    def __deepcopy__(self, memo: dict[int, Any]) -> MaskedWeight:
        if id(self) not in memo:
            twin = _rebuild(*self._state())
            twin._name = self._name
            owner = self._current_owner()
            copied = None if owner is None else memo.get(id(owner))
            if copied is not None:
                twin._owner = weakref.ref(copied)
                parameter = memo.get(id(getattr(owner, f"{self._name}_orig", None)))
                if parameter is not None and twin._origin is None:
                    twin._origin = version(parameter)
            memo[id(self)] = twin
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, self._state()

    def _state(self) -> tuple[Tensor, bool, bool]:
        """What a copy holds, whether somebody wrote to it, and whether that was after the parameter had changed."""
        written, owner = self.written, self._current_owner()
        if owner is not None and f"{self._name}_orig" in owner._parameters and f"{self._name}_mask" in owner._buffers:
            original, mask = operands(owner, self._name)
            stale = self._stale(original) and type(original) in PLAIN and original.shape == mask.shape
            if stale and not written:
                with torch.no_grad():
                    return product(original, mask), False, False
            return _plain(self).clone(), written, stale
        return _plain(self).clone(), written, False

    def _stale(self, original: Tensor) -> bool:
        return self._origin is not None and self._origin != version(original)

    def forget_writes(self) -> None:
        """Let what was written be no write."""
        self._assigned, self._version_then = False, self._version
        if self._lent is not None:
            self._lent_version = self._lent._version

    def _current_owner(self) -> nn.Module | None:
        """The module whose weight this is; ``None`` if it is gone or has computed another since."""
        owner = self._module if self._owner is None else self._owner()
        return owner if owner is not None and owner.__dict__.get(self._name) is self else None

    def _renewed(self) -> MaskedWeight:
        """What the module would compute with now: this, unless the parameter or the mask have changed since."""
        if self._successor is not None:
            return self._successor._renewed()
        owner = self._current_owner()
        if owner is None or self.written:
            return self
        original, mask = operands(owner, self._name)
        if original.device != self.device or type(original) not in PLAIN:
            return self
        with torch.no_grad():
            now = product(original, mask)
        if now.shape == self.shape and now.dtype == self.dtype and torch.equal(now, _plain(self)):
            return self
        place(owner, self._name, derive(owner, self._name))
        successor = owner.__dict__.get(self._name)
        if type(successor) is not MaskedWeight:
            return self
        self._successor = successor
        return successor


def _writing(name: str) -> Callable[..., Any]:
    """An in-place method that starts from what the module would compute with now, and reaches the parameter."""
    method = getattr(Tensor, name)

    def write(self: MaskedWeight, *args: Any, **kwargs: Any) -> Any:
        weight = self._renewed()
        weight._refuse_if_left_behind()
        result = method(weight, *args, **kwargs)
        owner = weight._current_owner()
        if owner is not None:
            settle(owner, weight._name)
        return result

    write.__name__, write.__qualname__ = name, f"MaskedWeight.{name}"
    write.__doc__ = f"As `torch.Tensor.{name}`, on the weight as it is now; reaches the parameter."
    return write


_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
_NO_WRITES = ("requires_grad_", "detach_", "rename_", "share_memory_", "resize_", "resize_as_", "set_")
for _name in (*dir(Tensor), "__setitem__", *(f"__i{name}__" for name in _OPERATORS)):
    _in_place = _name.endswith("_") and not _name.startswith("_") and _name not in _NO_WRITES
    if (_in_place or _name == "__setitem__" or _name[3:-2] in _OPERATORS) and hasattr(Tensor, _name):
        setattr(MaskedWeight, _name, _writing(_name))


def _plain(weight: Tensor) -> Tensor:
    """The weight without its graph and without what it knows of itself."""
    return Tensor.detach(weight).as_subclass(Tensor)


def _rebuild(values: Tensor, written: bool, stale: bool) -> MaskedWeight:
    weight = values.as_subclass(MaskedWeight)
    weight._version_then, weight._assigned, weight._origin = weight._version, written, _STALE if stale else None
    return weight


def derive(module: nn.Module, name: str) -> Tensor:
    """Compute the weight of a pruned tensor, once what was written to the last one has reached its parameter.

    Raises:
        RuntimeError: if it was written to and a compiler or exporter is looking.
    """
    if torch.compiler.is_compiling():
        if not torch.compiler.is_dynamo_compiling() and getattr(module.__dict__.get(name), "written", False):
            raise RuntimeError(
                f"{type(module).__name__}.{name} is pruned and was written to: run the model once before it is "
                f"exported, so that {name}_orig has the values"
            )
        weight = product(getattr(module, f"{name}_orig"), getattr(module, f"{name}_mask"))
        if type(weight) is not Tensor:
            return weight
        compiled = weight.as_subclass(MaskedWeight)
        compiled._module, compiled._name = module, name
        return compiled
    last = module.__dict__.get(name)
    if type(last) is MaskedWeight and last.written:
        _write_through(module, name, last)
    original, mask = operands(module, name)
    if original.is_meta:
        original, mask = offloaded(module, f"{name}_orig", original), offloaded(module, f"{name}_mask", mask)
    if torch.is_grad_enabled() or type(original) not in PLAIN:
        weight = _mark(product(original, mask))
    elif torch.is_inference_mode_enabled():
        weight = _mark_after_inference(original, mask)
    elif threading.active_count() > 1:
        weight = _mark_in_graph(original, mask)
    else:
        weight = _mark(product(original, mask))
    if type(weight) is MaskedWeight:
        weight._owner, weight._name, weight._origin = weakref.ref(module), name, version(original)
    return heard(module, name, weight)


def _mark(weight: Tensor) -> Tensor:
    if type(weight) is not Tensor or weight.is_inference():
        return weight
    return weight.as_subclass(MaskedWeight)


def _mark_in_graph(original: Tensor, mask: Tensor) -> Tensor:
    """The product with its graph, where gradients are off: another thread may be training this module, and find it."""
    set_grad_enabled(True)
    try:
        return _mark(product(original, mask))
    finally:
        set_grad_enabled(False)


def _mark_after_inference(original: Tensor, mask: Tensor) -> Tensor:
    """The product as an ordinary tensor: one of inference mode knows of no writes, and no thread can train with it."""
    if original.is_inference() or mask.is_inference():
        return product(original, mask)
    with torch.inference_mode(False), torch.enable_grad():
        return _mark(product(original, mask))


def place(module: nn.Module, name: str, weight: Tensor) -> None:
    """Let a module compute with this weight."""
    if type(module).__setattr__ is nn.Module.__setattr__ and not torch.compiler.is_compiling():
        module.__dict__[name] = weight
    else:
        setattr(module, name, weight)


def settle(module: nn.Module, name: str) -> None:
    """Let what was written to a masked weight reach its parameter now; `derive` does so before every forward."""
    last = module.__dict__.get(name)
    if type(last) is MaskedWeight and last.written:
        _write_through(module, name, last)


def current(module: nn.Module, name: str) -> Tensor:
    """The weight that a module would compute with now, detached; of a pruned tensor the product, computed anew.

    Args:
        module: any module, its tensor pruned or not.
        name: of the tensor.

    Returns:
        A tensor without a graph.

    Example:
        >>> import torch, sao_prune
        >>> layer = sao_prune.prune.kernel_l1(torch.nn.Linear(4, 4), "weight", amount=0.5)
        >>> int((current(layer, "weight") != 0).sum())
        8
    """
    if f"{name}_mask" not in module._buffers or name in module._parameters:
        weight: Tensor = getattr(module, name)
        return Tensor.detach(weight)
    settle(module, name)
    with torch.no_grad():
        return product(*operands(module, name))


@torch.no_grad()
def _write_through(module: nn.Module, name: str, weight: MaskedWeight) -> None:
    """Write a masked weight's values to its parameter, where the mask is one, and drop its others.

    Raises:
        RuntimeError: if the parameter cannot be written, or was itself changed since the weight was computed.
    """
    original, mask = operands(module, name)
    whose = f"{type(module).__name__}.{name}"
    instead = _INSTEAD.format(name)
    values, stale = _plain(weight).clone(), weight._stale(original)
    weight.forget_writes()
    if f"{name}_orig" not in module._parameters or type(original) not in PLAIN:
        raise RuntimeError(f"{whose} is pruned and was written to, but {name}_orig is computed or sharded: {instead}")
    if weight.shape != original.shape:
        raise RuntimeError(
            f"{whose} is pruned and was given data of shape {tuple(weight.shape)}, expected "
            f"{tuple(original.shape)}: {instead}"
        )
    if stale:
        raise RuntimeError(
            f"{whose} is pruned and was written to after {name}_orig had changed, so that it was out of date: {instead}"
        )
    values = values.to(original)
    kept = mask.to(original.device) != 0
    dropped = int(((values != 0) & ~kept).sum())
    original.copy_(torch.where(kept, values, original))
    _DATA.__get__(weight).copy_(product(original, mask))
    weight._origin = version(original)
    if dropped:
        warnings.warn(
            f"{whose} is pruned: of what was written to it, {dropped} non-zero values lie where its mask is zero and "
            f"were dropped (sao_prune.remove(model) first, to keep them)",
            stacklevel=2,
        )
