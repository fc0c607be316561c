"""Masks as `torch.nn.utils.prune` knows them: the pruning hooks, and the hooks that keep masked weights fresh."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch._C import _disabled_torch_function_impl
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod, PruningContainer


class MaskedWeight(Tensor):
    """The product of weight and mask: an ordinary tensor in the graph that can also be copied and pickled.

    A plain non-leaf tensor refuses `copy.deepcopy`, which would break model averaging and every other tool that
    copies a pruned model. The copy is detached; the next forward pass computes it anew.
    """

    __torch_function__ = _disabled_torch_function_impl  # type: ignore[assignment]

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
        self.called = self.settled = False

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """The given mask where the earlier one keeps an entry."""
        if self._mask is None or self._mask.shape != default_mask.shape:
            given = None if self._mask is None else tuple(self._mask.shape)
            raise ValueError(f"the mask must have the weight's shape {tuple(default_mask.shape)}, got {given}")
        return default_mask * self._mask.to(default_mask)

    def apply_mask(self, module: nn.Module) -> Tensor:
        """The weight that the module uses: ``<name>_orig * <name>_mask``."""
        return super().apply_mask(module).as_subclass(MaskedWeight)

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


class MaskContainer(PruningContainer):
    """torch's container of stacked prunings, with a masked weight that can be copied."""

    def apply_mask(self, module: nn.Module) -> Tensor:
        """The weight that the module uses."""
        return super().apply_mask(module).as_subclass(MaskedWeight)


def pruning_hooks(module: nn.Module) -> Iterator[BasePruningMethod]:
    """The pruning hooks on a module, one for each pruned tensor."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod):
            yield hook


def is_pruned_tensor(module: nn.Module, name: str) -> bool:
    """Whether a pruning hook is on this very tensor."""
    return any(hook._tensor_name == name for hook in pruning_hooks(module))


def refresh(module: nn.Module) -> None:
    """Recompute the masked weights of one module from its parameters and masks."""
    for hook in pruning_hooks(module):
        if type(hook) is PruningContainer:
            hook.__class__ = MaskContainer
        setattr(module, hook._tensor_name, hook.apply_mask(module))


def _costly(module: nn.Module) -> bool:
    """Whether a module computes its weight from other parameters, and will do so again when it is called."""
    return parametrize.is_parametrized(module) and all(getattr(h, "called", False) for h in pruning_hooks(module))


class RefreshAll:
    """Forward pre-hook of a whole model: recomputes every masked weight, whoever reads it and however.

    Modules that are called recompute theirs themselves, but some read ``child.weight`` without calling the child, and
    there the masked weight would be stale, and its graph freed after the first backward.
    """

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        for descendant in module.modules():
            if descendant._forward_pre_hooks and not _costly(descendant):
                _settle(descendant)
                refresh(descendant)


class RefreshChildren:
    """As `RefreshAll`, for children that were never called before: where a part of a model runs alone.

    What was called in this very pass does not count: checkpointing runs a part again, and has to find it the same.
    """

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        for child in module._modules.values():
            if child is not None and any(not getattr(hook, "settled", False) for hook in pruning_hooks(child)):
                refresh(child)


def _settle(module: nn.Module) -> None:
    for hook in pruning_hooks(module):
        if isinstance(hook, MaskPruning) and getattr(hook, "settled", False) != hook.called:
            hook.settled = hook.called


_REFRESHERS = (RefreshAll, RefreshChildren)


def watch(module: nn.Module, hook: type[RefreshAll] | type[RefreshChildren]) -> None:
    """Register a refreshing hook on a module, once."""
    if not any(isinstance(known, hook) for known in module._forward_pre_hooks.values()):
        module.register_forward_pre_hook(hook())


def unwatch(module: nn.Module) -> None:
    """Remove the refreshing hooks from a module."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, _REFRESHERS):
            del module._forward_pre_hooks[key]
