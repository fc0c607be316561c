"""hold: orthogonal blocks after many optimizer steps, and nothing else changed."""

import copy

import pytest
import torch
from torch import nn

import sao_prune
from sao_prune import SAO, analysis
from sao_prune.blocks import compact
from sao_prune.nn import ECOConv2d
from sao_prune.orthogonality import hold, release

STEPS = 200


def mlp(width=60, depth=3):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))


def train(model, x, steps=STEPS):
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()


def drift(weight, gain=1.0):
    return float((torch.linalg.svdvals(weight.detach()) - gain).abs().max())


@pytest.mark.parametrize("orthogonal_map", ["cayley", "matrix_exp"])
def test_masked_layers_stay_orthogonal(orthogonal_map):
    model, x = mlp(), torch.randn(16, 60)
    sao_prune.apply(model, groups=7, method=SAO(gain=1.1), seed=0)
    mask, before, y = model[1].weight_mask.clone(), model[1].weight.detach().clone(), model(x)
    report = hold(model, orthogonal_map=orthogonal_map)
    assert [r.gain for r in report.held] == [pytest.approx(1.1)]
    torch.testing.assert_close(model(x), y, atol=1e-5, rtol=1e-5)
    train(model, x)
    assert drift(model[1].weight, 1.1) <= 1e-4
    assert (model[1].weight - before).abs().max() > 0.01
    assert not model[1].weight[mask == 0].any()


def test_without_hold_they_drift():
    model, x = mlp(), torch.randn(16, 60)
    sao_prune.apply(model, groups=7, seed=0)
    train(model, x)
    assert drift(model[1].weight) > 1e-2


@pytest.mark.parametrize("groups", [4, 7])
def test_compact_layers_stay_orthogonal(groups):
    model, x = mlp(), torch.randn(16, 60)
    sao_prune.apply(model, groups=groups, seed=0)
    compact(model)
    y = model(x)
    hold(model)
    torch.testing.assert_close(model(x), y, atol=1e-5, rtol=1e-5)
    train(model, x)
    assert drift(model[1].weight) <= 1e-4


def test_eco_convolutions_stay_orthogonal_at_every_frequency():
    model = nn.Sequential(ECOConv2d(4, 8, 3, groups=2, seed=0), ECOConv2d(8, 8, 3, stride=2, groups=3, seed=0))
    x = torch.randn(4, 4, 12, 12)
    y = model(x)
    hold(model)
    torch.testing.assert_close(model(x), y, atol=1e-5, rtol=1e-5)
    train(model, x)
    for layer, channels in ((model[0], 4), (model[1], 8)):
        assert (analysis.singular_values(layer, (channels, 12, 12)) - 1).abs().max() <= 1e-4


def test_eco_convolutions_under_a_mask_of_blocks_stay_orthogonal_at_every_frequency():
    model = nn.Sequential(ECOConv2d(4, 8, 3, seed=0), ECOConv2d(8, 8, 3, stride=2, seed=0))
    sao_prune.apply(model, groups=4, method=SAO(conv="eco"), skip_first=False, skip_last=False, seed=0)
    x, masks = torch.randn(4, 4, 6, 6), [layer.weight_mask.clone() for layer in model]
    y = model(x)
    assert len(hold(model).held) == 2
    torch.testing.assert_close(model(x), y, atol=1e-5, rtol=1e-5)
    train(model, x, steps=20)
    for layer, channels, mask in zip(model, (4, 8), masks):
        assert (analysis.singular_values(layer, (channels, 6, 6)) - 1).abs().max() <= 1e-4
        assert not layer.weight[mask == 0].any()
    y = model(x)
    release(model)
    torch.testing.assert_close(model(x), y, atol=1e-5, rtol=1e-5)


def test_eco_convolutions_under_other_masks_are_not_held():
    model = nn.Sequential(ECOConv2d(4, 8, 3, seed=0), ECOConv2d(8, 8, 3, groups=2, seed=0))
    sao_prune.apply(model, sparsity=0.5, method="lmp", skip_first=False, skip_last=False, seed=0)
    with pytest.raises(ValueError, match=r"mask is not made of blocks.*mask lies on blocks of its own"):
        hold(model)
    torch.nn.utils.prune.random_unstructured(layer := ECOConv2d(4, 8, 3, seed=0), "weight", amount=0.5)
    with pytest.raises(ValueError, match="splits kernels"):
        hold(layer)


