"""The supports and lifts as options of the methods, through the verbs."""

import pytest
import torch
from torch import nn

import sao_prune
from sao_prune import RG, SAO, analysis
from sao_prune.algorithms import EOI


def mlp(width=32, depth=2):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))


ALL = {"skip_first": False, "skip_last": False, "seed": 0}


@pytest.mark.parametrize("topology", ["expander", "radix", "product"])
def test_other_supports_go_through_apply(topology):
    for method in (SAO(topology=topology), RG(topology=topology), RG(topology=topology, values="normal")):
        model = mlp()
        report = sao_prune.apply(model, sparsity=0.75, method=method, **ALL)
        assert report.sparsity == pytest.approx(0.75)
        assert not method.structured
        assert model[0].weight_mask.sum(1).unique().tolist() == [8]
        assert model(torch.randn(2, 32)).isfinite().all()


def test_fresh_values_have_the_scale_of_orthogonal_ones():
    model = mlp(256, 1)
    for values in ("normal", "uniform"):
        sao_prune.apply(model, sparsity=0.75, method=RG(topology="expander", values=values), **ALL)
        assert float(model[0].weight.detach().square().sum()) == pytest.approx(256, rel=0.05)
        sao_prune.remove(model)


def test_radix_spells_out_its_digits_along_the_model():
    model = mlp(64, 3)
    sao_prune.apply(model, degree=4, method=RG(topology="radix"), **ALL)
    assert analysis.depth_to_full_reachability(model) == 3


def test_convolutions_keep_whole_kernels():
    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1))
    sao_prune.apply(model, sparsity=0.75, method=RG(topology="expander", values="uniform"), **ALL)
    assert torch.equal((model[0].weight != 0).flatten(2).any(2), model[0].weight_mask[:, :, 0, 0].bool())
    assert (model[0].weight != 0).flatten(2).all(2).sum() == 64


def test_eoi_is_orthogonal_at_any_density():
    model = nn.Sequential(nn.Linear(48, 40), nn.Conv2d(24, 24, 3, padding=1))
    report = sao_prune.apply(model, sparsity=0.83, method=EOI(gain=1.2), **ALL)
    assert report.sparsity == pytest.approx(0.83, abs=0.02)
    for values in (
        analysis.singular_values(nn.Linear(48, 40)) * 0 + torch.linalg.svdvals(model[0].weight.detach()),
        analysis.singular_values(model[1], (24, 3, 3)),
    ):
        assert (values - 1.2).abs().max() < 1e-5


def test_approximate_values_on_blocks():
    model = mlp()
    sao_prune.apply(model, groups=4, method=SAO(values="nearly_orthogonal"), **ALL)
    assert (analysis.singular_values(model[0]) - 1).abs().max() < 1e-3


@pytest.mark.parametrize("variant", [1, 2])
def test_eco_on_stock_convolutions_is_exact_with_the_right_dilation(variant):
    model = nn.Sequential(nn.Conv2d(12, 18, 3, padding=2, dilation=2, padding_mode="circular"), nn.Conv1d(4, 4, 2))
    sao_prune.apply(model, groups=2, method=SAO(conv="eco", gain=1.1, variant=variant), **ALL)
    assert (analysis.singular_values(model[0], (12, 6, 6)) - 1.1).abs().max() < 1e-5
    assert (model[0].weight != 0).flatten(2).all(2).sum() == 12 * 18 // 2


def test_eco_with_linear_layers_and_groups():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular", groups=2), nn.Linear(8, 8))
    sao_prune.apply(model, groups=2, method=SAO(conv="eco"), **ALL)
    assert (analysis.singular_values(model[0], (8, 3, 3)) - 1).abs().max() < 1e-5
    assert (analysis.singular_values(model[1]) - 1).abs().max() < 1e-5


def test_mirrored_eco_networks_are_isometric():
    torch.manual_seed(0)
    layers = []
    for cin, cout in ((3, 16), (16, 16), (16, 16)):
        layers += [nn.Conv2d(cin, cout, 3, padding=1, padding_mode="circular"), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    sao_prune.apply(model, groups=2, method=SAO(conv="eco", nonlinearity="relu"), **ALL)
    for layer in model[::2]:
        nn.init.zeros_(layer.bias)
    spectrum = analysis.jacobian_spectrum(model, torch.randn(1, 3, 3, 3))
    assert spectrum.largest - spectrum.smallest < 1e-3


def test_seeds_decide():
    for method in (EOI(), SAO(topology="expander"), SAO(topology="product"), SAO(conv="eco")):
        models = [mlp(), mlp(), mlp()]
        for model, seed in zip(models, (1, 1, 2)):
            sao_prune.apply(model, groups=4, method=method, **{**ALL, "seed": seed})
        assert torch.equal(models[0][1].weight, models[1][1].weight)
        assert not torch.equal(models[0][1].weight, models[2][1].weight)


def test_options_that_contradict_each_other():
    with pytest.raises(ValueError, match="exactly orthogonal"):
        SAO(topology="expander", values="orthogonal")
    with pytest.raises(ValueError, match="variant 1 or 3"):
        SAO(topology="expander", conv="eco")
    with pytest.raises(ValueError, match="'delta', 'eco'"):
        SAO(conv="dirac")
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 9), nn.Linear(9, 8))
    with pytest.raises(ValueError, match=r"1\.weight.*odd one"):
        sao_prune.apply(model, sparsity=0.75, method=RG(topology="product"), seed=0)
