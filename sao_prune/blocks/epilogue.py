"""What joins a block layer's kernel: a batch norm and an activation, or an activation and the next linear layer.

The layer that owns an epilogue computes it in its own forward. The modules that it absorbed stay where they are in the
model, with their parameters, buffers, names and hooks; while their owner computes them they give back what they are
given, if that is the owner's result, and raise an error if it is not.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.multiprocessing.reductions import StorageWeakRef

from .._torch import BatchNorm, has_global_hooks, version
from . import operators
from .backends import cpu

if TYPE_CHECKING:
    from .modules import BlockLinear, BlockModule

ACTIVATIONS: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.GELU: "gelu", nn.SiLU: "silu", nn.Tanh: "tanh"}
NORMS: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.BatchNorm2d)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


# Storage, offset and version of a result; and how many are remembered, for passes that run again.
_Result = tuple[StorageWeakRef, int, int | None]
Homes = Mapping[int, Sequence[tuple[nn.Module, str]]]
_MOST = 16


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
    """

    def __init__(
        self,
        owner: BlockModule,
        norm: nn.Module | None,
        activation: nn.Module | None,
        between: tuple[nn.Module, ...] = (),
        then: BlockLinear | None = None,
    ) -> None:
        self._present = norm is not None, activation is not None, then is not None
        self._refer([owner, norm, activation, then, *between], [])
        self.fused = False
        self._results: list[_Result] = []

    def _refer(self, modules: list[nn.Module | None], homes: list[tuple[nn.Module, str, nn.Module]]) -> None:
        self._modules = [None if m is None else weakref.ref(m) for m in modules]
        self._homes = [(weakref.ref(parent), name, weakref.ref(member)) for parent, name, member in homes]

    def settle(self, homes: Homes) -> None:
        """Note where in a model the members are: once one is somewhere else, or in a wrapper, the owner runs alone."""
        members = self.members()
        self._refer(members, [(*home, m) for m in members if m is not None for home in homes.get(id(m), ())])

    def members(self) -> list[nn.Module | None]:
        """Owner, norm, activation, next layer, and what is between; ``None`` for what is not there (any more)."""
        return [None if ref is None else ref() for ref in self._modules]

    @property
    def names(self) -> tuple[str, ...]:
        """What is computed, in order, for reports."""
        _, norm, activation, then, *_ = self.members()
        found = ["batch_norm"] if norm is not None else []
        found += [self._activation(activation)] if activation is not None else []
        return (*found, *(["linear"] if then is not None else []))

    @staticmethod
    def can_absorb(norm: nn.Module | None, activation: nn.Module | None) -> bool:
        """Whether these modules can be computed by a layer."""
        if activation is not None and not is_activation(activation):
            return False
        # The activation of a norm that has one joins with it.
        own = activation_in(norm)
        if isinstance(own, nn.Identity):
            own = None
        return (activation is not None) if norm is None else is_norm(norm) and (own is None or own is activation)

    @staticmethod
    def _activation(module: nn.Module | None) -> str:
        return next((name for kind, name in ACTIVATIONS.items() if isinstance(module, kind)), "")

    def parts(self) -> tuple[BatchNorm | None, str, BlockLinear | None]:
        """The norm, the activation's name and the next layer."""
        _, norm, activation, then, *_ = self.members()
        return norm, self._activation(activation), then  # type: ignore[return-value]

    def begin(self, x: Tensor, plain: bool) -> bool:
        """Decide whether the owner computes all in this call, and let the others know."""
        self.fused = not plain and self._suits(x)
        return self.fused

    def _suits(self, x: Tensor) -> bool:
        owner, norm, activation, then, *between = members = self.members()
        if (norm is not None, activation is not None, then is not None) != self._present or owner is None:
            return False
        if torch.is_autocast_enabled(x.device.type) or has_global_hooks():
            return False
        if not torch.compiler.is_compiling() and not self._is_at_home():
            return False
        if any(is_watched(m) for m in members if m is not None):
            return False
        if any(m is None or (m.training and getattr(m, "p", 1) > 0) for m in between):
            return False
        tensors: list[Any] = [x]
        if norm is not None:
            if not torch.compiler.is_compiling() and not is_norm(norm):
                return False
            if x.dim() != (4 if isinstance(norm, nn.BatchNorm2d) else x.dim()) or norm.momentum is None:
                return False
            if norm.training and x.numel() // x.shape[1] < 2:
                return False
            tensors += [norm.weight, norm.bias, norm.running_mean, norm.running_var]
        if then is not None:
            tensors += [then.blocks, then.bias]
        if any(t is not None and (t.device != x.device or t.dtype != x.dtype) for t in tensors):
            return False
        return torch.compiler.is_compiling() or not x.is_cpu or cpu.ready(*tensors)

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
                self._results = [r for r in self._results if not r[0].expired()][-_MOST + 1 :]
            self._results.append((StorageWeakRef(y.untyped_storage()), int(y.storage_offset()), version(y)))
        return y

    def given(self, x: Tensor, module: nn.Module) -> bool:
        """Whether an absorbed module is given a result in which it has been computed; the last ends the owner's call.

        Raises:
            RuntimeError: if it is given anything else while its owner computes it.
        """
        if torch.compiler.is_compiling():
            return self.fused
        if not self._results:
            return False
        storage = StorageWeakRef(x.untyped_storage()).cdata
        place = int(x.storage_offset()), version(x)
        if any(r[0].cdata == storage and (r[1:] == place or place[1] == -1) for r in self._results):
            _, norm, activation, then, *_ = self.members()
            if module is (then or activation or norm) or (
                activation is not None and activation_in(module) is activation
            ):
                self.fused = False
            return True
        if self.fused:
            raise RuntimeError(
                "this module is computed by the block layer before it, and was given something else than that layer's "
                "result: the model runs otherwise than when it was made compact. Make it compact anew (expand, then "
                "compact) for the way it runs now, or with fuse=False"
            )
        return False

    def __deepcopy__(self, memo: dict[int, Any]) -> Epilogue:
        from copy import deepcopy

        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        copies = [None if m is None else deepcopy(m, memo) for m in self.members()]
        new.__setstate__({"present": self._present, "modules": copies})
        homes = [(memo.get(id(parent())), name, memo.get(id(member()))) for parent, name, member in self._homes]
        # Of a layer that is copied alone nobody holds the copies of the others, so that it runs alone.
        new._refer(copies, [(p, name, m) for p, name, m in homes if p is not None and m is not None])
        return new

    def __getstate__(self) -> dict[str, Any]:
        return {"present": self._present, "modules": self.members()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._present = state["present"]
        self._refer(state["modules"], [])
        self.fused, self._results = False, []


def _kinds_with_activation() -> tuple[type[nn.Module], ...]:
    """timm's batch norm that has an activation as its child, where timm has been loaded."""
    module = sys.modules.get("timm.layers.norm_act")
    return () if module is None else (module.BatchNormAct2d,)


def activation_in(module: nn.Module | None) -> nn.Module | None:
    """The activation that a norm has as its child and calls itself."""
    return module.act if isinstance(module, _kinds_with_activation()) else None  # type: ignore[union-attr,return-value]


def is_norm(module: nn.Module) -> bool:
    """Whether a layer can compute this norm, with the activation in it."""
    kind = type(module).__bases__[1] if isinstance(module, _Absorbed) else type(module)
    if kind not in _kinds_with_activation():
        return kind in NORMS
    act = activation_in(module)
    plain = type(module.drop) is nn.Identity
    return plain and act is not None and (type(act) is nn.Identity or is_activation(act))


def is_activation(module: nn.Module) -> bool:
    """Whether a layer can compute this activation."""
    kind = type(module).__bases__[1] if isinstance(module, _Absorbed) else type(module)
    return kind in ACTIVATIONS and (not isinstance(module, nn.GELU) or module.approximate == "none")


def is_watched(module: nn.Module) -> bool:
    """Whether anyone sees what goes into or comes out of a module, or runs it compiled by itself."""
    return any(getattr(module, name) for name in _HOOKS) or module._compiled_call_impl is not None


class _Absorbed:
    """A module that a block layer may compute along with itself; ``absorbed`` tells which."""

    absorbed: Epilogue

    def forward(self, x: Tensor) -> Tensor:
        """The owner's result as it is, while the owner computes this module; else what the module computes."""
        if isinstance(x, Proxy):
            if isinstance(self, NORMS):
                # A norm stays one step of a traced graph, as torch's own does: it follows train() and eval().
                return x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), (x,), {})  # type: ignore
        elif self.absorbed.given(x, self):  # type: ignore[arg-type]
            # The identity in a norm that has no activation.
            act = self._modules.get("act")  # type: ignore[attr-defined]
            return x if act is None or self.absorbed.parts()[1] else act(x)
        return super().forward(x)  # type: ignore[misc,no-any-return]


