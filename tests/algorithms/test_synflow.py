"""SynFlow: exact masks, conserved flow at any scale, and no layer emptied."""

import copy

import pytest
import torch
from torch import nn

import sao_prune
from sao_prune import SNIP, SynFlow
from sao_prune.algorithms.flow import Flow, flow_network_

from .cases import digits, mlp, pruned


def test_synflow_by_hand():
    """``|W1| 1 = (3, 7)``, ``1^T |W2| = (2, 3)``: scores [[2, 4], [9, 12]] and [[3, 7], [3, 14]], 27 in each layer."""
    net = mlp(2, 2, 2, bias=False)
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, -2.0], [3.0, 4.0]]))
        net[2].weight.copy_(torch.tensor([[1.0, 1.0], [-1.0, 2.0]]))
    first, second = pruned(net, SynFlow(rounds=1))
    assert first.tolist() == [[0, 0], [1, 1]]
    assert second.tolist() == [[0, 1], [0, 1]]


@pytest.mark.parametrize("act", [nn.Identity, nn.ReLU, nn.Tanh, nn.SiLU, nn.GELU])
def test_flow_is_conserved(act):
    """Every layer's scores sum to the flow itself (Tanaka et al., theorem 1), also through pooling and batch norm."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        act(),
        nn.AvgPool2d(2),
        nn.Conv2d(6, 6, 3, groups=2, bias=False),
        act(),
        nn.Flatten(),
        nn.Linear(24, 5, bias=False),
    ).double()
    net[1].running_mean.fill_(3.0)
    flow_network_(net)
    weights = [net[0].weight, net[4].weight, net[7].weight]
    ones = torch.ones(1, 2, 10, 10)
    sums = [float((w.detach() * g).sum()) for w, g in zip(weights, Flow(net, ones, weights).gradients())]
    with torch.no_grad():
        plain = nn.Sequential(*(m for m in net if not isinstance(m, act)))
        assert sums == pytest.approx([float(plain(ones.double()).sum())] * 3)


@pytest.mark.parametrize("scale", [1e12, 1e-12])
def test_synflow_does_not_mind_the_scale_of_layers(scale):
    """The order of scores is the same however layers are scaled, also beyond double precision (here 1e+-720)."""
    torch.manual_seed(0)
    net = mlp(*[12] * 61, act=nn.Tanh, bias=False)
    scaled = copy.deepcopy(net)
    with torch.no_grad():
        for module in scaled:
            if isinstance(module, nn.Linear):
                module.weight.mul_(scale)
    method = SynFlow(rounds=8)
    assert all(map(torch.equal, pruned(net, method, 0.7), pruned(scaled, method, 0.7)))


def test_flow_that_cannot_be_rescaled_is_refused():
    class Skip(nn.Sequential):
        def forward(self, x):
            return x + super().forward(x)

    net = nn.Sequential(*(Skip(nn.Linear(8, 8)) for _ in range(40)))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1e12)
    with pytest.raises(ValueError, match="leaves the range of double precision"):
        pruned(net, SynFlow(rounds=2, inputs=torch.ones(1, 8)))


@pytest.mark.filterwarnings("ignore::sao_prune.SparsityWarning")
def test_synflow_empties_no_layer_where_snip_does():
    """A wide middle and eleven weights for five layers: maximal critical compression against layer collapse."""
    torch.manual_seed(0)
    net = mlp(6, 8, 128, 128, 8, 4, act=nn.ReLU)
    x, y = digits(64)
    snip = [int(m.sum()) for m in pruned(net, SNIP(inputs=x, targets=y), 0.9994)]
    flow = [int(m.sum()) for m in pruned(net, SynFlow(), 0.9994)]
    assert sum(snip) == sum(flow) == 11
    assert min(snip) == 0
    assert min(flow) > 0


def test_timm_models_tell_synflow_their_input_size():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", zero_init_last=False)
    report = sao_prune.apply(model, sparsity=0.9, method=SynFlow(rounds=5), exclude=["*.downsample.*"])
    assert report.sparsity == pytest.approx(0.9, abs=0.001)
    assert min(layer.nnz for layer in report.pruned) > 0
