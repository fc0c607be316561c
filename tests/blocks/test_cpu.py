"""The native kernels give what the dense layer gives, in every shape, order and layout; all runs without them too."""

from __future__ import annotations

import copy
import logging
import os
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import sao_prune
from sao_prune.blocks import BlockConv1d, BlockConv2d, BlockLinear, BlockModule, Execution, convert, tune
from sao_prune.blocks.native import build, launch, ready
from sao_prune.topology import BlockTopology, interleaved, ramanujan

from .cases import assert_same, randomise, topologies

NATIVE = Execution(native=True)
needs_compiler = pytest.mark.skipif(build.library() is None, reason="no C compiler that the kernels can be built with")


def _dense(layer: BlockModule, dense: nn.Module) -> nn.Module:
    with torch.no_grad():
        dense.weight.copy_(layer.weight)
        if dense.bias is not None:
            dense.bias.copy_(layer.bias)
    return dense


def _linear(topology, bias: bool = True) -> tuple[BlockLinear, nn.Module]:
    layer = BlockLinear(topology, bias)
    randomise(layer)
    layer.run_as(NATIVE)
    return layer, _dense(layer, nn.Linear(layer.in_features, layer.out_features, bias))


def _images(topology, kind, kernel, bias: bool = True, **options) -> tuple[BlockModule, nn.Module]:
    layer = kind(topology, kernel, bias=bias, **options)
    randomise(layer)
    layer.run_as(NATIVE)
    channels = layer.in_channels, layer.out_channels
    return layer, _dense(layer, layer.dense_class(*channels, kernel, bias=bias, **options))


@needs_compiler
@given(
    topologies(40),
    st.sampled_from([(1,), (15,), (16,), (37,), (200,), (2, 3), (2, 19, 3), (0,)]),
    st.booleans(),
    st.sampled_from([None, True, False]),
    st.booleans(),
    st.sampled_from([1, 2, 3]),
)
@settings(max_examples=150, deadline=None)
def test_rows_and_columns(topology, lead, bias, features_first, transposed, threads):
    layer, dense = _linear(topology, bias)
    layer.features_first = features_first
    x = torch.randn(*lead, layer.in_features)
    if transposed:
        x = x.reshape(-1, layer.in_features).t().contiguous().t().view(x.shape)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_same(layer, dense, x, tolerance=2e-3)
        plain = copy.deepcopy(layer)
        plain.run_as(Execution())
        assert layer(x).stride() == plain(x).stride()
    finally:
        torch.set_num_threads(before)


@needs_compiler
@given(topologies(40), st.sampled_from([(1, 3), (4, 50), (2, 3, 16), (2, 100)]), st.booleans())
@settings(max_examples=50, deadline=None)
def test_transposed_tokens(topology, lead, bias):
    layer, dense = _linear(topology, bias)
    x = torch.randn(*lead[:-1], layer.in_features, lead[-1]).mT
    assert_same(layer, dense, x, tolerance=2e-3)


@needs_compiler
@pytest.mark.parametrize("shape", [(1576, 384, 1536), (300, 1536, 384), (64, 512, 512)])
def test_large_matrices_are_written_past_the_caches(shape):
    batch, n, m = shape
    assert_same(*_linear(interleaved(m, n, 32)), torch.randn(batch, n), tolerance=5e-3)


@needs_compiler
@given(
    topologies(40),
    st.sampled_from([(1, 1), (3, 3), (5, 3), (1, 7)]),
    st.sampled_from([1, 2]),
    st.sampled_from([(1, 1, 1), (2, 5, 9), (3, 14, 14), (1, 33, 6), (1, 4, 230)]),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=120, deadline=None)
def test_images(topology, kernel, dilation, space, channels_last, bias):
    layer, dense = _images(topology, BlockConv2d, kernel, bias, padding="same", dilation=dilation)
    x = torch.randn(space[0], layer.in_channels, *space[1:])
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    assert_same(layer, dense, x, tolerance=1e-2)
    plain = copy.deepcopy(layer)
    plain.run_as(Execution())
    if min(x.shape[1:]) > 1 and layer.out_channels > 1:
        assert layer(x).stride() == plain(x).stride()


