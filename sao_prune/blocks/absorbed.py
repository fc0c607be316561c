"""The norms and activations that a block layer can compute along with itself, and what they are while it may."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn
from torch.fx import Proxy

ACTIVATIONS: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.GELU: "gelu", nn.SiLU: "silu", nn.Tanh: "tanh"}
_NORMS: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.BatchNorm2d)


def with_activation() -> tuple[type[nn.Module], ...]:
    """timm's batch norm that has an activation as its child, where timm has been loaded."""
    module = sys.modules.get("timm.layers.norm_act")
    return () if module is None else (module.BatchNormAct2d,)


# The class of dense layers that have an epilogue, and the one that they had before.
OWNERS: dict[type[nn.Module], type[nn.Module]] = {}


def activation_in(module: nn.Module | None) -> nn.Module | None:
    """The activation that a norm has as its child and calls itself."""
    act = module.act if isinstance(module, with_activation()) else None  # type: ignore[union-attr]
    return None if isinstance(act, nn.Identity) else act  # type: ignore[return-value]


def is_norm(module: nn.Module) -> bool:
    """Whether a layer can compute this norm, with the activation in it."""
    kind = kind_of(module)
    if kind not in with_activation():
        return kind in _NORMS
    act = activation_in(module)
    return type(module.drop) is nn.Identity and (act is None or is_activation(act))


def is_activation(module: nn.Module) -> bool:
    """Whether a layer can compute this activation."""
    return kind_of(module) in ACTIVATIONS and (not isinstance(module, nn.GELU) or module.approximate == "none")


def activation_name(module: nn.Module | None) -> str:
    """What the operators call it; ``""`` for none."""
    return ACTIVATIONS.get(kind_of(module), "") if module is not None else ""


def kind_of(module: nn.Module) -> type[nn.Module]:
    """The class of a module, whether it is absorbed or not."""
    return type(module).__bases__[1] if isinstance(module, Absorbed) else type(module)


class Absorbed:
    """A module that a block layer may compute along with itself; ``absorbed``, an `Epilogue`, tells which."""

    absorbed: Any

    def forward(self, input: Tensor) -> Tensor:
        """The owner's result as it is, while the owner computes this module; else what the module computes."""
        x = input
        if isinstance(x, Proxy):
            if isinstance(self, _NORMS):
                # A norm stays one step of a traced graph, as torch's own does: it follows train() and eval().
                return x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), (x,), {})  # type: ignore
        elif self.absorbed.given(x, self):
            # The identity in a norm that has no activation.
            act = self._modules.get("act")  # type: ignore[attr-defined]
            return x if act is None or self.absorbed.parts()[1] else act(x)
        return super().forward(x)  # type: ignore[misc,no-any-return]


class AbsorbedReLU(Absorbed, nn.ReLU):
    """A ReLU that a block layer computes."""


class AbsorbedGELU(Absorbed, nn.GELU):
    """A GELU that a block layer computes."""


class AbsorbedSiLU(Absorbed, nn.SiLU):
    """A SiLU that a block layer computes."""


class AbsorbedTanh(Absorbed, nn.Tanh):
    """A tanh that a block layer computes."""


class AbsorbedBatchNorm1d(Absorbed, nn.BatchNorm1d):
    """A batch norm that a block layer computes."""


class AbsorbedBatchNorm2d(Absorbed, nn.BatchNorm2d):
    """A batch norm that a block layer computes."""


_ABSORBED: dict[type[nn.Module], type[nn.Module]] = {
    kind.__bases__[1]: kind
    for kind in (AbsorbedReLU, AbsorbedGELU, AbsorbedSiLU, AbsorbedTanh, AbsorbedBatchNorm1d, AbsorbedBatchNorm2d)
}


def _forward_of_x(self: Absorbed, x: Tensor) -> Tensor:
    """As timm names it."""
    return Absorbed.forward(self, x)


def absorbed_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of absorbed modules of a kind; of timm's, made when it is first needed."""
    if kind not in _ABSORBED:
        own = {"__module__": __name__, "__doc__": AbsorbedBatchNorm2d.__doc__, "forward": _forward_of_x}
        _ABSORBED[kind] = type(f"Absorbed{kind.__name__}", (Absorbed, kind), own)
    return _ABSORBED[kind]


def __getattr__(name: str) -> type[nn.Module]:
    """Classes of absorbed timm modules, for those who read pickles of them."""
    if name.startswith("AbsorbedBatchNormAct"):
        from timm.layers import norm_act

        return absorbed_class(getattr(norm_act, name.removeprefix("Absorbed")))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
