"""Skew convolutions and MaxMin keep norms."""

import pytest
import torch

from sao_prune.analysis import jacobian_spectrum, singular_values
from sao_prune.nn import MaxMin, SkewConv2d


@pytest.mark.parametrize(
    ("cin", "cout", "stride", "groups", "n"), [(4, 4, 1, 1, 6), (4, 8, 1, 2, 5), (8, 4, 1, 1, 5), (3, 6, 2, 3, 6)]
)
@pytest.mark.parametrize("scale", [0.1, 10.0])
def test_is_orthogonal_for_any_weight(cin, cout, stride, groups, n, scale):
    layer = SkewConv2d(cin, cout, 3, stride, groups, seed=0).eval()
    layer.weight.data.mul_(scale)
    values = singular_values(layer, (cin, n, n))
    assert (values - 1).abs().max() < 1e-5


def test_the_scaled_skew_kernel_has_norm_at_most_one():
    for groups in (1, 2):
        layer = SkewConv2d(4, 4, 5, groups=groups, seed=0)
        layer.weight.data.mul_(100)
        conv = torch.nn.Conv2d(4, 4, 5, padding=2, groups=groups, bias=False)
        conv.weight.data.copy_(layer.skew_kernel())
        operator_values = singular_values(conv, (4, 8, 8))
        assert operator_values[0] <= 1 + 1e-5


def test_bad_arguments():
    with pytest.raises(ValueError, match="odd"):
        SkewConv2d(4, 4, 2)
    with pytest.raises(ValueError, match="groups"):
        SkewConv2d(4, 4, 3, groups=3)
    with pytest.raises(ValueError, match="terms"):
        SkewConv2d(4, 4, 3, terms=(0, 1))
    with pytest.raises(ValueError, match="stride 2"):
        SkewConv2d(4, 4, 3, 2)(torch.zeros(1, 4, 3, 4))


def test_maxmin_sorts_pairs_and_is_isometric():
    x = torch.tensor([[3.0, 0.0, 1.0, 2.0]])
    assert MaxMin()(x).tolist() == [[3.0, 2.0, 1.0, 0.0]]
    spectrum = jacobian_spectrum(MaxMin(), torch.randn(1, 6, 4, 4))
    assert spectrum.smallest == pytest.approx(1)
    assert spectrum.largest == pytest.approx(1)
    with pytest.raises(ValueError, match="odd number"):
        MaxMin()(torch.zeros(1, 3))


def test_weights_that_are_not_finite_give_nan_and_no_error():
    conv = SkewConv2d(4, 4, seed=0)
    with torch.no_grad():
        conv.weight[0, 0, 0, 0] = torch.inf
    assert conv(torch.ones(1, 4, 6, 6)).isnan().any()