@needs_compiler
@given(topologies(24), st.sampled_from([1, 3, 5]), st.sampled_from([1, 20, 64]))
@settings(max_examples=30, deadline=None)
def test_signals(topology, kernel, length):
    layer, dense = _images(topology, BlockConv1d, kernel, padding=kernel // 2)
    assert_same(layer, dense, torch.randn(3, layer.in_channels, length), tolerance=5e-3)
    torch.testing.assert_close(
        layer(torch.ones(layer.in_channels, length)), dense(torch.ones(layer.in_channels, length))
    )


@needs_compiler
@pytest.mark.parametrize(
    "options",
    [{"stride": 2, "padding": 1}, {"padding": 0}, {"padding": 2}, {"padding": 1, "padding_mode": "circular"}],
    ids=str,
)
def test_other_geometries_run_as_before(options):
    layer, dense = _images(interleaved(8, 12, 4), BlockConv2d, 3, **options)
    assert not layer.suits_native
    assert_same(layer, dense, torch.randn(2, 12, 9, 9), tolerance=1e-3)


@needs_compiler
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_call_leaves_nothing_for_the_next(layout):
    conv, _ = _images(interleaved(40, 24, 8), BlockConv2d, 3, padding=1)
    linear, _ = _linear(ramanujan(40, 24, 8))
    x = torch.randn(2, 24, 9, 11).contiguous(memory_format=layout)

    def run() -> list[torch.Tensor]:
        found = []
        for layer, start in ((conv, x), (linear, x.flatten(2).mT.reshape(-1, 24))):
            start = start.detach().requires_grad_()
            y = layer(start)
            found += [y, *torch.autograd.grad(y.square().sum(), [start, *layer.parameters()])]
        return found

    first = run()
    for layer, shape in ((conv, (3, 24, 13, 7)), (linear, (777, 24))):
        bad = torch.full(shape, float("nan"))
        bad = (bad.contiguous(memory_format=layout) if len(shape) == 4 else bad).requires_grad_()
        layer(bad).sum().backward()
    for before, after in zip(first, run()):
        assert torch.equal(before, after)


@needs_compiler
def test_infinities_stay_where_they_are():
    """Behind the last row of columns, and in the padding of uneven blocks."""
    linear, _ = _linear(interleaved(24, 24, 4))
    linear(torch.full((47, 24), float("nan")).t().contiguous().t().requires_grad_()).sum().backward()
    for batch in (5, 17, 33, 37):
        linear.zero_grad()
        linear(torch.randn(24, batch).t()).sum().backward()
        assert linear.blocks.grad.isfinite().all()
    conv, _ = _images(interleaved(16, 16, 4), BlockConv2d, 3, padding=1)
    for size in ((12, 14), (9, 9), (20, 3), (5, 7)):
        x = torch.randn(2, 16, *size).contiguous(memory_format=torch.channels_last)
        conv(x * float("nan")).sum().backward()
        conv.zero_grad()
        conv(x).sum().backward()
        assert conv.blocks.grad.isfinite().all()
    topology = BlockTopology(torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 0, 1, 1, 1]))
    uneven, _ = _images(topology, BlockConv2d, 1)
    x = torch.randn(3, 5, 6, 6)
    x[0] = float("inf")
    assert uneven(x)[1:].isfinite().all()


@needs_compiler
def test_a_bias_may_lie_anywhere_and_signals_too():
    for layer, dense in (_images(interleaved(16, 16, 4), BlockConv1d, 3, padding=1), _linear(interleaved(16, 16, 4))):
        with torch.no_grad():
            layer.bias = nn.Parameter(torch.randn(16).repeat_interleave(2)[::2])
            dense.bias.copy_(layer.bias)
        x = torch.randn(2, 20, 16)
        x = x.mT if isinstance(layer, BlockConv1d) else x
        torch.testing.assert_close(layer(x), dense(x), rtol=1e-4, atol=1e-4)


@needs_compiler
@pytest.mark.parametrize("topology", ["interleaved", "ramanujan"])
def test_a_model_compact_with_native_kernels(topology, monkeypatch):
    monkeypatch.setattr(convert, "default_plan", tune.native_plan)
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 1),
        nn.ReLU(), nn.Conv2d(32, 16, 3, padding=1), nn.Flatten(), nn.Linear(16 * 36, 64), nn.Tanh(), nn.Linear(64, 96),
        nn.ReLU(), nn.Linear(96, 32), nn.Linear(32, 5),
    )  # fmt: skip
    sao_prune.apply(net, groups=8, method=sao_prune.SAO(topology=topology), seed=0)
    masked = copy.deepcopy(net)
    x = torch.randn(4, 3, 8, 8)
    report = sao_prune.compact(net, example_input=x)
    assert all("native" in layer.execution for layer in report.compact)
    for model in (masked, net):
        model(x).square().sum().backward()
    torch.testing.assert_close(net(x), masked(x), rtol=1e-4, atol=1e-4)
    for mine, theirs in zip(net.modules(), masked.modules()):
        if isinstance(mine, BlockModule):
            torch.testing.assert_close(mine.bias.grad, theirs.bias.grad, rtol=1e-3, atol=1e-3)
            kept = theirs.weight_orig.grad[theirs.weight_mask.bool()].sort().values
            torch.testing.assert_close(mine.blocks.grad.flatten().sort().values, kept, rtol=1e-3, atol=1e-3)
    again = pickle.loads(pickle.dumps(net))
    torch.testing.assert_close(again(x), net(x))


@needs_compiler
def test_tuning_times_the_native_kernels():
    net = nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 64), nn.Linear(64, 8))
    sao_prune.apply(net, groups=8, seed=0)
    candidate = tune.Candidate("1", net[1], BlockLinear(interleaved(64, 64, 8)))
    assert [e.native for e in tune._executions(candidate.block)] == [True, False, False]
    x = torch.randn(32, 8)
    y = net(x)
    report = sao_prune.compact(net, example_input=x, tune="train")
    assert len(report.layers) == 3
    torch.testing.assert_close(net(x), y)


