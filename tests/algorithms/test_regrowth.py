"""SET and RigL do what their papers say, on cases small enough to be done by hand."""

import json

import pytest
import torch
from torch import nn

import sao_prune
from sao_prune import SET, RigL
from sao_prune.algorithms import Stage
from sao_prune.allocation import Allocation
from sao_prune.discovery import PrunableWeight

from .cases import ALL


def revise(method, weight, mask, gradient=None, *, step=1, decay=1.0, seed=0):
    """The mask after one move."""
    weight, mask = torch.tensor(weight), torch.tensor(mask, dtype=torch.bool)
    item = PrunableWeight("fc", "weight", "Linear" if weight.dim() == 2 else "Conv1d", tuple(weight.shape))
    units = mask[None]
    allocation = Allocation(item, float(mask.float().mean()), 1)
    gradients = () if gradient is None else (torch.tensor(gradient),)
    stage = Stage([allocation], [allocation], [units], step, decay, gradients)
    masked = weight * mask.view(*mask.shape, *(1,) * (weight.dim() - mask.dim()))
    (draw,) = method.revise(nn.Identity(), stage, [masked], seed)
    assert draw.keeps_values
    return draw.units[0].int().tolist()


pytestmark = pytest.mark.filterwarnings("ignore::sao_prune.SparsityWarning")
WEIGHT = [[0.1, 0.0, -0.9], [0.5, -0.2, 0.0], [0.0, 0.8, 0.0]]
MASK = [[1, 0, 1], [1, 1, 0], [0, 1, 0]]
GRADIENT = [[0.0, -3.0, 0.0], [0.0, 0.0, 2.0], [1.0, 9.0, 0.5]]


def test_rigl_drops_the_smallest_and_grows_the_largest_gradients():
    # Five entries; 0.4 of them are two: 0.1 and -0.2 go, gradients -3 and 2 come. 9 is there already.
    assert revise(RigL(share=0.4), WEIGHT, MASK, GRADIENT) == [[0, 1, 1], [1, 0, 1], [0, 1, 0]]


def test_rigl_counts_down_with_the_cosine():
    # 0.4 * 0.5 * 5 is one.
    assert revise(RigL(share=0.4), WEIGHT, MASK, GRADIENT, decay=0.5) == [[0, 1, 1], [1, 1, 0], [0, 1, 0]]
    assert revise(RigL(share=0.4), WEIGHT, MASK, GRADIENT, decay=0.4) == MASK


def test_rigl_takes_back_what_it_dropped_if_its_gradient_is_largest():
    gradient = [[7.0, -3.0, 0.0], [0.0, 0.0, 2.0], [1.0, 9.0, 0.5]]
    assert revise(RigL(share=0.4), WEIGHT, MASK, gradient) == [[1, 1, 1], [1, 0, 0], [0, 1, 0]]


@pytest.mark.parametrize("gradient", [None, [[float("nan")] * 3] * 3])
def test_without_a_gradient_nothing_moves(gradient):
    assert revise(RigL(share=1.0), WEIGHT, MASK, gradient) == MASK


def test_set_removes_by_sign_and_draws_among_the_absent():
    # Of the positive 0.1, 0.5, 0.8 a share of 0.4 is one: 0.1; of the negative -0.9, -0.2 none. With 0.5 also -0.2.
    for share, left in ((0.4, [[0, 0, 1], [1, 1, 0], [0, 1, 0]]), (0.5, [[0, 0, 1], [1, 0, 0], [0, 1, 0]])):
        outcomes = {str(revise(SET(share=share), WEIGHT, MASK, step=step)) for step in range(40)}
        for outcome in map(json.loads, outcomes):
            new = torch.tensor(outcome) - torch.tensor(left)
            assert int(new.sum()) == 5 - int(torch.tensor(left).sum())
            assert bool((new[torch.tensor(MASK) == 1] == 0).all())
        # Every choice of 1 or 2 of the 4 absent entries comes up.
        assert len(outcomes) == (4 if share == 0.4 else 6)


