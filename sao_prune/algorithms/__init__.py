"""The methods: each a frozen dataclass of options that combines topologies and values, found by name."""

from .base import Method, ResidualRecord, Settlement, Stage, methods, register, resolve
from .draw import Draw, Fidelity, Values
from .eoi import EOI
from .grasp import GraSP
from .magnitude import GMP, LMP, LRP
from .project import Project
from .regrowth import SET, RigL
from .rewire import Rewire
from .rg import RG
from .sao import SAO
from .semistructured import NM
from .snip import SNIP
from .synflow import SynFlow

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
    "Draw",
    "Fidelity",
    "GraSP",
    "Method",
    "Project",
    "ResidualRecord",
    "Rewire",
    "RigL",
    "Settlement",
    "Stage",
    "SynFlow",
    "Values",
    "methods",
    "register",
    "resolve",
]
