"""The functional forms and their classes, on one tensor of one module, as `torch.nn.utils.prune` has them.

They know one module only. Where another module reads its weight without calling it, as `nn.MultiheadAttention` does
with ``out_proj``, prune with `sao_prune.apply`, which keeps such weights fresh.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import singledispatch
from numbers import Integral, Real
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ..algorithms import GMP, RG, SAO, Draw, Method
from ..algorithms.magnitude import keep_top, unit_scores
from ..allocation import Allocation, Budget, allocate
from ..discovery import PrunableWeight, weight_of
from ..seeds import Seed, base_seed, named_generator
from .attachment import attach, check_writable, last_hook, stored
from .derived import current
from .hooks import MaskPruning, is_pruned_tensor

P = TypeVar("P", bound=MaskPruning)


class TopologyPruning(MaskPruning):
    """Base of the prunings that choose a topology by a method."""

    default: ClassVar[Method]

    @classmethod
    def apply(  # type: ignore[override]
        cls,
        module: nn.Module,
        name: str,
        sparsity: float | None = None,
        *,
        degree: float | None = None,
        groups: int | None = None,
        method: Method | None = None,
        seed: Seed = None,
    ) -> Self:
        """Prune ``module.<name>``; the arguments are those of the functional form."""
        return _by_method(cls, module, name, Budget(sparsity, degree, groups), method or cls.default, seed)


class SAOPruning(TopologyPruning):
    """SAO topology and orthogonal values on one tensor; `sao` is the functional form."""

    default = SAO()


class RamanujanPruning(TopologyPruning):
    """SAO's topology on one tensor, its values kept or drawn; `ramanujan` is the functional form."""

    default = RG()


@singledispatch
def pruning_class(method: Method) -> type[MaskPruning]:
    """The class of the hooks that a method leaves on a model; subclasses of a method have those of their base.

    Args:
        method: what chose the masks.

    Returns:
        `MaskPruning` or a subclass.

    Example:
        >>> pruning_class(SAO()).__name__, pruning_class(GMP()).__name__
        ('SAOPruning', 'MaskPruning')
    """
    return MaskPruning


@pruning_class.register
def _(method: SAO) -> type[MaskPruning]:
    return SAOPruning


@pruning_class.register
def _(method: RG) -> type[MaskPruning]:
    return RamanujanPruning


class KernelL1Pruning(MaskPruning):
    """Whole kernels (single weights of a matrix) of least L1 norm; `kernel_l1` is the functional form."""

    @classmethod
    def apply(  # type: ignore[override]
        cls, module: nn.Module, name: str, amount: int | float
    ) -> KernelL1Pruning:
        """Prune ``amount`` of the units of ``module.<name>`` that are left, a share or a number of them."""
        weight = weight_of(module, name)
        return _by_score(cls, module, weight, amount, _scores(module, weight))


class KernelRandomPruning(MaskPruning):
    """Random whole kernels (single weights of a matrix); `kernel_random` is the functional form."""

    @classmethod
    def apply(  # type: ignore[override]
        cls, module: nn.Module, name: str, amount: int | float, seed: Seed = None
    ) -> KernelRandomPruning:
        """Prune ``amount`` of the units of ``module.<name>`` that are left, a share or a number of them."""
        weight = weight_of(module, name)
        generator = named_generator(base_seed(seed), "random", name)
        scores = torch.rand(weight.parts, *weight.matrix, generator=generator, dtype=torch.float64, device="cpu")
        return _by_score(cls, module, weight, amount, scores)


def sao(
    module: nn.Module,
    name: str = "weight",
    sparsity: float | None = None,
    *,
    degree: float | None = None,
    groups: int | None = None,
    method: SAO | None = None,
    seed: Seed = None,
) -> nn.Module:
    """Give one tensor of a module an SAO topology with exactly orthogonal values, in place (thesis section 3.4).

    Args:
        module: a linear, convolutional, recurrent or attention module.
        name: the parameter.
        sparsity: of the tensor, in [0, 1); or give ``degree`` or ``groups``.
        degree: edges of each node on the smaller side.
        groups: number of blocks.
        method: options, `sao_prune.SAO`.
        seed: where the draws come from; ``None`` takes `torch.initial_seed`.

    Returns:
        The module, with ``<name>_orig`` and ``<name>_mask`` as `torch.nn.utils.prune` has them. Over an earlier
        pruning the masks are joined, and what is left of the values is no longer orthogonal.

    Raises:
        ValueError: if there is no such weight or the amount is out of range.

    Example:
        >>> import torch, sao_prune
        >>> layer = sao_prune.prune.sao(torch.nn.Linear(32, 32), "weight", sparsity=0.75, seed=0)
        >>> float(layer.weight_mask.mean()), bool(torch.linalg.svdvals(layer.weight).max() < 1.0001)
        (0.25, True)
    """
    SAOPruning.apply(module, name, sparsity, degree=degree, groups=groups, method=method, seed=seed)
    return module


