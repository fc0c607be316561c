"""Where to prune: the weights of any model, and why others are left alone."""

from .layers import Predicate, PrunableWeight, Selection, Selector, check_patterns, matches, walk
from .trace import call

__all__ = [
    "Predicate",
    "PrunableWeight",
    "Selection",
    "Selector",
    "call",
    "check_patterns",
    "matches",
    "walk",
]