class AbsorbedReLU(_Absorbed, nn.ReLU):
    """A ReLU that a block layer computes."""


class AbsorbedGELU(_Absorbed, nn.GELU):
    """A GELU that a block layer computes."""


class AbsorbedSiLU(_Absorbed, nn.SiLU):
    """A SiLU that a block layer computes."""


class AbsorbedTanh(_Absorbed, nn.Tanh):
    """A tanh that a block layer computes."""


class AbsorbedBatchNorm1d(_Absorbed, nn.BatchNorm1d):
    """A batch norm that a block layer computes."""


class AbsorbedBatchNorm2d(_Absorbed, nn.BatchNorm2d):
    """A batch norm that a block layer computes."""


_ABSORBED: dict[type[nn.Module], type[nn.Module]] = {
    nn.ReLU: AbsorbedReLU,
    nn.GELU: AbsorbedGELU,
    nn.SiLU: AbsorbedSiLU,
    nn.Tanh: AbsorbedTanh,
    nn.BatchNorm1d: AbsorbedBatchNorm1d,
    nn.BatchNorm2d: AbsorbedBatchNorm2d,
}


def _absorbed(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of absorbed modules of a kind; of timm's, made when it is first needed."""
    if kind not in _ABSORBED:
        name = f"Absorbed{kind.__name__}"
        _ABSORBED[kind] = type(
            name, (_Absorbed, kind), {"__module__": __name__, "__doc__": AbsorbedBatchNorm2d.__doc__}
        )
    return _ABSORBED[kind]


def __getattr__(name: str) -> type[nn.Module]:
    """Classes of absorbed timm modules, for those who read pickles of them."""
    if name.startswith("AbsorbedBatchNormAct"):
        from timm.layers import norm_act

        return _absorbed(getattr(norm_act, name.removeprefix("Absorbed")))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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
    owner, norm, activation, then, *_ = epilogue.members()
    assert owner is not None
    owner.__dict__["epilogue"] = epilogue
    inner = activation_in(norm)
    for module in (norm, activation):
        if module is not None and module is not inner:
            module.__class__ = _absorbed(type(module))
            module.__dict__["absorbed"] = epilogue
    if then is not None:
        then.__dict__["absorbed"] = epilogue


def detach(model: nn.Module) -> None:
    """Let every module of a model compute itself."""
    for module in model.modules():
        module.__dict__.pop("epilogue", None)
        if module.__dict__.pop("absorbed", None) is not None and isinstance(module, _Absorbed):
            module.__class__ = type(module).__bases__[1]


def normed(
    norm: BatchNorm,
    own: tuple[Any, ...],
    sets: tuple[Tensor, Tensor],
    activation: str,
    backend: str,
    options: tuple[Any, ...],
) -> Tensor:
    """A layer, its batch norm and activation; the norm's running averages are updated as torch does."""
    training = norm.training
    averages = (None, None) if training else (norm.running_mean, norm.running_var)
    inputs = *own, norm.weight, norm.bias
    y, _, mean, variance = operators.block_conv_norm(
        *inputs, *sets, *averages, activation, backend, norm.eps, *map(_listed, options)
    )
    if training:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        values = y.numel() // y.shape[1]
        momentum: Any = norm.momentum
        with torch.no_grad():
            norm.running_mean.lerp_(mean, momentum)
            norm.running_var.lerp_(variance * (values / (values - 1)), momentum)
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.add_(1)
    return y  # type: ignore[no-any-return]


def _listed(option: Any) -> Any:
    return list(option) if isinstance(option, tuple) else option
