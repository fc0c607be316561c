"""Isometry end to end: very deep networks are orthogonal linear maps at initialisation."""

import pytest
import torch
from torch import nn

import sao_prune
from sao_prune import SAO, analysis

ALL = {"skip_first": False, "skip_last": False, "seed": 0}


def spread(model, shape):
    torch.manual_seed(1)
    spectrum = analysis.jacobian_spectrum(model, torch.randn(1, *shape))
    assert spectrum.exact
    return spectrum.largest - 1, 1 - spectrum.smallest


def test_a_thousand_mirrored_relu_layers_are_isometric():
    layers = [nn.Linear(16, 64, bias=False), nn.ReLU()]
    for _ in range(998):
        layers += [nn.Linear(64, 64, bias=False), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(64, 32, bias=False))
    sao_prune.apply(model, sparsity=0.875, method=SAO(nonlinearity="relu"), **ALL)
    above, below = spread(model, (16,))
    assert max(above, below) < 1e-3


@pytest.mark.parametrize("nonlinearity", [None, "relu"])
def test_two_hundred_delta_convolutions_are_isometric(nonlinearity):
    act = nn.ReLU if nonlinearity else nn.Identity
    layers = [nn.Conv2d(4, 16, 3, padding=1, bias=False), act()]
    for _ in range(198):
        layers += [nn.Conv2d(16, 16, 3, padding=1, bias=False), act()]
    model = nn.Sequential(*layers, nn.Conv2d(16, 8, 3, padding=1, bias=False))
    if not nonlinearity:
        model[-1] = nn.Conv2d(16, 16, 3, padding=1, bias=False)
    sao_prune.apply(model, groups=4, method=SAO(nonlinearity=nonlinearity), **ALL)
    above, below = spread(model, (4, 3, 3))
    assert max(above, below) < 1e-3


def test_gains_multiply():
    model = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(10)))
    sao_prune.apply(model, groups=4, method=SAO(gain=1.1), **ALL)
    spectrum = analysis.jacobian_spectrum(model, torch.randn(1, 32))
    assert spectrum.largest == pytest.approx(1.1**10, rel=1e-3)
    assert spectrum.smallest == pytest.approx(1.1**10, rel=1e-3)
