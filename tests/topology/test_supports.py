"""Expander, RadiX-Net and product supports: degrees, connection, reach."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sao_prune import analysis
from sao_prune.topology import expander, make_support, product, radix, ramanujan


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@given(st.integers(1, 30), st.integers(1, 30), st.data())
@settings(max_examples=60, deadline=None)
def test_expanders_are_connected_and_biregular_to_within_one(rows, cols, data):
    nnz = data.draw(st.integers(rows + cols - 1, rows * cols)) if rows * cols >= rows + cols - 1 else rows * cols
    mask = expander(rows, cols, nnz, generator(data.draw(st.integers(0, 99))))
    assert int(mask.sum()) == nnz
    assert analysis.is_connected(mask)
    for degrees in (mask.sum(0), mask.sum(1)):
        assert int(degrees.max() - degrees.min()) <= 1


def test_expander_of_degree_two_is_one_cycle():
    assert analysis.is_connected(expander(128, 128, 256, generator()))


def test_expanders_are_ramanujan_by_the_standard_definition_where_blocks_are_not():
    gap = analysis.ramanujan_gap(expander(256, 256, 256 * 8, generator()))
    assert gap.lambda_1 == pytest.approx(8)
    assert gap.standard > -0.2
    assert gap.standard == pytest.approx(gap.distinct)
    assert analysis.ramanujan_gap(ramanujan(256, 256, 32, generator())).standard < -2


def test_expander_draws_from_its_generator_alone():
    state = torch.get_rng_state()
    assert torch.equal(expander(16, 16, 64, generator(1)), expander(16, 16, 64, generator(1)))
    assert not torch.equal(expander(16, 16, 64, generator(1)), expander(16, 16, 64, generator(2)))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("size", "degree", "places"), [(128, 2, 7), (64, 4, 3), (125, 5, 3), (128, 8, 3), (100, 3, 5)])
def test_radix_reaches_everything_in_as_many_layers_as_there_are_digits(size, degree, places):
    masks = [radix(size, size, degree, place) for place in range(2 * places)]
    assert all((mask.sum(d) == degree).all() for mask in masks for d in (0, 1))
    depth = analysis.depth_to_full_reachability(masks)
    assert depth is not None
    assert analysis.least_depth(size, degree) <= depth <= places + 1


def test_radix_paths_are_equally_many_where_the_degree_is_a_root():
    paths = torch.eye(64)
    for place in range(3):
        paths = radix(64, 64, 4, place).float() @ paths
    assert (paths == 1).all()


def test_radix_of_other_shapes_repeats_its_nodes():
    mask = radix(6, 9, 2)
    assert mask.shape == (6, 9)
    assert mask.sum(1).unique().tolist() == [6]
    assert mask.sum(0).unique().tolist() == [4]


@pytest.mark.parametrize(("rows", "cols", "halvings"), [(64, 64, 3), (128, 64, 4), (96, 32, 5), (16, 16, 4)])
def test_products_are_biregular_with_the_asked_density(rows, cols, halvings):
    mask = product(rows, cols, halvings, generator())
    assert mask.double().mean().item() == 2.0**-halvings
    assert len(mask.sum(0).unique()) == len(mask.sum(1).unique()) == 1


def test_lifts_keep_the_ramanujan_bound():
    # A prime base has a trivial outer factor, so the product is the lifted complete graph itself.
    gap = analysis.ramanujan_gap(product(40, 40, 3, generator()))
    assert gap.lambda_1 == pytest.approx(5)
    assert gap.standard > 0


def test_bad_input():
    with pytest.raises(ValueError, match="connected 8 x 8 support has from 15"):
        expander(8, 8, 14, generator())
    with pytest.raises(ValueError, match="degree from 1 to 4"):
        radix(4, 8, 5)
    with pytest.raises(ValueError, match="from 0 to 2 times"):
        product(12, 4, 3)
    with pytest.raises(ValueError, match="odd one"):
        make_support("product", 9, 8, 0.25)
    with pytest.raises(ValueError, match="known: expander, product, radix"):
        make_support("ring", 8, 8, 0.5)
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        make_support("radix", 8, 8, 0.0)
