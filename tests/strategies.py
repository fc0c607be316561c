"""Hypothesis strategies that tests share."""

import torch
from hypothesis import strategies as st

from sao_prune.topology import GENERATORS, BlockTopology, make_topology


@st.composite
def topologies(draw: st.DrawFn, most: int = 40) -> BlockTopology:
    """Block topologies of every kind and size, even, exact and cropped."""
    rows, cols = draw(st.integers(1, most)), draw(st.integers(1, most))
    kind = draw(st.sampled_from(sorted(GENERATORS)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    if draw(st.booleans()):
        nnz = draw(st.integers(max(rows, cols), rows * cols))
        topology = make_topology(kind, rows, cols, nnz=nnz, generator=generator)
    else:
        topology = make_topology(kind, rows, cols, groups=draw(st.integers(1, min(rows, cols))), generator=generator)
    if draw(st.booleans()):
        topology = topology.crop(draw(st.integers(1, rows)), draw(st.integers(1, cols)))
    return topology
