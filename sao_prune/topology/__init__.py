"""Which edges exist: block topologies and their makers."""

from .block import BlockTopology, Bucket, NotBlockStructuredError
from .makers import MAKERS, interleaved, make_topology, ramanujan
from .sizes import even_sizes, exact_sizes

__all__ = [
    "MAKERS",
    "BlockTopology",
    "Bucket",
    "NotBlockStructuredError",
    "even_sizes",
    "exact_sizes",
    "interleaved",
    "make_topology",
    "ramanujan",
]
