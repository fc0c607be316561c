"""N:M sparsity: of every M inputs of an output N stay, the pattern that sparse tensor cores run (2:4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..allocation import Allocation
from .base import Method, register
from .draw import Draw

# Swaps that gain less than this share of all scores are rounding.
_LEAST_GAIN = 1e-6
_MOST_ROUNDS = 1000


@register
@dataclass(frozen=True)
class NM(Method):
    """N:M magnitude pruning: of every ``m`` inputs in a row each output keeps the ``n`` of greatest magnitude.

    In convolutions the inputs are channels, and every tap of the kernel has its own choice, as NVIDIA's ASP has it
    (Mishra et al., 2021, https://arxiv.org/abs/2104.08378). With ``permute`` the sets of ``m`` are not neighbours:
    columns change places between sets, the best swaps first, until none keeps more (Pool and Yu, NeurIPS 2021,
    https://openreview.net/forum?id=WAO1STUPWPP, their greedy phase). To run such a layer on sparse tensor cores its
    inputs have to be brought into that order, by permuting the layer before; masks and accuracies are the same.

    Leaves a share of exactly ``n / m``: 2:4 goes with ``sparsity=0.5`` or ``groups=2``.

    Attributes:
        n: inputs of a set that stay.
        m: inputs of a set.
        permute: search for the sets.

    Raises:
        ValueError: unless ``1 <= n < m``.

    Example:
        >>> import torch, sao_prune
        >>> net = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3)))
        >>> _ = sao_prune.apply(net, sparsity=0.5, method="nm")
        >>> net[1].weight_mask.unflatten(1, (2, 4)).sum(2).unique().tolist()
        [2.0]
    """

    name: ClassVar[str] = "nm"

    n: int = 2
    m: int = 4
    permute: bool = False

    def __post_init__(self) -> None:
        whole = all(isinstance(v, int) and not isinstance(v, bool) for v in (self.n, self.m))
        if not whole or not 1 <= self.n < self.m:
            raise ValueError(f"n and m must be whole numbers with 1 <= n < m, got n={self.n!r}, m={self.m!r}")

    def preview(self, allocations: Sequence[Allocation]) -> list[tuple[int | None, int]]:
        """The edges, after a look at whether the pattern fits."""
        for allocation in allocations:
            self._check(allocation)
        return super().preview(allocations)

    def draw(self, allocations: Sequence[Allocation], weights: Sequence[Tensor], seed: int) -> list[Draw]:
        """Keep the top ``n`` of every set of every output.

        Raises:
            ValueError: if another sparsity is asked for, a layer's inputs are no multiple of ``m``, or a weight is not
                finite.
        """
        draws = []
        for allocation, weight in zip(allocations, weights):
            self._check(allocation)
            scores = allocation.weight.matrices(weight).detach().abs()
            scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
            if not bool(torch.isfinite(scores).all()):
                name = allocation.weight.name
                raise ValueError(f"{name}: the weight holds NaN or infinite values, so its entries cannot be ranked")
            draws.append(Draw(allocation.weight, units=torch.stack([self._keep(part) for part in scores])))
        return draws

    def _keep(self, scores: Tensor) -> Tensor:
        """Boolean mask of a part's ``(rows, cols, *kernel)`` magnitudes."""
        last = scores.movedim(1, -1)
        table = last.reshape(-1, scores.shape[1])
        order = permuted(table, self.n, self.m) if self.permute else torch.arange(table.shape[1], device=table.device)
        mask = torch.zeros_like(table, dtype=torch.bool)
        mask[:, order] = keep_of_sets(table[:, order], self.n, self.m)
        return mask.view(last.shape).movedim(-1, 1)

    def _check(self, allocation: Allocation) -> None:
        weight, share = allocation.weight, self.n / self.m
        if abs(allocation.density - share) > 1e-9:
            raise ValueError(
                f"{self.n}:{self.m} leaves {share:.4g} of a weight, and {weight.name} was asked for "
                f"{allocation.density:.4g}: give sparsity={1 - share:.4g}, with distribution='uniform'"
            )
        if weight.matrix[1] % self.m:
            raise ValueError(
                f"{weight.name} has {weight.matrix[1]} inputs, no multiple of {self.m}: leave it out with "
                f"exclude=[{(weight.module or weight.tensor)!r}]"
            )


