"""Which edges exist: block topologies and their generators, and other supports."""

from .assignment import balanced_assignment
from .block import BlockTopology, Bucket, NotBlockStructuredError
from .clustering import chain, clustered, coarsened, kept_energy, split
from .codes import Seen, decode_sets, encode_sets, real_values, topology_of, unwrapped
from .expanders import expander
from .following import clustered_pair, followed
from .generators import (
    GENERATORS,
    SUPPORTS,
    SupportGenerator,
    TopologyGenerator,
    interleaved,
    make_topology,
    ramanujan,
    register,
)
from .mixed_radix import radix
from .products import product
from .sizes import even_sizes, exact_sizes
from .supports import make_support, register_support

__all__ = [
    "GENERATORS",
    "SUPPORTS",
    "BlockTopology",
    "Bucket",
    "NotBlockStructuredError",
    "Seen",
    "SupportGenerator",
    "TopologyGenerator",
    "balanced_assignment",
    "chain",
    "clustered",
    "clustered_pair",
    "coarsened",
    "decode_sets",
    "encode_sets",
    "even_sizes",
    "exact_sizes",
    "expander",
    "followed",
    "interleaved",
    "kept_energy",
    "make_support",
    "make_topology",
    "product",
    "radix",
    "ramanujan",
    "real_values",
    "register",
    "register_support",
    "split",
    "topology_of",
    "unwrapped",
]
