"""A permutation takes the channels that its index names, in every memory format, type and size."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sao_prune.blocks.permutation import Kind, Permutation

KINDS = ("identity", "strided", "strided in runs", "index")
SPACES = ((), (5,), (3, 4), (2, 3, 2), (0,))
LAYOUTS = ("contiguous", "last", "transposed")


def make_permutation(kind: str, a: int, b: int) -> Permutation:
    """Of ``a * b`` channels, or of twice as many in runs of two."""
    index = torch.arange(a * b * (2 if "runs" in kind else 1))
    if "strided" in kind:
        index = index.view(a, b, -1).transpose(0, 1).flatten()
    elif kind == "index":
        index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(a + 7 * b))]
    return Permutation.of(index, index.argsort())


def lay_out(x: Tensor, layout: str, sliced: bool) -> Tensor:
    """The same values in another layout; sliced: as a part of something wider, as gradients of concatenations are."""
    if layout == "last" and x.dim() in (4, 5):
        x = x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    elif layout == "transposed":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    return torch.cat([x, x, x], 1)[:, x.shape[1] : 2 * x.shape[1]] if sliced else x


@pytest.mark.parametrize(("kind", "space", "layout", "sliced"), list(product(KINDS, SPACES, LAYOUTS, (False, True))))
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 4), st.sampled_from([torch.float64, torch.bfloat16]))
@settings(max_examples=3, deadline=None)
def test_takes_what_the_index_names(kind, space, layout, sliced, a, b, batch, dtype):
    permutation = make_permutation(kind, a, b)
    values = torch.randn(batch, len(permutation.index), *space).to(dtype)
    x = lay_out(values, layout, sliced)
    for found in (permutation.channels(x), permutation.plain(x, 1), permutation.plain(x, 1 - x.dim())):
        assert torch.equal(found, values[:, permutation.index])
    assert torch.equal(permutation.reverse.channels(permutation.channels(x)), values)
    assert torch.equal(values[:, permutation.index][:, permutation.inverse], values)


@pytest.mark.parametrize(("kind", "space", "layout"), list(product(KINDS, SPACES, LAYOUTS)))
def test_plain_is_differentiable_and_so_is_its_derivative(kind, space, layout):
    permutation = make_permutation(kind, 3, 4)
    x = lay_out(torch.randn(2, len(permutation.index), *space), layout, False).requires_grad_()
    for gradient in (torch.randn(1, len(permutation.index), *space), torch.randn(2, 1, *space), torch.tensor(2.0)):
        gradient = gradient.expand(x.shape)
        (grad,) = torch.autograd.grad(permutation.plain(x, 1), x, gradient)
        (expected,) = torch.autograd.grad(x[:, permutation.index], x, gradient)
        assert torch.equal(grad, expected)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(512, 192), (8, 192, 7, 7), (2, 192, 16, 16)])
@pytest.mark.parametrize("kind", ["strided", "index"])
def test_large_ones_too(kind, shape, dtype, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        permutation = make_permutation(kind, 6, 32)
        assert permutation.kind is (Kind.STRIDED if kind == "strided" else Kind.INDEX)
        x = torch.randn(shape).to(dtype)
        for formatted in (x, lay_out(x, "last", False)):
            y = permutation.channels(formatted)
            assert torch.equal(y, x[:, permutation.index])
            assert y.stride() == formatted.stride()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("index", "kind", "dims"),
    [
        ([0, 1, 2, 3], "identity", (1, 1, 4)),
        ([0, 2, 1, 3], "strided", (2, 2, 1)),
        ([0, 1, 4, 5, 2, 3, 6, 7], "strided", (2, 2, 2)),
        ([0, 3, 1, 4, 2, 5], "strided", (2, 3, 1)),
        ([0, 2, 3, 1], "index", (0, 0, 0)),
        ([1, 0, 2, 3], "index", (0, 0, 0)),
    ],
)
def test_kinds(index, kind, dims):
    found = Permutation.of(torch.tensor(index), torch.tensor(index).argsort())
    assert (found.kind.value, found.dims) == (kind, dims)
    assert found.reverse.reverse.dims == dims