def keep_of_sets(scores: Tensor, n: int, m: int) -> Tensor:
    """Boolean mask of the ``n`` highest scores of every ``m`` in a row; of equal scores the earlier ones.

    Args:
        scores: shape ``(rows, cols)``, ``cols`` a multiple of ``m``.
        n: how many stay.
        m: of how many.

    Example:
        >>> keep_of_sets(torch.tensor([[3.0, 1.0, 2.0, 2.0]]), 2, 4).tolist()
        [[True, False, True, False]]
    """
    sets = scores.unflatten(1, (-1, m))
    order = sets.argsort(dim=2, descending=True, stable=True)[..., :n]
    return torch.zeros_like(sets, dtype=torch.bool).scatter_(2, order, True).flatten(1)


def permuted(scores: Tensor, n: int, m: int) -> Tensor:
    """An order of columns in which every ``m`` in a row keep more of the scores: greedy swaps between sets.

    All swaps are compared at once, then the best are made as long as they touch different sets; so every round keeps
    more than the one before. A round compares ``cols^2`` pairs over all rows.

    Args:
        scores: non-negative, shape ``(rows, cols)``, ``cols`` a multiple of ``m``.
        n: how many of a set stay in every row.
        m: columns of a set.

    Returns:
        Indices of columns, ``(cols,)``; each set in ascending order.

    Example:
        >>> scores = torch.tensor([[9.0, 8.0, 7.0, 1.0, 1.0, 1.0]])
        >>> order = permuted(scores, 1, 2)
        >>> float(scores[:, order][keep_of_sets(scores[:, order], 1, 2)].sum())
        24.0
    """
    cols = scores.shape[1]
    order = torch.arange(cols, device=scores.device)
    everywhere, owner = order.clone(), order // m
    places, smallest = everywhere, _LEAST_GAIN * float(scores.sum())
    # What a set keeps if the column at one of its places (rows) gave way to another (columns).
    values, fixed, last = scores.new_empty(cols, cols), scores.new_empty(cols), torch.empty_like(scores)
    for _ in range(_MOST_ROUNDS):
        current = scores[:, order]
        fixed[places], last[:, places] = _without(current[:, places], n, m)
        values[places] = fixed[places, None] + _maxima(last[:, places], current)
        if len(places) < cols:
            values[:, places] = fixed[:, None] + _maxima(last, current[:, places])
        kept = values.diagonal()
        gain = values + values.T - kept[:, None] - kept
        swaps = _disjoint(torch.where(owner[:, None] < owner, gain, 0.0), m, smallest)
        if not swaps:
            break
        for a, b in swaps:
            order[[a, b]] = order[[b, a]]
        touched = owner.new_tensor(sorted({place // m for swap in swaps for place in swap}))
        places = everywhere[torch.isin(owner, touched)]
    return order.view(-1, m).sort(1).values.flatten()


def _without(scores: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """For every column the sum of the ``n - 1`` best of the others of its set, and in each row the next best of them.

    With a new column in its place, the set keeps the former and the greater of the latter and the new one.
    """
    sets = scores.unflatten(1, (-1, m))
    tops = [sets[..., [p for p in range(m) if p != place]].topk(n, dim=2).values for place in range(m)]
    top = torch.stack(tops, 2).flatten(1, 2)
    return top[..., : n - 1].sum(2).sum(0), top[..., n - 1]


def _maxima(one: Tensor, other: Tensor) -> Tensor:
    """Sums over the rows of ``max(a, b)``, for every column ``a`` of one table and ``b`` of another."""
    return (one.sum(0)[:, None] + other.sum(0) + torch.cdist(one.T, other.T, 1)) / 2


def _disjoint(gain: Tensor, m: int, least: float) -> list[tuple[int, int]]:
    """The best swaps of places, none of which touch the same set."""
    best, place = gain.view(gain.shape[0], -1, m).max(2)
    order = torch.argsort(best.flatten(), descending=True, stable=True)
    ranked = order[best.flatten()[order] > least].tolist()
    taken: set[int] = set()
    swaps = []
    for index in ranked:
        if len(taken) > best.shape[1] - 2:
            break
        a, other = divmod(index, best.shape[1])
        if a // m in taken or other in taken:
            continue
        taken |= {a // m, other}
        swaps.append((a, other * m + int(place[a, other])))
    return swaps
