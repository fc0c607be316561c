"""Sparse orthogonal networks from the first step: `apply` a topology to any model, train it, run it small.

Example:
    >>> import torch, sao_prune
    >>> net = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(4)))
    >>> sao_prune.apply(net, sparsity=0.96875, seed=0).sparsity
    0.96875
"""

from . import prune
from .algorithms import EOI, GMP, LMP, LRP, RG, SAO, SNIP, GraSP, Method, SynFlow, methods
from .allocation import Budget
from .blocks import compact, expand
from .checkpoint import load, save
from .discovery import PrunableWeight, Selection, walk
from .model import apply, plan, remove, report
from .orthogonality import hold, release
from .replaced import StaleOptimizerWarning
from .reporting import LayerRecord, Report, SparsityWarning
from .state_file import CheckpointError
from .topology import BlockTopology, NotBlockStructuredError

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
    "StaleOptimizerWarning",
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
