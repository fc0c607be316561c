"""Givens rotations and approximate isometry."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sao_prune.topology import expander, interleaved
from sao_prune.weights import approximate_isometry, givens, givens_matrix
from sao_prune.weights.givens import _levels


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@given(st.integers(1, 24), st.integers(1, 24), st.data())
@settings(max_examples=60, deadline=None)
def test_givens_matrices_are_orthogonal_and_as_dense_as_asked(rows, cols, data):
    nnz = data.draw(st.integers(min(rows, cols), rows * cols))
    q = givens_matrix(rows, cols, nnz, generator(data.draw(st.integers(0, 99))), gain=1.5)
    values = torch.linalg.svdvals(q)
    torch.testing.assert_close(values, torch.full_like(values, 1.5), atol=1e-5, rtol=0)
    assert nnz <= int((q != 0).sum()) <= nnz + 2 * min(rows, cols)


def test_rotations_are_taken_in_few_batches(monkeypatch):
    """One product a rotation would take minutes on large layers."""
    found = []
    monkeypatch.setattr(givens, "_levels", lambda planes, rows: found.append(_levels(planes, rows)) or found[-1])
    givens_matrix(1024, 1024, round(0.03 * 1024**2), generator())
    (batches,) = found
    rotations = sum(map(len, batches))
    assert rotations > 1000
    assert len(batches) < rotations / 50


def test_approximate_isometry_is_exact_where_it_can_be():
    for shape in ((12, 24, 3), (24, 12, 3)):
        topology = interleaved(*shape)
        result = approximate_isometry(topology.mask(), generator(), gain=1.1)
        values = torch.linalg.svdvals(result.matrix)
        assert result.residual < 1e-5
        torch.testing.assert_close(values, torch.full_like(values, 1.1), atol=1e-4, rtol=0)


def test_approximate_isometry_keeps_to_the_mask_and_reports_what_is_left():
    mask = expander(48, 48, 48 * 4, generator())
    result = approximate_isometry(mask, generator())
    assert not result.matrix[~mask].any()
    error = (result.matrix @ result.matrix.T - torch.eye(48)).norm() / 48**0.5
    assert result.residual == pytest.approx(float(error), abs=1e-6)
    start = torch.randn(48, 48, generator=generator()) * mask / 2
    assert 0.01 < error < (start @ start.T - torch.eye(48)).norm() / 48**0.5 / 3


def test_rows_that_share_one_column_become_orthogonal_only_by_a_zero():
    mask = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 0, 1]], dtype=torch.bool)
    values = approximate_isometry(mask, generator()).matrix
    assert int((values.abs() > 1e-3).sum()) == 3


def test_bad_input():
    with pytest.raises(ValueError, match="from 4 to 24"):
        givens_matrix(6, 4, 3, generator())
    with pytest.raises(ValueError, match="at least one edge"):
        approximate_isometry(torch.zeros(3, 3), generator())
    with pytest.raises(ValueError, match="zeros and ones"):
        approximate_isometry(torch.full((3, 3), 0.5), generator())
