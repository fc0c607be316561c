"""Layers that standardise their weight: the mask acts after standardising, over the kept entries alone."""

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import sao_prune

pytest.importorskip("timm")

from timm.layers import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame, pad_same

KINDS = [StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame]
ALL = {"skip_first": False, "skip_last": False}


def layer(kind, inputs=16, outputs=32, kernel=3, **options):
    torch.manual_seed(0)
    made = kind(inputs, outputs, kernel, **options)
    if hasattr(made, "gain"):
        nn.init.uniform_(made.gain, 0.5, 2)
    return nn.Sequential(made)


def expected(module, x):
    """The layer's output, from the definition: statistics of the kept entries, scaled to the whole fan-in."""
    weight, mask = module.weight_orig.detach(), module.weight_mask != 0
    rows = []
    for values, kept in zip(weight, mask):
        chosen = values[kept]
        row = torch.zeros_like(values)
        if len(chosen):
            centred = chosen - chosen.mean()
            row[kept] = centred / (centred.square().sum() / values.numel() + module.eps).sqrt()
        rows.append(row)
    standard = torch.stack(rows)
    if hasattr(module, "gain"):
        standard = standard * module.gain.detach() * module.scale
    if getattr(module, "same_pad", False):
        x = pad_same(x, module.kernel_size, module.stride, module.dilation)
    return F.conv2d(x, standard, module.bias, module.stride, module.padding, module.dilation, module.groups)


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    groups=st.sampled_from([1, 2]),
    kernel=st.sampled_from([1, 3]),
    stride=st.sampled_from([1, 2]),
    method=st.sampled_from(["sao", "rg", "lmp", "lrp", "gmp"]),
    sparsity=st.sampled_from([0.5, 0.75, 0.9]),
)
@pytest.mark.filterwarnings("ignore::sao_prune.SparsityWarning")
def test_outputs_are_those_of_the_definition(kind, groups, kernel, stride, method, sparsity):
    net = layer(kind, kernel=kernel, groups=groups, stride=stride)
    sao_prune.apply(net, sparsity, method=method, seed=0, **ALL)
    x = torch.randn(2, 16, 9, 9)
    with torch.no_grad():
        torch.testing.assert_close(net(x), expected(net[0], x), rtol=1e-4, atol=1e-4)
    assert torch.equal(net[0].weight, net[0].weight_orig * net[0].weight_mask)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_dropped_has_no_effect_and_no_gradient(kind):
    net = layer(kind)
    sao_prune.apply(net, 0.75, seed=0, **ALL)
    x = torch.randn(2, 16, 7, 7)
    before = net(x)
    before.square().sum().backward()
    mask = net[0].weight_mask
    assert not net[0].weight_orig.grad[mask == 0].any()
    assert net[0].weight_orig.grad[mask != 0].any()
    with torch.no_grad():
        net[0].weight_orig[mask == 0] = 1e3
        assert torch.equal(net(x), before)


