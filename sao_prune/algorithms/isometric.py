"""SAO whose residual blocks start as orthogonal maps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..allocation import Allocation
from ..discovery.residual import Residuals, find_residuals
from ..seeds import named_generator
from ..weights import Mirror, mirror_blocks, mirror_topology, orthogonal_blocks
from .base import Method, ResidualRecord, Settlement, TopologyDrawer
from .branches import BranchPlan, BranchPlanner, Unfit
from .calibration import identity_norms, mirrored_polar
from .draw import Draw, Values
from .halves import half_topologies

#: Models of up to so many parameters, and blocks times signals of the largest layer, are measured unasked: seconds.
MEASURED_PARAMETERS, MEASURED_SIGNALS = 500_000, 100_000


@dataclass(frozen=True)
class Isometric(Method):
    """What ``SAO(residual="isometric")`` is for one model.

    Attributes:
        plain: how layers outside the blocks are drawn.
        kind: of the topologies.
        unique: every layer its own topology.
        norm: what becomes of norms.
        measure: whether singular values are measured; ``None``: of small models.
        found: the residual blocks.
        example_input: what the user gave.
    """

    plain: Method
    kind: str
    unique: bool
    norm: Literal["identity", "keep"]
    measure: bool | None
    found: Residuals
    example_input: Any = field(default=None, repr=False)

    @property
    def origin(self) -> Values:
        """All values are new."""
        return "drawn"

    @property
    def structured(self) -> bool:
        """Its supports are block topologies."""
        return True

    def preview(self, allocations: Sequence[Allocation]) -> list[tuple[int | None, int]]:
        """Groups and edges of the topologies that would be drawn."""
        plans = _planned(self._plans(allocations, 0))
        known = {name: t for plan in plans for name, t in plan.topologies.items()}
        known |= {d.weight.name: d.topologies[0] for d in self._edges(self._others(allocations, known), 0)}
        rest = self._others(allocations, known)
        out = dict(zip((a.weight.name for a in rest), self.plain.preview(rest))) if rest else {}
        out |= {name: (t.groups, t.nnz) for name, t in known.items()}
        return [out[a.weight.name] for a in allocations]

    def draw(self, allocations: Sequence[Allocation], weights: Sequence[Tensor], seed: int) -> list[Draw]:
        """The blocks, the layers around chains of them, and all others as the plain method draws them."""
        plans = _planned(self._plans(allocations, seed))
        by_name = {a.weight.name: a for a in allocations}
        draws = {d.weight.name: d for plan in plans for d in plan.draws(by_name, seed)}
        draws |= {d.weight.name: d for d in self._edges(self._others(allocations, draws), seed)}
        others = [index for index, a in enumerate(allocations) if a.weight.name not in draws]
        if others:
            rest = self.plain.draw([allocations[i] for i in others], [weights[i] for i in others], seed)
            draws |= {d.weight.name: d for d in rest}
        return [draws[a.weight.name] for a in allocations]

    def settle(self, model: nn.Module, allocations: Sequence[Allocation], draws: Sequence[Draw]) -> Settlement:
        """Biases, scales and norms inside the blocks, and dense layers around chains of them.

        Raises:
            ValueError: if norms are to be set and there is no example input to set them on.
        """
        plans = _planned(self._plans(allocations, 0))
        drawn = {draw.weight.name for draw in draws}
        held = {name: t.detach() for name, t in (*model.named_parameters(), *model.named_buffers())}
        values = dict(self._inside(plans, held, drawn)) | dict(self._around(held, drawn))
        if self.norm == "identity":
            if self.example_input is None:
                raise ValueError("norm='identity' sets norms on a batch: give example_input=.., a few dozen examples")
            after = values_after(model, draws, values)
            ours = {name for plan in plans for name in plan.block.norms}
            values |= identity_norms(self.found.graph, after, ours)
        records = self.residuals(allocations)
        notes = {
            layer.weight: f"{record.status}: {record.name}"
            for block, record in zip(self.found.blocks, records)
            for layer in (*block.layers, *((block.projection,) if block.projection else ()))
        }
        return Settlement(values, notes, tuple(records))

    def measures(self, model: nn.Module) -> bool:
        """Whether singular values are to be measured: as the user said, else where an example is there and it is cheap.

        Raises:
            ValueError: if they are asked for without an example input.
        """
        if self.example_input is None:
            if self.measure:
                raise ValueError("measure=True takes singular values at an example: give example_input=..")
            return False
        if self.measure is not None:
            return self.measure
        largest = max((node.shape for node in self.found.graph.nodes), key=lambda shape: prod(shape[1:]))
        parameters = sum(p.numel() for p in model.parameters())
        signals = len(self.found.blocks) * prod(largest[1:])
        return parameters <= MEASURED_PARAMETERS and signals <= MEASURED_SIGNALS

    def residuals(self, allocations: Sequence[Allocation]) -> tuple[ResidualRecord, ...]:
        """What each block will be, in execution order."""
        out = []
        for block, plan in zip(self.found.blocks, self._plans(allocations, 0)):
            if isinstance(plan, str):
                out.append(ResidualRecord(block.name, "left", plan))
                continue
            why = [plan.near] if plan.near else []
            if block.norms and not block.batch_norms:
                why.append("a norm other than batch norm stays in it")
            elif block.norms and self.norm == "keep":
                why.append("its batch norms are kept")
            out.append(ResidualRecord(block.name, "near" if why else "exact", "; ".join(why)))
        return tuple(out)

    def _plans(self, allocations: Sequence[Allocation], seed: int) -> list[BranchPlan | str]:
        """The plan of each block, or why there is none."""
        by_name = {a.weight.name: a for a in allocations}
        drawer = TopologyDrawer(self.kind, seed, unique=self.unique)
        planner = BranchPlanner(self.kind, drawer, by_name, seed)
        out: list[BranchPlan | str] = []
        for block in self.found.blocks:
            try:
                out.append(planner.plan(block))
            except Unfit as reason:
                out.append(str(reason))
        return out

    def _others(self, allocations: Sequence[Allocation], known: Mapping[str, object]) -> list[Allocation]:
        return [a for a in allocations if a.weight.name not in known]

    def _edges(self, allocations: Sequence[Allocation], seed: int) -> list[Draw]:
        """Mirrored draws of pruned layers before and after chains of ReLU blocks."""
        drawer = TopologyDrawer(self.kind, seed, unique=self.unique)
        out = []
        for allocation in allocations:
            weight, role = allocation.weight, self._role(allocation.weight.name)
            if role is None or weight.parts > 1 or _odd(role, weight.matrix):
                continue
            (half,) = half_topologies(allocation, role, drawer)
            blocks = orthogonal_blocks([half], [named_generator(seed, "values", weight.name, 0)])[0]
            out.append(Draw(weight, (mirror_topology(half, role),), (mirror_blocks(blocks, role),)))
        return out

    def _role(self, name: str) -> Mirror | None:
        """Which sides of a layer meet mirrored channels, outside the blocks."""
        rows, cols = name in self.found.entries, name in self.found.exits
        return Mirror((rows, cols)) if rows or cols else None

    def _inside(
        self, plans: Sequence[BranchPlan], held: Mapping[str, Tensor], drawn: set[str]
    ) -> Iterator[tuple[str, Tensor]]:
        for plan in plans:
            block = plan.block
            for layer in (*block.layers, *((block.projection,) if block.projection else ())):
                if layer.bias is not None:
                    yield layer.bias, torch.zeros_like(held[layer.bias])
            yield from ((name, torch.ones_like(held[name])) for name in block.scales)
            yield from ((name, torch.zeros_like(held[name])) for name in block.shifts)
            projection = block.projection.weight if block.projection else None
            if projection is not None and projection not in drawn:
                yield projection, torch.zeros_like(held[projection])

    def _around(self, held: Mapping[str, Tensor], drawn: set[str]) -> Iterator[tuple[str, Tensor]]:
        for name in dict.fromkeys((*self.found.entries, *self.found.exits)):
            role = self._role(name)
            assert role is not None
            matrix = (held[name].shape[0], held[name].shape[1])
            bias = f"{name.rpartition('.')[0]}.bias".lstrip(".")
            if role.rows and bias in held:
                yield bias, torch.zeros_like(held[bias])
            if name not in drawn and not _odd(role, matrix):
                yield name, mirrored_polar(held[name], role)


def values_after(model: nn.Module, draws: Sequence[Draw], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters and buffers by name as they will be; pruned weights are zero outside their supports."""
    out = {name: t.detach() for name, t in (*model.named_buffers(), *model.named_parameters())}
    for draw in draws:
        draw.write_(dense := torch.zeros_like(out[draw.weight.name]))
        out[draw.weight.name] = dense
    return out | dict(values)


def isometric(
    plain: Method,
    model: nn.Module,
    example_input: Any,
    *,
    kind: str,
    unique: bool,
    norm: Literal["identity", "keep"],
    measure: bool | None,
) -> Isometric:
    """Find the model's residual blocks; see `Isometric`.

    Raises:
        ValueError: if the model has none, or none is found without an example input.
    """
    found = find_residuals(model, example_input)
    if not found.blocks:
        raise ValueError(
            f"{type(model).__name__} has no residual addition with a layer in its branch, so residual='isometric' has "
            "nothing to do"
        )
    return Isometric(plain, kind, unique, norm, measure, found, example_input)


def _planned(plans: Sequence[BranchPlan | str]) -> list[BranchPlan]:
    return [plan for plan in plans if isinstance(plan, BranchPlan)]


def _odd(role: Mirror, matrix: tuple[int, int]) -> bool:
    return any(doubled and size % 2 for doubled, size in zip(role.value, matrix))
