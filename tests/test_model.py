"""Whole models: apply and remove do what they say, all or nothing."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

import sao_prune
from sao_prune import SAO

from .networks import Net, image


@pytest.fixture
def net():
    torch.manual_seed(0)
    model = Net()
    sao_prune.apply(model, groups=4, seed=0)
    return model


def test_report_says_what_was_done():
    model = Net()
    report = sao_prune.apply(model, sparsity=0.75, seed=0)
    kept = {layer.name: layer.reason for layer in report.skipped}
    assert kept == {"stem.weight": "first layer", "head.weight": "last layer"}
    assert len(report.pruned) == 8
    assert report.sparsity == report.requested == 0.75
    nonzero = sum(int(m.sum()) for n, m in model.named_buffers() if n.endswith("_mask"))
    assert report.nnz == nonzero
    text = str(report)
    assert "stem " in text
    assert "first layer" in text
    assert sao_prune.report(model).nnz == nonzero


def test_plan_touches_nothing_and_previews_apply():
    model = Net()
    before = copy.deepcopy(model.state_dict())
    plan = sao_prune.plan(model, sparsity=0.75)
    assert not torch_prune.is_pruned(model)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))
    with torch.device("meta"):
        assert sao_prune.plan(Net(), sparsity=0.75).layers == plan.layers
    assert sao_prune.apply(model, sparsity=0.75).layers == plan.layers


@pytest.mark.parametrize("fit", ["nearest", "regular", "exact"])
def test_plan_and_apply_agree_for_every_fit(fit):
    def make():
        return nn.Sequential(*(nn.Linear(a, b) for a, b in [(20, 30), (30, 45), (45, 17), (17, 5)]))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sao_prune.SparsityWarning)
        assert (
            sao_prune.plan(make(), sparsity=0.7, fit=fit).layers
            == sao_prune.apply(make(), sparsity=0.7, fit=fit).layers
        )


def test_layers_off_target_are_warned_about_by_name():
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    with pytest.warns(sao_prune.SparsityWarning, match=r"1\.weight \(98\.000 % -> 87\.500 %\)"):
        sao_prune.apply(model, sparsity=0.98)


def test_a_default_device_changes_nothing():
    plain, under = Net(), Net()
    sao_prune.apply(plain, groups=4, seed=0)
    with torch.device("meta"):
        sao_prune.apply(under, groups=4, seed=0)
    assert torch.equal(plain.conv.weight, under.conv.weight)


def test_same_seed_same_model():
    nets = [Net(), Net(), Net()]
    for model, seed in zip(nets, (1, 1, 2)):
        sao_prune.apply(model, groups=4, seed=seed)
    weights = [m.conv.weight for m in nets]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not torch.equal(nets[0].reader.qkv.weight, nets[0].reader.proj.weight)


def test_remove_bakes_and_outputs_stay(net):
    x = image()
    before = net(x)
    names = {n for n, _ in Net().named_parameters()}
    report = sao_prune.remove(net)
    assert report.sparsity == 0.75
    assert not torch_prune.is_pruned(net)
    assert {n for n, _ in net.named_parameters()} == names
    assert not any(m._forward_pre_hooks for m in net.modules())
    assert torch.equal(net(x), before)
    assert sao_prune.report(net).sparsity == 0.75
    with pytest.raises(ValueError, match="nothing to remove"):
        sao_prune.remove(net)


def test_apply_is_atomic():
    model = Net()
    before = copy.deepcopy(model.state_dict())
    model.lstm.weight_hh_l0.data[0, 0] = float("nan")
    before["lstm.weight_hh_l0"][0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"lstm\.weight_hh_l0: the weight holds NaN"):
        sao_prune.apply(model, sparsity=0.75, method="lmp")
    _unchanged(model, before)


def test_apply_is_atomic_when_a_module_refuses(monkeypatch):
    model = Net()
    before = copy.deepcopy(model.state_dict())
    register = sao_prune.prune.MaskPruning.register.__func__

    def fails_late(cls, module, name, mask):
        if isinstance(module, nn.LSTM):
            raise RuntimeError("no")
        register(cls, module, name, mask)

    monkeypatch.setattr(sao_prune.prune.MaskPruning, "register", classmethod(fails_late))
    with pytest.raises(RuntimeError, match="no"):
        sao_prune.apply(model, groups=4, seed=0)
    _unchanged(model, before)


def _unchanged(model, before):
    assert not torch_prune.is_pruned(model)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(a, b) or a.isnan().any() for a, b in zip(model.state_dict().values(), before.values()))
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert all(isinstance(m.weight, nn.Parameter) for m in (model.conv, model.reader.qkv))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: (sao_prune.apply(m, groups=2), sao_prune.apply(m, groups=2)), ValueError, "pruned already"),
        (lambda m: sao_prune.apply(nn.ReLU(), groups=2), ValueError, "ReLU has no layer that can be pruned"),
        (lambda m: sao_prune.apply(nn.Sequential(), groups=2), ValueError, "no layer that can be pruned"),
        (lambda m: sao_prune.apply(m, groups=2, exclude=["*"]), ValueError, "is left to prune"),
        (lambda m: sao_prune.apply(m, groups=2, include=["blocks.*"]), ValueError, r"'blocks\.\*' matches none"),
        (lambda m: sao_prune.apply(m, sparsity={"blocks.*": 0.5}), ValueError, r"'blocks\.\*' matches none"),
        (lambda m: sao_prune.apply(m, groups=2, colour="red"), TypeError, "unknown option 'colour'"),
        (lambda m: sao_prune.apply(m, groups=2, form="dense"), ValueError, "form must be"),
        (lambda m: sao_prune.apply("net", groups=2), TypeError, r"torch\.nn\.Module"),
        (lambda m: sao_prune.apply(m.to("meta"), groups=2), ValueError, "meta device"),
        (lambda m: sao_prune.plan(m), ValueError, "say how sparse"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(Net())


def test_different_layers_may_get_different_methods_one_after_the_other():
    model = Net()
    sao_prune.apply(model, groups=4, include=["conv"], seed=0)
    report = sao_prune.apply(model, sparsity=0.5, method="lmp", include=["reader.*"])
    assert [layer.name for layer in report.pruned] == ["reader.qkv.weight", "reader.proj.weight"]
    assert len(sao_prune.report(model).pruned) == 3


def test_nothing_changes_where_weights_cannot_be_written():
    with torch.inference_mode():
        frozen = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    expanded = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    expanded[2].weight = nn.Parameter(torch.zeros(1, 8).expand(8, 8))
    for model, message in ((frozen, "inference mode"), (expanded, "share memory")):
        with pytest.raises(ValueError, match=message):
            sao_prune.apply(model, groups=2, seed=0)
        assert not torch_prune.is_pruned(model)
        assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_warning_made_an_error_changes_nothing():
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    with warnings.catch_warnings():
        warnings.simplefilter("error", sao_prune.SparsityWarning)
        with pytest.raises(sao_prune.SparsityWarning):
            sao_prune.apply(model, groups=100)
    assert not torch_prune.is_pruned(model)


def test_remove_is_atomic():
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(5)))
    sao_prune.apply(model, groups=4, seed=0)
    del model[2]._buffers["weight_mask"]
    with pytest.raises(ValueError, match=r"2\.weight: it has lost its weight or mask; nothing was removed"):
        sao_prune.remove(model)
    assert torch_prune.is_pruned(model[1])


def test_a_dense_model_is_reported_dense():
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))
    with torch.no_grad():
        model[0].weight.zero_()
        model[1].weight[0, 0] = 0
    assert sao_prune.report(model).pruned == ()


@pytest.mark.parametrize("method", ["sao", "rg", "lmp", "lrp", SAO(nonlinearity="relu")])
def test_plan_previews_every_method(method):
    def make():
        return nn.Sequential(nn.Conv2d(4, 34, 3), nn.Conv2d(34, 34, 3), nn.Conv2d(34, 34, 1), nn.Conv2d(34, 4, 3))

    planned = sao_prune.plan(make(), sparsity=0.83, method=method)
    assert planned.layers == sao_prune.apply(make(), sparsity=0.83, method=method).layers


def test_layers_that_keep_nothing_are_warned_about():
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))
    with pytest.warns(sao_prune.SparsityWarning, match=r"keep no weight at all: 1\.weight"):
        sao_prune.apply(model, sparsity=0.999, method="lmp")


def test_default_dtype_changes_nothing():
    plain, under = (nn.Sequential(*(nn.Linear(16, 16) for _ in range(3))) for _ in range(2))
    sao_prune.apply(plain, groups=4, seed=0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        sao_prune.apply(under, groups=4, seed=0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(plain[1].weight, under[1].weight)
