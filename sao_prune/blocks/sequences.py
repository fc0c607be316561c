"""Timing of recurrent layers: whole, in each form, on the arguments that the model gives them."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from ..naming import dotted
from .autotune import Timings, race, runner, suits_native, tensors_in
from .forms import dense_form
from .forms.base import fields
from .modules import BlockRNNBase, Execution


@dataclass(frozen=True)
class Recurrent:
    """A recurrent layer that could be compact, its block form, and what it is called with.

    Attributes:
        path: of the layer.
        module: it.
        block: its block form.
        arguments: positional and named arguments.
    """

    path: str
    module: nn.Module
    block: BlockRNNBase
    arguments: tuple[tuple[Any, ...], dict[str, Any]]

    @property
    def key(self) -> str:
        """What decides the timings."""
        block, masked = self.block, bool(self.module._buffers)
        layouts = [(m.path, m.layer.weight_shape, m.layer.layout) for m in block.matrices()]
        kinds = [
            (*own, la.groups, la.rows, la.cols, la.inputs.kind.value, la.outputs.kind.value) for *own, la in layouts
        ]
        given = [(tuple(t.shape), str(t.dtype), t.device.type) for t in tensors_in(self.arguments)]
        return repr((block.mode, block.extra_repr(), kinds, given, masked))

    def names(self) -> list[str]:
        """Paths of its block layers."""
        return [dotted(self.path, m.path) for m in self.block.matrices()]

    def time(self, tune: Literal["train", "infer"]) -> Timings:
        """Time the layer and its block forms in turn."""
        layers = [m.layer for m in self.block.matrices()]
        forms = [Execution(), Execution(dense=True)]
        if all(suits_native(layer) for layer in layers):
            forms.insert(0, Execution(native=True))
        ways: dict[Hashable, nn.Module] = {execution: _running(self.block, execution) for execution in forms}
        ways |= {"dense": dense_form(self.block, masked=False), "current": self.module}
        seconds = race({key: runner(way, *self.arguments, tune) for key, way in ways.items()}, layers[0].blocks.device)
        return Timings(seconds["dense"], seconds["current"], {e: seconds[e] for e in forms})


def _running(block: BlockRNNBase, execution: Execution) -> BlockRNNBase:
    """The layer with the same parameters, run otherwise."""
    new = block.__class__.__new__(block.__class__)
    new.__dict__.update(fields(block))
    for matrix in block.matrices():
        child = matrix.layer.__class__.__new__(matrix.layer.__class__)
        child.__dict__.update(matrix.layer.__dict__)
        child.run_as(execution)
        new._modules[matrix.path] = child
    return new
