"""Singular values against dense operators and against autograd's full Jacobian."""

import pytest
import torch
from torch import nn

from sao_prune import analysis
from sao_prune.analysis import masks as masks_module
from sao_prune.analysis.operators import module_map


def dense_values(module, shape):
    return torch.linalg.svdvals(module_map(module, shape).matrix().double())


def mlp(seed=0, width=24, depth=3):
    torch.manual_seed(seed)
    return nn.Sequential(*(layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.Tanh())))


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(3, 5, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(4, 6, 3, padding=2, dilation=2, groups=2, padding_mode="circular"),
        nn.Conv2d(3, 2, (3, 5), padding="same", padding_mode="circular"),
        nn.Conv1d(3, 4, 3, padding=1, padding_mode="circular"),
    ],
)
def test_fourier_values_are_those_of_the_operator(conv):
    shape = (conv.in_channels, *(7,) * len(conv.kernel_size))
    torch.testing.assert_close(analysis.singular_values(conv, shape), dense_values(conv, shape), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "conv", [nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, stride=2), nn.ConvTranspose2d(2, 3, 2)]
)
def test_other_convolutions_by_their_operator(conv):
    x = torch.eye(conv.in_channels * 25).view(-1, conv.in_channels, 5, 5)
    operator = (conv(x) - conv(torch.zeros_like(x[:1]))).flatten(1).detach()
    expected = torch.linalg.svdvals(operator.double())
    torch.testing.assert_close(analysis.singular_values(conv, (conv.in_channels, 5, 5)), expected, atol=1e-5, rtol=0)
    top = analysis.singular_values(conv, (conv.in_channels, 5, 5), k=2)
    torch.testing.assert_close(top, expected[:2], atol=1e-4, rtol=0)


def test_linear_and_its_largest_values():
    layer = nn.Linear(30, 20)
    exact = torch.linalg.svdvals(layer.weight.detach().double())
    torch.testing.assert_close(analysis.singular_values(layer), exact)
    torch.testing.assert_close(analysis.singular_values(layer, k=3), exact[:3], atol=1e-5, rtol=0)


def test_exact_spectrum_is_that_of_the_full_jacobian():
    model, x = mlp(), torch.randn(1, 24)
    jacobian = torch.autograd.functional.jacobian(model, x).view(24, 24)
    expected = torch.linalg.svdvals(jacobian.double())
    spectrum = analysis.jacobian_spectrum(model, x)
    torch.testing.assert_close(spectrum.values, expected, atol=1e-6, rtol=1e-4)
    assert spectrum.mean == pytest.approx(float(expected.mean()), rel=1e-4)
    assert spectrum.variance == pytest.approx(float(expected.var(correction=0)), rel=1e-4)


def test_lanczos_agrees_with_the_exact_spectrum():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1))
    x = torch.randn(1, 2, 8, 8)
    exact = analysis.jacobian_spectrum(model, x, method="exact")
    estimate = analysis.jacobian_spectrum(model, x, method="lanczos", probes=12, steps=60)
    assert not estimate.exact
    assert estimate.values is None
    assert estimate.largest == pytest.approx(exact.largest, rel=1e-3)
    assert estimate.smallest >= exact.smallest * (1 - 1e-3)
    assert estimate.mean == pytest.approx(exact.mean, rel=0.1)
    assert estimate.mean_square == pytest.approx(exact.mean_square, rel=0.15)
    assert float(estimate.weights.sum()) == pytest.approx(1)


def test_lanczos_stops_early_on_few_distinct_values():
    model = nn.Linear(64, 64, bias=False)
    nn.init.orthogonal_(model.weight)
    spectrum = analysis.jacobian_spectrum(model, torch.randn(1, 64), method="lanczos")
    assert spectrum.mean == pytest.approx(1, abs=1e-5)
    assert spectrum.variance < 1e-5
    assert spectrum.products < 20


def test_attention_can_be_measured():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    x = torch.randn(1, 4, 8)
    exact = analysis.jacobian_spectrum(model, x, method="exact")
    estimate = analysis.jacobian_spectrum(model, x, method="lanczos", steps=32)
    assert estimate.largest == pytest.approx(exact.largest, rel=1e-3)


def test_model_is_left_as_it_was():
    model = mlp()
    model.train()
    model[0].weight.requires_grad_(False)
    analysis.jacobian_spectrum(model, torch.randn(1, 24))
    assert model.training
    assert [p.requires_grad for p in model[0].parameters()] == [False, True]
    assert all(p.grad is None for p in model.parameters())


def test_bad_input(monkeypatch):
    with pytest.raises(ValueError, match="floating-point"):
        analysis.jacobian_spectrum(mlp(), torch.zeros(1, 24, dtype=torch.long))
    with pytest.raises(ValueError, match="'auto', 'exact' or 'lanczos'"):
        analysis.jacobian_spectrum(mlp(), torch.zeros(1, 24), method="svd")
    with pytest.raises(ValueError, match="input_shape"):
        analysis.singular_values(nn.Conv2d(3, 3, 3))
    with pytest.raises(ValueError, match="does not depend"):
        analysis.jacobian_spectrum(lambda x: torch.zeros(3, requires_grad=True), torch.zeros(1, 3))
    monkeypatch.setattr(masks_module, "MEMORY_LIMIT", 2**10)
    with pytest.raises(analysis.SpectrumTooLargeError, match='method="lanczos"'):
        analysis.jacobian_spectrum(mlp(), torch.zeros(1, 24), method="exact")
    with pytest.raises(analysis.SpectrumTooLargeError, match="k="):
        analysis.singular_values(nn.Conv2d(3, 3, 3), (3, 8, 8))


def test_ks_test_sees_differences_and_forgives_rounding():
    ones = torch.ones(256)
    assert analysis.ks_test(ones, ones + 1e-7 * torch.randn(256)).pvalue == 1
    result = analysis.ks_test(ones, 0.5 * ones)
    assert result.statistic == 1
    assert result.pvalue == pytest.approx(4.23e-153, rel=1e-2)
    with pytest.raises(ValueError, match="finite"):
        analysis.ks_test(ones, torch.tensor([float("nan")]))
    with pytest.raises(ValueError, match="positive"):
        analysis.ks_test(ones, ones, resolution=0)


def test_track_isometry_records_and_writes(tmp_path):
    model = mlp()
    tracker = analysis.track_isometry(model, torch.randn(1, 24), every=2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(5):
        tracker()
        optimizer.zero_grad()
        model(torch.randn(4, 24)).square().sum().backward()
        optimizer.step()
    assert [r.step for r in tracker.records] == [0, 2, 4]
    assert tracker.records[0].mean != tracker.records[-1].mean
    lines = tracker.to_csv(tmp_path / "track.csv").read_text().splitlines()
    assert lines[0] == "step,mean,smallest,largest,variance"
    assert len(lines) == 4
    tracker.records.append("no record")
    with pytest.raises(TypeError):
        tracker.to_csv(tmp_path / "track.csv")
    assert [path.read_text().splitlines() for path in tmp_path.iterdir()] == [lines]
    with pytest.raises(ValueError, match="at least 1"):
        analysis.track_isometry(model, torch.randn(1, 24), every=0)


@pytest.mark.slow
def test_resnet50_is_measured_with_few_products_and_without_its_jacobian():
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet50", zero_init_last=False)
    spectrum = analysis.jacobian_spectrum(model, torch.randn(1, 3, 64, 64))
    assert spectrum.values is None
    assert spectrum.products <= 2 * 30 * 2
    assert spectrum.shape == (1000, 12288)
    assert spectrum.largest > spectrum.mean > 0
