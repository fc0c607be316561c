"""Pruning in the conventions of `torch.nn.utils.prune`: hooks, masks and the functional forms."""

from torch.nn.utils.prune import global_unstructured, is_pruned, remove

from .attachment import Snapshot, attach, attach_all, written
from .custom import CustomFromMaskPruning, custom_from_mask
from .derived import MaskedWeight, current
from .frozen import freeze
from .functional import (
    KernelL1Pruning,
    KernelRandomPruning,
    RamanujanPruning,
    SAOPruning,
    global_kernel_l1,
    kernel_l1,
    kernel_random,
    pruning_class,
    ramanujan,
    sao,
)
from .hooks import (
    MaskPruning,
    RefreshAll,
    RefreshChildren,
    is_pruned_tensor,
    pruning_hooks,
    refresh,
    settle_all,
    unwatch,
    watch,
)
from .standardised import bake_standardising

__all__ = [
    "CustomFromMaskPruning",
    "KernelL1Pruning",
    "KernelRandomPruning",
    "MaskPruning",
    "MaskedWeight",
    "RamanujanPruning",
    "RefreshAll",
    "RefreshChildren",
    "SAOPruning",
    "Snapshot",
    "attach",
    "attach_all",
    "bake_standardising",
    "current",
    "custom_from_mask",
    "freeze",
    "global_kernel_l1",
    "global_unstructured",
    "is_pruned",
    "is_pruned_tensor",
    "kernel_l1",
    "kernel_random",
    "pruning_class",
    "pruning_hooks",
    "ramanujan",
    "refresh",
    "remove",
    "sao",
    "settle_all",
    "unwatch",
    "watch",
    "written",
]
