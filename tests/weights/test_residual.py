"""Values of residual branches: exactly orthogonal blocks, on their topologies, for all shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sao_prune.topology import BlockTopology, interleaved, make_topology
from sao_prune.weights.residual import (
    carriers,
    closing_matrices,
    closing_topology,
    copies,
    deal,
    mirrored_matrix,
    padded_block,
    projection_block,
    relay,
    values_on,
)
from sao_prune.weights.rotation import plain_branch, rotation_less_identity

from ..strategies import topologies

seeds = st.integers(0, 2**31)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def is_orthogonal(matrix: torch.Tensor) -> bool:
    small = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
    return torch.allclose(small @ small.mT, torch.eye(len(small)), atol=2e-6)


@settings(max_examples=40)
@given(topologies(), st.integers(0, 5))
def test_an_output_carries_an_input_of_its_own_block(topology: BlockTopology, turn: int) -> None:
    picked, copy = carriers(topology, turn), copies(topology)
    joined = topology.row_set >= 0
    assert torch.equal(topology.col_set[picked[joined]], topology.row_set[joined])
    assert bool((picked[~joined] < 0).all())
    carried = list(zip(picked[joined].tolist(), copy[joined].tolist()))
    assert len(set(carried)) == len(carried)


@settings(max_examples=40)
@given(st.integers(1, 24), st.integers(1, 24), st.data())
def test_the_last_layer_makes_the_block_orthogonal_and_stays_on_its_topology(
    k: int, m: int, data: st.DataObject
) -> None:
    seed, m = data.draw(seeds), min(k, m)
    carried = torch.randperm(k, generator=generator(seed))[:m]
    row_set = torch.randint(data.draw(st.integers(1, 4)), (k,), generator=generator(seed + 1))
    written, taken = closing_matrices(row_set, carried, generator(seed))
    carry = torch.eye(k)[carried]
    assert is_orthogonal(torch.eye(k) + (written - taken) @ carry)
    outside = ~closing_topology(row_set, carried).mask()
    assert not bool(written[outside].any())
    assert not bool(taken[outside].any())


@given(st.integers(1, 30), st.data())
def test_dealt_sets_have_the_sizes_that_were_asked_for(k: int, data: st.DataObject) -> None:
    groups = data.draw(st.integers(1, k))
    count = data.draw(st.integers(groups, k))
    topology = make_topology("interleaved", k, count, groups=groups)
    seed = data.draw(seeds)
    carried = torch.randperm(k, generator=generator(seed))[:count]
    order = torch.randperm(k, generator=generator(seed + 1))
    sets = deal(topology.row_sizes, topology.col_sizes, carried, order)
    assert torch.equal(torch.bincount(sets, minlength=groups), topology.row_sizes)
    assert torch.equal(torch.bincount(sets[carried], minlength=groups), topology.col_sizes)


@settings(max_examples=40)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=20), seeds)
def test_the_identity_and_a_rotation_less_it_are_a_rotation_by_an_eighth(sets: list[int], seed: int) -> None:
    s = torch.tensor(sets)
    branch = rotation_less_identity(s, generator(seed))
    rotation = torch.eye(len(s)) + branch
    assert is_orthogonal(rotation)
    assert torch.linalg.det(rotation).item() == pytest.approx(1, abs=1e-4)
    assert not bool(branch[s[:, None] != s].any())
    cosines = torch.linalg.eigvals(rotation).real
    odd = sum(size % 2 for size in torch.bincount(s).tolist())
    assert int((cosines - 1).abs().lt(1e-3).sum()) == odd


@settings(max_examples=40)
@given(topologies(16), seeds, st.booleans())
def test_plain_branches_are_rotations_on_transposed_topologies(
    topology: BlockTopology, seed: int, paired: bool
) -> None:
    (first, second), (w1, w2) = plain_branch(topology, generator(seed), paired=1.0 if paired else None)
    function = torch.nn.functional.silu if paired else torch.nn.Identity()
    columns = torch.eye(topology.shape[1])
    assert is_orthogonal(columns + w2 @ function(w1 @ columns))
    values_on(first, w1)
    values_on(second, w2)
    assert second == first.transpose()


def test_values_outside_the_topology_are_refused() -> None:
    with pytest.raises(ValueError, match="outside"):
        values_on(interleaved(4, 4, 2), torch.ones(4, 4))


@pytest.mark.parametrize(("k", "n", "m"), [(8, 4, 8), (8, 4, 4), (8, 8, 8), (4, 8, 4), (12, 4, 4)])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_shortcut_and_a_branch_together_are_as_orthogonal_as_they_can_be(k: int, n: int, m: int, stride: int) -> None:
    g = generator(0)
    closing = make_topology("ramanujan", k, m, groups=2, generator=g)
    shortcut = BlockTopology(closing.row_set, torch.arange(n) % 2)
    if stride == 2:
        fresh, twice = torch.arange(m), torch.full((m,), -1)
        signals = torch.eye(n + m)
        brought, carried = signals[:n], signals[n:]
    else:
        fresh, twice = torch.tensor([], dtype=torch.long), torch.arange(m) % n
        twice[n:] = -1
        brought = torch.eye(n)
        carried = torch.where(twice[:, None] >= 0, brought[twice.clamp(min=0)], 0)
    last, beside = projection_block(closing, shortcut, fresh, twice, g)
    block = last @ carried + beside @ brought
    values = torch.linalg.svdvals(block)
    used = min(k, n + (m if stride == 2 else 0))
    assert torch.allclose(values[:used], torch.ones(used), atol=1e-6)
    assert not bool(last[~closing.mask()].any())
    assert not bool(beside[~shortcut.mask()].any())


def test_a_padding_shortcut_is_cleared_and_written_anew() -> None:
    unit, fresh = torch.tensor([0, 2]), torch.tensor([1, 3])
    topology = BlockTopology(torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, 1, 1]))
    matrix = padded_block(topology, fresh, unit, 2, generator(0))
    h = torch.randn(4, generator=generator(1))
    hidden = torch.stack([h[0], h[2], h[1], h[3]])
    z = torch.cat([hidden, -hidden]).relu()
    shortcut = torch.zeros(8)
    shortcut[2:6] = torch.cat([h[:2], -h[:2]]).relu()
    out = shortcut + matrix @ z
    torch.testing.assert_close(out[:4], -out[4:])
    torch.testing.assert_close(out[:4].norm(), h.norm())


def test_a_relay_reads_every_input_and_then_other_taps() -> None:
    step = relay(interleaved(4, 2, 2), taps=(4, 5), kernel=9, corner=4)
    assert step.picked.tolist() == [0, 0, 1, 1]
    assert step.tap.tolist() == [4, 5, 4, 5]
    matrix = step.matrix()
    assert matrix.shape == (8, 4, 9)
    assert int(matrix.sum()) == 8
    assert matrix[5, 2, 5] == 1
    assert mirrored_matrix(torch.eye(1), -torch.eye(1)).tolist() == [[1, -1], [-1, 1]]
