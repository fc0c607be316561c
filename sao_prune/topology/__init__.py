"""Which edges exist: block topologies and their makers, and other supports."""

from .assignment import balanced_assignment
from .block import BlockTopology, Bucket, NotBlockStructuredError
from .clustering import chain, clustered, coarsened, kept_energy, split
from .codes import Seen, decode_sets, encode_sets, real_values, topology_of, unwrapped
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
    "Seen",
    "balanced_assignment",
    "chain",
    "clustered",
    "coarsened",
    "decode_sets",
    "encode_sets",
    "even_sizes",
    "exact_sizes",
    "expander",
    "interleaved",
    "kept_energy",
    "make_support",
    "make_topology",
    "product",
    "radix",
    "ramanujan",
    "real_values",
    "split",
    "topology_of",
    "unwrapped",
]
