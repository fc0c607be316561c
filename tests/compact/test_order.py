"""An order takes the channels its index names, in every memory format, type and size, forwards and backwards."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sao_prune.compact.order import Kind, Order, take


@st.composite
def orders(draw: st.DrawFn) -> Order:
    """Identity, strided with and without runs, and irregular."""
    a, b, run = (draw(st.integers(1, 6)) for _ in range(3))
    index = torch.arange(a * b * run)
    if draw(st.booleans()):
        index = index.view(a, b, run).transpose(0, 1).flatten()
    else:
        index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))]
    return Order.of(index, index.argsort())


@given(
    orders(), st.sampled_from([(), (5,), (3, 4), (2, 3, 2), (0,)]), st.integers(0, 4),
    st.sampled_from(["contiguous", "last", "transposed"]),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_takes_what_the_index_names(order, space, batch, layout, dtype):
    x = torch.randn(batch, len(order.index), *space).to(dtype)
    if layout == "last" and len(space) in (2, 3):
        x = x.contiguous(memory_format=torch.channels_last if len(space) == 2 else torch.channels_last_3d)
    elif layout == "transposed":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    x.requires_grad_()
    y = take(x, order)
    assert torch.equal(y, x[:, order.index])
    assert torch.equal(order.planes(x), y)
    (grad,) = torch.autograd.grad(y, x, y.detach())
    assert torch.equal(grad, x)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(512, 192), (8, 192, 7, 7), (2, 192, 16, 16)])
def test_large_ones_too(shape, dtype, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        strided = torch.arange(192).view(6, 32).t().flatten()
        for index in (strided, torch.randperm(192, generator=torch.Generator().manual_seed(0))):
            order = Order.of(index, index.argsort())
            x = torch.randn(shape).to(dtype)
            for formatted in (x, x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x):
                y = take(formatted, order)
                assert torch.equal(y, x[:, index])
                assert y.stride() == formatted.stride()
        assert Order.of(strided, strided.argsort()).kind is Kind.STRIDED
    finally:
        torch.set_num_threads(before)
