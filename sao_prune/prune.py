"""Pruning in the conventions of `torch.nn.utils.prune`: hooks, masks and the functional forms."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod, global_unstructured, is_pruned
from torch.nn.utils.prune import remove as remove

from .allocate import Budget, allocate
from .methods import GMP, LMP, LRP, RG, SAO, Draw, Method
from .seeds import Seed, base_seed
from .walk import PrunableWeight, weight_of

__all__ = [
    "KernelL1Pruning",
    "KernelRandomPruning",
    "MaskPruning",
    "MaskedWeight",
    "RamanujanPruning",
    "SAOPruning",
    "attach",
    "global_kernel_l1",
    "global_unstructured",
    "is_pruned",
    "kernel_l1",
    "kernel_random",
    "ramanujan",
    "remove",
    "sao",
]


class MaskedWeight(Tensor):
    """The product of weight and mask: an ordinary tensor in the graph that can also be copied and pickled.

    A plain non-leaf tensor refuses `copy.deepcopy`, which would break model averaging and every other tool that
    copies a pruned model. The copy is detached; the next forward pass computes it anew.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[int, Any]) -> MaskedWeight:
        if id(self) not in memo:
            memo[id(self)] = self.detach().clone().as_subclass(MaskedWeight)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.detach().as_subclass(Tensor).__reduce_ex__(protocol)


class MaskPruning(BasePruningMethod):
    """Base of this library's pruning methods: a given mask, joined with any that is there already.

    As `torch.nn.utils.prune` has it, the parameter moves to ``<name>_orig``, the buffer ``<name>_mask`` holds the
    mask, and a forward pre-hook puts their product in ``<name>``.
    """

    PRUNING_TYPE = "global"

    def __init__(self, mask: Tensor | None = None) -> None:
        self._mask = mask
        self.called = False

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """The given mask where the earlier one keeps an entry."""
        if self._mask is None or self._mask.shape != default_mask.shape:
            given = None if self._mask is None else tuple(self._mask.shape)
            raise ValueError(f"the mask must have the weight's shape {tuple(default_mask.shape)}, got {given}")
        return default_mask * self._mask.to(default_mask)

    def apply_mask(self, module: nn.Module) -> Tensor:
        """The weight that the module uses: ``<name>_orig * <name>_mask``."""
        mask: Tensor = getattr(module, f"{self._tensor_name}_mask")
        original: Tensor = getattr(module, f"{self._tensor_name}_orig")
        weight = original * mask.to(original.dtype)
        return weight if torch.compiler.is_compiling() else weight.as_subclass(MaskedWeight)

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        if not self.called:
            self.called = True
        setattr(module, self._tensor_name, self.apply_mask(module))

    @classmethod
    def register(cls, module: nn.Module, name: str, mask: Tensor) -> None:
        """Prune one tensor of a module with a given mask.

        Where it was pruned before, the masks are joined and the hooks gathered in torch's own `PruningContainer`.
        Else this does what `BasePruningMethod.apply` does, without its passes over the weight; ``<name>`` itself is
        left to `refresh`.
        """
        if is_pruned_tensor(module, name):
            joined = super().apply(module, name, mask=mask)
            joined[-1]._mask = None
            return
        method = cls()
        method._tensor_name = name
        original: nn.Parameter = module._parameters.pop(name)  # type: ignore[assignment]
        module.register_parameter(f"{name}_orig", original)
        module.register_buffer(f"{name}_mask", mask)
        setattr(module, name, original.detach())
        module.register_forward_pre_hook(method)


class SAOPruning(MaskPruning):
    """SAO topology and orthogonal values on one tensor; `sao` is the functional form."""

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
    ) -> SAOPruning:
        """Prune ``module.<name>``; the arguments are those of `sao`."""
        return _prune_one(cls, module, name, Budget(sparsity, degree, groups), method or SAO(), seed)


class RamanujanPruning(MaskPruning):
    """SAO's topology on one tensor, its values kept or drawn; `ramanujan` is the functional form."""

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
    ) -> RamanujanPruning:
        """Prune ``module.<name>``; the arguments are those of `ramanujan`."""
        return _prune_one(cls, module, name, Budget(sparsity, degree, groups), method or RG(), seed)


