"""Where to prune: the weights of any model, and why others are skipped."""

from .kinds import Packed, is_standardised
from .layers import walk, weight_of
from .lazy import initialise_, initialised
from .others import untouched
from .selection import Predicate, Selection, Selector, check_patterns, matches, pick
from .trace import call
from .weight import ALREADY_PRUNED, PrunableWeight

__all__ = [
    "ALREADY_PRUNED",
    "Packed",
    "Predicate",
    "PrunableWeight",
    "Selection",
    "Selector",
    "call",
    "check_patterns",
    "initialise_",
    "initialised",
    "is_standardised",
    "matches",
    "pick",
    "untouched",
    "walk",
    "weight_of",
]
