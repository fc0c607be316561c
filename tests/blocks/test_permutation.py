"""An order takes the channels its index names, in every memory format, type and size, forwards and backwards."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sao_prune.blocks.order import Kind, Order, take

KINDS = ("identity", "strided", "strided in runs", "index")
SPACES = ((), (5,), (3, 4), (2, 3, 2), (0,))
LAYOUTS = ("contiguous", "last", "transposed")


def make_order(kind: str, a: int, b: int) -> Order:
    """Of ``a * b`` channels, or of twice as many in runs of two."""
    index = torch.arange(a * b * (2 if "runs" in kind else 1))
    if "strided" in kind:
        index = index.view(a, b, -1).transpose(0, 1).flatten()
    elif kind == "index":
        index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(a + 7 * b))]
    return Order.of(index, index.argsort())


def lay_out(x: Tensor, layout: str, sliced: bool) -> Tensor:
    """The same values in another layout; sliced: as a part of something wider, as gradients of concatenations are."""
    if layout == "last" and x.dim() in (4, 5):
        x = x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    elif layout == "transposed":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    return torch.cat([x, x, x], 1)[:, x.shape[1] : 2 * x.shape[1]] if sliced else x


@pytest.mark.parametrize(("kind", "space", "layout", "sliced"), product(KINDS, SPACES, LAYOUTS, (False, True)))
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 4), st.sampled_from([torch.float64, torch.bfloat16]))
@settings(max_examples=8, deadline=None)
def test_takes_what_the_index_names(kind, space, layout, sliced, a, b, batch, dtype):
    order = make_order(kind, a, b)
    values = torch.randn(batch, len(order.index), *space).to(dtype)
    x = lay_out(values, layout, sliced).detach().requires_grad_()
    y = take(x, order)
    assert torch.equal(y, values[:, order.index])
    assert torch.equal(order.planes(x), y)
    (grad,) = torch.autograd.grad(y, x, lay_out(y.detach(), layout, sliced))
    assert torch.equal(grad, values)
    take(x * 2, order).relu_().sum().backward()
    with torch.no_grad():
        assert torch.equal(take(x, order), y)


@pytest.mark.parametrize(("kind", "space", "layout"), product(KINDS, SPACES, LAYOUTS))
def test_gradients_may_be_expanded(kind, space, layout):
    order = make_order(kind, 3, 4)
    x = lay_out(torch.randn(2, len(order.index), *space), layout, False).requires_grad_()
    for gradient in (torch.randn(1, len(order.index), *space), torch.randn(2, 1, *space), torch.tensor(2.0)):
        gradient = gradient.expand(x.shape)
        (grad,) = torch.autograd.grad(take(x, order), x, gradient)
        (expected,) = torch.autograd.grad(x[:, order.index], x, gradient)
        assert torch.equal(grad, expected)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(512, 192), (8, 192, 7, 7), (2, 192, 16, 16)])
@pytest.mark.parametrize("kind", ["strided", "index"])
def test_large_ones_too(kind, shape, dtype, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        order = make_order(kind, 6, 32)
        assert order.kind is (Kind.STRIDED if kind == "strided" else Kind.INDEX)
        x = torch.randn(shape).to(dtype)
        for formatted in (x, lay_out(x, "last", False)):
            y = take(formatted, order)
            assert torch.equal(y, x[:, order.index])
            assert y.stride() == formatted.stride()
    finally:
        torch.set_num_threads(before)