def test_set_keeps_its_share_unless_it_is_to_decay():
    assert revise(SET(share=0.4), WEIGHT, MASK, decay=0.01) != MASK
    assert revise(SET(share=0.4, decay=True), WEIGHT, MASK, decay=0.01) == MASK


def test_a_nearly_full_matrix_moves_what_can_move():
    weight, mask = [[1.0, 2.0], [-3.0, 0.0]], [[1, 1], [1, 0]]
    assert revise(SET(share=0.9), weight, mask) == [[0, 1], [1, 1]]
    assert revise(RigL(share=1.0), weight, mask, [[0.0, 0.0], [0.0, 1.0]]) == [[0, 1], [1, 1]]
    assert revise(RigL(), [[1.0, 2.0]], [[1, 1]], [[0.0, 1.0]]) == [[1, 1]]


def test_kernels_go_and_come_as_a_whole():
    weight = [[[1.0, -1.0], [3.0, 0.0]], [[0.5, 0.5], [9.0, 9.0]]]
    gradient = [[[0.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.1, -0.2]]]
    mask = [[1, 1], [1, 0]]
    # L1 norms 2, 3 and 1: the last goes, and the only absent one comes.
    assert revise(RigL(share=0.4, unit="kernel"), weight, mask, gradient) == [[1, 1], [0, 1]]
    assert revise(SET(share=0.4, unit="kernel"), weight, mask) == [[1, 1], [0, 1]]


def test_taps_go_and_come_one_by_one():
    weight = [[[1.0, -1.0], [3.0, 0.0]], [[0.5, 0.5], [9.0, 9.0]]]
    mask = [[[1, 1], [1, 0]], [[1, 0], [0, 0]]]
    gradient = [[[0.0, 0.0], [0.0, 0.1]], [[0.0, 0.3], [0.1, -0.9]]]
    assert revise(RigL(share=0.25), weight, mask, gradient) == [[[1, 1], [1, 0]], [[0, 0], [0, 1]]]


def test_tiles_go_and_come_as_a_whole():
    weight = [[1.0, 1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 9.0]]
    mask = [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 0, 0, 1]]
    gradient = [[0.0, 0.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0], [1.0, 0.5, 0.0, 0.0, 0.0]]
    method = RigL(share=0.5, unit="block", block=2)
    assert revise(method, weight, mask, gradient) == [[0, 0, 1, 1, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]


@pytest.mark.parametrize("unit", ["weight", "kernel", "block"])
@pytest.mark.parametrize("distribution", ["uniform", "erk"])
def test_the_random_mask_of_the_start_has_the_budget(unit, distribution):
    net = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 32, 3), nn.Flatten(), nn.Linear(32, 8))
    for method in (RigL(unit=unit), SET(unit=unit)):
        planned = sao_prune.plan(net, sparsity=0.75, method=method, distribution=distribution, **ALL)
        model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 32, 3), nn.Flatten(), nn.Linear(32, 8))
        before = model[1].weight.detach().clone()
        report = sao_prune.apply(model, sparsity=0.75, method=method, distribution=distribution, seed=0, **ALL)
        assert [r.nnz for r in report.pruned] == [r.nnz for r in sao_prune.report(model).pruned]
        if unit != "block":
            assert [r.nnz for r in report.pruned] == [r.nnz for r in planned.pruned]
        assert torch.equal(model[1].weight, before * model[1].weight_mask)
        assert (unit == "weight") is bool((model[1].weight_mask.flatten(2).sum(2) % 9).any())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RigL(share=0), "share must be a share in"),
        (lambda: SET(share=1.5), "share must be a share in"),
        (lambda: RigL(unit="taps"), "unit must be one of 'weight', 'kernel', 'block'"),
        (lambda: SET(block=0), "block must be a whole number of at least 1"),
    ],
)
def test_bad_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
