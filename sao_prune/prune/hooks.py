"""Masks as `torch.nn.utils.prune` knows them: the pruning hooks, and the hooks that keep masked weights fresh."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod, PruningContainer
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .derived import derive, place, settle
from .offload import Unload, is_offloaded
from .operands import operands
from .standardised import follow_standardising


class _LayerByLayer(str):
    """torch's name of a pruning type, which says in error messages what to do instead of pruning globally."""

    def __str__(self) -> str:
        return (
            f"{super().__str__()}: sao_prune chooses masks layer by layer; call sao_prune.apply(model, sparsity), or "
            "with Lightning use sao_prune.integrations.lightning.SparseTraining"
        )

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)


class MaskPruning(BasePruningMethod):
    """Base of this library's pruning methods: a given mask, joined with any that is there already.

    As `torch.nn.utils.prune` has it, the parameter moves to ``<name>_orig``, the buffer ``<name>_mask`` holds the
    mask, and a forward pre-hook puts their product in ``<name>``.

    Raises:
        TypeError: for an argument that its kind of pruning does not take.
    """

    PRUNING_TYPE = _LayerByLayer("global")

    def __init__(self, mask: Tensor | None = None, **unknown: Any) -> None:
        if unknown:
            raise TypeError(f"{type(self).__name__} takes no {next(iter(unknown))!r}: it is {self.PRUNING_TYPE}")
        self._mask = mask
        self.called = self.settled = False

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """The given mask where the earlier one keeps an entry.

        Raises:
            ValueError: if the mask has another shape than the weight.
        """
        if self._mask is None or self._mask.shape != default_mask.shape:
            given = None if self._mask is None else tuple(self._mask.shape)
            raise ValueError(f"the mask must have the weight's shape {tuple(default_mask.shape)}, got {given}")
        return default_mask * self._mask.to(default_mask)

    def apply_mask(self, module: nn.Module) -> Tensor:
        """The weight that the module uses: ``<name>_orig * <name>_mask``."""
        return derive(module, self._tensor_name)

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        if not self.called:
            self.called = True
        if f"{self._tensor_name}_orig" not in module._parameters:
            _run_last(module, self, inputs)
        place(module, self._tensor_name, derive(module, self._tensor_name))
        if "_hf_hook" in module.__dict__:
            _unload_afterwards(module, self._tensor_name)

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
            _follow_state(module)
            follow_standardising(module, name)
            return
        method = cls()
        method._tensor_name = name
        original: nn.Parameter = module._parameters.pop(name)  # type: ignore[assignment]
        module.register_parameter(f"{name}_orig", original)
        module.register_buffer(f"{name}_mask", mask)
        setattr(module, name, original.detach())
        module.register_forward_pre_hook(method)
        _follow_state(module)
        follow_standardising(module, name)


class MaskContainer(PruningContainer):
    """torch's container of stacked prunings, with a masked weight that can be copied."""

    def apply_mask(self, module: nn.Module) -> Tensor:
        """The weight that the module uses."""
        return derive(module, self._tensor_name)


def pruning_hooks(module: nn.Module) -> Iterator[BasePruningMethod]:
    """The pruning hooks on a module, one for each pruned tensor.

    Args:
        module: any module; its children are not looked at.

    Returns:
        The hooks, one by one.

    Example:
        >>> import torch, sao_prune
        >>> layer = sao_prune.prune.kernel_l1(torch.nn.Linear(4, 4), "weight", amount=0.5)
        >>> [hook._tensor_name for hook in pruning_hooks(layer)]
        ['weight']
    """
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod):
            yield hook


def is_pruned_tensor(module: nn.Module, name: str) -> bool:
    """Whether a pruning hook is on this very tensor.

    Args:
        module: any module.
        name: of the tensor, without ``_orig``.

    Returns:
        Whether one is.

    Example:
        >>> import torch, sao_prune
        >>> layer = sao_prune.prune.kernel_l1(torch.nn.Linear(4, 4), "weight", amount=0.5)
        >>> is_pruned_tensor(layer, "weight"), is_pruned_tensor(layer, "bias")
        (True, False)
    """
    return any(hook._tensor_name == name for hook in pruning_hooks(module))


def refresh(module: nn.Module) -> None:
    """Recompute the masked weights of one module from its parameters and masks.

    Args:
        module: any module; its children are not looked at.

    Example:
        >>> import torch, sao_prune
        >>> layer = sao_prune.prune.kernel_l1(torch.nn.Linear(4, 4), "weight", amount=0.5)
        >>> with torch.no_grad():
        ...     _ = layer.weight_orig.fill_(2.0)
        >>> refresh(layer)
        >>> layer.weight.unique().tolist()
        [0.0, 2.0]
    """
    for hook in pruning_hooks(module):
        _recompute(module, hook)


def _recompute(module: nn.Module, hook: BasePruningMethod) -> None:
    if type(hook) is PruningContainer:
        hook.__class__ = MaskContainer
    place(module, hook._tensor_name, hook.apply_mask(module))