@needs_compiler
def test_second_derivatives():
    for (layer, dense), x in (
        (_linear(interleaved(12, 8, 4)), torch.randn(5, 8)),
        (_linear(ramanujan(12, 8, 4)), torch.randn(2, 5, 8)),
        (_images(interleaved(12, 8, 4), BlockConv2d, 3, padding=1), torch.randn(2, 8, 5, 5)),
    ):
        found = []
        for module in (layer, dense):
            start = x.clone().requires_grad_()
            (first,) = torch.autograd.grad(module(start).pow(3).sum(), start, create_graph=True)
            found.append(torch.autograd.grad(first.square().sum(), [start, module.bias]))
        for mine, theirs in zip(*found):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


@needs_compiler
def test_whoever_watches_or_casts_gets_ordinary_operations():
    layer, dense = _images(interleaved(16, 16, 4), BlockConv2d, 3, padding=1)
    x = torch.randn(2, 16, 8, 8)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    with FlopCounterMode(display=False) as whole:
        dense(x)
    assert counter.get_total_flops() * 4 == whole.get_total_flops()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == dense(x).dtype == torch.bfloat16
    assert layer.double()(x.double()).dtype == torch.float64
    assert not ready(torch.ones(1, device="meta"), torch.ones(1))


@needs_compiler
def test_default_device_and_type_play_no_part():
    layers = [_images(interleaved(16, 16, 4), BlockConv2d, 3, padding=1), _linear(interleaved(16, 16, 4))]
    images = torch.randn(2, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = [layer(x) for (layer, _), x in zip(layers, (images, images.flatten(2).mT.reshape(-1, 16)))]
    finally:
        torch.set_default_dtype(torch.float32)
    for (_, dense), y, x in zip(layers, found, (images, images.flatten(2).mT.reshape(-1, 16))):
        torch.testing.assert_close(y, dense(x), rtol=1e-4, atol=1e-4)


@needs_compiler
def test_a_bias_of_another_type_is_not_read_as_single_precision():
    layer, _ = _images(interleaved(16, 16, 4), BlockConv2d, 3, padding=1)
    layer.bias.data = layer.bias.data.double()
    with pytest.raises(RuntimeError):
        layer(torch.ones(2, 16, 5, 5))


@needs_compiler
def test_inputs_of_a_wrong_shape_are_refused():
    conv, _ = _images(interleaved(16, 16, 4), BlockConv2d, 3, padding=1)
    linear, _ = _linear(interleaved(16, 16, 4))
    for layer, x in ((conv, torch.ones(2, 8, 5, 5)), (conv, torch.ones(2, 16, 5, 5, 5)), (linear, torch.ones(2, 8))):
        with pytest.raises(RuntimeError, match=r"[Ee]xpected"):
            layer(x)


@needs_compiler
def test_compilers_and_exporters_see_ordinary_operations():
    layer, dense = _linear(interleaved(12, 8, 4))
    x = torch.randn(5, 8)
    torch.testing.assert_close(layer(x), dense(x))
    exported = torch.export.export(nn.Sequential(layer), (x,)).module()
    torch.testing.assert_close(exported(x), dense(x))
    jacobian = torch.func.jacrev(layer)(x[0])
    torch.testing.assert_close(jacobian, dense.weight)


def test_without_the_kernels_everything_runs(monkeypatch):
    monkeypatch.setattr(launch, "library", lambda: None)
    layer, dense = _linear(interleaved(12, 8, 4))
    assert_same(layer, dense, torch.randn(5, 8), tolerance=1e-4)
    assert tune.native_plan([tune.Candidate("", dense, layer)]) is None
    assert not any(e.native for e in tune._executions(layer))


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """An empty cache of built kernels."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.library.cache_clear()
    yield tmp_path / "sao_prune"
    build.library.cache_clear()


@needs_compiler
def test_the_kernels_are_built_once(fresh, monkeypatch):
    assert build.library() is not None
    (built,) = fresh.iterdir()
    assert not fresh.stat().st_mode & 0o077
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("built again"))
    build.library.cache_clear()
    assert build.library() is not None
    assert list(fresh.iterdir()) == [built]


@needs_compiler
def test_a_folder_that_others_can_write_to_is_not_trusted(fresh):
    fresh.mkdir()
    os.chmod(fresh, 0o777)
    assert build.library() is not None
    assert not list(fresh.iterdir())


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("SAO_PRUNE_NATIVE", "0", "SAO_PRUNE_NATIVE=0"),
        ("CC", "no-such-compiler", "no C compiler: no-such-compiler is not on the path"),
        ("CC", "false", "false --version failed"),
        ("CC", "true -x", None),
    ],
)
def test_why_there_are_no_kernels(fresh, monkeypatch, caplog, variable, value, reason):
    monkeypatch.setenv(variable, value)
    with caplog.at_level(logging.INFO, build.__name__):
        assert build.library() is None
    assert reason is None or f"no native kernels: {reason}" in caplog.text
    assert not fresh.exists() or not list(fresh.iterdir())
