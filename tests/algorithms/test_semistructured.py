"""N:M: literal masks, and what the search for sets of columns gains."""

from itertools import permutations

import pytest
import torch
from torch import nn

import sao_prune
from sao_prune import NM
from sao_prune.algorithms.semistructured import keep_of_sets, permuted

ALL = {"skip_first": False, "skip_last": False, "groups": 2}


def kept(scores: torch.Tensor, n: int = 2, m: int = 4) -> float:
    return float((scores * keep_of_sets(scores, n, m)).sum())


def test_literal_masks() -> None:
    layer = nn.Linear(8, 2)
    rows = [[1.0, -4.0, 3.0, 2.0, 0.0, 0.0, 0.0, 0.0], [8.0, 7.0, 6.0, 5.0, -1.0, -2.0, 0.5, -2.0]]
    layer.weight.data = torch.tensor(rows)
    sao_prune.apply(nn.Sequential(layer), method="nm", **ALL)
    assert layer.weight_mask.tolist() == [[0, 1, 1, 0, 1, 1, 0, 0], [1, 1, 0, 0, 0, 1, 0, 1]]
    assert layer.weight.tolist()[1] == [8, 7, 0, 0, 0, -2, 0, -2]
    layer = nn.Linear(4, 2)
    layer.weight.data = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0]])
    sao_prune.apply(nn.Sequential(layer), sparsity=0.75, method=NM(1, 4), skip_first=False, skip_last=False)
    assert layer.weight_mask.tolist() == [[0, 0, 0, 1], [1, 0, 0, 0]]


def test_columns_change_places_where_that_keeps_more() -> None:
    layer = nn.Linear(8, 2)
    # The large columns stand together: two of the four go, until they are dealt to both sets.
    layer.weight.data = torch.tensor([[9.0, 8.0, 7.0, 6.0, 0.1, 0.2, 0.3, 0.4]] * 2)
    sao_prune.apply(nn.Sequential(layer), method=NM(permute=True), **ALL)
    assert layer.weight_mask.tolist() == [[1, 1, 1, 1, 0, 0, 0, 0]] * 2


def test_every_tap_of_a_convolution_has_a_choice_of_its_own() -> None:
    model = nn.Sequential(nn.Conv2d(8, 6, 3), nn.Conv2d(8, 8, (1, 3), groups=2), nn.ConvTranspose2d(8, 6, 2))
    report = sao_prune.apply(model, method="nm", **ALL)
    assert report.sparsity == 0.5
    assert [record.nnz for record in report.layers] == [m.weight.numel() // 2 for m in model]
    assert sao_prune.report(model).sparsity == 0.5
    for layer in model[:2]:
        assert (layer.weight_mask.unflatten(1, (-1, 4)).sum(2) == 2).all()
        smallest = torch.where(layer.weight_mask > 0, layer.weight_orig.abs(), torch.inf).unflatten(1, (-1, 4)).amin(2)
        largest = torch.where(layer.weight_mask > 0, 0.0, layer.weight_orig.abs()).unflatten(1, (-1, 4)).amax(2)
        assert (largest <= smallest).all()
    assert (model[2].weight_mask.unflatten(0, (-1, 4)).sum(1) == 2).all()
    assert not torch.equal(model[0].weight_mask[..., 0, 0], model[0].weight_mask[..., 1, 1])


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (4, 8)])
def test_the_search_never_keeps_less_and_ends_where_no_swap_helps(n: int, m: int) -> None:
    scores = torch.randn(24, 4 * m, generator=torch.Generator().manual_seed(0)).abs() * torch.linspace(0.2, 2, 4 * m)
    order = permuted(scores, n, m)
    assert sorted(order.tolist()) == list(range(4 * m))
    best = kept(scores[:, order], n, m)
    assert best > kept(scores, n, m)
    for a in range(4 * m):
        for b in range(a):
            swapped = order.clone()
            swapped[[a, b]] = order[[b, a]]
            assert kept(scores[:, swapped], n, m) <= best + 1e-3


def test_two_sets_of_two_are_solved_nearly_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        scores = torch.rand(5, 4, generator=generator)
        best = max(kept(scores[:, list(order)], 1, 2) for order in permutations(range(4)))
        assert kept(scores[:, permuted(scores, 1, 2)], 1, 2) == pytest.approx(best)


def test_bad_input() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 10), nn.Linear(10, 8))
    for verb in (sao_prune.plan, sao_prune.apply):
        with pytest.raises(ValueError, match=r"2:4 leaves 0.5 of a weight, and 0\.weight was asked for 0\.25"):
            verb(model, sparsity=0.75, method="nm", skip_first=False)
        with pytest.raises(ValueError, match=r"2\.weight has 10 inputs, no multiple of 4.*exclude=\['2'\]"):
            verb(model, sparsity=0.5, method="nm", skip_last=False)
    for n, m in ((4, 4), (0, 4), (2.0, 4), (True, 4)):
        with pytest.raises(ValueError, match="1 <= n < m"):
            NM(n, m)
    model[1].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"1\.weight: .*NaN"):
        sao_prune.apply(model, sparsity=0.5, method="nm", exclude=["2"])
    assert not any("weight_mask" in m._buffers for m in model)
