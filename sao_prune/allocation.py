"""How much to prune: from one budget to a number of groups, or of edges, for each weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite, prod
from numbers import Real
from typing import Literal, get_args

from .discovery import PrunableWeight, check_patterns, matches
from .topology import even_sizes, exact_sizes

Fit = Literal["nearest", "regular", "exact"]
Distribution = Literal["uniform", "erk"]
Amount = float | Mapping[str, float]


@dataclass(frozen=True)
class Budget:
    """How sparse the pruned layers shall be.

    Exactly one of ``sparsity``, ``degree`` and ``groups`` is a number, or any of them are mappings from glob
    patterns to numbers; the first pattern that matches a layer counts, a layer that none matches is skipped.

    Attributes:
        sparsity: of the pruned layers, in [0, 1).
        degree: the thesis's degree ``d0 = max(m, n) / groups``, edges on each node of the smaller side; a layer
            with no more nodes than that stays whole.
        groups: number of blocks; a layer with fewer nodes on its smaller side gets as many as it has.
        fit: ``"nearest"`` takes the group count whose sparsity is nearest, with uneven sets where it does not
            divide; ``"regular"`` only counts that divide both sides, so that masks are (c, d)-regular; ``"exact"``
            lets set sizes differ until the number of edges is met.
        distribution: ``"uniform"`` gives every layer the same sparsity; ``"erk"`` (Erdos-Renyi kernel) keeps
            more of small layers at the same total. Counts only for a single ``sparsity``.

    Raises:
        ValueError: if none is given, several are that exclude each other, or a number is out of range.
    """

    sparsity: Amount | None = None
    degree: Amount | None = None
    groups: Amount | None = None
    fit: Fit = "nearest"
    distribution: Distribution = "uniform"

    def __post_init__(self) -> None:
        for option, allowed in (("fit", get_args(Fit)), ("distribution", get_args(Distribution))):
            if getattr(self, option) not in allowed:
                raise ValueError(f"{option} must be one of {', '.join(allowed)}, got {getattr(self, option)!r}")
        given = {name: amount for name, amount in self._amounts().items() if amount is not None}
        if not given:
            raise ValueError("say how sparse: give sparsity=, degree= or groups=")
        numbers = [name for name, amount in given.items() if not isinstance(amount, Mapping)]
        if numbers and len(given) > 1:
            raise ValueError(f"give one of sparsity, degree and groups, or mappings; got {', '.join(given)}")
        if self.distribution == "erk" and numbers != ["sparsity"]:
            raise ValueError("distribution='erk' needs a single number for sparsity")
        for name, amount in given.items():
            for value in amount.values() if isinstance(amount, Mapping) else (amount,):
                _check_amount(name, value)

    def _amounts(self) -> dict[str, Amount | None]:
        return {"sparsity": self.sparsity, "degree": self.degree, "groups": self.groups}

    def of(self, weight: PrunableWeight) -> tuple[str, float] | None:
        """The unit and amount that this budget names for a weight; ``None`` where no pattern matches."""
        for unit, amount in self._amounts().items():
            if isinstance(amount, Mapping):
                for pattern, value in amount.items():
                    if matches(pattern, weight):
                        return unit, float(value)
            elif amount is not None:
                return unit, float(amount)
        return None

    def check_matches(self, weights: Sequence[PrunableWeight]) -> None:
        """Refuse mapping patterns that match no layer."""
        for unit, amount in self._amounts().items():
            if isinstance(amount, Mapping):
                check_patterns(unit, amount, list(weights))


@dataclass(frozen=True)
class Allocation:
    """What one weight is asked for and what a block topology can give.

    Attributes:
        weight: the weight.
        density: requested share of non-zeros.
        groups: number of blocks of each part.
        nnz: edges of each part where ``fit="exact"``, else ``None``.
    """

    weight: PrunableWeight
    density: float
    groups: int
    nnz: int | None = None

    @property
    def edges(self) -> int:
        """Edges of each part as the block topology has them."""
        rows, cols = self.weight.matrix
        row_sizes, col_sizes = (
            even_sizes(rows, cols, self.groups) if self.nnz is None else exact_sizes(rows, cols, self.nnz)
        )
        return int((row_sizes * col_sizes).sum())


def allocate(weights: Sequence[PrunableWeight], budget: Budget) -> list[Allocation | PrunableWeight]:
    """Give every prunable weight its share of the budget.

    Args:
        weights: from `sao_prune.walk`; those with a reason pass through unchanged.
        budget: how sparse.

    Returns:
        In the same order an `Allocation` for each weight that is pruned, else the weight with its reason.

    Raises:
        ValueError: if a pattern of the budget matches no layer.

    Example:
        >>> w = PrunableWeight("fc", "weight", "Linear", (256, 1024))
        >>> [a.groups for a in allocate([w], Budget(degree=16))]
        [64]
    """
    budget.check_matches(weights)
    out: list[Allocation | PrunableWeight] = []
    for weight in weights:
        asked = budget.of(weight) if weight.reason is None else None
        if weight.reason is not None:
            out.append(weight)
        elif asked is None:
            out.append(replace(weight, reason="no pattern of the budget matches it"))
        else:
            out.append(_allocate_one(weight, *asked, budget.fit))
    if budget.distribution == "erk":
        out = _erk(out, budget)
    if budget.fit == "exact":
        out = _exact(out)
    return out


def _check_amount(unit: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not isfinite(value):
        raise ValueError(f"{unit} must be a finite number, got {value!r}")
    value = float(value)
    if unit == "sparsity" and not 0 <= value < 1:
        hint = f"; did you mean {value / 100:g}?" if 1 < value < 100 else ""
        raise ValueError(f"sparsity is a share in [0, 1), got {value}{hint}")
    if unit != "sparsity" and (value < 1 or value != int(value)):
        raise ValueError(f"{unit} must be a whole number of at least 1, got {value:g}")


def _allocate_one(weight: PrunableWeight, unit: str, amount: float, fit: Fit) -> Allocation:
    rows, cols = weight.matrix
    if unit == "sparsity":
        density = 1 - amount
    else:
        density = amount / max(rows, cols) if unit == "degree" else 1 / amount
    density = min(density, 1.0)
    return Allocation(weight, density, _nearest_groups(rows, cols, density, regular=fit == "regular"))


def _nearest_groups(rows: int, cols: int, density: float, *, regular: bool) -> int:
    """The feasible group count whose density ``1/g`` is nearest; the sparser of two equals."""
    most = min(rows, cols)
    if regular:
        divisors = [g for g in range(1, most + 1) if rows % g == 0 and cols % g == 0]
        return min(divisors, key=lambda g: (abs(1 / g - density), -g))
    guess = int(1 / density)
    return min((max(1, min(g, most)) for g in (guess, guess + 1)), key=lambda g: (abs(1 / g - density), -g))


def _erk(items: list[Allocation | PrunableWeight], budget: Budget) -> list[Allocation | PrunableWeight]:
    """Densities in proportion to ``(m + n + sum k) / (m n prod k)``, capped at 1 (Evci et al., RigL, 2020)."""
    allocations = [a for a in items if isinstance(a, Allocation)]
    total = sum(a.density * a.weight.numel for a in allocations)
    raw = {a.weight.name: (sum(a.weight.matrix) + sum(a.weight.kernel)) / _size(a.weight) for a in allocations}
    dense: set[str] = set()
    scale = 0.0
    while len(dense) < len(allocations):
        open_ = [a.weight for a in allocations if a.weight.name not in dense]
        left = total - sum(a.weight.numel for a in allocations if a.weight.name in dense)
        scale = left / sum(raw[w.name] * w.numel for w in open_)
        full = {w.name for w in open_ if raw[w.name] * scale > 1}
        if not full:
            break
        dense |= full
    out: list[Allocation | PrunableWeight] = []
    for item in items:
        if isinstance(item, Allocation):
            density = 1.0 if item.weight.name in dense else raw[item.weight.name] * scale
            item = _allocate_one(item.weight, "sparsity", 1 - density, budget.fit)
        out.append(item)
    return out


def _size(weight: PrunableWeight) -> int:
    rows, cols = weight.matrix
    return rows * cols * prod(weight.kernel)


def _exact(items: list[Allocation | PrunableWeight]) -> list[Allocation | PrunableWeight]:
    """Edge counts for each weight; what a small layer cannot meet, the next larger one takes over."""
    allocations = [(index, item) for index, item in enumerate(items) if isinstance(item, Allocation)]
    out = list(items)
    owed = 0.0
    for index, item in sorted(allocations, key=lambda pair: pair[1].weight.numel):
        rows, cols = item.weight.matrix
        per_edge = item.weight.parts * prod(item.weight.kernel)
        wanted = item.density * item.weight.numel + owed
        nnz = min(max(round(wanted / per_edge), max(rows, cols)), rows * cols)
        exact = replace(item, nnz=nnz, groups=len(exact_sizes(rows, cols, nnz)[0]))
        owed = wanted - exact.edges * per_edge
        out[index] = exact
    return out
