"""Block convolutions are the dense ones with their weight, in every geometry and execution."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sao_prune
from sao_prune.blocks import BlockConv1d, BlockConv2d, BlockConv3d, Execution

from .cases import assert_same, randomise, topologies

_CLASSES = {1: (BlockConv1d, nn.Conv1d), 2: (BlockConv2d, nn.Conv2d), 3: (BlockConv3d, nn.Conv3d)}


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
@settings(max_examples=120, deadline=None)
def test_equals_the_dense_layer(dims, topology, kernel, stride, padding, dilation, mode, channels_last, merge, batched):
    if padding == "same" or mode in ("reflect", "replicate"):
        stride = 1 if padding == "same" else stride
    block_class, dense_class = _CLASSES[dims]
    options = {"stride": stride, "padding": padding, "dilation": dilation, "padding_mode": mode}
    layer = block_class(topology, kernel, **options).double()
    randomise(layer)
    layer.run_as(Execution(merge=merge, channels_last=channels_last and dims == 2))
    dense = dense_class(layer.in_channels, layer.out_channels, kernel, **options).double()
    with torch.no_grad():
        dense.weight.copy_(layer.weight)
        dense.bias.copy_(layer.bias)
    shape = (2, layer.in_channels) if batched else (layer.in_channels,)
    x = torch.randn(*shape, *(6,) * dims, dtype=torch.float64)
    if channels_last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    assert_same(layer, dense, x)


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
    layer = BlockConv2d(sao_prune.topology.interleaved(8, 12, 4), 3, padding=1)
    assert (layer.in_channels, layer.out_channels, layer.kernel_size) == (12, 8, (3, 3))
    assert (layer.stride, layer.padding, layer.dilation, layer.groups) == ((1, 1), (1, 1), (1, 1), 1)
    assert layer.weight.shape == (8, 12, 3, 3)
    assert layer.blocks.shape == (4, 2, 3, 3, 3)
    with pytest.raises(ValueError, match="leave groups at 1"):
        BlockConv2d(sao_prune.topology.interleaved(8, 12, 4), 3, groups=2)


@given(st.integers(1, 3), topologies(12), st.sampled_from([2, 3]), st.booleans(), st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_kernel_as_large_as_the_image_is_a_product(dims, topology, kernel, channels_last, bias, batched):
    block_class, dense_class = _CLASSES[dims]
    layer = block_class(topology, kernel, bias=bias, stride=2).double()
    randomise(layer)
    layer.run_as(Execution(channels_last=channels_last and dims == 2))
    dense = dense_class(layer.in_channels, layer.out_channels, kernel, bias=bias, stride=2).double()
    with torch.no_grad():
        dense.weight.copy_(layer.weight)
        if bias:
            dense.bias.copy_(layer.bias)
    shape = (3, layer.in_channels) if batched else (layer.in_channels,)
    x = torch.randn(*shape, *(kernel,) * dims, dtype=torch.float64)
    assert layer._is_covered(x.view(-1, *x.shape[-dims - 1 :]))
    assert_same(layer, dense, x)
