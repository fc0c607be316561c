"""The derived weight of a pruned module: ``<name>_orig * <name>_mask``, what its forward computes with.

It is computed anew for every forward, from what the parameter and the mask hold then. It is a plain tensor wherever
tensors cannot be subclassed (fake, functional and distributed tensors); elsewhere it can be copied and pickled, and it
knows whether anybody wrote to it: such a write reaches the parameter where the mask is one, or raises.
"""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _disabled_torch_function_impl

from .offload import offloaded

_DATA: Any = Tensor.data
_STALE = -1
_PLAIN = (nn.Parameter, Tensor)
# Older compilers know no subclasses of tensors: there a compiled forward leaves a plain one, which cannot be copied.
_COMPILES = torch.__version__ >= "2.8"
_INSTEAD = "call sao_prune.remove(model) first, or write to {0}_orig"


class MaskedWeight(Tensor):
    """The product of weight and mask: an ordinary tensor in the graph that can be copied, pickled and written to.

    A plain non-leaf tensor refuses `copy.deepcopy`, which would break model averaging and every other tool that
    copies a pruned model. The copy is detached; the next forward pass computes it anew.
    """

    __torch_function__ = _disabled_torch_function_impl  # type: ignore[assignment]

    _owner: weakref.ref[nn.Module] | None = None
    _name = ""
    #: Version of the parameter that this was computed from; `None` if unknown.
    _origin: int | None = None
    #: Its own version when it was computed.
    _version_then = 0
    _assigned = False
    _lent: Tensor | None = None
    _lent_version = 0

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
        current = self._renewed()
        if current is not self:
            return current.data
        if self._lent is None:
            self._lent = _DATA.__get__(self)
            self._lent_version = self._lent._version
        return self._lent

    @data.setter
    def data(self, value: Tensor) -> None:
        _DATA.__set__(self, value)
        self._assigned, self._lent = True, None
        owner = self._current_owner()
        if owner is not None:
            settle(owner, self._name)

    def refill_(self, original: Tensor) -> None:
        """Take over a parameter that is zero where the mask is, without allocating; that is no write."""
        self.copy_(original)
        self._version_then, self._origin = self._version, version(original)

    def __deepcopy__(self, memo: dict[int, Any]) -> MaskedWeight:
        if id(self) not in memo:
            twin = self.detach().clone().as_subclass(MaskedWeight)
            twin._assigned, twin._name = self.written, self._name
            owner = self._current_owner()
            original = None if owner is None else getattr(owner, f"{self._name}_orig", None)
            if owner is not None and original is not None:
                copied, parameter = memo.get(id(owner)), memo.get(id(original))
                twin._owner = None if copied is None else weakref.ref(copied)
                twin._origin = _STALE if self._stale(original) else None if parameter is None else version(parameter)
            memo[id(self)] = twin
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        owner = self._current_owner()
        original = None if owner is None else getattr(owner, f"{self._name}_orig", None)
        stale = original is not None and self._stale(original)
        return _rebuild, (self.detach().as_subclass(Tensor), self.written, stale)

    def _stale(self, original: Tensor) -> bool:
        return self._origin is not None and self._origin != version(original)

    def _current_owner(self) -> nn.Module | None:
        """The module whose weight this is; ``None`` if it is gone or has computed another since."""
        owner = None if self._owner is None else self._owner()
        return owner if owner is not None and owner.__dict__.get(self._name) is self else None

    def _renewed(self) -> MaskedWeight:
        """What the module would compute with now: this, unless the parameter or the mask have changed since."""
        owner = self._current_owner()
        if owner is None or self.written:
            return self
        original, mask = operands(owner, self._name)
        if original.device != self.device or type(original) not in _PLAIN:
            return self
        with torch.no_grad():
            now = product(original, mask)
        if now.shape == self.shape and now.dtype == self.dtype and torch.equal(now, self.detach()):
            return self
        place(owner, self._name, derive(owner, self._name))
        current = owner.__dict__.get(self._name)
        return current if type(current) is MaskedWeight else self


def _rebuild(values: Tensor, written: bool, stale: bool) -> MaskedWeight:
    weight = values.as_subclass(MaskedWeight)
    weight._version_then, weight._assigned, weight._origin = weight._version, written, _STALE if stale else None
    return weight


def version(tensor: Tensor) -> int | None:
    """How often a tensor was written to in place; ``None`` where torch does not count."""
    return None if tensor.is_inference() else tensor._version


