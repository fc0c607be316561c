"""Sparse training with Lightning: `SparseTraining`, in place of its own ``ModelPruning``.

``ModelPruning`` ranks single weights over all layers together, which is no way to choose a topology.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils.prune import is_pruned

from ..model import apply, remove
from ..reporting import Report

try:
    from lightning.pytorch.callbacks import Callback
except ImportError:
    try:
        from pytorch_lightning.callbacks import Callback  # type: ignore[assignment]
    except ImportError as error:
        raise ImportError("sao_prune.integrations.lightning needs Lightning: pip install lightning") from error


class SparseTraining(Callback):  # type: ignore[misc]
    """Makes the model sparse before its optimizers and checkpoints are set up, once.

    Args:
        *args: as for `sao_prune.apply`, from ``sparsity`` on.
        permanent: make the pruning permanent when fitting ends, as `sao_prune.remove` does.
        **options: as for `sao_prune.apply`.

    Attributes:
        report: what `sao_prune.apply` returned; ``None`` before that, and for a model that was pruned already.

    Example:
        >>> import pytest; _ = pytest.importorskip("lightning")
        >>> from sao_prune.integrations.lightning import SparseTraining
        >>> callback = SparseTraining(sparsity=0.75, seed=0)  # Trainer(callbacks=[callback])
    """

    def __init__(self, *args: Any, permanent: bool = False, **options: Any) -> None:
        super().__init__()
        self._args, self._options, self._permanent = args, options, permanent
        self.report: Report | None = None

    def setup(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        """Prune, unless that was done before."""
        if not is_pruned(pl_module):
            self.report = apply(pl_module, *self._args, **self._options)

    def on_fit_end(self, trainer: Any, pl_module: nn.Module) -> None:
        """Make the pruning permanent, if asked to."""
        if self._permanent:
            remove(pl_module)
