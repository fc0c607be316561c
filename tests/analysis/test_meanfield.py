"""The limit of infinite width against wide networks, and against what can be worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sao_prune
from sao_prune.analysis import mean_field


def test_the_identity_scales_by_the_gain():
    found = mean_field(lambda x: x, gain=1.1, depth=10, variance=2.0, correlation=0.3)
    assert found.variance == pytest.approx(2.0 * 1.1**20)
    assert found.growth == pytest.approx(1.1**20)
    assert found.correlation == pytest.approx(0.3)


def test_relu_halves_and_its_correlation_is_the_arc_cosine_kernel():
    found = mean_field(torch.relu, depth=3, variance=1.0, correlation=0.5)
    assert found.variance == pytest.approx(1 / 8, rel=1e-3)
    assert found.growth == pytest.approx(1 / 8, rel=1e-2)
    c = torch.tensor(0.5, dtype=torch.float64)
    for _ in range(3):
        c = (torch.sqrt(1 - c**2) + (torch.pi - torch.arccos(c)) * c) / torch.pi
    assert found.correlation == pytest.approx(float(c), abs=2e-3)


@pytest.mark.parametrize("gain", [1.0, pytest.param(1.1, marks=pytest.mark.slow), 1.5])
@pytest.mark.parametrize("groups", [None, 16])
def test_wide_networks_do_as_predicted(gain, groups):
    torch.manual_seed(0)
    depth, width = 12, 512
    layers = []
    for _ in range(depth):
        linear = nn.Linear(width, width, bias=False)
        nn.init.orthogonal_(linear.weight, gain)
        layers += [nn.Tanh(), linear]
    net = nn.Sequential(*layers)
    if groups:
        method = sao_prune.SAO(gain=gain)
        sao_prune.apply(net, groups=groups, method=method, seed=0, skip_first=False, skip_last=False)
    x = torch.randn(2, width)
    x[1] = 0.6 * x[0] + 0.8 * x[1]
    predicted = mean_field(
        torch.tanh,
        gain,
        depth,
        variance=float(x.square().mean()),
        correlation=float(torch.cosine_similarity(*x, dim=0)),
    )
    with torch.no_grad():
        y = net(x)
    assert float(y.square().mean()) == pytest.approx(predicted.variance, rel=0.1)
    assert float(torch.cosine_similarity(*y, dim=0)) == pytest.approx(predicted.correlation, abs=0.08)
    # The mean square of what the transposed Jacobian does to random directions.
    one, directions = x[:1].requires_grad_(), torch.randn(32, width)
    pulled = [torch.autograd.grad((net(one) * v).sum(), one)[0].square().sum() for v in directions]
    assert float(torch.stack(pulled).mean()) / width == pytest.approx(predicted.growth, rel=0.15)


@pytest.mark.parametrize("bad", [{"gain": 0}, {"variance": -1}, {"depth": 0}, {"correlation": 1.5}])
def test_bad_input(bad):
    with pytest.raises(ValueError, match="must be positive"):
        mean_field(torch.tanh, **bad)
