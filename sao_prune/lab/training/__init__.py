"""One training, the same for every method."""

from .distributed import from_first, in_turn, process_group, rank, world
from .evaluation import evaluate
from .history import History
from .loop import train
from .spec import DistillSpec, ScheduleSpec, TrainSpec
from .tensorboard import TensorBoardWriter

__all__ = [
    "DistillSpec",
    "History",
    "ScheduleSpec",
    "TensorBoardWriter",
    "TrainSpec",
    "evaluate",
    "from_first",
    "in_turn",
    "process_group",
    "rank",
    "train",
    "world",
]