class KernelL1Pruning(MaskPruning):
    """Whole kernels (single weights of a matrix) of least L1 norm; `kernel_l1` is the functional form."""

    @classmethod
    def apply(  # type: ignore[override]
        cls, module: nn.Module, name: str, amount: float
    ) -> KernelL1Pruning:
        """Prune the share ``amount`` of the units of ``module.<name>``."""
        return _prune_one(cls, module, name, Budget(sparsity=amount), LMP(), 0)


class KernelRandomPruning(MaskPruning):
    """Random whole kernels (single weights of a matrix); `kernel_random` is the functional form."""

    @classmethod
    def apply(  # type: ignore[override]
        cls, module: nn.Module, name: str, amount: float, seed: Seed = None
    ) -> KernelRandomPruning:
        """Prune the share ``amount`` of the units of ``module.<name>``."""
        return _prune_one(cls, module, name, Budget(sparsity=amount), LRP(), seed)


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

    For a matrix the units are single weights. The count is exact; of equal norms the earlier unit stays.

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
        amount: share of all their weights that goes.

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
    allocations = [a for w in weights for a in _allocations(w, Budget(sparsity=amount))]
    draws = GMP().draw(allocations, [getattr(module, name).detach() for module, name in pairs], 0)
    for (module, _), draw in zip(pairs, draws):
        attach(module, draw, KernelL1Pruning)


def attach(module: nn.Module, draw: Draw, method: type[MaskPruning] = MaskPruning) -> None:
    """Put a draw's mask and values on one module."""
    name = draw.weight.tensor
    fresh = not is_pruned_tensor(module, name)
    method.register(module, name, draw.mask(getattr(module, name)))
    draw.write_(getattr(module, f"{name}_orig").data)
    if fresh and not draw.keeps_values:
        settle(module, name)
    else:
        refresh(module)


def is_pruned_tensor(module: nn.Module, name: str) -> bool:
    """Whether a pruning hook is on this very tensor."""
    hooks = module._forward_pre_hooks.values()
    return any(isinstance(hook, BasePruningMethod) and hook._tensor_name == name for hook in hooks)


def refresh(module: nn.Module) -> None:
    """Recompute the masked weights of one module from its parameters and masks."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod):
            setattr(module, hook._tensor_name, hook.apply_mask(module))


def settle(module: nn.Module, name: str) -> None:
    """`refresh` for values that were just drawn: they are zero off the mask, so the product is the weight itself."""
    original: Tensor = getattr(module, f"{name}_orig")
    setattr(module, name, original.view_as(original).as_subclass(MaskedWeight))


class RefreshChildren:
    """Forward pre-hook for modules that read ``child.weight`` without calling the child.

    Their children's own hooks never run, so the masked weight would be stale, and its graph freed after the first
    backward. Children that are called look after themselves.
    """

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        for child in module._modules.values():
            if child is not None and any(
                isinstance(hook, BasePruningMethod) and not getattr(hook, "called", False)
                for hook in child._forward_pre_hooks.values()
            ):
                refresh(child)


def watch_children(module: nn.Module) -> None:
    """Register `RefreshChildren` on a module, once."""
    if not any(isinstance(hook, RefreshChildren) for hook in module._forward_pre_hooks.values()):
        module.register_forward_pre_hook(RefreshChildren())


def unwatch_children(module: nn.Module) -> None:
    """Remove `RefreshChildren` from a module."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, RefreshChildren):
            del module._forward_pre_hooks[key]


def _allocations(weight: PrunableWeight, budget: Budget) -> list[Any]:
    return list(allocate([weight], budget))


def _prune_one(cls: type[MaskPruning], module: nn.Module, name: str, budget: Budget, method: Method, seed: Seed) -> Any:
    weight = weight_of(module, name)
    (draw,) = method.draw(_allocations(weight, budget), [getattr(module, name).detach()], base_seed(seed))
    attach(module, draw, cls)
    return next(
        hook
        for hook in reversed(module._forward_pre_hooks.values())
        if isinstance(hook, BasePruningMethod) and hook._tensor_name == name
    )
