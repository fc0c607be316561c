"""Laws of block topologies."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from sao_prune.topology import BlockTopology, NotBlockStructuredError, interleaved, make_topology, ramanujan
from tests.strategies import topologies


def test_algorithm_1_wide_has_strided_rows_and_a_random_partition_of_columns():
    topology = ramanujan(4, 8, 2, torch.Generator().manual_seed(0))
    expected = torch.tensor(
        [[0, 1, 0, 1, 1, 0, 1, 0], [1, 0, 1, 0, 0, 1, 0, 1], [0, 1, 0, 1, 1, 0, 1, 0], [1, 0, 1, 0, 0, 1, 0, 1]]
    )
    assert torch.equal(topology.mask().int(), expected.int())


def test_algorithm_1_tall_is_the_wide_one_transposed():
    wide = ramanujan(4, 8, 2, torch.Generator().manual_seed(3))
    tall = ramanujan(8, 4, 2, torch.Generator().manual_seed(3))
    assert torch.equal(tall.mask(), wide.mask().T)


def test_interleaved_small_case():
    assert interleaved(4, 6, 2).mask().int().tolist() == [
        [1, 0, 1, 0, 1, 0],
        [1, 0, 1, 0, 1, 0],
        [0, 1, 0, 1, 0, 1],
        [0, 1, 0, 1, 0, 1],
    ]


def test_thesis_crop_of_mlp7():
    topology = ramanujan(100, 1100, 10, torch.Generator().manual_seed(0))
    assert topology.degrees[0].unique().tolist() == [110]
    assert topology.degrees[1].unique().tolist() == [10]
    cropped = topology.crop(100, 1024)
    assert torch.equal(cropped.mask(), topology.mask()[:, :1024])
    assert cropped.degrees[1].unique().tolist() == [10]
    assert not cropped.is_regular


@given(topologies())
def test_mask_has_the_stated_degrees_edges_and_sparsity(topology):
    mask = topology.mask().long()
    rows, cols = topology.degrees
    assert torch.equal(mask.sum(1), rows)
    assert torch.equal(mask.sum(0), cols)
    assert int(mask.sum()) == topology.nnz
    assert topology.sparsity == pytest.approx(1 - mask.float().mean().item(), abs=1e-6)
    assert topology.shape == tuple(mask.shape)


@given(topologies())
def test_mask_reads_back_as_the_same_topology(topology):
    assert BlockTopology.from_mask(topology.mask()) == topology
    assert BlockTopology.from_mask(topology.mask(torch.float32)).groups == topology.groups
    assert hash(BlockTopology.from_mask(topology.mask())) == hash(topology)


@given(topologies())
def test_orders_make_the_mask_block_diagonal(topology):
    assume(topology.groups)
    sorted_mask = topology.mask()[topology.row_order][:, topology.col_order]
    blocks = [torch.ones(r, c) for r, c in zip(topology.row_sizes.tolist(), topology.col_sizes.tolist())]
    assert torch.equal(sorted_mask, torch.block_diag(*blocks).bool())


@given(topologies())
def test_scatter_and_gather_are_inverse(topology):
    blocks = tuple(torch.randn(b.shape) for b in topology.buckets)
    matrix = topology.scatter(blocks)
    assert torch.equal(matrix != 0, topology.mask())
    assert all(torch.equal(a, b) for a, b in zip(blocks, topology.gather(matrix)))


@given(topologies())
def test_spectrum_is_the_masks(topology):
    measured = torch.linalg.svdvals(topology.mask(torch.float64))
    assert torch.allclose(measured, topology.spectrum(), atol=1e-9)


@given(topologies())
def test_transpose(topology):
    assert torch.equal(topology.transpose().mask(), topology.mask().T)


@given(st.permutations(list(range(6))), st.permutations(list(range(5))))
def test_from_mask_finds_blocks_under_any_permutation(rows, cols):
    mask = torch.block_diag(torch.ones(2, 3), torch.ones(3, 1), torch.ones(1, 1)).bool()[list(rows)][:, list(cols)]
    topology = BlockTopology.from_mask(mask)
    assert topology.groups == 3
    assert torch.equal(topology.mask(), mask)


def test_from_mask_keeps_unconnected_nodes_apart():
    mask = torch.tensor([[1, 0, 0], [0, 0, 0], [0, 0, 1]])
    topology = BlockTopology.from_mask(mask)
    assert topology.groups == 2
    assert topology.row_set.tolist() == [0, -1, 1]
    assert torch.equal(topology.mask().int(), mask.int())


def test_from_mask_refuses_incomplete_blocks():
    with pytest.raises(NotBlockStructuredError, match=r"output \d shares some of its inputs"):
        BlockTopology.from_mask(torch.tensor([[1, 1, 0], [0, 1, 1]]))


@pytest.mark.parametrize("mask", [torch.tensor([[0.5, 1.0]]), torch.ones(3), torch.ones(0, 2)])
def test_from_mask_refuses_what_is_no_mask(mask):
    with pytest.raises(ValueError, match="zeros and ones"):
        BlockTopology.from_mask(mask)


@pytest.mark.parametrize(("groups", "nnz"), [(None, None), (2, 8)])
def test_make_topology_wants_groups_or_edges(groups, nnz):
    with pytest.raises(ValueError, match="exactly one of groups and nnz"):
        make_topology("ramanujan", 4, 4, groups=groups, nnz=nnz)


def test_unknown_kind_names_the_known_ones():
    with pytest.raises(ValueError, match="interleaved, ramanujan"):
        make_topology("nope", 4, 4, groups=2)


@pytest.mark.parametrize(
    "sets", [torch.zeros(3), torch.zeros(2, 2, dtype=torch.long), torch.zeros(0, dtype=torch.long)]
)
def test_sets_must_be_integer_vectors(sets):
    with pytest.raises(ValueError, match="1-D integer"):
        BlockTopology(sets, torch.zeros(2, dtype=torch.long))