def ramanujan(
    module: nn.Module,
    name: str = "weight",
    sparsity: float | None = None,
    *,
    degree: float | None = None,
    groups: int | None = None,
    method: RG | None = None,
    seed: Seed = None,
) -> nn.Module:
    """Mask one tensor of a module with SAO's topology, in place; values are kept unless ``method`` says otherwise.

    The topology is that of Algorithm 1 of the thesis (section 3.4.3).

    Args:
        module: a linear, convolutional, recurrent or attention module.
        name: the parameter.
        sparsity: of the tensor, in [0, 1); or give ``degree`` or ``groups``.
        degree: edges of each node on the smaller side.
        groups: number of blocks.
        method: options, `sao_prune.RG`.
        seed: where the draws come from; ``None`` takes `torch.initial_seed`.

    Returns:
        The module, with ``<name>_orig`` and ``<name>_mask`` as `torch.nn.utils.prune` has them.

    Raises:
        ValueError: if there is no such weight or the amount is out of range.

    Example:
        >>> import torch, sao_prune
        >>> layer = sao_prune.prune.ramanujan(torch.nn.Conv2d(8, 16, 3), sparsity=0.75, seed=0)
        >>> float(layer.weight_mask.mean())
        0.25
    """
    RamanujanPruning.apply(module, name, sparsity, degree=degree, groups=groups, method=method, seed=seed)
    return module


def kernel_l1(module: nn.Module, name: str = "weight", amount: int | float = 0.5) -> nn.Module:
    """Prune a convolution's kernels of least L1 norm, in place; of a matrix its single weights.

    The count is exact; of equal norms the earlier unit stays. On a tensor that is pruned already the amount is of what
    is left, as in `torch.nn.utils.prune`.

    Args:
        module: a linear, convolutional, recurrent or attention module.
        name: the parameter.
        amount: a float in [0, 1), the share of kernels (weights of a matrix) that goes; or an integer, their number.

    Returns:
        The module, with ``<name>_orig`` and ``<name>_mask`` as `torch.nn.utils.prune` has them.

    Raises:
        ValueError: if there is no such weight, the amount is out of range or the weight is not finite.

    Example:
        >>> import torch, sao_prune
        >>> float(sao_prune.prune.kernel_l1(torch.nn.Conv2d(4, 4, 3), "weight", amount=0.5).weight_mask.mean())
        0.5
        >>> int((sao_prune.prune.kernel_l1(torch.nn.Linear(4, 4), "weight", amount=3).weight_mask == 0).sum())
        3
    """
    KernelL1Pruning.apply(module, name, amount)
    return module


def kernel_random(module: nn.Module, name: str = "weight", amount: int | float = 0.5, seed: Seed = None) -> nn.Module:
    """Prune random kernels of a convolution, in place; of a matrix its single weights.

    Args:
        module: a linear, convolutional, recurrent or attention module.
        name: the parameter.
        amount: a float in [0, 1), the share of kernels (weights of a matrix) that goes; or an integer, their number.
            On a tensor that is pruned already, of what is left.
        seed: where the choice comes from; ``None`` takes `torch.initial_seed`.

    Returns:
        The module, with ``<name>_orig`` and ``<name>_mask`` as `torch.nn.utils.prune` has them.

    Raises:
        ValueError: if there is no such weight or the amount is out of range.

    Example:
        >>> import torch, sao_prune
        >>> float(sao_prune.prune.kernel_random(torch.nn.Linear(4, 4), "weight", amount=0.25).weight_mask.mean())
        0.75
    """
    KernelRandomPruning.apply(module, name, amount, seed)
    return module