def operands(module: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    """Parameter and mask of a pruned tensor.

    Raises:
        RuntimeError: if the tensor was replaced, or the module is no longer the one that was pruned.
    """
    if name in module._parameters:
        raise RuntimeError(
            f"{type(module).__name__}.{name} is pruned ({name}_orig * {name}_mask), and another parameter was put in "
            f"its place: call sao_prune.remove(model) or sao_prune.compact(model) before weights are replaced or "
            f"quantized (`del module.{name}` undoes the replacement)"
        )
    original = module._parameters.get(f"{name}_orig")
    mask = module._buffers.get(f"{name}_mask")
    if original is None or mask is None:
        # Sharding, replicas and parametrizations keep them as attributes.
        original, mask = getattr(module, f"{name}_orig", None), getattr(module, f"{name}_mask", None)
    if original is None or mask is None:
        missing = f"{name}_mask" if mask is None else f"{name}_orig"
        raise RuntimeError(
            f"{type(module).__name__} has the pruning hook of {name!r} but no {missing}: it was converted while it was "
            f"pruned; call sao_prune.remove(model) or sao_prune.compact(model) before converting or quantizing"
        )
    return original, mask


def product(original: Tensor, mask: Tensor) -> Tensor:
    """``original * mask``; where the parameter is distributed, its mask is taken to be the same on all ranks."""
    if type(original) not in _PLAIN and hasattr(original, "device_mesh") and not hasattr(mask, "device_mesh"):
        from torch.distributed.tensor import DTensor, Replicate

        mesh: Any = original.device_mesh
        mask = DTensor.from_local(mask, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return (mask if mask.dtype == original.dtype else mask.to(dtype=original.dtype)) * original


def derive(module: nn.Module, name: str) -> Tensor:
    """Compute the weight of a pruned tensor, once what was written to the last one has reached its parameter."""
    if torch.compiler.is_compiling():
        weight = product(getattr(module, f"{name}_orig"), getattr(module, f"{name}_mask"))
        return weight.as_subclass(MaskedWeight) if type(weight) is Tensor and _COMPILES else weight
    last = module.__dict__.get(name)
    if type(last) is MaskedWeight and last.written:
        _write_through(module, name, last)
    original, mask = operands(module, name)
    if original.is_meta:
        original, mask = offloaded(module, f"{name}_orig", original), offloaded(module, f"{name}_mask", mask)
    if torch.is_grad_enabled() or not original.requires_grad or type(original) not in _PLAIN:
        weight = product(original, mask)
    else:
        weight = _product_in_graph(original, mask)
    if type(weight) is not Tensor:
        return weight
    masked = weight.as_subclass(MaskedWeight)
    masked._owner, masked._name, masked._origin = weakref.ref(module), name, version(original)
    return masked


def _product_in_graph(original: Tensor, mask: Tensor) -> Tensor:
    """The product with its graph, where gradients are off: another thread may be training the module."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.enable_grad():
            return product(original, mask)
    torch._C._set_grad_enabled(True)
    try:
        return product(original, mask)
    finally:
        torch._C._set_grad_enabled(False)


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
        place(module, name, derive(module, name))


def current(module: nn.Module, name: str) -> Tensor:
    """The weight that a module would compute with now, detached; of a pruned tensor the product, computed anew."""
    if f"{name}_mask" not in module._buffers or name in module._parameters:
        weight: Tensor = getattr(module, name)
        return weight.detach()
    settle(module, name)
    with torch.no_grad():
        return product(*operands(module, name))


@torch.no_grad()
def _write_through(module: nn.Module, name: str, weight: MaskedWeight) -> None:
    """Write a masked weight's values to its parameter, where the mask is one.

    Raises:
        RuntimeError: if the parameter cannot be written, or was itself changed since the weight was computed.
    """
    original, mask = operands(module, name)
    whose = f"{type(module).__name__}.{name}"
    instead = _INSTEAD.format(name)
    if f"{name}_orig" not in module._parameters or type(original) not in _PLAIN:
        raise RuntimeError(f"{whose} is pruned and was written to, but {name}_orig is computed or sharded: {instead}")
    if weight.shape != original.shape:
        raise RuntimeError(
            f"{whose} is pruned and was given data of shape {tuple(weight.shape)}, expected "
            f"{tuple(original.shape)}: {instead}"
        )
    if weight._stale(original):
        raise RuntimeError(
            f"{whose} is pruned and was written to after {name}_orig had changed, so that it was out of date: {instead}"
        )
    values = weight.detach().to(original)
    kept = mask.to(original.device) != 0
    dropped = int(((values != 0) & ~kept).sum())
    original.copy_(torch.where(kept, values, original))
    weight._assigned, weight._origin = False, None
    if dropped:
        warnings.warn(
            f"{whose} is pruned: of what was written to it, {dropped} non-zero values lie where its mask is zero and "
            f"were dropped (sao_prune.remove(model) first, to keep them)",
            stacklevel=2,
        )
