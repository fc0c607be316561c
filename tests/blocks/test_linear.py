"""BlockLinear is the dense layer with its weight: values, gradients, memory orders, shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sao_prune.blocks import BlockLinear, Execution
from sao_prune.topology import BlockTopology, interleaved, ramanujan

from .cases import assert_same, randomise, topologies


def _pair(topology: BlockTopology, bias: bool = True) -> tuple[BlockLinear, nn.Linear]:
    layer = BlockLinear(topology, bias).double()
    randomise(layer)
    dense = nn.Linear(layer.in_features, layer.out_features, bias).double()
    with torch.no_grad():
        dense.weight.copy_(layer.weight)
        if bias:
            dense.bias.copy_(layer.bias)
    return layer, dense


@given(
    topologies(),
    st.sampled_from([(1,), (5,), (2, 3), (2, 1, 3), (0,)]),
    st.booleans(),
    st.sampled_from([None, True, False]),
    st.booleans(),
    st.sampled_from([Execution(), Execution(dense=True), Execution(merge=2), Execution(merge=3)]),
)
@settings(max_examples=150, deadline=None)
def test_equals_the_dense_layer(topology, lead, bias, features_first, transposed, execution):
    layer, dense = _pair(topology, bias)
    layer.run_as(execution)
    layer.features_first = features_first
    x = torch.randn(*lead, layer.in_features, dtype=torch.float64)
    if transposed:
        x = x.reshape(-1, layer.in_features).t().contiguous().t().view(x.shape)
    assert_same(layer, dense, x)


@given(
    topologies(), st.sampled_from([(1, 3), (4, 5), (2, 3, 5), (2, 1), (0, 3), (3, 0)]), st.booleans(),
    st.sampled_from([Execution(), Execution(merge=2)]),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_transposed_tokens_need_no_copy(topology, lead, bias, execution):
    layer, dense = _pair(topology, bias)
    layer.run_as(execution)
    x = torch.randn(*lead[:-1], layer.in_features, lead[-1], dtype=torch.float64).mT
    assert_same(layer, dense, x)
    if min(x.shape) > 1 and layer.out_features > 1:
        assert layer(x).mT.is_contiguous()


@given(topologies(8), st.booleans())
@settings(max_examples=15, deadline=None)
def test_second_derivatives(topology, tokens):
    layer, _ = _pair(topology)
    x = torch.randn(2, layer.in_features, dtype=torch.float64, requires_grad=True)
    if tokens:
        x = torch.randn(2, layer.in_features, 2, dtype=torch.float64).mT.requires_grad_()

    def run(x, blocks, bias):
        return torch.func.functional_call(layer, {"blocks": blocks, "bias": bias}, (x,)).tanh()

    inputs = x, layer.blocks.detach().requires_grad_(), layer.bias.detach().requires_grad_()
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_weight_is_exactly_the_blocks():
    layer = BlockLinear(BlockTopology(torch.tensor([0, 1, 0]), torch.tensor([1, 0])), bias=False)
    with torch.no_grad():
        layer.blocks.copy_(torch.tensor([5.0, 6.0, 7.0]).view_as(layer.blocks))
    # Buckets come by shape: the set with one row first.
    assert layer.weight.tolist() == [[0.0, 6.0], [5.0, 0.0], [0.0, 7.0]]
    assert layer(torch.tensor([1.0, 10.0])).tolist() == [60.0, 5.0, 70.0]


def test_interleaved_layers_only_take_views_of_features_first_input():
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
    x = torch.randn(4, 9, dtype=torch.float64)
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(transform(layer)(x[0]), transform(dense)(x[0]))
    torch.testing.assert_close(torch.vmap(layer)(x), dense(x))
    _, tangent = torch.autograd.functional.jvp(layer, x, torch.ones_like(x))
    torch.testing.assert_close(tangent, torch.ones_like(x) @ dense.weight.T)


def test_wrong_width_is_refused():
    layer = BlockLinear(interleaved(8, 12, 4))
    for x in (torch.randn(2, 11), torch.randn(2, 2, 6), torch.randn(2, 24)):
        with pytest.raises(RuntimeError, match=r"\.\.\., 12"):
            layer(x)


def test_reads_like_the_dense_layer():
    layer = BlockLinear(interleaved(8, 12, 4))
    assert (layer.in_features, layer.out_features) == (12, 8)
    assert layer.weight.shape == (8, 12)
    assert layer.weight.dtype == torch.float32
    assert int((layer.weight != 0).sum()) == layer.blocks.numel() == 24
    assert list(layer.state_dict()) == ["blocks", "bias", "row_set", "col_set"]
