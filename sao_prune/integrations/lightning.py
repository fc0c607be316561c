"""Sparse training with Lightning: `SparseTraining` at once and `PrunerCallback` over time, not its ``ModelPruning``.

``ModelPruning`` ranks single weights over all layers together, which is no way to choose a topology.
"""

from __future__ import annotations

from typing import Any
from weakref import ref

from torch import Tensor, nn
from torch.nn.utils.prune import is_pruned

from ..blocks import BlockModule
from ..checkpoint import prune_like
from ..model import apply, remove
from ..naming import dotted
from ..prune import pruning_hooks
from ..pruner import Pruner
from ..reporting import Report

try:
    from lightning.pytorch.callbacks import Callback
except ImportError:
    try:
        from pytorch_lightning.callbacks import Callback  # type: ignore[assignment]
    except ImportError as error:
        raise ImportError(
            "sao_prune.integrations.lightning needs Lightning: pip install 'sao-prune[integrations]'"
        ) from error


class SparseTraining(Callback):  # type: ignore[misc]
    """Makes the model sparse before its optimizers and checkpoints are set up, once.

    A model that it has made permanent gets the same masks back, over the same values, for as long as a trainer with
    this callback fits, tests, .. it: checkpoints of the training have masks.

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
        self._removed: tuple[ref[nn.Module], dict[str, Tensor]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_removed": None}

    def setup(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        """Prune, unless that was done before."""
        if is_pruned(pl_module) or any(isinstance(module, BlockModule) for module in pl_module.modules()):
            return
        if self._removed is not None and self._removed[0]() is pl_module:
            prune_like(dict(pl_module.named_modules(remove_duplicate=False)), self._removed[1])
        else:
            self.report, self._removed = apply(pl_module, *self._args, **self._options), None

    def on_fit_end(self, trainer: Any, pl_module: nn.Module) -> None:
        """Make the pruning permanent, if asked to."""
        if self._permanent and is_pruned(pl_module):
            masks = {
                dotted(path, hook._tensor_name): getattr(module, f"{hook._tensor_name}_mask")
                for path, module in pl_module.named_modules(remove_duplicate=False)
                for hook in pruning_hooks(module)
            }
            remove(pl_module)
            self._removed = ref(pl_module), masks

    def teardown(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        """Take the masks off again that a permanent model got for the time."""
        if self._removed is not None and self._removed[0]() is pl_module and is_pruned(pl_module):
            remove(pl_module)


class PrunerCallback(Callback):  # type: ignore[misc]
    """Steps a `Pruner` after every optimizer step: ``Trainer(.., callbacks=[PrunerCallback(pruner)])``.

    Its place in the schedule is in the trainer's checkpoints, the masks are in the module's state.

    Args:
        pruner: from `sao_prune.schedule`, on the lightning module or a part of it.
    """

    def __init__(self, pruner: Pruner) -> None:
        super().__init__()
        self.pruner = pruner
        self._seen = 0

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Steps are counted from here."""
        self._seen = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: nn.Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Prune, if the batch ended with a step of the optimizer and it is time."""
        if trainer.global_step > self._seen:
            self._seen = trainer.global_step
            self.pruner.step(trainer.optimizers)

    def state_dict(self) -> dict[str, Any]:
        """The place in the schedule."""
        return self.pruner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.pruner.load_state_dict(state_dict)
