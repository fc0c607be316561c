"""Layers with one weight: linear, convolutions, and what computes as those do."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import torch
from torch import nn

from ...discovery import is_standardised
from ...prune import MaskPruning, refresh
from ...prune.standardised import bake_standardising
from ..absorbed import OWNERS
from ..modules import (
    BlockConv1d,
    BlockConv2d,
    BlockConv3d,
    BlockConvTranspose1d,
    BlockConvTranspose2d,
    BlockConvTranspose3d,
    BlockLinear,
    BlockModule,
    BlockStdConv2d,
    Execution,
    joined_topology,
    turned,
)
from .base import Form, Given, Ineligible, drop_weight, fields, parameter_of, reorder

# Attributes of block layers that dense ones do not have.
_OWN_FIELDS = ("_dense_class", "_masked", "_layout", "execution", "epilogue", "absorbed")
_LIBRARIES = ("timm.", "transformers.")


class LayerForm(Form):
    """A layer with one weight, which becomes a `BlockModule`."""

    block_class: type[BlockModule]
    # Whether the dense layer stores inputs before outputs.
    transposed = False

    def block(self, module: nn.Module, given: Mapping[str, Given]) -> BlockModule:
        """See `Form`."""
        own, parts = given["weight"], int(getattr(module, "groups", 1))
        topology = joined_topology(own.topologies) if parts > 1 else own.topologies[0]
        weight = parameter_of(module, "weight")
        assert weight is not None
        blocks = own.values(topology, None, parts)
        new: BlockModule = self.block_class.__new__(self.block_class)
        new.__dict__.update(fields(module))
        new.__dict__.pop("epilogue", None)
        if type(module) in OWNERS:
            new.__dict__.pop("whole", None)
        drop_weight(new, "weight")
        kind = OWNERS.get(type(module), type(module))
        new.__dict__.update(_dense_class=kind, _masked=own.masked, execution=Execution())
        self._prepare(new, module)
        new.set_topology(topology, nn.Parameter(blocks.contiguous(), requires_grad=weight.requires_grad))
        reorder(new, ["blocks"])
        return new

    def dense(self, module: nn.Module, masked: bool | None) -> nn.Module:
        """See `Form`."""
        assert isinstance(module, BlockModule)
        kind: type[nn.Module] = module.__dict__.get("_dense_class", self.stock)
        masked = module.__dict__.get("_masked", False) if masked is None else masked
        new = kind.__new__(kind)
        new.__dict__.update(fields(module))
        for name in ("row_set", "col_set"):
            del new._buffers[name]
            new._non_persistent_buffers_set.discard(name)
        blocks = new._parameters.pop("blocks")
        assert blocks is not None
        for name in _OWN_FIELDS:
            new.__dict__.pop(name, None)
        self._unprepare(new)
        with torch.no_grad():
            weight = self._oriented(self._weight(module), module.parts)
            mask = self._oriented(module.dense(torch.ones_like(module.stored())), module.parts)
        new.register_parameter("weight", nn.Parameter(weight, requires_grad=blocks.requires_grad))
        reorder(new, ["weight"])
        if masked:
            MaskPruning.register(new, "weight", mask)
            refresh(new)
        else:
            bake_standardising(new, "weight", mask)
        return new

    def _weight(self, module: BlockModule) -> torch.Tensor:
        """What the dense layer is to hold."""
        return module.dense(module.stored())

    def _prepare(self, new: BlockModule, module: nn.Module) -> None:
        """Attributes that the block layer has besides the dense one's."""

    def _unprepare(self, new: nn.Module) -> None:
        """Without those."""

    def _oriented(self, weight: torch.Tensor, parts: int) -> torch.Tensor:
        """Outputs and inputs as the dense layer stores them."""
        return turned(weight, parts).contiguous() if self.transposed else weight


class TransposedConvForm(LayerForm):
    """Transposed convolutions, which store their weight as ``(in, out, *kernel)``."""

    transposed = True


class TransposedForm(LayerForm):
    """transformers' ``Conv1D``, a linear layer that stores its weight as ``(in, out)``."""

    transposed = True

    def __init__(self) -> None:
        super().__init__(nn.Module, BlockLinear)

    def suits(self, module: nn.Module) -> bool:
        """See `Form`; a model can only hold one if that library is loaded."""
        kind = _conv1d()
        return kind is not None and isinstance(module, kind)

    def _has_own_forward(self, module: nn.Module) -> bool:
        return "forward" in module.__dict__ or type(module).forward is not _conv1d().forward  # type: ignore[union-attr]

    def _prepare(self, new: BlockModule, module: nn.Module) -> None:
        weight = parameter_of(module, "weight")
        assert weight is not None
        new.__dict__.update(in_features=weight.shape[0], out_features=weight.shape[1])

    def _unprepare(self, new: nn.Module) -> None:
        del new.__dict__["in_features"], new.__dict__["out_features"]


def _conv1d() -> type[nn.Module] | None:
    return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)


class StandardisedForm(LayerForm):
    """Convolutions that standardise their weight, those of timm and transformers."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d, BlockStdConv2d)

    def suits(self, module: nn.Module) -> bool:
        """See `Form`."""
        return is_standardised(module)

    def check(self, module: nn.Module, *, meta: bool = False) -> None:
        """See `Form`; what other libraries' layers of the same name compute is not known."""
        if not self._known(module).__module__.startswith(_LIBRARIES):
            raise Ineligible(f"{type(module).__name__} standardises its weight in a way that is not known")
        super().check(module, meta=meta)

    def _has_own_forward(self, module: nn.Module) -> bool:
        return "forward" in module.__dict__ or type(module).forward is not self._known(module).forward

    def _weight(self, module: BlockModule) -> torch.Tensor:
        made = "_dense_class" in module.__dict__
        # One that was never dense becomes an ordinary convolution.
        standardised = isinstance(module, BlockStdConv2d) and not made
        return module.dense(module.values()) if standardised else super()._weight(module)

    @staticmethod
    def _known(module: nn.Module) -> type[nn.Module]:
        """The class that standardises, of which the module's may be a subclass."""
        names = [c for c in type(module).__mro__ if issubclass(c, nn.Conv2d) and c is not nn.Conv2d]
        return next(c for c in reversed(names) if "Std" in c.__name__ or "Standardized" in c.__name__)


LAYERS: tuple[LayerForm, ...] = (
    StandardisedForm(),
    LayerForm(nn.Linear, BlockLinear),
    LayerForm(nn.Conv1d, BlockConv1d),
    LayerForm(nn.Conv2d, BlockConv2d),
    LayerForm(nn.Conv3d, BlockConv3d),
    TransposedConvForm(nn.ConvTranspose1d, BlockConvTranspose1d),
    TransposedConvForm(nn.ConvTranspose2d, BlockConvTranspose2d),
    TransposedConvForm(nn.ConvTranspose3d, BlockConvTranspose3d),
    TransposedForm(),
)
