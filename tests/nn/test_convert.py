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
