"""RG: the topology of SAO without its orthogonality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod, sqrt
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from ..allocation import Allocation
from ..seeds import named_generator
from ..topology import GENERATORS, SUPPORTS, BlockTopology, coarsened
from ..weights import Blocks, normal_blocks, uniform_blocks
from .base import Method, Stage, SupportDrawer, TopologyDrawer, TopologySharing, choice, register
from .draw import Draw, Values
from .sao import check_gain

_VALUES = {"normal": normal_blocks, "uniform": uniform_blocks}


@register
@dataclass(frozen=True)
class RG(Method):
    """A Ramanujan-graph mask with the weight's own, normal or uniform values (thesis sections 3.4.3, 3.4.4).

    Attributes:
        values: ``"keep"`` masks the weight as it is (RG-S before training, RG-T after); ``"normal"`` and
            ``"uniform"`` draw fresh values (RG-N, RG-U) with the variance of the orthogonal ones.
        topology: ``"ramanujan"`` or ``"interleaved"``; or a support not made of blocks, ``"expander"`` (X-Net),
            ``"radix"`` (RadiX-Net) or ``"product"`` (RBGP).
        gain: factor on fresh values.
        topology_sharing: ``"layer-shape"``, layers of one shape share a topology; ``"none"``, every layer has its own.
            The matrices of a stack (experts) have each its own in any case.

    Example:
        >>> import torch, sao_prune
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
        >>> sao_prune.apply(net, groups=4, method=sao_prune.RG(values="normal")).sparsity
        0.75
    """

    name: ClassVar[str] = "rg"

    values: Literal["keep", "normal", "uniform"] = "keep"
    topology: str = "ramanujan"
    gain: float = 1.0
    topology_sharing: TopologySharing = "layer-shape"

    def __post_init__(self) -> None:
        choice("values", self.values, ("keep", *_VALUES))
        choice("topology", self.topology, (*GENERATORS, *SUPPORTS))
        choice("topology_sharing", self.topology_sharing, get_args(TopologySharing))
        check_gain(self.gain)

    @property
    def origin(self) -> Values:
        """Kept, or drawn anew."""
        return "kept" if self.values == "keep" else "drawn"

    @property
    def structured(self) -> bool:
        """Whether supports are block topologies."""
        return self.topology in GENERATORS

    def draw(self, allocations: Sequence[Allocation], weights: Sequence[Tensor], seed: int) -> list[Draw]:
        """One topology a part, and values where they are not kept."""
        if not self.structured:
            return self._draw_irregular(allocations, seed)
        drawer = TopologyDrawer(self.topology, seed, unique=self.topology_sharing == "none")
        draws = []
        for allocation in allocations:
            weight = allocation.weight
            names = [(weight.name, part) for part in range(weight.parts)]
            parts = tuple(
                drawer(*weight.matrix, groups=allocation.groups, nnz=allocation.nnz, name=name, own=weight.stacked)
                for name in names
            )
            draws.append(Draw(weight, parts, self._blocks(weight.kernel, parts, names, seed)))
        return draws

    @property
    def gradual(self) -> bool:
        """Blocks whose values are kept can be split on the way."""
        return self.structured and self.values == "keep"

    def revise(self, model: nn.Module, stage: Stage, weights: Sequence[Tensor], seed: int) -> list[Draw]:
        """The final topology with its sets joined, as many as are asked for now."""
        final = self.draw(stage.final, weights, seed)
        return [
            Draw(a.weight, tuple(coarsened(t, a.groups) for t in draw.topologies))
            for a, draw in zip(stage.allocations, final)
        ]

    def _draw_irregular(self, allocations: Sequence[Allocation], seed: int) -> list[Draw]:
        drawer = SupportDrawer(self.topology, seed, unique=self.topology_sharing == "none")
        draws = []
        for place, allocation in enumerate(allocations):
            units, matrices = drawer(allocation, place), None
            if self.values != "keep":
                matrices = self._matrices(allocation, units, named_generator(seed, "values", allocation.weight.name))
            draws.append(Draw(allocation.weight, units=units, matrices=matrices))
        return draws

    def _matrices(self, allocation: Allocation, units: Tensor, generator: torch.Generator) -> Tensor:
        """Fresh values for every tap, their variance ``gain^2`` over the mean degree of the shorter side's nodes."""
        kernel, longest = allocation.weight.kernel, max(allocation.weight.matrix)
        shape = (*units.shape, *kernel)
        if self.values == "normal":
            values = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        else:
            uniform = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")
            values = (uniform * 2 - 1) * sqrt(3)
        degree = float(units.float().mean()) * longest
        mask = units.view(*units.shape, *(1,) * len(kernel))
        return values * mask * (self.gain / sqrt(max(degree, 1) * prod(kernel)))

    def _blocks(
        self,
        kernel: tuple[int, ...],
        parts: tuple[BlockTopology, ...],
        names: list[tuple[str, int]],
        seed: int,
    ) -> tuple[Blocks, ...]:
        if self.values == "keep":
            return ()
        draw, taps = _VALUES[self.values], prod(kernel)
        return tuple(
            draw(topology, named_generator(seed, "values", *name), gain=self.gain / sqrt(taps), taps=taps)
            for topology, name in zip(parts, names)
        )
