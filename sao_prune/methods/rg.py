"""RG: the topology of SAO without its orthogonality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod, sqrt
from typing import ClassVar, Literal

from torch import Tensor

from ..allocate import Allocation
from ..seeds import named_generator
from ..topology import MAKERS, BlockTopology
from ..weights import Blocks, normal_blocks, uniform_blocks
from .base import Method, TopologyDrawer, choice, register
from .draw import Draw
from .sao import check_gain

_VALUES = {"normal": normal_blocks, "uniform": uniform_blocks}


@register
@dataclass(frozen=True)
class RG(Method):
    """A Ramanujan-graph mask with the weight's own, normal or uniform values (thesis sections 3.4.3, 3.4.4).

    Attributes:
        values: ``"keep"`` masks the weight as it is (RG-S before training, RG-T after); ``"normal"`` and
            ``"uniform"`` draw fresh values (RG-N, RG-U) with the variance of the orthogonal ones.
        topology: ``"ramanujan"`` or ``"interleaved"``.
        gain: factor on fresh values.
        unique: every layer its own topology, instead of one for all layers of a shape.

    Example:
        >>> import torch, sao_prune
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
        >>> sao_prune.apply(net, groups=4, method=sao_prune.RG(values="normal")).sparsity
        0.75
    """

    name: ClassVar[str] = "rg"
    structured: ClassVar[bool] = True

    values: Literal["keep", "normal", "uniform"] = "keep"
    topology: str = "ramanujan"
    gain: float = 1.0
    unique: bool = False

    def __post_init__(self) -> None:
        choice("values", self.values, ("keep", *_VALUES))
        choice("topology", self.topology, tuple(MAKERS))
        check_gain(self.gain)

    def draw(self, allocations: Sequence[Allocation], weights: Sequence[Tensor], seed: int) -> list[Draw]:
        """One topology a part, and values where they are not kept."""
        drawer = TopologyDrawer(self.topology, seed, unique=self.unique)
        draws = []
        for allocation in allocations:
            weight = allocation.weight
            names = [(weight.name, part) for part in range(weight.parts)]
            parts = tuple(
                drawer(*weight.matrix, groups=allocation.groups, nnz=allocation.nnz, name=name) for name in names
            )
            draws.append(Draw(weight, parts, self._blocks(weight.kernel, parts, names, seed)))
        return draws

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
