"""What joins a block layer's call: a batch norm and an activation, or an activation and the next linear layers.

The layer that owns an epilogue computes it in its own forward. The modules that it absorbed stay where they are in the
model, with their parameters, buffers, names and hooks; while their owner computes them they give back what they are
given, if that is the owner's result, and raise an error if it is not.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from copy import deepcopy
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from .._torch import BatchNorm, decided_once, has_global_hooks, version
from .absorbed import OWNERS, absorbed_class, activation_in, activation_name, is_activation, is_norm, kind_of
from .backends import cpu

# Storage, offset and version of a result; and how many are remembered, for passes that run again and other threads.
_Result = tuple[StorageWeakRef, int, int | None]
Homes = Mapping[int, Sequence[tuple[nn.Module, str]]]
_MOST = 64


class Epilogue:
    """The modules that a block layer computes along with itself.

    They are known by weak references: a module that has been replaced in the model is gone, and the layer then runs
    alone. Copies and pickles of a model refer to their own modules.

    Args:
        owner: the layer.
        norm: its batch norm, first.
        activation: then an activation.
        between: modules that give back what they are given while they are inactive (dropouts).
        then: last a linear layer.
        rest: in its place several, each with the activation behind it, the last perhaps without; then nothing may be
            between.
    """

    def __init__(
        self,
        owner: nn.Module,
        norm: nn.Module | None,
        activation: nn.Module | None,
        between: tuple[nn.Module, ...] = (),
        then: nn.Module | None = None,
        rest: tuple[nn.Module, ...] = (),
    ) -> None:
        self._present = norm is not None, activation is not None, then is not None, len(rest)
        self._refer([owner, norm, activation, then, *between, *rest], [])
        self._idle()

    def _refer(self, modules: list[nn.Module | None], homes: list[tuple[nn.Module, str, nn.Module]]) -> None:
        self._modules = [None if m is None else weakref.ref(m) for m in modules]
        self._homes = [(weakref.ref(parent), name, weakref.ref(member)) for parent, name, member in homes]

    def _idle(self) -> None:
        # What a compiled program decides; the threads in which the others wait for the owner's result; its results by
        # their storages. No step of one thread relies on what it has found before, as others go on meanwhile.
        self.fused = False
        self._waiting: set[int] = set()
        self._results: dict[int, _Result] = {}

    def settle(self, homes: Homes) -> None:
        """Note where in a model the members are: once one is somewhere else, or in a wrapper, the owner runs alone."""
        members = self.members()
        self._refer(members, [(*home, m) for m in members if m is not None for home in homes.get(id(m), ())])

    def members(self) -> list[nn.Module | None]:
        """Owner, norm, activation, next layer, and what is between or the rest; ``None`` for what is not there (any
        more)."""
        return [None if ref is None else ref() for ref in self._modules]

    @property
    def is_stack(self) -> bool:
        """Whether there is a rest."""
        return self._present[3] > 0

    def stack(self) -> tuple[list[Any], list[str]]:
        """The layers of a stack, the owner first, and what each has behind it."""
        owner, _, activation, _, *rest = self.members()
        behind = [activation_name(activation), *(activation_name(m) for m in rest[1::2])]
        layers = [owner, *rest[::2]]
        return layers, behind + [""] * (len(layers) - len(behind))

    @property
    def names(self) -> tuple[str, ...]:
        """What is computed, in order."""
        _, norm, activation, then, *others = self.members()
        rest = tuple(activation_name(m) or "linear" for m in others) if self.is_stack else ()
        return (*step_names(norm, activation, then), *rest)

    @staticmethod
    def can_absorb(norm: nn.Module | None, activation: nn.Module | None) -> bool:
        """Whether these modules can be computed by a layer."""
        if activation is not None and not is_activation(activation):
            return False
        # The activation of a norm that has one joins with it.
        own = activation_in(norm)
        return (activation is not None) if norm is None else is_norm(norm) and (own is None or own is activation)

    def parts(self) -> tuple[BatchNorm | None, str, Any]:
        """The norm, the activation's name and the next layer."""
        _, norm, activation, then, *_ = self.members()
        return norm, activation_name(activation), then  # type: ignore[return-value]

    def begin(self, x: Tensor, plain: bool) -> bool:
        """Decide whether the owner computes all in this call, and let the others know."""
        self.fused = fused = not plain and self._suits(x)
        if not torch.compiler.is_compiling():
            (self._waiting.add if fused else self._waiting.discard)(get_ident())
        return fused

    def _suits(self, x: Tensor) -> bool:
        owner, norm, activation, then, *others = members = self.members()
        if (norm is not None, activation is not None, then is not None) != self._present[:3] or owner is None:
            return False
        if x.is_meta or torch.is_autocast_enabled("cpu" if x.is_cpu else x.device.type) or has_global_hooks():
            return False
        compiling = torch.compiler.is_compiling()
        if not self._is_at_home():
            return False
        for m in members:
            if m is not None and (is_watched(m) or m.__dict__.get("approximate", "none") != "none"):
                return False
        tensors: list[Any] = []
        for m in others:
            if m is None or (not self.is_stack and m.training and getattr(m, "p", 1) > 0):
                return False
        for layer in others[::2] if self.is_stack else ():
            tensors += [layer.blocks, layer.bias]  # type: ignore[union-attr]
        if norm is not None:
            if not compiling and not is_norm(norm):
                return False
            if x.dim() != (4 if isinstance(norm, nn.BatchNorm2d) else x.dim()) or norm.momentum is None:
                return False
            if norm.running_mean is None or norm.running_var is None:
                return False
            if norm.training and (not norm.track_running_stats or x.numel() // x.shape[1] < 2):
                return False
            tensors += [norm.weight, norm.bias, norm.running_mean, norm.running_var]
        if then is not None:
            tensors += [then.blocks, then.bias]
        for t in tensors:
            if t is not None and (t.device != x.device or t.dtype != x.dtype):
                return False
        return compiling or not x.is_cpu or cpu.ready(x, *tensors)

    @decided_once
    def _is_at_home(self) -> bool:
        for home, name, ref in self._homes:
            parent = home()
            if parent is None or parent._modules.get(name) is not ref():
                return False
        return True

    def done(self, y: Tensor) -> Tensor:
        """Note the result that the absorbed modules are to be given."""
        if not torch.compiler.is_compiling():
            if len(self._results) >= _MOST:
                for key in [k for k, r in list(self._results.items()) if r[0].expired()]:
                    self._results.pop(key, None)
                for key in list(self._results)[: -_MOST // 2]:
                    self._results.pop(key, None)
            storage = StorageWeakRef(y.untyped_storage())
            self._results[storage.cdata] = storage, int(y.storage_offset()), version(y)
        return y

    def given(self, x: Tensor, module: nn.Module) -> bool:
        """Whether an absorbed module is given a result in which it has been computed; the last ends the owner's call.

        Raises:
            RuntimeError: if it is given anything else while its owner computes it.
        """
        compiling = torch.compiler.is_compiling()
        if not (self.fused if compiling else self._is_result(x)):
            # An owner that ran compiled has left no result; then no thread waits.
            waits = not compiling and (get_ident() in self._waiting or (self.fused and not self._waiting))
            if waits:
                raise RuntimeError(
                    "this module is computed by the block layer before it, and was given something else than that "
                    "layer's result: the model runs otherwise than when it was made compact. Make it compact anew "
                    "(expand, then compact) for the way it runs now, or with fuse=False"
                )
            return False
        _, norm, activation, then = self._modules[:4]
        last = self._modules[-1] if self.is_stack else then or activation or norm
        # An activation may be part of the norm, which is given the result in its place.
        if last is not None and (last() is module or (norm is not None and last() is activation_in(module))):
            self.fused = False
            if not compiling:
                self._waiting.discard(get_ident())
        return True

    def _is_result(self, x: Tensor) -> bool:
        try:
            storage = StorageWeakRef(x.untyped_storage()).cdata
        except NotImplementedError:
            # Within a function transform, where owners run alone: no result of theirs.
            return False
        known, written = self._results.get(storage), version(x)
        return known is not None and (known[1:] == (int(x.storage_offset()), written) or written == -1)

    def __deepcopy__(self, memo: dict[int, Any]) -> Epilogue:
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        copies = [None if m is None else deepcopy(m, memo) for m in self.members()]
        # Of a layer that is copied alone nobody holds the copies of the others, so that it runs alone.
        homes = [(memo.get(id(parent())), name, memo.get(id(member()))) for parent, name, member in self._homes]
        new.__setstate__({"present": self._present, "modules": copies, "homes": homes})
        return new

    def __getstate__(self) -> dict[str, Any]:
        homes = [(parent(), name, member()) for parent, name, member in self._homes]
        return {"present": self._present, "modules": self.members(), "homes": homes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._present = state["present"]
        homes = [home for home in state.get("homes", ()) if home[0] is not None and home[2] is not None]
        self._refer(state["modules"], homes)
        self._idle()


def step_names(norm: nn.Module | None, activation: nn.Module | None, then: nn.Module | None) -> tuple[str, ...]:
    """What an epilogue of these modules computes, in order."""
    steps = norm and "batch_norm", activation_name(activation), then and "linear"
    return tuple(str(step) for step in steps if step)


def is_watched(module: nn.Module) -> bool:
    """Whether anyone sees what goes into or comes out of a module, replaces that, or runs it compiled by itself."""
    before, after = module._forward_pre_hooks, module._forward_hooks
    hooks = before or after or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or module._compiled_call_impl is not None or "forward" in module.__dict__


def homes_of(model: nn.Module) -> Homes:
    """Parent and name of every module of a model, by the id of the module."""
    homes: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent.named_children():
            homes.setdefault(id(child), []).append((parent, name))
    return homes


def attach(epilogue: Epilogue, homes: Homes | None = None) -> None:
    """Make a layer compute its epilogue from now on, as long as its members stay where they are in the model."""
    epilogue.settle(homes or {})
    owner, norm, activation, then, *others = epilogue.members()
    assert owner is not None
    owner.__dict__["epilogue"] = epilogue
    inner = activation_in(norm)
    for module in (norm, activation, then, *(others if epilogue.is_stack else ())):
        if module is None or module is inner:
            continue
        if activation_name(module) or is_norm(module):
            module.__class__ = absorbed_class(type(module))
        module.__dict__["absorbed"] = epilogue


def detach(model: nn.Module) -> None:
    """Let every module of a model compute itself."""
    for module in model.modules():
        # What a model has under these names itself is its own.
        for name in ("epilogue", "absorbed"):
            if isinstance(module.__dict__.get(name), Epilogue):
                del module.__dict__[name]
                module.__class__ = kind_of(module)
        if isinstance(module, tuple(OWNERS)):
            module.__dict__.pop("whole", None)
        if type(module) in OWNERS:
            module.__class__ = OWNERS[type(module)]
