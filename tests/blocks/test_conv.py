"""Block convolutions are the dense ones with their weight, in every geometry and execution."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sao_prune
from sao_prune.blocks import BlockConv1d, BlockConv2d, BlockConv3d, BlockLinear, BlockModule, Execution, operators
from sao_prune.topology import interleaved

from .cases import LAYOUTS, NATIVE, assert_all_close, assert_same, needs_compiler, randomise, set_dense, topologies

_CLASSES = {1: BlockConv1d, 2: BlockConv2d, 3: BlockConv3d}


def _pair(dims: int, topology, kernel, **options) -> tuple[BlockModule, nn.Module]:
    layer = _CLASSES[dims](topology, kernel, **options)
    randomise(layer)
    return layer, set_dense(layer, layer.dense_class(layer.in_channels, layer.out_channels, kernel, **options))


@given(
    st.integers(1, 3),
    topologies(12),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([1, 2]),
    st.sampled_from([0, 1, "valid", "same"]),
    st.sampled_from([1, 2]),
    st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    st.booleans(),
    st.sampled_from([1, 2, 4]),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_equals_the_dense_layer(dims, topology, kernel, stride, padding, dilation, mode, channels_last, merge, batched):
    stride = 1 if padding == "same" else stride
    options = {"stride": stride, "padding": padding, "dilation": dilation, "padding_mode": mode}
    layer, dense = _pair(dims, topology, kernel, **options)
    layer.double().run_as(Execution(merge=merge, channels_last=channels_last and dims == 2))
    shape = (2, layer.in_channels) if batched else (layer.in_channels,)
    x = torch.randn(*shape, *(6,) * dims, dtype=torch.float64)
    if channels_last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    assert_same(layer, dense.double(), x)


@given(st.integers(1, 3), topologies(12), st.sampled_from([2, 3]), st.booleans(), st.booleans(), st.booleans())
@settings(max_examples=30, deadline=None)
def test_a_kernel_as_large_as_the_image(dims, topology, kernel, channels_last, bias, batched):
    layer, dense = _pair(dims, topology, kernel, bias=bias, stride=2)
    layer.double().run_as(Execution(channels_last=channels_last and dims == 2))
    shape = (3, layer.in_channels) if batched else (layer.in_channels,)
    assert_same(layer, dense.double(), torch.randn(*shape, *(kernel,) * dims, dtype=torch.float64))


@needs_compiler
@given(
    st.sampled_from([topology(192, 160, 2) for topology in LAYOUTS.values()]),
    st.sampled_from([(), (1, 1), (2, 3)]),
    st.integers(1, 17),
    st.sampled_from(["", "relu", "gelu", "tanh"]),
    st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_few_rows_of_large_blocks(topology, kernel, batch, act, channels_last):
    """Whether the kernels or BLAS multiply them, and in rows and columns."""
    layer = BlockConv2d(topology, kernel) if kernel else BlockLinear(topology)
    randomise(layer)
    layer.run_as(NATIVE)
    x = torch.randn(batch, layer.weight_shape[1], *kernel)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last) if kernel else x.t().contiguous().t()
    operator, geometry = (operators.block_conv, [[1, 1], [0, 0], [1, 1], 1]) if kernel else (operators.block_linear, [])
    sets = layer.row_set, layer.col_set
    found, wanted = [], []
    for dtype, into in ((torch.float32, found), (torch.float64, wanted)):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, layer.blocks, layer.bias)]
        y = operator(*leaves, *sets, act, "cpu", *geometry)[0]
        into += [y, *torch.autograd.grad(y.square().sum(), leaves)]
    assert_all_close([t.double() for t in found], wanted, 1e-4)


@needs_compiler
@given(
    topologies(40),
    st.sampled_from([(1, 1), (3, 3), (5, 3), (1, 7), (7,), (1,), (3, 1)]),
    st.sampled_from([1, 2, 3]),
    st.integers(1, 40),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=50, deadline=None)
def test_images_of_a_single_window_by_the_kernels(topology, kernel, stride, batch, channels_last, bias):
    layer, dense = _pair(len(kernel), topology, kernel, bias=bias, stride=stride)
    native = layer.suits_native(channels_last)
    layer.run_as(NATIVE if native else Execution())
    x = torch.randn(batch, layer.in_channels, *kernel)
    if channels_last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    assert_same(layer, dense, x, tolerance=1e-2)


@needs_compiler
@pytest.mark.parametrize("execution", [Execution(), NATIVE, Execution(dense=True)], ids=["torch", "native", "dense"])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"dilation": 2, "padding": 2},
        {"stride": 1, "padding": 0},
        {"stride": [2], "padding": [2], "dilation": (1,)},
        {"padding": "same", "dilation": 3},
        {"padding": "valid"},
        {"padding_mode": "circular", "dilation": 2},
    ],
)
def test_options_that_are_changed_later(dims, options, execution):
    layer, dense = _pair(dims, interleaved(8, 12, 4), 4, stride=1, padding=1)
    layer.run_as(execution if dims == 2 else Execution())
    x = torch.randn(2, 12, *(9, 8, 7)[:dims])
    layer(x)
    for conv in (layer, dense):
        vars(conv).update(options)
    assert_same(layer, dense, x, tolerance=1e-4)
    assert repr(layer)


@needs_compiler
@given(
    topologies(40),
    st.sampled_from([(1, 1), (3, 3), (5, 3), (1, 7)]),
    st.sampled_from([1, 2]),
    st.sampled_from([(1, 1, 1), (2, 5, 9), (3, 14, 14), (1, 33, 6), (1, 4, 230)]),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=50, deadline=None)
def test_images_by_the_kernels(topology, kernel, dilation, space, channels_last, bias):
    layer, dense = _pair(2, topology, kernel, bias=bias, padding="same", dilation=dilation)
    layer.run_as(NATIVE)
    assert layer.suits_native(channels_last)
    x = torch.randn(space[0], layer.in_channels, *space[1:])
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    assert_same(layer, dense, x, tolerance=1e-2)
    stride = layer(x).stride()
    layer.run_as(Execution())
    if min(x.shape[1:]) > 1 and layer.out_channels > 1:
        assert layer(x).stride() == stride


@needs_compiler
@given(topologies(24), st.sampled_from([1, 3, 5]), st.sampled_from([1, 20, 64]))
@settings(max_examples=20, deadline=None)
def test_signals_by_the_kernels(topology, kernel, length):
    layer, dense = _pair(1, topology, kernel, padding=kernel // 2)
    layer.run_as(NATIVE)
    assert_same(layer, dense, torch.randn(3, layer.in_channels, length), tolerance=5e-3)
    x = torch.ones(layer.in_channels, length)
    torch.testing.assert_close(layer(x), dense(x))


@needs_compiler
@given(
    topologies(40),
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.integers(0, 4), st.integers(0, 4)),
    st.sampled_from([1, 2, 3]),
    st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40)),
    st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_strides_by_the_kernels(topology, kernel, stride, padding, dilation, space, bias):
    least = [dilation * (k - 1) + 1 - 2 * p for k, p in zip(kernel, padding)]
    space = space[0], max(space[1], least[0], 1), max(space[2], least[1], 1)
    options = {"stride": stride, "padding": padding, "dilation": dilation}
    layer, dense = _pair(2, topology, kernel, bias=bias, **options)
    layer.run_as(NATIVE)
    assert layer.suits_native(channels_last=True)
    x = torch.randn(space[0], layer.in_channels, *space[1:]).contiguous(memory_format=torch.channels_last)
    assert_same(layer, dense, x, tolerance=1e-2)
    # As compilers are told, whoever computes it.
    told = layer(x).stride()
    layer.run_as(Execution())
    assert layer(x).stride() == told


@needs_compiler
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2, "padding": 1},
        {"padding": 0},
        {"padding": 2},
        {"padding": 1, "padding_mode": "circular"},
        {"stride": 5, "padding": 1},
        {"stride": (1, 2), "padding": "valid"},
    ],
    ids=str,
)
def test_other_geometries(options, channels_last):
    layer, dense = _pair(2, interleaved(8, 12, 4), 3, **options)
    layer.run_as(NATIVE)
    assert layer.suits_native(channels_last) == (channels_last and options.get("stride") != 5)
    x = torch.randn(2, 12, 9, 9)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    assert_same(layer, dense, x, tolerance=1e-3)


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("topology", ["ramanujan", "interleaved"])
def test_grouped_convolutions(parts, topology):
    conv = nn.Conv2d(16, 24, 3, groups=parts, padding=1).double()
    sao_prune.prune.sao(conv, sparsity=0.5, seed=0, method=sao_prune.SAO(topology=topology))
    nn.init.normal_(conv.weight_orig)
    x = torch.randn(2, 16, 5, 5, dtype=torch.float64)
    expected = conv(x)
    model = nn.Sequential(conv)
    sao_prune.compact(model)
    assert isinstance(conv, BlockConv2d)
    assert conv.weight.shape == (24, 16 // parts, 3, 3)
    torch.testing.assert_close(conv(x), expected)
    sao_prune.expand(model)
    torch.testing.assert_close(conv(x), expected)


def test_reads_like_the_dense_layer():
    layer = BlockConv2d(interleaved(8, 12, 4), 3, padding=1)
    assert (layer.in_channels, layer.out_channels, layer.kernel_size) == (12, 8, (3, 3))
    assert (layer.stride, layer.padding, layer.dilation, layer.groups) == ((1, 1), (1, 1), (1, 1), 1)
    assert layer.weight.shape == (8, 12, 3, 3)
    assert layer.blocks.shape == (4, 2, 3, 3, 3)
    with pytest.raises(ValueError, match="leave groups at 1"):
        BlockConv2d(interleaved(8, 12, 4), 3, groups=2)


@pytest.mark.parametrize("execution", [Execution(), Execution(dense=True), NATIVE], ids=str)
def test_inputs_of_a_wrong_shape_are_refused(execution):
    conv = BlockConv2d(interleaved(16, 16, 4), 3, padding=1)
    conv.run_as(execution)
    for shape in ((2, 8, 5, 5), (2, 16, 5, 5, 5), (16, 16), (16,)):
        with pytest.raises(RuntimeError, match=r"[Ee]xpected"):
            conv(torch.ones(shape))


@needs_compiler
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(
    ("kernel", "space", "options"),
    [
        (4, (3, 3), {"stride": 2}),
        (3, (2, 9), {"stride": 3}),
        (5, (2, 2), {"stride": 4}),
        (3, (4, 12), {"stride": 2, "dilation": 2}),
        (3, (2, 9), {}),
    ],
)
def test_kernels_larger_than_the_image_are_refused(kernel, space, options, native):
    layer, dense = _pair(2, interleaved(8, 8, 2), kernel, **options)
    x = torch.randn(2, 8, *space).contiguous(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError):
        dense(x)
    layer.run_as(NATIVE if native else Execution())
    with pytest.raises(RuntimeError, match="larger than its image"):
        layer(x)


@needs_compiler
@pytest.mark.parametrize("dilation", [9, 17, 33, 64, 150, 512])
def test_wide_dilations_whatever_the_buffers_hold(dilation):
    signals, dense = _pair(1, interleaved(8, 8, 2), 3, padding=dilation, dilation=dilation)
    images, flat = _pair(2, interleaved(8, 8, 2), (1, 3), padding=(0, dilation), dilation=(1, dilation))
    for layer, other, x in ((signals, dense, torch.randn(4, 8, 100)), (images, flat, torch.randn(4, 8, 5, 100))):
        layer.run_as(NATIVE)
        # Buffers that are larger than needed, and full of what is no number.
        layer(torch.full((2, 8, *x.shape[2:-1], 5000), torch.nan).requires_grad_()).sum().backward()
        layer.zero_grad()
        assert_same(layer, other, x, tolerance=1e-2)


@needs_compiler
@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (1, 2), (2, 3), (3, 4)])
def test_pixels_that_no_output_has_seen_may_be_anything(kernel, stride):
    layer, dense = _pair(2, interleaved(8, 8, 2), kernel, stride=stride)
    layer.run_as(NATIVE)
    x = torch.randn(2, 8, 10, 10).contiguous(memory_format=torch.channels_last).requires_grad_()
    seen = torch.autograd.grad(dense(x).abs().sum(), x)[0].abs().sum((0, 1)) > 0
    spoilt = torch.where(seen, x.detach(), torch.nan).contiguous(memory_format=torch.channels_last)
    last = seen.any(1).nonzero().max() + 1, seen.any(0).nonzero().max() + 1
    spoilt[:, :, : last[0], : last[1]] = x.detach()[:, :, : last[0], : last[1]]
    layer.zero_grad()
    layer(spoilt).sum().backward()
    assert layer.blocks.grad.isfinite().all()


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("options", [{"stride": 0}, {"stride": -1}, {"padding": -1}, {"dilation": 0}, {"dilation": -1}])
def test_geometries_that_are_none_are_refused(options, native):
    layer = BlockConv2d(interleaved(16, 16, 4), 3)
    layer.run_as(NATIVE if native else Execution())
    x = torch.randn(2, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    where = {"stride": 1, "padding": 1, "dilation": 1, **options}
    with pytest.raises(RuntimeError, match="expected strides and dilations of at least 1"):
        operators.block_conv(
            x, layer.blocks, layer.bias, layer.row_set, layer.col_set, "", layer.execution.backend,
            *([n, n] for n in where.values()), 1,
        )  # fmt: skip
