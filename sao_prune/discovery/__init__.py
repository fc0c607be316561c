"""Where to prune: the weights of any model, and why others are left alone."""

from .layers import (
    ALREADY_PRUNED,
    Predicate,
    PrunableWeight,
    Selection,
    Selector,
    check_patterns,
    matches,
    walk,
    weight_of,
)
from .trace import call

__all__ = [
    "ALREADY_PRUNED",
    "Predicate",
    "PrunableWeight",
    "Selection",
    "Selector",
    "call",
    "check_patterns",
    "matches",
    "walk",
    "weight_of",
]
