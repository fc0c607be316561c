"""What is particular to the compiled kernels: large sizes, leftovers, infinities, odd operands, and doing without."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import sao_prune
from sao_prune.blocks import BlockConv1d, BlockConv2d, BlockLinear, BlockModule, Execution, autotune
from sao_prune.blocks.backends.cpu import launch
from sao_prune.topology import BlockTopology, interleaved, ramanujan

from .cases import NATIVE, assert_all_close, assert_same, block_layers, needs_compiler, randomise, set_dense


def _linear(topology: BlockTopology) -> tuple[BlockLinear, nn.Module]:
    layer = BlockLinear(topology)
    randomise(layer)
    layer.run_as(NATIVE)
    return layer, set_dense(layer, nn.Linear(layer.in_features, layer.out_features))


def _images(topology: BlockTopology, kind: type[BlockModule] = BlockConv2d, kernel: int = 3):
    layer = kind(topology, kernel, padding=kernel // 2)
    randomise(layer)
    layer.run_as(NATIVE)
    dense = layer.dense_class(layer.in_channels, layer.out_channels, kernel, padding=kernel // 2)
    return layer, set_dense(layer, dense)


@needs_compiler
@pytest.mark.parametrize("shape", [(5504, 64, 768), (1576, 384, 768), (64, 512, 512)])
def test_large_matrices_are_written_past_the_caches(shape):
    batch, n, m = shape
    assert_same(*_linear(interleaved(m, n, 32)), torch.randn(batch, n), tolerance=5e-3)


@needs_compiler
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_call_leaves_nothing_for_the_next(layout):
    conv, _ = _images(interleaved(40, 24, 8))
    linear, _ = _linear(ramanujan(40, 24, 8))
    x = torch.randn(2, 24, 9, 11).contiguous(memory_format=layout)

    def run() -> list[Tensor]:
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
    conv, _ = _images(interleaved(16, 16, 4))
    for size in ((12, 14), (9, 9), (20, 3), (5, 7)):
        x = torch.randn(2, 16, *size).contiguous(memory_format=torch.channels_last)
        conv(x * float("nan")).sum().backward()
        conv.zero_grad()
        conv(x).sum().backward()
        assert conv.blocks.grad.isfinite().all()
    topology = BlockTopology(torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 0, 1, 1, 1]))
    uneven, _ = _images(topology, kernel=1)
    x = torch.randn(3, 5, 6, 6)
    x[0] = float("inf")
    assert uneven(x)[1:].isfinite().all()


@needs_compiler
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_variances_far_from_zero_do_not_cancel(offset):
    layer, _ = _images(interleaved(16, 16, 4))
    x = torch.randn(4, 16, 24, 24)
    sets = layer.row_set, layer.col_set
    bias = layer.bias.detach() + offset
    rest = *sets, None, None, "", "cpu", 0.0, [1, 1], [1, 1], [1, 1], 1
    y, _, mean, variance = torch.ops.sao_prune.block_conv_norm(x, layer.blocks, bias, None, None, *rest)
    z = nn.functional.conv2d(x.double(), layer.weight.double(), bias.double(), padding=1)
    torch.testing.assert_close(mean.double(), z.mean((0, 2, 3)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(variance.double(), z.var((0, 2, 3), correction=0), rtol=2e-3, atol=0)
    assert float(y.detach().var((0, 2, 3), correction=0).sub(1).abs().max()) < 1e-2


@needs_compiler
def test_a_bias_may_lie_anywhere_and_signals_too():
    for layer, dense in (_images(interleaved(16, 16, 4), BlockConv1d), _linear(interleaved(16, 16, 4))):
        with torch.no_grad():
            layer.bias = nn.Parameter(torch.randn(16).repeat_interleave(2)[::2])
            dense.bias.copy_(layer.bias)
        x = torch.randn(2, 20, 16)
        x = x.mT if isinstance(layer, BlockConv1d) else x
        torch.testing.assert_close(layer(x), dense(x), rtol=1e-4, atol=1e-4)


@needs_compiler
@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("topology", ["interleaved", "ramanujan"])
def test_a_whole_model(topology, fuse):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 1),
        nn.ReLU(), nn.Conv2d(32, 16, 3, padding=1), nn.Flatten(), nn.Linear(16 * 36, 64), nn.Tanh(), nn.Linear(64, 96),
        nn.ReLU(), nn.Linear(96, 32), nn.Linear(32, 5),
    )  # fmt: skip
    sao_prune.apply(net, groups=8, method=sao_prune.SAO(topology=topology), seed=0)
    masked = copy.deepcopy(net)
    x = torch.randn(4, 3, 8, 8)
    report = sao_prune.compact(net, example_input=x, fuse=fuse)
    assert all("native" in layer.execution for layer in report.compact)
    assert any(layer.epilogue is not None for layer in block_layers(net)) == fuse
    for model in (masked, net):
        model(x).square().sum().backward()
    torch.testing.assert_close(net(x), masked(x), rtol=1e-4, atol=1e-4)
    for mine, theirs in zip(net.modules(), masked.modules()):
        if isinstance(mine, BlockModule):
            kept = theirs.weight_orig.grad[theirs.weight_mask.bool()].sort().values
            assert_all_close([mine.bias.grad, mine.blocks.grad.flatten().sort().values], [theirs.bias.grad, kept])
    again = pickle.loads(pickle.dumps(net))
    torch.testing.assert_close(again(x), net(x))


@needs_compiler
def test_default_device_and_type_play_no_part():
    layers = [_images(interleaved(16, 16, 4)), _linear(interleaved(16, 16, 4))]
    images = torch.randn(2, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    inputs = images, images.flatten(2).mT.reshape(-1, 16)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = [layer(x) for (layer, _), x in zip(layers, inputs)]
    finally:
        torch.set_default_dtype(torch.float32)
    for (_, dense), y, x in zip(layers, found, inputs):
        torch.testing.assert_close(y, dense(x), rtol=1e-4, atol=1e-4)


@needs_compiler
def test_other_types_run_by_torch():
    for layer, dense in (_images(interleaved(16, 16, 4)), _linear(interleaved(16, 16, 4))):
        x = torch.randn(2, 16, 8, 8) if isinstance(layer, BlockConv2d) else torch.randn(5, 16)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == dense(x).dtype == torch.bfloat16
        torch.testing.assert_close(layer.double()(x.double()), dense.double()(x.double()))
        layer.float().bias.data = layer.bias.data.double()
        with pytest.raises(RuntimeError, match="one type"):  # not read as single precision
            layer(x)


@pytest.mark.parametrize("execution", [NATIVE, Execution(native=True, channels_last=True)], ids=str)
def test_without_the_kernels_everything_runs(monkeypatch, execution):
    monkeypatch.setattr(launch, "library", lambda: None)
    monkeypatch.setattr(autotune.cpu, "library", lambda: None)
    for (layer, dense), x in (
        (_linear(interleaved(12, 8, 4)), torch.randn(5, 8)),
        (_images(interleaved(12, 8, 4)), torch.randn(2, 8, 5, 5)),
    ):
        layer.run_as(execution)
        assert_same(layer, dense, x, tolerance=1e-4)
        assert not autotune.default_execution(layer).native
        assert not any(e.native for e in autotune.executions(layer))