@pytest.mark.parametrize("kind", KINDS)
def test_the_sum_of_squares_of_an_output_is_that_of_the_dense_layer(kind):
    dense = layer(kind, 32, 32, 1)
    sparse = copy.deepcopy(dense)
    sao_prune.apply(sparse, 0.75, method="rg", seed=0, **ALL)
    # The identity as the input shows the weight that is used.
    eye = torch.eye(32).view(32, 32, 1, 1)
    with torch.no_grad():
        used = [(net(eye) - net(torch.zeros(1, 32, 1, 1))).square().sum((0, 2, 3)) for net in (dense, sparse)]
    torch.testing.assert_close(*used, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_remove_leaves_a_plain_layer_that_computes_the_same(kind):
    net = layer(kind)
    fresh = copy.deepcopy(net)
    keys = list(net.state_dict())
    report = sao_prune.apply(net, 0.75, seed=0, **ALL)
    assert report.pruned[0].note == "kept weights are standardised, so not isometric"
    x = torch.randn(2, 16, 9, 9)
    with torch.no_grad():
        before = net(x)
        sao_prune.remove(net)
        torch.testing.assert_close(net(x), before, rtol=1e-4, atol=1e-4)
        assert sorted(net.state_dict()) == sorted(keys)
        assert not net[0]._forward_hooks
        assert not net[0]._forward_pre_hooks
        fresh.load_state_dict(net.state_dict())
        torch.testing.assert_close(fresh(x), before, rtol=1e-4, atol=1e-4)
    assert sao_prune.report(net).nnz == report.nnz


def test_frozen_zeros_stay_out_of_the_statistics():
    net = layer(ScaledStdConv2d)
    sao_prune.apply(net, 0.75, seed=0, **ALL)
    mask = net[0].weight_mask.clone()
    x = torch.randn(4, 16, 7, 7)
    sao_prune.remove(net, freeze_zeros=True)
    optimizer = torch.optim.Adam(net.parameters(), 0.05)
    for _ in range(3):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    assert isinstance(net[0].weight, nn.Parameter)
    assert not net[0].weight[mask == 0].any()
    twin = layer(ScaledStdConv2d)
    sao_prune.prune.ramanujan(twin[0], "weight", 0.75, seed=0)
    with torch.no_grad():
        twin[0].weight_orig.copy_(net[0].weight)
        twin[0].weight_mask.copy_(mask)
        twin[0].gain.copy_(net[0].gain)
        twin[0].bias.copy_(net[0].bias)
        torch.testing.assert_close(net(x), twin(x))


def test_torchs_own_remove_keeps_the_outputs():
    net = layer(StdConv2d)
    sao_prune.apply(net, 0.75, seed=0, **ALL)
    x = torch.randn(2, 16, 7, 7)
    before = net(x)
    torch.nn.utils.prune.remove(net[0], "weight")
    torch.testing.assert_close(net(x), before, rtol=1e-4, atol=1e-4)
    assert isinstance(net[0].weight, nn.Parameter)


def test_pruning_again():
    net = layer(StdConv2d)
    for seed in (0, 1):
        sao_prune.prune.kernel_random(net[0], "weight", 0.5, seed=seed)
    x = torch.randn(2, 16, 7, 7)
    with torch.no_grad():
        torch.testing.assert_close(net(x), expected(net[0], x), rtol=1e-4, atol=1e-4)
    torch.nn.utils.prune.l1_unstructured(net[0], "weight", 0.5)
    with pytest.raises(RuntimeError, match="knows nothing of its standardising"):
        net(x)


def test_copies_pickles_compiled_and_loaded_ones(tmp_path):
    net = layer(ScaledStdConv2dSame)
    sao_prune.apply(net, 0.75, seed=0, **ALL)
    x = torch.randn(2, 16, 9, 9)
    before = net(x)
    assert torch.equal(copy.deepcopy(net)(x), before)
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), before)
    torch.testing.assert_close(torch.compile(net, backend="eager", fullgraph=True)(x), before)
    fresh = layer(ScaledStdConv2dSame)
    sao_prune.load(fresh, sao_prune.save(net, tmp_path / "m.safetensors"))
    assert torch.equal(fresh(x), before)


def test_a_failure_leaves_no_hooks(monkeypatch):
    net = nn.Sequential(*(layer(StdConv2d)[0] for _ in range(2)))

    def fail(self, *names):
        raise RuntimeError("no")

    monkeypatch.setattr(sao_prune.prune.hooks.RefreshAll, "__init__", fail, raising=False)
    with pytest.raises(RuntimeError, match="no"):
        sao_prune.apply(net, 0.75, seed=0, **ALL)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert sorted(net.state_dict()) == ["0.weight", "1.weight"]


def test_a_whole_network_trains_with_zeros():
    torch.manual_seed(0)
    net = nn.Sequential(
        StdConv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.ReLU(), StdConv2d(16, 16, 3), nn.GroupNorm(4, 16), nn.ReLU(),
        ScaledStdConv2d(16, 16, 3), nn.Flatten(), nn.Linear(16 * 16 * 16, 4),
    )  # fmt: skip
    report = sao_prune.apply(net, 0.75, seed=0)
    assert len(report.pruned) == 2
    optimizer = torch.optim.SGD(net.parameters(), 0.1, weight_decay=0.1)
    x = torch.randn(2, 3, 16, 16)
    for _ in range(2):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    assert sao_prune.report(net).nnz == report.nnz
