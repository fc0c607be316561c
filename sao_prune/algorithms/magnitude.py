"""Magnitude and random pruning: GMP, LMP, LRP. Exact counts; ties are broken by index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..allocation import Allocation
from ..seeds import named_generator
from .base import Method, Stage, register
from .draw import Draw


def unit_scores(weight: Tensor, kernel_dims: int) -> Tensor:
    """L1 norm of every unit: the weight itself, or a convolution's whole kernel.

    Args:
        weight: ``(parts, m, n, *kernel)``.
        kernel_dims: how many of the dimensions are the kernel's.

    Raises:
        ValueError: if a weight is not finite, for then there is no order.
    """
    scores = weight.detach().abs()
    if kernel_dims:
        scores = scores.flatten(3).sum(3, dtype=torch.promote_types(scores.dtype, torch.float32))
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("the weight holds NaN or infinite values, so its entries cannot be ranked")
    return scores


def keep_top(scores: Tensor, count: int) -> Tensor:
    """Boolean mask of the ``count`` highest scores, exactly; of equal scores the earlier ones.

    Example:
        >>> import torch
        >>> keep_top(torch.tensor([1.0, 2.0, 1.0, 1.0]), 3).tolist()
        [True, True, True, False]
    """
    flat = scores.flatten()
    if count <= 0 or count >= flat.numel():
        return torch.full_like(scores, count > 0, dtype=torch.bool)
    threshold = torch.kthvalue(flat, flat.numel() - count + 1).values
    keep = flat > threshold
    ties = torch.nonzero(flat == threshold).flatten()
    keep[ties[: count - int(keep.sum())]] = True
    return keep.view_as(scores)


def keep_global(
    allocations: Sequence[Allocation],
    scores: Sequence[Tensor],
    budget: int | None = None,
    among: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Boolean masks of the highest scores of all weights together; of equal scores the earlier ones.

    Args:
        allocations: what each weight is asked for.
        scores: of their units, each ``(parts, m, n)``.
        budget: how many weights stay, a kernel counting all its taps; by default what the allocations ask for
            together. It is met exactly where all kernels have one size, else to within one kernel.
        among: boolean masks of the units that may stay; by default all.
    """
    taps = [prod(a.weight.kernel) for a in allocations]
    if budget is None:
        budget = round(sum(a.density * a.weight.numel for a in allocations))
    flat = torch.cat([s.flatten().to(torch.promote_types(s.dtype, torch.float32)) for s in scores])
    open_ = None if among is None else torch.cat([units.flatten() for units in among])
    ranked = flat if open_ is None else flat[open_]
    if len(set(taps)) == 1:
        keep = keep_top(ranked, budget // taps[0])
    else:
        sizes = torch.cat([torch.full((s.numel(),), t, device=s.device) for s, t in zip(scores, taps)])
        sizes = sizes if open_ is None else sizes[open_]
        order = torch.sort(ranked, descending=True, stable=True).indices
        keep = torch.zeros_like(ranked, dtype=torch.bool)
        keep[order[sizes[order].cumsum(0) <= budget]] = True
    if open_ is not None:
        keep = torch.zeros_like(open_).masked_scatter_(open_, keep)
    return [k.view_as(s) for k, s in zip(keep.split([s.numel() for s in scores]), scores)]


@register
@dataclass(frozen=True)
class LMP(Method):
    """Local magnitude pruning: in every layer the weights (kernels, by L1 norm) of least magnitude go.

    In a stack of matrices, experts ``(experts, out, in)``, every matrix counts for itself.

    Example:
        >>> import torch, sao_prune
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
        >>> sao_prune.apply(net, sparsity=0.9, method="lmp").layers[1].nnz
        6
    """

    name: ClassVar[str] = "lmp"

    def draw(self, allocations: Sequence[Allocation], weights: Sequence[Tensor], seed: int) -> list[Draw]:
        """Keep the top units of each weight."""
        return [
            Draw(a.weight, units=_keep_local(a, scores))
            for a, scores in zip(allocations, _all_scores(allocations, weights))
        ]

    @property
    def gradual(self) -> bool:
        """Magnitudes rank at any time."""
        return True

    def revise(self, model: nn.Module, stage: Stage, weights: Sequence[Tensor], seed: int) -> list[Draw]:
        """Keep the top units of each weight among those that are left."""
        draws = []
        for allocation, units, scores in zip(stage.allocations, stage.units, _all_scores(stage.allocations, weights)):
            draws.append(Draw(allocation.weight, units=_keep_local(allocation, scores, units.to(scores.device))))
        return draws


@register
@dataclass(frozen=True)
class GMP(Method):
    """Global magnitude pruning: one threshold over all pruned layers, weights and kernels by L1 norm."""

    name: ClassVar[str] = "gmp"
    layerwise: ClassVar[bool] = False

    def draw(self, allocations: Sequence[Allocation], weights: Sequence[Tensor], seed: int) -> list[Draw]:
        """Keep the top units of all weights together, until the budget of weights is spent."""
        kept = keep_global(allocations, _all_scores(allocations, weights))
        return [Draw(a.weight, units=units) for a, units in zip(allocations, kept)]

    @property
    def gradual(self) -> bool:
        """Magnitudes rank at any time."""
        return True

    def revise(self, model: nn.Module, stage: Stage, weights: Sequence[Tensor], seed: int) -> list[Draw]:
        """Keep the top units of all weights together among those that are left."""
        scores = _all_scores(stage.allocations, weights)
        left = [units.to(s.device) for units, s in zip(stage.units, scores)]
        kept = keep_global(stage.allocations, scores, among=left)
        return [Draw(a.weight, units=units) for a, units in zip(stage.allocations, kept)]


@register
@dataclass(frozen=True)
class LRP(Method):
    """Local random pruning: in every layer (every matrix of a stack) a random choice of weights (kernels) stays."""

    name: ClassVar[str] = "lrp"

    def draw(self, allocations: Sequence[Allocation], weights: Sequence[Tensor], seed: int) -> list[Draw]:
        """Keep random units of each weight."""
        draws = []
        for allocation in allocations:
            weight = allocation.weight
            generator = named_generator(seed, "random", weight.name)
            sets = weight.parts if weight.stacked else 1
            size = weight.parts * weight.matrix[0] * weight.matrix[1] // sets
            units = torch.zeros(sets, size, dtype=torch.bool, device="cpu")
            count = round(allocation.density * size)
            for one in units:
                one[torch.randperm(size, generator=generator, device="cpu")[:count]] = True
            draws.append(Draw(weight, units=units.view(weight.parts, *weight.matrix)))
        return draws

    @property
    def gradual(self) -> bool:
        """The random order is the same at every density."""
        return True

    def revise(self, model: nn.Module, stage: Stage, weights: Sequence[Tensor], seed: int) -> list[Draw]:
        """Keep the first units of the same random order."""
        return self.draw(stage.allocations, weights, seed)


def _keep_local(allocation: Allocation, scores: Tensor, among: Tensor | None = None) -> Tensor:
    """The top units of a weight, of each matrix where it is a stack, among those that may stay."""
    if allocation.weight.stacked:
        left = [None] * len(scores) if among is None else among
        return torch.stack([_top(allocation, one, own) for one, own in zip(scores, left)])
    return _top(allocation, scores, among)


def _top(allocation: Allocation, scores: Tensor, among: Tensor | None) -> Tensor:
    count = round(allocation.density * scores.numel())
    if among is None:
        return keep_top(scores, count)
    return keep_top(torch.where(among, scores, -1), min(count, int(among.sum())))


def _all_scores(allocations: Sequence[Allocation], weights: Sequence[Tensor]) -> list[Tensor]:
    scores = []
    for allocation, weight in zip(allocations, weights):
        try:
            scores.append(unit_scores(allocation.weight.matrices(weight), len(allocation.weight.kernel)))
        except ValueError as error:
            raise ValueError(f"{allocation.weight.name}: {error}") from None
    return scores
