"""What a training left behind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...analysis import IsometryRecord


@dataclass
class History:
    """What a training left behind, one entry an epoch.

    Attributes:
        status: ``ok``, or ``diverged`` when the training loss stopped being a finite number.
        execution: the form in which the network was trained, e.g. ``compact: 48 of 51 layers``.
        train_loss: mean of what was minimised (so with label smoothing and mixed images where these are on), nats.
        test_loss: mean cross-entropy on the test set, nats.
        accuracy: correct answers on the test set, a fraction.
        lr: the learning rate of the epoch.
        isometry: singular values of the input-output Jacobian, after as many epochs as a record's ``step`` says.
        seconds: wall clock of the training steps, without the evaluations.
        cpu_seconds: processor time of the training steps, over all threads (and all processes).
        memory: bytes that the first step held, by what they are of (`step_memory`); of several processes, the first
            one's. Empty under `torch.compile`.
    """

    status: str = "ok"
    execution: str = ""
    train_loss: list[float] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    isometry: list[IsometryRecord] = field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    memory: dict[str, int] = field(default_factory=dict)

    @property
    def epochs(self) -> int:
        """How many epochs are done.

        Example:
            >>> History(accuracy=[0.5, 0.75]).epochs
            2
        """
        return len(self.accuracy)

    @classmethod
    def restored(cls, fields: Mapping[str, Any]) -> History:
        """The history whose `dataclasses.asdict` this is."""
        return cls(**{**fields, "isometry": [IsometryRecord(**record) for record in fields["isometry"]]})
