"""accelerate: a `Pruner` whose place in the schedule is in the accelerator's checkpoints."""

from __future__ import annotations

from typing import Any

from ..pruner import Pruner

try:
    from accelerate import Accelerator
except ImportError as error:
    raise ImportError(
        "sao_prune.integrations.accelerate needs accelerate: pip install 'sao-prune[integrations]'"
    ) from error


class PreparedPruner:
    """A `Pruner` that knows the accelerator: register and call `step` where ``optimizer.step()`` is called.

    Steps that only accumulate gradients, and steps that the gradient scaler skips, do not count.
    ``accelerator.save_state`` and ``load_state`` take the pruner with them; the masks are in the model's state.

    Args:
        accelerator: of the training.
        pruner: from `sao_prune.schedule`, on the model before or after ``accelerator.prepare``.
    """

    def __init__(self, accelerator: Accelerator, pruner: Pruner) -> None:
        self.accelerator, self.pruner = accelerator, pruner
        accelerator.register_for_checkpointing(pruner)

    def step(self, optimizer: Any) -> Any:
        """As `Pruner.step`, after ``optimizer.step()``."""
        if self.accelerator.sync_gradients and not optimizer.step_was_skipped:
            return self.pruner.step(optimizer)
        return None
