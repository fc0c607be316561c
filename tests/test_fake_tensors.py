"""Models of fake tensors, as they are made to look at a model without its memory."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import sao_prune

from .networks import Net

METHODS = ["sao", "rg", "eoi", "gmp", "lmp", "lrp"]


def amount(method):
    return {"groups": 4} if method in ("sao", "rg", "eoi") else {"sparsity": 0.75}


@pytest.mark.parametrize("method", METHODS)
def test_plans_are_those_of_real_models(method):
    expected = sao_prune.plan(Net(), method=method, **amount(method))
    with FakeTensorMode():
        net = Net()
        assert str(sao_prune.plan(net, method=method, **amount(method))) == str(expected)
    assert str(sao_prune.plan(net, method=method, **amount(method))) == str(expected)


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_pruning_needs_values_and_says_so(method, inside):
    mode = FakeTensorMode()
    with mode:
        net = Net()
    names = [name for name, _ in net.named_parameters()]

    def refuses():
        with pytest.raises(ValueError, match=r"conv\.weight is a fake tensor.* pruning needs real weights"):
            sao_prune.apply(net, method=method, **amount(method))
        with pytest.raises(ValueError, match="is a fake tensor"):
            sao_prune.apply(net, groups=4, form="compact")
        with pytest.raises(ValueError, match="is a fake tensor"):
            sao_prune.prune.sao(net.conv, "weight", sparsity=0.75)

    if inside:
        with mode:
            refuses()
    else:
        refuses()
    assert [name for name, _ in net.named_parameters()] == names
    assert not list(net.buffers())


@pytest.mark.parametrize(
    "mode", [lambda: FakeTensorMode(allow_non_fake_inputs=True), lambda: FlopCounterMode(display=False)]
)
def test_a_real_model_is_pruned_whatever_mode_is_on(mode):
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(nn.Sequential(*(nn.Linear(16, 16) for _ in range(3))))
    sao_prune.apply(models[0], groups=4, seed=0)
    with mode():
        sao_prune.apply(models[1], groups=4, seed=0)
    assert type(models[1][1].weight_mask) is torch.Tensor
    x = torch.randn(2, 16)
    assert torch.equal(models[0](x), models[1](x))
