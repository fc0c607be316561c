"""Which edges exist: block topologies and their makers, and other supports."""

from .block import BlockTopology, Bucket, NotBlockStructuredError
from .expanders import expander
from .makers import MAKERS, interleaved, make_topology, ramanujan
from .mixed_radix import radix
from .products import product
from .sizes import even_sizes, exact_sizes
from .supports import SUPPORTS, make_support

__all__ = [
    "MAKERS",
    "SUPPORTS",
    "BlockTopology",
    "Bucket",
    "NotBlockStructuredError",
    "even_sizes",
    "exact_sizes",
    "expander",
    "interleaved",
    "make_support",
    "make_topology",
    "product",
    "radix",
    "ramanujan",
]
