"""Laws of the values: the operator's singular values, not the formula that made them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sao_prune.seeds import named_generator
from sao_prune.topology import make_topology
from sao_prune.weights import (
    Mirror,
    delta_,
    haar,
    mirror_blocks,
    mirror_topology,
    normal_blocks,
    orthogonal_blocks,
    uniform_blocks,
)

sides = st.integers(1, 48)


def matrix(topology, *, gain=1.0, shared=False, seed=0):
    (blocks,) = orthogonal_blocks([topology], [named_generator(seed, "test")], gain=gain, shared=shared)
    return topology.scatter(blocks)


@given(sides, sides, st.integers(0, 10**6))
def test_haar_is_semi_orthogonal(rows, cols, seed):
    q = haar(torch.randn(3, rows, cols, generator=torch.Generator().manual_seed(seed)))
    assert q.shape == (3, rows, cols)
    assert (torch.linalg.svdvals(q) - 1).abs().max() < 1e-5


def test_haar_moments():
    # Haar measure on O(5): E tr = 0, E tr^2 = 1, E tr^4 = 3, and the determinant is +1 as often as -1.
    q = haar(torch.randn(200_000, 5, 5, generator=torch.Generator().manual_seed(0)))
    trace = q.diagonal(dim1=1, dim2=2).sum(1)
    assert abs(trace.mean()) < 0.01
    assert abs((trace**2).mean() - 1) < 0.02
    assert abs((trace**4).mean() - 3) < 0.1
    assert abs(torch.linalg.det(q).mean()) < 0.01


@given(sides, sides, st.data())
@settings(deadline=None)
def test_values_on_any_topology_are_exactly_orthogonal(rows, cols, data):
    kind = data.draw(st.sampled_from(["ramanujan", "interleaved"]))
    gain = data.draw(st.floats(0.1, 3))
    exact = data.draw(st.booleans())
    size = (
        {"nnz": data.draw(st.integers(max(rows, cols), rows * cols))}
        if exact
        else {"groups": data.draw(st.integers(1, min(rows, cols)))}
    )
    topology = make_topology(kind, rows, cols, **size, generator=torch.Generator().manual_seed(0))
    weight = matrix(topology, gain=gain, shared=data.draw(st.booleans()))
    assert (torch.linalg.svdvals(weight) - gain).abs().max() < 1e-5 * max(1, gain)
    assert bool((weight[~topology.mask()] == 0).all())


def test_cropped_topology_keeps_rows_orthogonal():
    topology = make_topology("ramanujan", 100, 1100, groups=10).crop(100, 1024)
    assert (torch.linalg.svdvals(matrix(topology)) - 1).abs().max() < 1e-5


def test_shared_values_are_the_same_in_every_block():
    topology = make_topology("interleaved", 12, 12, groups=4)
    (values,) = topology.gather(matrix(topology, shared=True))
    assert torch.equal(values, values[:1].expand_as(values))
    (own,) = topology.gather(matrix(topology))
    assert not torch.equal(own[0], own[1])


@pytest.mark.parametrize("draw", [normal_blocks, uniform_blocks])
def test_drawn_values_have_the_variance_of_orthogonal_ones(draw):
    topology = make_topology("ramanujan", 256, 512, groups=8)
    (values,) = draw(topology, named_generator(0), gain=1.5)
    orthogonal = matrix(topology, gain=1.5)[topology.mask()]
    assert values.std().item() == pytest.approx(orthogonal.std().item(), rel=0.02)
    assert abs(values.mean().item()) < 0.01


@given(st.lists(st.integers(1, 5), min_size=0, max_size=3), st.integers(1, 5), st.integers(1, 5))
def test_delta_puts_the_matrix_on_the_centre_tap(kernel, rows, cols):
    values = torch.randn(rows, cols)
    weight = delta_(torch.full((rows, cols, *kernel), 7.0), values)
    centre = weight[(slice(None), slice(None), *(k // 2 for k in kernel))]
    assert torch.equal(centre, values)
    assert int((weight != 0).sum()) == rows * cols


@given(st.integers(1, 12), st.integers(1, 12), st.data())
@settings(deadline=None)
def test_mirrored_relu_layers_are_an_orthogonal_linear_map(width, out, data):
    groups = data.draw(st.integers(1, min(width, out)))
    half = make_topology("ramanujan", out, width, groups=groups, generator=torch.Generator().manual_seed(0))
    (blocks,) = orthogonal_blocks([half], [named_generator(1)])
    plain = half.scatter(blocks)
    weights = {}
    for mirror in Mirror:
        topology = mirror_topology(half, mirror)
        weights[mirror] = topology.scatter(mirror_blocks(blocks, mirror))
        assert topology.groups == half.groups
        assert torch.equal(weights[mirror] != 0, topology.mask())
    x = torch.randn(4, width)
    entered = x @ weights[Mirror.ENTRY].T
    assert torch.allclose(entered, torch.cat([x @ plain.T, -x @ plain.T], 1), atol=1e-6)
    pair = torch.relu(torch.cat([x, -x], 1))
    assert torch.allclose(pair @ weights[Mirror.INNER].T, entered, atol=1e-5)
    assert torch.allclose(pair @ weights[Mirror.EXIT].T, x @ plain.T, atol=1e-5)


def test_mirror_refuses_odd_sides():
    with pytest.raises(ValueError, match="pair the outputs up, but there are 7"):
        Mirror.ENTRY.half(7, 4)


def test_a_column_of_zeros_is_no_nan():
    assert haar(torch.zeros(2, 3, 3)).isfinite().all()
    assert (torch.linalg.svdvals(haar(torch.zeros(1, 1, 1))) - 1).abs().max() == 0
