"""No parameter of two or more dimensions goes unmentioned, and each has a reason."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, weight_norm

import sao_prune


def mentioned(model, report):
    """Parameters of two or more dimensions that the report does not name, by any name of theirs."""
    names = {layer.name for layer in report.layers}
    shared = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.dim() > 1:
            shared.setdefault(id(parameter), set()).add(name.removesuffix("_orig"))
    return [sorted(group) for group in shared.values() if not group & names]


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.pos = nn.Embedding(4, 8)
        self.pos_embed = nn.Parameter(torch.zeros(1, 4, 8))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.layer_scale = nn.Parameter(torch.ones(8, 1, 1))
        self.norm = nn.LayerNorm((4, 8))
        self.mixes = nn.ParameterList([nn.Parameter(torch.randn(4, 8))])
        self.pair = nn.Bilinear(4, 4, 4)
        self.q = nn.Linear(8, 8)
        self.table = nn.Parameter(torch.zeros(4, 4, dtype=torch.int32), requires_grad=False)
        self.head = nn.Linear(8, 10)
        self.vector = nn.Parameter(torch.ones(1, 8))


def test_what_each_parameter_is():
    model = Everything()
    plan = sao_prune.plan(model, 0.5)
    assert not mentioned(model, plan)
    assert {layer.name: layer.reason for layer in plan.layers} == {
        "q.weight": None,
        "head.weight": "last layer",
        "embed.weight": "embedding",
        "pos.weight": "positional embedding",
        "pos_embed": "positional embedding",
        "cls_token": "token",
        "layer_scale": "scale",
        "norm.weight": "norm",
        "norm.bias": "norm",
        "mixes.0": "in no layer of a known kind: include=['mixes.0'] prunes it",
        "pair.weight": "in no layer of a known kind: include=['pair.weight'] prunes it",
        "table": "not a floating-point weight (torch.int32)",
        "vector": "a vector: only one of its dimensions is longer than one",
    }
    applied = sao_prune.apply(model, 0.5, seed=0)
    read = sao_prune.report(model)
    assert {layer.name for layer in plan.layers} == {a.name for a in applied.layers} == {r.name for r in read.layers}
    assert "embedding" in str(plan)


def test_what_is_named_is_no_longer_untouched_and_is_read_back():
    model = Everything()
    report = sao_prune.apply(model, 0.5, include=["mixes.0", "pair.weight"], seed=0)
    assert [layer.name for layer in report.pruned] == ["mixes.0", "pair.weight"]
    assert not mentioned(model, report)
    read = sao_prune.report(model)
    assert [(layer.name, layer.nnz) for layer in read.pruned] == [(layer.name, layer.nnz) for layer in report.pruned]
    with pytest.raises(ValueError, match="pruned already"):
        sao_prune.apply(model, 0.5)
    sao_prune.remove(model)
    assert int((model.mixes[0] != 0).sum()) == 16


def test_computed_weights_are_mentioned_once():
    net = nn.Sequential(
        nn.Linear(8, 8),
        parametrizations.orthogonal(nn.Linear(8, 8)),
        weight_norm(nn.Linear(8, 8)),
        nn.Linear(8, 8),
        nn.Linear(8, 8),
    )
    names = [layer.name for layer in sao_prune.plan(net, 0.5).layers]
    assert names == [f"{i}.weight" for i in range(5)]


def test_compact_models_and_tied_weights():
    net = nn.Sequential(nn.Embedding(16, 16), nn.Linear(16, 16), nn.Linear(16, 16, bias=False))
    net[2].weight = net[0].weight
    sao_prune.apply(net, 0.75, seed=0)
    report = sao_prune.report(net)
    assert not mentioned(net, report)
    assert report.skipped[0].reason == "tied to 0.weight, which is no layer to prune"
    sao_prune.compact(net)
    assert [layer.name for layer in sao_prune.report(net).pruned] == ["1.weight"]
    assert len(sao_prune.report(net).layers) == 2


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "swin_tiny_patch4_window7_224", "convnextv2_atto"])
def test_timm_models(name):
    timm = pytest.importorskip("timm")
    if name not in timm.list_models():
        pytest.skip("this timm does not have it")
    with torch.device("meta"):
        model = timm.create_model(name)
    plan = sao_prune.plan(model, 0.5)
    assert not mentioned(model, plan)
    assert sum(layer.reason == "first layer" for layer in plan.layers) == 1
    assert not any("no layer of a known kind" in (layer.reason or "") for layer in plan.layers)


def test_held_weights_are_read_back_as_pruned():
    class SomeExperts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.randn(3, 16, 16))

    net = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)), SomeExperts(), nn.Linear(16, 16))
    sao_prune.apply(net, 0.75, seed=0)
    before = sao_prune.report(net)
    assert len(before.pruned) == 3
    sao_prune.hold(net)
    held = sao_prune.report(net)
    assert [(layer.name, layer.nnz, layer.groups) for layer in held.layers] == [
        (layer.name, layer.nnz, layer.groups) for layer in before.layers
    ]
    assert (held.parameters, held.remaining) == (before.parameters, before.remaining)
    with pytest.raises(ValueError, match="pruned already"):
        sao_prune.apply(net, 0.5)
    sao_prune.release(net)
    assert sao_prune.report(net) == before
