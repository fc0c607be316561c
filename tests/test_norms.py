"""Weight and spectral norm on pruned layers: hooks and parametrizations, before pruning and after."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import sao_prune

from .networks import masks_hold

HOOKS = [torch.nn.utils.weight_norm, torch.nn.utils.spectral_norm]
NORMS = [*HOOKS, parametrizations.weight_norm, parametrizations.spectral_norm]
X = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")


def dense():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))


def masked():
    model = dense()
    sao_prune.apply(model, groups=4, seed=0)
    return model


def take_off(layer, norm):
    if norm is HOOKS[0]:
        torch.nn.utils.remove_weight_norm(layer, "weight_orig")
    elif norm is HOOKS[1]:
        torch.nn.utils.remove_spectral_norm(layer, "weight_orig")
    else:
        parametrize.remove_parametrizations(layer, "weight_orig")


@pytest.mark.parametrize("norm", NORMS)
def test_the_parameter_under_a_mask_is_normalised_from_the_first_pass_on(norm):
    model = masked()
    with torch.no_grad():
        model[1].weight_orig.mul_(3)
    norm(model[1], "weight_orig")
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        hidden = model[0](X).detach()
        y = model[1](hidden)
        computed = model[1].weight_orig.detach()
        # Reading a parametrization of the spectral norm in training mode takes one more step of its power iteration.
        torch.testing.assert_close(
            y, nn.functional.linear(hidden, computed * model[1].weight_mask, model[1].bias), rtol=1e-3, atol=1e-3
        )
        if "spectral" in norm.__name__:
            assert torch.linalg.matrix_norm(computed, 2) < 2.5
        model(X).sum().backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
    assert masks_hold(model)
    expected = model.eval()(X)
    with pytest.raises(ValueError, match="nothing was removed"):
        sao_prune.remove(model)
    take_off(model[1], norm)
    sao_prune.remove(model)
    torch.testing.assert_close(model(X), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_verbs_take_the_layer_or_say_why_not(norm, tmp_path):
    model = masked()
    norm(model[1], "weight_orig")
    model(X).sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    expected = model.eval()(X)
    other = masked()
    norm(other[1], "weight_orig")
    sao_prune.load(other, sao_prune.save(model, tmp_path / "m.safetensors"))
    torch.testing.assert_close(other.eval()(X), expected)
    reasons = {record.name: record.reason for record in sao_prune.hold(other).layers}
    assert reasons["1.weight"].startswith("its weight_orig is ")
    with pytest.raises(ValueError, match=r"pruned already \("):
        sao_prune.apply(model, groups=4)
    sao_prune.compact(model)
    torch.testing.assert_close(model(X), expected, atol=1e-5, rtol=1e-5)
    assert [type(layer).__name__ for layer in model].count("BlockLinear") == 1


@pytest.mark.parametrize("norm", NORMS)
def test_a_layer_that_is_normalised_is_not_pruned_and_the_reason_is_given(norm):
    model = dense()
    norm(model[1])
    report = sao_prune.apply(model, groups=4, seed=0)
    assert [layer.groups for layer in report.layers][:4] == [None, None, 4, None]
    assert "its weight is computed from other parameters" in str(report)
    with pytest.raises(ValueError, match="its weight is computed from other parameters"):
        sao_prune.prune.sao(model[1], "weight", sparsity=0.75)
    with pytest.raises(ValueError, match="its weight is computed from other parameters"):
        sao_prune.apply(model, groups=4, include=["1"])
    model(X).sum().backward()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("by", ["sao_prune", "torch"])
def test_the_masked_weight_itself_cannot_be_normalised(norm, by):
    """As in layers that torch pruned: it is no parameter. The error is torch's, and nothing has changed then."""
    model = masked() if by == "sao_prune" else dense()
    if by == "torch":
        nn.utils.prune.l1_unstructured(model[1], "weight", 0.75)
    before, expected = copy.deepcopy(model.state_dict()), model(X)
    with pytest.raises((KeyError, ValueError), match="weight"):
        norm(model[1])
    torch.testing.assert_close(model(X), expected)
    assert model.state_dict().keys() == before.keys()
    norm(model[1], "weight_orig")
    model(X).sum().backward()
