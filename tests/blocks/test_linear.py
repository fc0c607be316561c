"""BlockLinear is the dense layer with its weight: values, gradients, memory orders, shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sao_prune.blocks import BlockLinear, Execution
from sao_prune.topology import BlockTopology, interleaved, ramanujan

from .cases import NATIVE, assert_same, needs_compiler, randomise, set_dense, topologies


def _pair(topology: BlockTopology, bias: bool = True) -> tuple[BlockLinear, nn.Module]:
    layer = BlockLinear(topology, bias)
    randomise(layer)
    return layer, set_dense(layer, nn.Linear(layer.in_features, layer.out_features, bias))


@given(
    topologies(),
    st.sampled_from([(1,), (5,), (2, 3), (2, 1, 3), (0,)]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([Execution(), Execution(dense=True), Execution(merge=2), Execution(merge=3)]),
)
@settings(max_examples=50, deadline=None)
def test_equals_the_dense_layer(topology, lead, bias, transposed, execution):
    layer, dense = _pair(topology, bias)
    layer.double().run_as(execution)
    x = torch.randn(*lead, layer.in_features, dtype=torch.float64)
    if transposed:
        x = x.reshape(-1, layer.in_features).t().contiguous().t().view(x.shape)
    assert_same(layer, dense.double(), x)


@given(
    topologies(), st.sampled_from([(1, 3), (4, 5), (2, 3, 5), (2, 1), (0, 3), (3, 0)]), st.booleans(),
    st.sampled_from([Execution(), Execution(merge=2)]),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_transposed_tokens_need_no_copy(topology, lead, bias, execution):
    layer, dense = _pair(topology, bias)
    layer.double().run_as(execution)
    x = torch.randn(*lead[:-1], layer.in_features, lead[-1], dtype=torch.float64).mT
    assert_same(layer, dense.double(), x)
    if min(x.shape) > 1 and layer.out_features > 1:
        assert layer(x).mT.is_contiguous()


@needs_compiler
@given(
    topologies(40),
    st.sampled_from([(1,), (15,), (16,), (37,), (200,), (2, 3), (2, 19, 3), (0,)]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1, 2, 3]),
)
@settings(max_examples=60, deadline=None)
def test_by_the_kernels(topology, lead, bias, transposed, threads):
    layer, dense = _pair(topology, bias)
    layer.run_as(NATIVE)
    x = torch.randn(*lead, layer.in_features)
    if transposed:
        x = x.reshape(-1, layer.in_features).t().contiguous().t().view(x.shape)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_same(layer, dense, x, tolerance=2e-3)
        stride = layer(x).stride()
        layer.run_as(Execution())
        assert layer(x).stride() == stride
    finally:
        torch.set_num_threads(before)


@needs_compiler
@given(topologies(40), st.sampled_from([(1, 3), (4, 50), (2, 3, 16), (2, 100)]), st.booleans())
@settings(max_examples=25, deadline=None)
def test_transposed_tokens_by_the_kernels(topology, lead, bias):
    layer, dense = _pair(topology, bias)
    layer.run_as(NATIVE)
    assert_same(layer, dense, torch.randn(*lead[:-1], layer.in_features, lead[-1]).mT, tolerance=2e-3)


def test_weight_is_exactly_the_blocks():
    layer = BlockLinear(BlockTopology(torch.tensor([0, 1, 0]), torch.tensor([1, 0])), bias=False)
    with torch.no_grad():
        layer.blocks.copy_(torch.tensor([5.0, 6.0, 7.0]).view_as(layer.blocks))
    # Buckets come by shape: the set with one row first.
    assert layer.weight.tolist() == [[0.0, 6.0], [5.0, 0.0], [0.0, 7.0]]
    assert layer(torch.tensor([1.0, 10.0])).tolist() == [60.0, 5.0, 70.0]


def test_interleaved_layers_only_take_views_of_column_major_input():
    layer = BlockLinear(interleaved(64, 64, 8), bias=False)
    x = torch.randn(64, 16).t()
    layer(x)  # the first call reads the topology
    with torch.profiler.profile() as profile:
        y = layer(x)
    names = {event.key for event in profile.key_averages()}
    assert not names & {"aten::copy_", "aten::index_select", "aten::index", "aten::gather"}
    assert y.stride() == (1, 16)


def test_transforms_of_functions():
    layer, dense = _pair(ramanujan(6, 9, 3))
    layer, dense = layer.double(), dense.double()
    x = torch.randn(4, 9, dtype=torch.float64)
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(transform(layer)(x[0]), transform(dense)(x[0]))
    torch.testing.assert_close(torch.vmap(layer)(x), dense(x))
    _, tangent = torch.autograd.functional.jvp(layer, x, torch.ones_like(x))
    torch.testing.assert_close(tangent, torch.ones_like(x) @ dense.weight.T)


@pytest.mark.parametrize("execution", [Execution(), Execution(dense=True), NATIVE], ids=str)
def test_wrong_width_is_refused(execution):
    layer = BlockLinear(interleaved(8, 12, 4))
    layer.run_as(execution)
    for x in (torch.randn(2, 11), torch.randn(2, 2, 6), torch.randn(2, 24), torch.randn(11)):
        with pytest.raises(RuntimeError, match=r"channels|shapes"):
            layer(x)


def test_reads_like_the_dense_layer():
    layer = BlockLinear(interleaved(8, 12, 4))
    assert (layer.in_features, layer.out_features) == (12, 8)
    assert layer.weight.shape == (8, 12)
    assert layer.weight.dtype == torch.float32
    assert int((layer.weight != 0).sum()) == layer.blocks.numel() == 24
    assert list(layer.state_dict()) == ["blocks", "bias", "row_set", "col_set"]
