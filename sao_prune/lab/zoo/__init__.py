"""The zoo: every architecture of timm and torchvision, and small ones of transformers, planned and put to work."""

from .architecture import LIBRARIES, Architecture, Library, ZooError, architectures
from .plans import PlanTask, ZooPlan, plan_one, plan_zoo
from .report import Zoo, print_zoo, write_json, write_markdown
from .runs import representatives, run_zoo
from .trial import RunTask, ZooRun, run_one
from .visiting import VisitOptions, visit

__all__ = [
    "LIBRARIES",
    "Architecture",
    "Library",
    "PlanTask",
    "RunTask",
    "VisitOptions",
    "Zoo",
    "ZooError",
    "ZooPlan",
    "ZooRun",
    "architectures",
    "plan_one",
    "plan_zoo",
    "print_zoo",
    "representatives",
    "run_one",
    "run_zoo",
    "visit",
    "write_json",
    "write_markdown",
]
