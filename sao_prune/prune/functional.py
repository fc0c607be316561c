"""The functional forms and their classes, on one tensor of one module, as `torch.nn.utils.prune` has them.

They know one module only. Where another module reads its weight without calling it, as `nn.MultiheadAttention` does
with ``out_proj``, prune with `sao_prune.apply`, which keeps such weights fresh.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import PruningContainer
from typing_extensions import Self

from ..algorithms import GMP, RG, SAO, Draw, Method
from ..algorithms.magnitude import keep_top, unit_scores
from ..allocation import Allocation, Budget, allocate
from ..discovery import PrunableWeight, weight_of
from ..seeds import Seed, base_seed, named_generator
from .attachment import attach, check_writable, stored
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


class KernelL1Pruning(MaskPruning):
    """Whole kernels (single weights of a matrix) of least L1 norm; `kernel_l1` is the functional form."""

    @classmethod
    def apply(  # type: ignore[override]
        cls, module: nn.Module, name: str, amount: float
    ) -> KernelL1Pruning:
        """Prune the share ``amount`` of the units of ``module.<name>`` that are left."""
        weight = weight_of(module, name)
        return _by_score(cls, module, weight, amount, _scores(module, weight))


class KernelRandomPruning(MaskPruning):
    """Random whole kernels (single weights of a matrix); `kernel_random` is the functional form."""

    @classmethod
    def apply(  # type: ignore[override]
        cls, module: nn.Module, name: str, amount: float, seed: Seed = None
    ) -> KernelRandomPruning:
        """Prune the share ``amount`` of the units of ``module.<name>`` that are left."""
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
        sparsity: share of zeros; or give ``degree`` (edges of a node on the smaller side) or ``groups`` (blocks).
        degree: see above.
        groups: see above.
        method: options, `sao_prune.SAO`.
        seed: where the draws come from.

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

    Arguments, result and errors are those of `sao`; ``method`` takes `sao_prune.RG` (thesis section 3.4.3).

    Example:
        >>> import torch, sao_prune
        >>> layer = sao_prune.prune.ramanujan(torch.nn.Conv2d(8, 16, 3), sparsity=0.75, seed=0)
        >>> float(layer.weight_mask.mean())
        0.25
    """
    RamanujanPruning.apply(module, name, sparsity, degree=degree, groups=groups, method=method, seed=seed)
    return module


def kernel_l1(module: nn.Module, name: str = "weight", amount: float = 0.5) -> nn.Module:
    """Prune the share ``amount`` of a convolution's kernels, those of least L1 norm, in place.

    For a matrix the units are single weights. The count is exact; of equal norms the earlier unit stays. On a tensor
    that is pruned already the amount is of what is left, as in `torch.nn.utils.prune`.

    Example:
        >>> import torch, sao_prune
        >>> float(sao_prune.prune.kernel_l1(torch.nn.Conv2d(4, 4, 3), "weight", amount=0.5).weight_mask.mean())
        0.5
    """
    KernelL1Pruning.apply(module, name, amount)
    return module


def kernel_random(module: nn.Module, name: str = "weight", amount: float = 0.5, seed: Seed = None) -> nn.Module:
    """Prune a random share ``amount`` of a convolution's kernels (of a matrix's weights), in place.

    Example:
        >>> import torch, sao_prune
        >>> float(sao_prune.prune.kernel_random(torch.nn.Linear(4, 4), "weight", amount=0.25).weight_mask.mean())
        0.75
    """
    KernelRandomPruning.apply(module, name, amount, seed)
    return module


def global_kernel_l1(parameters: Iterable[tuple[nn.Module, str]], amount: float) -> None:
    """Prune kernels (weights of a matrix) of least L1 norm over several tensors together, in place.

    Args:
        parameters: ``(module, name)`` pairs, as for `torch.nn.utils.prune.global_unstructured`.
        amount: share of all their weights that goes; on tensors pruned already, of what is left.

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
    masks = [getattr(m, f"{n}_mask") if is_pruned_tensor(m, n) else torch.ones(1) for m, n in pairs]
    allocations = [
        replace(_allocation(weight, Budget(sparsity=amount)), density=(1 - amount) * float(mask.float().mean()))
        for weight, mask in zip(weights, masks)
    ]
    draws = GMP().draw(allocations, [current(module, name) for module, name in pairs], 0)
    for (module, _), draw in zip(pairs, draws):
        attach(module, draw, KernelL1Pruning)


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
    return _last_hook(cls, module, name)


def _scores(module: nn.Module, weight: PrunableWeight) -> Tensor:
    try:
        return unit_scores(weight.matrices(stored(module, weight.tensor)), len(weight.kernel))
    except ValueError as error:
        raise ValueError(f"{weight.name}: {error}") from None


def _by_score(cls: type[P], module: nn.Module, weight: PrunableWeight, amount: float, scores: Tensor) -> P:
    """Prune the share ``amount`` of the units that an earlier pruning left, those of least score."""
    Budget(sparsity=amount)
    if is_pruned_tensor(module, weight.tensor):
        kept = weight.matrices(getattr(module, f"{weight.tensor}_mask") != 0)
        alive = kept.flatten(3).any(3) if weight.kernel else kept
        scores = scores.masked_fill(~alive.to(scores.device), -1)
        left = int(alive.sum())
    else:
        left = scores.numel()
    units = keep_top(scores, round((1 - amount) * left))
    attach(module, Draw(weight, units=units), cls)
    return _last_hook(cls, module, weight.tensor)


def _last_hook(cls: type[P], module: nn.Module, name: str) -> P:
    for hook in reversed(module._forward_pre_hooks.values()):
        for part in reversed(hook) if isinstance(hook, PruningContainer) else (hook,):
            if isinstance(part, cls) and part._tensor_name == name:
                return part
    raise AssertionError(f"{name} was pruned, but its hook is missing")
