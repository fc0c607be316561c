"""One training, the same for every method."""

from .loop import History, evaluate, train
from .spec import ScheduleSpec, TrainSpec

__all__ = ["History", "ScheduleSpec", "TrainSpec", "evaluate", "train"]
