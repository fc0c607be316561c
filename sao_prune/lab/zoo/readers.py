"""Which torch functions read masked weights, while a model runs."""

from __future__ import annotations

from typing import Any

from torch.overrides import TorchFunctionMode

from ..._torch import tree_leaves
from ...prune import MaskedWeight

_READERS = frozenset(
    ("linear", "conv1d", "conv2d", "conv3d", "conv_transpose2d", "multi_head_attention_forward", "lstm", "gru")
)


# Experts are read one by one, or all of them by grouped products; transformers' Conv1D adds its bias. Views change
# nothing.
_EXPERT_READERS = frozenset(
    (
        "addmm",
        "bmm",
        "matmul",
        "grouped_mm",
        "_grouped_mm",
        "__getitem__",
        "transpose",
        "t",
        "permute",
        "view",
        "reshape",
    )
)


class Readers(TorchFunctionMode):
    """Notes which torch functions read masked weights."""

    _SILENT = frozenset(("__get__", "__set__", "as_subclass", "detach", "requires_grad", "dim"))

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        if name not in self._SILENT and any(isinstance(a, MaskedWeight) for a in tree_leaves((args, kwargs))):
            self.names.add(name)
        return func(*args, **(kwargs or {}))

    def others(self, *, experts: bool) -> frozenset[str]:
        """Those that are no layer's product; with ``experts``, of the ways to read experts either."""
        return frozenset(self.names) - _READERS - (_EXPERT_READERS if experts else frozenset())
