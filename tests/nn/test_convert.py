"""convert_eco on existing networks."""

import pytest
import torch
from torch import nn

import sao_prune
from sao_prune import SAO, analysis
from sao_prune.nn import ECOConv2d, convert_eco


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(16, 24, 3, stride=2, padding=1),
        nn.Conv2d(24, 24, 3, padding=1, bias=False),
        nn.Conv2d(24, 24, 3, padding=1, groups=24),
        nn.Conv2d(24, 24, 3),
    )


X = torch.randn(2, 3, 12, 12)


def test_converts_what_it_can_and_says_why_not():
    model = network()
    report = convert_eco(model, X, seed=0)
    assert [r.name for r in report.converted] == ["0", "2", "3"]
    assert all(r.exact for r in report.converted)
    assert "24 groups" in str(report)
    assert "not the input size divided" in str(report)
    assert model(X).shape == (2, 24, 4, 4)
    assert (analysis.singular_values(model[2], (16, 12, 12)) - 1).abs().max() < 1e-5
    assert model[0].bias is not None
    assert model[3].bias is None


def test_last_and_patterns():
    assert [r.name for r in convert_eco(network(), X, last=1, seed=0).converted] == ["3"]
    assert [r.name for r in convert_eco(network(), X, include=["[02]"], exclude=["0"], seed=0).converted] == ["2"]


def test_pruned_convolutions_keep_blocks_and_values():
    model = network()
    sao_prune.apply(model, groups=4, method=SAO(conv="eco", gain=1.2), exclude=["4", "5"], skip_last=False, seed=0)
    masked = model[3].weight.detach().clone()
    report = convert_eco(model, X, seed=0)
    assert [r.groups for r in report.converted] == [1, 4, 4]
    torch.testing.assert_close(model[3].dense_weight(), masked)
    assert (analysis.singular_values(model[3], (24, 6, 6)) - 1.2).abs().max() < 1e-5
    assert (analysis.singular_values(model[2], (16, 12, 12)) - 1.0).abs().max() < 1e-5


def test_inexact_sizes_only_on_request():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1))
    x = torch.zeros(1, 4, 8, 8)
    with pytest.raises(ValueError, match="does not divide the input size"):
        convert_eco(model, x)
    with pytest.warns(UserWarning, match="cannot be orthogonal"):
        report = convert_eco(model, x, only_exact=False)
    assert not report.converted[0].exact
    assert isinstance(model[0], ECOConv2d)


def test_bad_input():
    with pytest.raises(ValueError, match="runs no convolution"):
        convert_eco(nn.Sequential(nn.Linear(2, 2)), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="at least 1"):
        convert_eco(network(), X, last=0)
    with pytest.raises(TypeError, match="Module"):
        convert_eco("net", X)


class Levels(nn.Module):
    """A head that all levels of a pyramid share, as detectors have it, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(4, 4, 3, padding=1)
        self.same = nn.ModuleList([self.head, nn.Conv2d(4, 4, 3, padding=1)])

    def forward(self, sizes):
        return [self.same[1](self.same[0](self.head(torch.ones(1, 4, n, n)))) for n in sizes]


def test_a_module_with_several_names_is_replaced_under_all_of_them():
    model = Levels()
    report = convert_eco(model, ([6, 3],), seed=0)
    assert [record.name for record in report.converted] == ["head", "same.1"]
    assert isinstance(model.head, ECOConv2d)
    assert model.head is model.same[0]


def test_a_convolution_is_exact_only_if_it_is_for_every_size_that_it_meets():
    with pytest.raises(ValueError, match=r"head: kernel size \(3, 3\) does not divide the input size \(5, 5\)"):
        convert_eco(Levels(), ([6, 5],), seed=0)
    report = convert_eco(Levels(), ([6, 5],), only_exact=False, seed=0)
    assert not any(record.exact for record in report.converted)


def test_tied_weights_stay_tied_and_frozen_ones_frozen():
    model = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(4)))
    model[1].weight = model[0].weight
    model[2].requires_grad_(False)
    report = convert_eco(model, torch.ones(1, 4, 6, 6), seed=0)
    assert {record.name: record.reason for record in report.skipped} == {
        "0": "its weight is tied to another module's",
        "1": "its weight is tied to another module's",
    }
    assert model[1].weight is model[0].weight
    assert not any(p.requires_grad for p in model[2].parameters())
    assert all(p.requires_grad for p in model[3].parameters())