def settle_all(model: nn.Module) -> None:
    """Let what was written to any masked weight of a model reach its parameter.

    Args:
        model: any module.

    Example:
        >>> import torch, sao_prune
        >>> layer = sao_prune.prune.kernel_l1(torch.nn.Linear(4, 4), "weight", amount=0.5)
        >>> with torch.no_grad():
        ...     _ = layer.weight.mul_(0)
        >>> settle_all(layer)
        >>> int((layer.weight_orig * layer.weight_mask).count_nonzero())
        0
    """
    for module in model.modules():
        for hook in pruning_hooks(module):
            settle(module, hook._tensor_name)


def _settle_state(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    """State-dict pre-hook: what was written to a masked weight is in the state."""
    for hook in pruning_hooks(module):
        settle(module, hook._tensor_name)


def _refresh_state(module: nn.Module, incompatible_keys: Any) -> None:
    """Load-state-dict post-hook: the masked weight is that of the loaded state."""
    for hook in pruning_hooks(module):
        name = hook._tensor_name
        if f"{name}_orig" in module._parameters and f"{name}_mask" in module._buffers:
            original, mask = operands(module, name)
            if _is_local(module, original, mask):
                # A plain tensor: what was written before the state was loaded is none of it.
                place(module, name, original.detach())
                _recompute(module, hook)


def _follow_state(module: nn.Module) -> None:
    """Keep masked weights and state dicts in step, once for each module."""
    if _settle_state not in module._state_dict_pre_hooks.values():
        module.register_state_dict_pre_hook(_settle_state)
    if _refresh_state not in module._load_state_dict_post_hooks.values():
        module.register_load_state_dict_post_hook(_refresh_state)


def _is_local(module: nn.Module, original: Tensor, mask: Tensor) -> bool:
    """Whether parameter and mask can be multiplied as they are: neither sharded nor offloaded."""
    if type(original) is not nn.Parameter and hasattr(original, "device_mesh") is not hasattr(mask, "device_mesh"):
        return False
    return original.shape == mask.shape and not is_offloaded(module, original)


def _run_last(module: nn.Module, hook: MaskPruning, inputs: Any) -> None:
    """Let other hooks of a module, `torch.nn.utils.weight_norm` for one, compute the parameter before it is masked."""
    hooks = module._forward_pre_hooks
    if next(reversed(hooks.values())) is not hook:
        known = list(hooks.values())
        for later in known[known.index(hook) + 1 :]:
            # In this pass they come too late.
            if isinstance(later, WeightNorm | SpectralNorm):
                later(module, inputs)
        for key in [key for key, one in hooks.items() if one is hook]:
            hooks[key] = hooks.pop(key)


def _unload_afterwards(module: nn.Module, name: str) -> None:
    original = operands(module, name)[0]
    if original.is_meta:
        module.register_forward_hook(Unload(name, original.detach()))


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
                for hook in pruning_hooks(descendant):
                    _refresh_or_leave(descendant, hook)


class RefreshChildren:
    """As `RefreshAll`, for children that were never called before: where a part of a model runs alone.

    What was called in this very pass does not count: checkpointing runs a part again, and has to find it the same.
    """

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        for child in module._modules.values():
            if child is not None and any(not getattr(hook, "settled", False) for hook in pruning_hooks(child)):
                refresh(child)


def _refresh_or_leave(module: nn.Module, hook: BasePruningMethod) -> None:
    """Recompute a masked weight outside its module's own forward.

    Where it is sharded or offloaded, that cannot be: the hook of its parent or its own does it, when it is whole.
    """
    name = hook._tensor_name
    original, mask = module._parameters.get(f"{name}_orig"), module._buffers.get(f"{name}_mask")
    ready = original is not None and mask is not None and _is_local(module, original, mask)
    if isinstance(hook, MaskPruning):
        settled = ready and hook.called
        if hook.settled is not settled:
            hook.settled = settled
    if ready or parametrize.is_parametrized(module, f"{name}_orig"):
        _recompute(module, hook)


_REFRESHERS = (RefreshAll, RefreshChildren)


def watch(module: nn.Module, hook: type[RefreshAll] | type[RefreshChildren]) -> None:
    """Register a refreshing hook on a module, once.

    Args:
        module: the model, or the parent of pruned layers.
        hook: the class of the hook.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential()
        >>> watch(model, RefreshAll)
        >>> watch(model, RefreshAll)
        >>> len(model._forward_pre_hooks)
        1
    """
    if not any(isinstance(known, hook) for known in module._forward_pre_hooks.values()):
        module.register_forward_pre_hook(hook())


def unwatch(module: nn.Module) -> None:
    """Remove the hooks that keep masked weights up to date from a module, but for those of pruned tensors.

    Args:
        module: any module; its children are not looked at.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential()
        >>> watch(model, RefreshAll)
        >>> unwatch(model)
        >>> len(model._forward_pre_hooks)
        0
    """
    if not any(True for _ in pruning_hooks(module)):
        for hooks, ours in (
            (module._state_dict_pre_hooks, _settle_state),
            (module._load_state_dict_post_hooks, _refresh_state),
        ):
            for key in [key for key, hook in hooks.items() if hook is ours]:
                del hooks[key]
    for key, hook in list(module._forward_pre_hooks.items()):
        if type(hook) in _REFRESHERS:
            del module._forward_pre_hooks[key]
