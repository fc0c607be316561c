"""transformers: a callback for ``Trainer``."""

from __future__ import annotations

from typing import Any

from ..pruner import Pruner

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        "sao_prune.integrations.transformers needs transformers: pip install 'sao-prune[integrations]'"
    ) from error


class PrunerCallback(TrainerCallback):
    """Steps a `Pruner` after every optimizer step: ``Trainer(.., callbacks=[PrunerCallback(pruner)])``.

    Checkpoints of the trainer hold the masks; a resumed training finds the place in the schedule by its global step.
    Another training of the same model, which counts its steps from zero, goes on where the last one left the schedule.

    Args:
        pruner: from `sao_prune.schedule`, on the trainer's model.
    """

    def __init__(self, pruner: Pruner) -> None:
        self.pruner = pruner

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go on where the trainer does; a training that starts anew goes on with the masks that there are."""
        if state.global_step:
            self.pruner.resume(state.global_step)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Prune, if it is time."""
        self.pruner.step(kwargs.get("optimizer"))
