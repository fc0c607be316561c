"""Rewire: a block topology whose inputs change places between blocks while it trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..allocation import Allocation
from ..scheduling import check_share
from ..seeds import named_generator
from ..topology import BlockTopology
from ..topology.rewire import choose_swaps, move_scores, random_swaps, swapped
from ..weights.rewire import exchange_columns
from .base import Method, Stage, choice, register
from .draw import Draw, Values
from .sao import SAO


@register
@dataclass(frozen=True)
class Rewire(Method):
    """Inputs of a layer change places between its blocks while it trains; sizes and number of blocks stay.

    A swap is worth the gradients that its two inputs would meet in each other's blocks, less the weights that they
    leave behind, both in units of their means over the layer. Every time the best swaps are made, those that are worth
    more than nothing, of at most ``share * decay`` of the inputs, ``decay`` the half cosine of `sao_prune.Moves`.
    The momentum of what moved is forgotten. `sao_prune.permutations` tells what was learned.

    Attributes:
        share: of a layer's inputs that may move at the start; rounded up to whole swaps.
        random: random swaps, as many as may be: the control.
        values: of moved entries: ``"zero"``; ``"exchange"``, each input takes over what stood at the other's edges,
            so that orthogonal blocks stay orthogonal.
        initial: what `sao_prune.apply` or `sao_prune.schedule` draw at the start, where they draw: a method whose
            supports are block topologies.

    Raises:
        ValueError: for an option out of range.

    Example:
        >>> import torch, sao_prune
        >>> net = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(3)))
        >>> over = sao_prune.Moves(steps=4, every=1)
        >>> pruner = sao_prune.schedule(net, sao_prune.Rewire(random=True), groups=4, over=over, seed=0)
        >>> before = net[1].weight_mask.clone()
        >>> pruner.step().layers[1].groups, torch.equal(net[1].weight_mask, before)
        (4, False)
    """

    name: ClassVar[str] = "rewire"

    share: float = 0.1
    random: bool = False
    values: Literal["zero", "exchange"] = "zero"
    initial: Method = field(default_factory=SAO)

    def __post_init__(self) -> None:
        check_share("share", self.share)
        choice("values", self.values, ("zero", "exchange"))
        if not isinstance(self.random, bool):
            raise ValueError(f"random must be True or False, got {self.random!r}")
        if not isinstance(self.initial, Method) or not self.initial.structured or self.initial.moving:
            raise ValueError(
                f"initial must be a method that draws block topologies, such as SAO() or RG(), got {self.initial!r}"
            )

    @property
    def moving(self) -> bool:
        """Inputs move at a constant number of edges."""
        return True

    @property
    def hears(self) -> bool:
        """The gradients of absent edges are half of a score."""
        return not self.random

    @property
    def structured(self) -> bool:
        """Supports are block topologies."""
        return True

    @property
    def origin(self) -> Values:
        """Where the initial method's values come from."""
        return self.initial.origin

    def preview(self, allocations: Sequence[Allocation]) -> list[tuple[int | None, int]]:
        """What the initial method would give."""
        return self.initial.preview(allocations)

    def draw_for(
        self, model: nn.Module, allocations: Sequence[Allocation], weights: Sequence[Tensor], seed: int
    ) -> list[Draw]:
        """What the initial method draws."""
        return self.initial.draw_for(model, allocations, weights, seed)

    def revise(self, model: nn.Module, stage: Stage, weights: Sequence[Tensor], seed: int) -> list[Draw]:
        """Swap inputs, matrix by matrix."""
        draws = []
        gradients = stage.gradients or [None] * len(weights)
        known = stage.topologies or [None] * len(weights)
        for allocation, units, there, weight, gradient in zip(
            stage.allocations, stage.units, known, weights, gradients
        ):
            item = allocation.weight
            before = there or tuple(BlockTopology.from_mask(part) for part in units)
            if self.hears and (gradient is None or not bool(gradient.isfinite().all())):
                draws.append(Draw(item, before, note="no finite gradient reached it, so nothing moved"))
                continue
            matrices = item.matrices(weight)
            wanted = None if gradient is None else item.matrices(gradient)
            after, values, moved = [], [], 0
            for part, topology in enumerate(before):
                generator = named_generator(seed, self.name, item.name, part, stage.step)
                most = ceil(self.share * stage.decay * topology.shape[1] / 2)
                if wanted is None:
                    swaps = random_swaps(topology, most, generator)
                else:
                    swaps = choose_swaps(topology, move_scores(topology, matrices[part], wanted[part]), most)
                after.append(swapped(topology, swaps))
                moved += swaps.numel()
                if self.values == "exchange":
                    values.append(exchange_columns(matrices[part], swaps))
            note = f"{moved} of {sum(t.shape[1] for t in before)} inputs moved"
            # Without values: what both topologies have stays, and what is new was zero outside the mask.
            draws.append(Draw(item, tuple(after), matrices=torch.stack(values) if values else None, note=note))
        return draws
