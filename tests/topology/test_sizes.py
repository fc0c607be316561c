"""Laws of set sizes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sao_prune.topology import even_sizes, exact_sizes

sides = st.integers(1, 120)


@given(sides, sides, st.data())
def test_even_sizes_differ_by_at_most_one_and_stay_semi_orthogonal(rows, cols, data):
    groups = data.draw(st.integers(1, min(rows, cols)))
    r, c = even_sizes(rows, cols, groups)
    assert len(r) == len(c) == groups
    assert int(r.sum()) == rows
    assert int(c.sum()) == cols
    assert int(r.max() - r.min()) <= 1
    assert int(c.max() - c.min()) <= 1
    assert bool((r <= c).all() if rows <= cols else (r >= c).all())


@given(sides, sides, st.data())
@settings(deadline=None)
def test_exact_sizes_are_a_legal_partition(rows, cols, data):
    nnz = data.draw(st.integers(max(rows, cols), rows * cols))
    r, c = exact_sizes(rows, cols, nnz)
    assert int(r.sum()) == rows
    assert int(c.sum()) == cols
    assert int(min(r.min(), c.min())) >= 1
    assert bool((r <= c).all() if rows <= cols else (r >= c).all())


@given(st.integers(64, 512), st.integers(64, 512), st.floats(0.03, 0.9))
@settings(deadline=None, max_examples=60)
def test_exact_sizes_meet_the_count(rows, cols, density):
    nnz = max(round(density * rows * cols), max(rows, cols))
    r, c = exact_sizes(rows, cols, nnz)
    # Above one half a square layer has few partitions to choose from; below, thousandths are rarely missed.
    assert abs(int((r * c).sum()) - nnz) <= max(1, (0.005 if density <= 0.5 else 0.02) * nnz)


def test_square_counts_are_met_to_the_parity_of_the_side():
    # A square layer's blocks are square, and a sum of squares has the parity of the side.
    for nnz in range(900, 1100, 7):
        r, c = exact_sizes(64, 64, nnz)
        assert abs(int((r * c).sum()) - nnz) == nnz % 2


@pytest.mark.parametrize("groups", [0, -1, 5])
def test_groups_out_of_range(groups):
    with pytest.raises(ValueError, match="takes from 1 to 4 groups"):
        even_sizes(4, 6, groups)


@pytest.mark.parametrize("nnz", [5, 25])
def test_edges_out_of_range(nnz):
    with pytest.raises(ValueError, match="takes from 6 to 24 edges"):
        exact_sizes(4, 6, nnz)
