"""Sparse orthogonal networks from the first step: `apply` a topology to any model, train it, run it small.

Example:
    >>> import torch, sao_prune
    >>> net = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(4)))
    >>> sao_prune.apply(net, sparsity=0.96875, seed=0).sparsity
    0.96875
"""

from . import prune
from .allocate import Budget
from .checkpoint import CheckpointError, load, save
from .compact import compact, expand
from .hold import hold, release
from .methods import EOI, GMP, LMP, LRP, RG, SAO, SNIP, GraSP, Method, SynFlow, methods
from .model import apply, plan, remove, report
from .report import LayerRecord, Report, SparsityWarning
from .topology import BlockTopology, NotBlockStructuredError
from .walk import PrunableWeight, Selection, walk

__version__ = "0.1.0"

__all__ = [
    "EOI",
    "GMP",
    "LMP",
    "LRP",
    "RG",
    "SAO",
    "SNIP",
    "BlockTopology",
    "Budget",
    "CheckpointError",
    "GraSP",
    "LayerRecord",
    "Method",
    "NotBlockStructuredError",
    "PrunableWeight",
    "Report",
    "Selection",
    "SparsityWarning",
    "SynFlow",
    "apply",
    "compact",
    "expand",
    "hold",
    "load",
    "methods",
    "plan",
    "prune",
    "release",
    "remove",
    "report",
    "save",
    "walk",
]