def test_mirrored_networks_stay_isometric():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(16, 64, bias=False),
        nn.ReLU(),
        nn.Linear(64, 64, bias=False),
        nn.ReLU(),
        nn.Linear(64, 32, bias=False),
    )
    options = {"skip_first": False, "skip_last": False, "seed": 0}
    sao_prune.apply(model, groups=4, method=SAO(nonlinearity="relu"), **options)
    hold(model)
    train(model, torch.randn(16, 16))
    spectrum = analysis.jacobian_spectrum(model, torch.randn(1, 16))
    assert spectrum.largest - spectrum.smallest < 1e-4


def test_values_that_are_not_orthogonal_move_to_the_nearest_that_are():
    model = mlp()
    sao_prune.apply(model, groups=4, method="rg", seed=0)
    record = hold(model).held[0]
    assert record.moved > 0.01
    assert drift(model[1].weight_orig, record.gain) < 1e-5


def test_release_leaves_plain_parameters_with_the_same_values():
    model, x = mlp(), torch.randn(4, 60)
    sao_prune.apply(model, groups=4, seed=0)
    keys = set(model.state_dict())
    hold(model)
    train(model, x)
    y = model(x)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(x), y)
    assert len(release(model).released) == 1
    torch.testing.assert_close(model(x), y)
    assert set(model.state_dict()) == keys
    sao_prune.remove(model)


def masked():
    model = mlp()
    sao_prune.apply(model, groups=4, seed=0)
    return model


def compacted():
    model = masked()
    compact(model)
    return model


@pytest.mark.parametrize("make", [masked, compacted])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad])
def test_release_leaves_parameters_frozen_or_not_wherever_it_is_called(make, frozen, context):
    model = make()
    model.requires_grad_(not frozen)
    parameters, buffers = ({name for name, _ in named} for named in (model.named_parameters(), model.named_buffers()))
    hold(model)
    with context():
        release(model)
    found = dict(model.named_parameters())
    assert set(found) == parameters
    assert {name for name, _ in model.named_buffers()} == buffers
    assert all(p.requires_grad is not frozen and p.is_leaf for p in found.values())


def tied_eco():
    model = nn.Sequential(ECOConv2d(8, 8, 3, seed=0), ECOConv2d(8, 8, 3, seed=0), ECOConv2d(8, 8, 3, seed=1))
    model[1].weight = model[0].weight
    return model


def tied_masked():
    model = mlp(depth=5)
    model[2].weight = model[1].weight
    sao_prune.apply(model, groups=4, seed=0)
    return model


@pytest.mark.parametrize(("make", "tensor"), [(tied_eco, "weight"), (tied_masked, "weight_orig")])
def test_tied_weights_stay_tied(make, tensor):
    model = make()
    report = hold(model)
    assert len(report.held) == 1
    assert all("are one weight" in record.reason for record in report.skipped)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False) if name.endswith(tensor)]
    assert len(names) - len([name for name, _ in model.named_parameters() if name.endswith(tensor)]) == 1


@pytest.mark.parametrize("make", [masked, compacted, tied_eco])
def test_what_has_no_values_is_not_held(make):
    with pytest.raises(ValueError, match=r"nothing to hold .* it is on the meta device"):
        hold(make().to("meta"))


def test_global_generator_is_left_alone():
    model = nn.Sequential(ECOConv2d(4, 8, 3, seed=0))
    state = torch.get_rng_state()
    hold(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_cannot_be_held_is_named():
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Linear(8, 8), nn.Linear(8, 8))
    sao_prune.apply(model, groups=2, skip_first=False, skip_last=False, seed=0)
    report = hold(model, exclude=["2"])
    assert [r.name for r in report.held] == ["1.weight"]
    assert "ECOConv2d" in str(report)
    with pytest.raises(ValueError, match="nothing to hold"):
        hold(mlp())
    with pytest.raises(ValueError, match="orthogonal_map"):
        hold(model, orthogonal_map="householder")
    with pytest.raises(TypeError, match="Module"):
        hold(3)