def global_kernel_l1(parameters: Iterable[tuple[nn.Module, str]], amount: int | float) -> None:
    """Prune kernels (weights of a matrix) of least L1 norm over several tensors together, in place.

    Args:
        parameters: ``(module, name)`` pairs, as for `torch.nn.utils.prune.global_unstructured`.
        amount: a float in [0, 1), the share of all their weights that goes; or an integer, the number of weights, a
            kernel counting all its taps. On tensors pruned already, of what is left.

    Raises:
        ValueError: without any pair, for a tensor that cannot be pruned, or an amount out of range.

    Example:
        >>> import torch, sao_prune
        >>> convs = [torch.nn.Conv2d(4, 4, 3), torch.nn.Conv2d(4, 4, 3)]
        >>> sao_prune.prune.global_kernel_l1([(c, "weight") for c in convs], amount=0.5)
        >>> sum(float(c.weight_mask.sum()) for c in convs)
        144.0
    """
    pairs = list(parameters)
    weights = [weight_of(module, name) for module, name in pairs]
    if not weights:
        raise ValueError("global_kernel_l1 needs at least one (module, name) pair")
    alive = [
        int(getattr(m, f"{n}_mask").count_nonzero()) if is_pruned_tensor(m, n) else weight.numel
        for (m, n), weight in zip(pairs, weights)
    ]
    left = sum(alive)
    stays = 1 - _count(amount, left) / left if left else 0.0
    allocations = [
        replace(_allocation(weight, Budget(sparsity=0)), density=stays * count / weight.numel)
        for weight, count in zip(weights, alive)
    ]
    draws = GMP().draw(allocations, [current(module, name) for module, name in pairs], 0)
    for (module, _), draw in zip(pairs, draws):
        attach(module, draw, KernelL1Pruning)


def _count(amount: int | float, left: int) -> int:
    """How many of ``left`` units an amount means: an integer itself, a float its share, rounded.

    Raises:
        ValueError: if it is out of range.
    """
    if isinstance(amount, Integral) and not isinstance(amount, bool):
        if not 0 <= amount <= left:
            raise ValueError(
                f"an integer amount is a number of units, from 0 to the {left} that are left, got {amount}"
            )
        return int(amount)
    if isinstance(amount, bool) or not isinstance(amount, Real) or not 0 <= amount < 1:
        raise ValueError(f"amount is a share in [0, 1), or a whole number of units, got {amount!r}")
    return left - round((1 - amount) * left)


def _allocation(weight: PrunableWeight, budget: Budget) -> Allocation:
    (allocation,) = allocate([weight], budget)
    assert isinstance(allocation, Allocation)
    asked = budget.groups if isinstance(budget.groups, int) else None
    if asked is not None and asked != allocation.groups:
        rows, cols = weight.matrix
        raise ValueError(f"a {rows} x {cols} {weight.kind} takes from 1 to {min(rows, cols)} groups, got {asked}")
    return allocation


def _by_method(cls: type[P], module: nn.Module, name: str, budget: Budget, method: Method, seed: Seed) -> P:
    weight = weight_of(module, name)
    value = stored(module, name)
    check_writable(weight.name, value)
    (draw,) = method.draw([_allocation(weight, budget)], [value], base_seed(seed))
    attach(module, draw, cls)
    return last_hook(cls, module, name)


def _scores(module: nn.Module, weight: PrunableWeight) -> Tensor:
    try:
        return unit_scores(weight.matrices(stored(module, weight.tensor)), len(weight.kernel))
    except ValueError as error:
        raise ValueError(f"{weight.name}: {error}") from None


def _by_score(cls: type[P], module: nn.Module, weight: PrunableWeight, amount: int | float, scores: Tensor) -> P:
    """Prune ``amount`` of the units that an earlier pruning left, those of least score."""
    if is_pruned_tensor(module, weight.tensor):
        kept = weight.matrices(getattr(module, f"{weight.tensor}_mask") != 0)
        alive = kept.flatten(3).any(3) if weight.kernel else kept
        scores = scores.masked_fill(~alive.to(scores.device), -1)
        left = int(alive.sum())
    else:
        left = scores.numel()
    units = keep_top(scores, left - _count(amount, left))
    attach(module, Draw(weight, units=units), cls)
    return last_hook(cls, module, weight.tensor)
