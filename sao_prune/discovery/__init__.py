"""Where to prune: the weights of any model, and why others are skipped."""

from .kinds import is_block_layer, is_standardised
from .layers import walk, weight_of
from .lazy import initialise_, initialised
from .selection import Predicate, Selection, Selector, check_patterns, matches
from .trace import call
from .untouched import untouched
from .weight import ALREADY_PRUNED, PrunableWeight

__all__ = [
    "ALREADY_PRUNED",
    "Predicate",
    "PrunableWeight",
    "Selection",
    "Selector",
    "call",
    "check_patterns",
    "initialise_",
    "initialised",
    "is_block_layer",
    "is_standardised",
    "matches",
    "untouched",
    "walk",
    "weight_of",
]
