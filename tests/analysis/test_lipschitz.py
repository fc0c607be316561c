"""Lipschitz bounds: equal to singular values where they are exact, never below them elsewhere."""

import pytest
import torch
from torch import nn

import sao_prune
from sao_prune import SAO, analysis
from sao_prune.nn import ECOConv2d, MaxMin, SkewConv2d

LAYERS = {
    "linear": (nn.Linear(6, 4), (6,), True),
    "eco": (ECOConv2d(4, 6, 3, groups=2, seed=0), (4, 6, 6), True),
    "eco, strided": (ECOConv2d(4, 6, 3, stride=2, seed=0), (4, 6, 6), True),
    "eco, a size that it does not fit": (ECOConv2d(4, 6, 3, seed=0), (4, 8, 8), True),
    "eco, a kernel longer than the input": (ECOConv2d(4, 6, 3, seed=0), (4, 2, 2), True),
    "skew": (SkewConv2d(4, 6, 3, seed=0), (4, 6, 6), False),
    "conv": (nn.Conv2d(4, 6, 3, padding=1), (4, 6, 6), False),
    "conv, strided": (nn.Conv2d(4, 6, 3, stride=2, groups=2), (4, 7, 7), False),
    "conv, circular": (nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), (2, 5, 5), False),
    "conv, circular, a longer output": (nn.Conv2d(2, 2, 1, padding=3, padding_mode="circular"), (2, 4, 3), False),
    "conv, circular, twice around": (nn.Conv2d(2, 2, 3, padding=3, padding_mode="circular"), (2, 3, 3), False),
    "conv, circular, dilated": (nn.Conv2d(2, 2, 3, padding=3, dilation=2, padding_mode="circular"), (2, 6, 6), False),
    "conv, circular, same": (nn.Conv2d(2, 2, 4, padding="same", padding_mode="circular"), (2, 5, 5), False),
    "activation": (MaxMin(), (4, 3, 3), False),
}


@pytest.mark.filterwarnings("ignore::sao_prune.nn.InexactConvolutionWarning")
@pytest.mark.parametrize("name", LAYERS)
def test_no_layer_stretches_more_than_its_bound(name):
    layer, shape, exact = LAYERS[name]
    torch.manual_seed(0)
    for parameter in layer.parameters():
        # As after a training: no orthogonal map any more.
        parameter.data += 0.2 * torch.randn_like(parameter)
    if isinstance(layer, MaxMin):
        true = torch.ones(())
    elif "circular" in name:
        x = torch.zeros(1, *shape)
        jacobian = torch.autograd.functional.jacobian(layer, x).reshape(-1, x.numel())
        true = torch.linalg.matrix_norm(jacobian, 2)
    else:
        true = analysis.singular_values(layer.eval(), shape if len(shape) == 3 else None).max()
    bound, near = analysis.operator_norm(layer), analysis.operator_norm(layer, iterations=50).detach()
    assert bound >= true * (1 - 1e-5)
    assert near <= bound * (1 + 1e-5)
    if exact:
        assert bound == pytest.approx(float(true), rel=1e-4)
        assert near == pytest.approx(float(true), rel=0.02)


def test_masks_and_held_layers_count():
    model = nn.Sequential(ECOConv2d(4, 8, 3, input_size=6, seed=0), nn.Flatten(), nn.Linear(288, 3))
    sao_prune.apply(model, groups=4, method=SAO(conv="eco", gain=0.5), skip_first=False, seed=0)
    assert analysis.operator_norm(model[0]) == pytest.approx(0.5, rel=1e-5)
    with torch.no_grad():
        model[0].weight_orig.mul_(3)
    assert analysis.operator_norm(model[0]) == pytest.approx(1.5, rel=1e-5)
    sao_prune.hold(model)
    assert analysis.operator_norm(model[0], iterations=1) == pytest.approx(1.5, rel=1e-5)


def test_the_constants_of_differences_are_those_of_the_rows():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 3))
    model[0].weight.data = torch.diag(torch.tensor([2.0, 1.0]))
    model[2].weight.data = torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]])
    constants = analysis.margin_constants(model)
    assert constants.tolist() == [[0, 10, 6], [10, 0, 8], [6, 8, 0]]
    analysis.margin_constants(model, iterations=5).sum().backward()
    assert model[0].weight.grad.isfinite().all()
    assert model[0].weight.grad.any()
    radii = analysis.certified_radii(torch.tensor([[5.0, 4.0, 2.0]] * 2), torch.tensor([0, 1]), constants)
    assert radii.tolist() == pytest.approx([0.1, 0.0])


def test_weights_that_are_not_finite_have_no_bound():
    layer = nn.Linear(2, 2)
    layer.weight.data.fill_(torch.nan)
    assert analysis.lipschitz_bound(layer).isnan()


def test_what_has_no_bound_is_named():
    with pytest.raises(TypeError, match="BatchNorm1d, layer 1"):
        analysis.lipschitz_bound(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    with pytest.raises(TypeError, match="no chain"):
        analysis.margin_constants(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    with pytest.raises(TypeError, match="'reflect'"):
        analysis.operator_norm(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"))
    with pytest.raises(ValueError, match="3 x 3"):
        analysis.certified_radii(torch.zeros(1, 3), torch.zeros(1, dtype=torch.long), torch.ones(2, 2))


class Skip(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


class Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(2 * x)


class Standardised(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight / weight.std(), bias)


class Steep(nn.ReLU):
    def forward(self, x):
        return 3 * super().forward(x)


@pytest.mark.parametrize(
    "layer",
    [Skip(nn.Linear(2, 2)), Doubled(2, 2), Standardised(2, 2, 3), Steep(), nn.Sequential(Skip(nn.Linear(2, 2)))],
)
def test_what_computes_something_else_than_its_kind_has_no_bound(layer):
    with pytest.raises(TypeError, match="no Lipschitz bound is known for"):
        analysis.lipschitz_bound(layer)


def test_parametrized_layers_are_still_of_their_kind():
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)).eval()
    assert analysis.operator_norm(layer) == pytest.approx(torch.linalg.matrix_norm(layer.weight, 2).item(), rel=1e-5)
