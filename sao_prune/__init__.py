"""Sparse orthogonal networks from the first step: `apply` a topology to any model, train it, run it small.

Example:
    >>> import torch, sao_prune
    >>> net = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(4)))
    >>> sao_prune.apply(net, sparsity=0.96875, seed=0).sparsity
    0.96875
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import prune
    from .algorithms import (
        EOI,
        GMP,
        LMP,
        LRP,
        NM,
        RG,
        SAO,
        SET,
        SNIP,
        GraSP,
        Method,
        Project,
        Rewire,
        RigL,
        SynFlow,
        methods,
    )
    from .allocation import Budget
    from .blocks import compact, expand
    from .checkpoint import load, save
    from .discovery import PrunableWeight, Selection, walk
    from .distillation import Distillation, Distiller
    from .exporting import ExportReport, export_onnx
    from .model import apply, plan, remove, report
    from .orders import BlockOrder, permutations
    from .orthogonality import hold, release
    from .pruner import Pruner, schedule
    from .replaced import StaleOptimizerWarning
    from .reporting import LayerRecord, Report, SparsityWarning
    from .scheduling import Moves, Schedule
    from .state_file import CheckpointError
    from .topology import BlockTopology, NotBlockStructuredError

__version__ = "0.2.0"

__all__ = [
    "EOI",
    "GMP",
    "LMP",
    "LRP",
    "NM",
    "RG",
    "SAO",
    "SET",
    "SNIP",
    "BlockOrder",
    "BlockTopology",
    "Budget",
    "CheckpointError",
    "Distillation",
    "Distiller",
    "ExportReport",
    "GraSP",
    "LayerRecord",
    "Method",
    "Moves",
    "NotBlockStructuredError",
    "Project",
    "PrunableWeight",
    "Pruner",
    "Report",
    "Rewire",
    "RigL",
    "Schedule",
    "Selection",
    "SparsityWarning",
    "StaleOptimizerWarning",
    "SynFlow",
    "apply",
    "compact",
    "expand",
    "export_onnx",
    "hold",
    "load",
    "methods",
    "permutations",
    "plan",
    "prune",
    "release",
    "remove",
    "report",
    "save",
    "schedule",
    "walk",
]

# Rooms that can be reached as attributes, and where each public name is at home. All are imported when they are first
# asked for: `import sao_prune` itself takes no time, and the command says what it does before torch is there.
_ROOMS = ("algorithms", "allocation", "analysis", "blocks", "discovery", "models", "nn", "prune", "topology", "weights")
_HOMES = {
    name: home
    for home, names in {
        "algorithms": "EOI GMP LMP LRP NM RG SAO SET SNIP GraSP Method Project Rewire RigL SynFlow methods",
        "allocation": "Budget",
        "blocks": "compact expand",
        "checkpoint": "load save",
        "discovery": "PrunableWeight Selection walk",
        "distillation": "Distillation Distiller",
        "exporting": "ExportReport export_onnx",
        "model": "apply plan remove report",
        "orthogonality": "hold release",
        "orders": "BlockOrder permutations",
        "pruner": "Pruner schedule",
        "replaced": "StaleOptimizerWarning",
        "reporting": "LayerRecord Report SparsityWarning",
        "scheduling": "Moves Schedule",
        "state_file": "CheckpointError",
        "topology": "BlockTopology NotBlockStructuredError",
    }.items()
    for name in names.split()
}


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f".{name}", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})
