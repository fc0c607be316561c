"""Graph instruments agree with dense linear algebra and with hand-made masks."""

from math import sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sao_prune import analysis
from sao_prune.analysis import masks as masks_module
from sao_prune.topology import interleaved, make_topology


def random_mask(rows, cols, density, seed=0):
    return torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed)) < density


def dense_adjacency(mask):
    m = mask.double()
    rows, cols = m.shape
    out = torch.zeros(rows + cols, rows + cols, dtype=torch.float64)
    out[:rows, rows:], out[rows:, :rows] = m, m.T
    return torch.linalg.eigvalsh(out).flip(0)


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.02, 1), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_eigenvalues_agree_with_the_dense_ones(rows, cols, density, seed):
    mask = random_mask(rows, cols, density, seed)
    torch.testing.assert_close(analysis.adjacency_eigenvalues(mask), dense_adjacency(mask), atol=1e-6, rtol=0)


@given(st.integers(2, 30), st.integers(2, 30), st.data())
@settings(max_examples=30, deadline=None)
def test_block_topologies_by_closed_form_agree_with_dense_values(rows, cols, data):
    groups = data.draw(st.integers(1, min(rows, cols)))
    topology = make_topology("ramanujan", rows, cols, groups=groups, generator=torch.Generator().manual_seed(0))
    dense = torch.linalg.svdvals(topology.mask().double())
    torch.testing.assert_close(analysis.spectrum(topology), dense, atol=1e-6, rtol=0)
    torch.testing.assert_close(analysis.spectrum(topology.mask()), dense, atol=1e-6, rtol=0)
    assert analysis.component_count(topology) == groups


@pytest.mark.parametrize("density", [0.02, 0.1])
def test_large_irregular_masks_by_lanczos_agree_with_dense_values(density):
    mask = random_mask(300, 400, density)
    dense = torch.linalg.svdvals(mask.double())
    torch.testing.assert_close(analysis.spectrum(mask, k=4), dense[:4])
    gap = analysis.ramanujan_gap(mask)
    assert gap.lambda_1 == pytest.approx(float(dense[0]))
    assert gap.lambda_2 == pytest.approx(float(dense[1]))


@given(st.integers(2, 24), st.integers(2, 24), st.floats(0.05, 0.6), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_gap_agrees_with_its_definition_on_the_dense_spectrum(rows, cols, density, seed):
    mask = random_mask(rows, cols, density, seed)
    if not mask.any():
        return
    values = torch.linalg.svdvals(mask.double())
    gap = analysis.ramanujan_gap(mask)
    below = values[values < values[0] * (1 - 1e-6)]
    second = float(below[0]) if len(below) else 0.0
    assert gap.distinct == pytest.approx(2 * sqrt(max(float(values[0]) - 1, 0)) - second, abs=1e-5)
    degrees = [d[d > 0].double().mean().item() for d in (mask.sum(1), mask.sum(0))]
    bound = sum(sqrt(d - 1) for d in degrees)
    assert gap.standard == pytest.approx(bound - float(values[1]), abs=1e-5)


def test_a_complete_graph_is_ramanujan_by_both_definitions_and_blocks_only_by_one():
    full = analysis.ramanujan_gap(torch.ones(8, 8))
    assert full.distinct == pytest.approx(2 * sqrt(7))
    assert full.standard == pytest.approx(2 * sqrt(7))
    blocks = analysis.ramanujan_gap(interleaved(8, 8, 2))
    assert blocks.distinct == pytest.approx(2 * sqrt(3))
    assert blocks.standard == pytest.approx(2 * sqrt(3) - 4)
    assert analysis.ramanujan_gap(interleaved(8, 8, 4)).standard == pytest.approx(0)
    assert analysis.ramanujan_gap(interleaved(8, 8, 2), "standard") == blocks.standard
    assert "distinct" in str(blocks)
    assert "standard" in str(blocks)


def test_components_number_lone_nodes_too():
    mask = torch.tensor([[1, 0, 0], [0, 0, 0]])
    assert analysis.component_count(mask) == 4
    assert not analysis.is_connected(mask)
    assert analysis.is_connected(torch.tensor([[1, 1, 0], [0, 1, 1]]))


def test_kernels_count_as_one_edge():
    mask = interleaved(4, 4, 2).mask()
    torch.testing.assert_close(analysis.spectrum(mask[:, :, None, None].expand(4, 4, 3, 3)), analysis.spectrum(mask))


def test_bad_masks():
    with pytest.raises(ValueError, match="only zeros and ones"):
        analysis.spectrum(torch.tensor([[0.5, 1.0]]))
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        analysis.ramanujan_gap(torch.ones(3))
    with pytest.raises(ValueError, match="no edges"):
        analysis.ramanujan_gap(torch.zeros(3, 3))
    with pytest.raises(ValueError, match="'distinct', 'standard'"):
        analysis.ramanujan_gap(torch.ones(3, 3), "other")
    with pytest.raises(ValueError, match=r"1 \.\. 3"):
        analysis.spectrum(torch.ones(3, 3), k=4)
    partial = torch.ones(2, 2, 3, 3)
    partial[0, 0, 0, 0] = 0
    with pytest.raises(ValueError, match="kept in part"):
        analysis.components(partial)


def test_a_spectrum_that_would_not_fit_says_how_much_it_needs(monkeypatch):
    monkeypatch.setattr(masks_module, "MEMORY_LIMIT", 2**16)
    mask = random_mask(300, 300, 0.05)
    with pytest.raises(analysis.SpectrumTooLargeError, match=r"GiB.*k="):
        analysis.spectrum(mask)
    assert len(analysis.spectrum(mask, k=3)) == 3
