"""Few rows: a sample, a token at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from sao_prune.blocks import BlockConv2d, BlockLinear, operators
from sao_prune.blocks.backends.cpu import few
from sao_prune.topology import BlockTopology, interleaved, ramanujan

from .calls import ACTS
from .cases import NATIVE, needs_compiler, randomise, topologies, uneven

pytestmark = needs_compiler


def layer_of(topology: BlockTopology, bias: bool = True) -> BlockLinear:
    layer = BlockLinear(topology, bias)
    randomise(layer)
    layer.run_as(NATIVE)
    return layer


def reference(layer: BlockLinear, x: Tensor, activation: str = "") -> Tensor:
    bias = None if layer.bias is None else layer.bias.double()
    return ACTS[activation](nn.functional.linear(x.double(), layer.weight.double(), bias))


def assert_near(found: Tensor, wanted: Tensor) -> None:
    assert found.dtype is torch.float32
    found, wanted = found.detach(), wanted.detach()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max() + 1))


@settings(max_examples=60, deadline=None)
@given(
    topology=topologies(80),
    shape=st.sampled_from([(1,), (7,), (8,), (16,), (17,), (1, 1), (2, 3), (1, 4, 2), (0,)]),
    activation=st.sampled_from(list(ACTS)),
    bias=st.booleans(),
)
def test_any_sets_and_any_number_of_rows(
    topology: BlockTopology, shape: tuple[int, ...], activation: str, bias: bool
) -> None:
    layer = layer_of(topology, bias)
    x = torch.randn(*shape, layer.in_features)
    y, _ = operators.block_linear(x, layer.blocks, layer.bias, *layer.sets, activation, "cpu")
    if y.numel():
        assert_near(y, reference(layer, x, activation))
    assert y.shape == (*shape, layer.out_features)


@pytest.mark.parametrize("shape", [(1, 1024), (16, 1024), (1, 1, 1024)])
@pytest.mark.parametrize(("rows", "groups"), [(1024, 32), (3000, 4), (1024, 8)])
def test_large_layers_whatever_the_number_of_threads(rows: int, groups: int, shape: tuple[int, ...]) -> None:
    layer, x = layer_of(ramanujan(rows, 1024, groups)), torch.randn(shape)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(layer(x))
    torch.set_num_threads(before)
    assert torch.equal(*found)
    assert_near(found[0], reference(layer, x))


ORDERS: dict[str, Callable[[int, int], Tensor]] = {
    "rows": torch.randn,
    "column-major": lambda rows, n: torch.randn(n, rows).t(),
    "transposed tokens": lambda rows, n: torch.randn(1, n, rows).mT,
    "one token each": lambda rows, n: torch.randn(rows, n, 1).mT,
    "channels moved last": lambda rows, n: torch.randn(1, n, rows, 1).movedim(1, -1),
    "sliced": lambda rows, n: torch.randn(rows, 2 * n)[:, n:],
    "a row again and again": lambda rows, n: torch.randn(n).expand(rows, n),
    "a number again and again": lambda rows, n: torch.randn(rows, 1).expand(rows, n),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("n", [1, 8])
def test_values_and_strides_are_those_that_compilers_are_told(n: int, order: str) -> None:
    first = layer_of(interleaved(6, n, 1 if n == 1 else 2))
    second = layer_of(interleaved(1, 6, 1)), layer_of(interleaved(4, 1, 1))
    for rows in (1, 2, 8, 9, 16, 17):
        x = ORDERS[order](rows, n)
        own = x, first.blocks.detach(), first.bias.detach()
        for act in ("", "gelu"):
            y = same_strides(operators.block_linear.overload, *own, *first.sets, act, "cpu")
            assert_near(y, reference(first, x, act))
        hidden, wanted = y, reference(first, x, "gelu")
        for layer in second:
            hidden = same_strides(operators.block_linear.overload, hidden, *values(layer), *layer.sets, "", "cpu")
            wanted = reference(layer, wanted)
        assert_near(hidden, wanted)
        sets = *first.sets, *second[0].sets
        for backend in ("cpu", ""):
            y = same_strides(operators.block_mlp.overload, *own, *values(second[0]), *sets, "gelu", backend)
            assert_near(y, reference(second[0], reference(first, x, "gelu")))


def values(layer: BlockLinear) -> tuple[Tensor, Tensor]:
    return layer.blocks.detach(), layer.bias.detach()


def same_strides(operator: Callable[..., object], *arguments: object) -> Tensor:
    """The result, once it is sure that its strides are those of the fake one."""
    with FakeTensorMode() as mode:
        told = first_of(operator(*[mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments]))
    found = first_of(operator(*arguments))
    assert (found.shape, found.stride()) == (told.shape, told.stride())
    return found


def first_of(results: object) -> Tensor:
    first = results[0] if isinstance(results, tuple) else results
    assert isinstance(first, Tensor)
    return first


def test_two_layers_and_what_is_between() -> None:
    first, second = layer_of(uneven(70, 40, 6)), layer_of(interleaved(40, 70, 5))
    x = torch.randn(2, 3, 40, requires_grad=True)
    sets = (*first.sets, *second.sets)
    y, *_ = operators.block_mlp(x, first.blocks, first.bias, second.blocks, second.bias, *sets, "gelu", "cpu")
    assert_near(y, reference(second, reference(first, x, "gelu")))
    (dx,) = torch.autograd.grad(y.sum(), x)
    (wanted,) = torch.autograd.grad(reference(second, reference(first, x, "gelu")).sum(), x)
    torch.testing.assert_close(dx, wanted, rtol=1e-4, atol=1e-3)


def test_images_that_are_one_window() -> None:
    layer = BlockConv2d(interleaved(24, 16, 4), 5)
    randomise(layer)
    layer.run_as(NATIVE)
    for x in (torch.randn(3, 16, 5, 5), torch.randn(3, 16, 5, 5).contiguous(memory_format=torch.channels_last)):
        assert_near(layer(x), nn.functional.conv2d(x.double(), layer.weight.double(), layer.bias.double()))


@pytest.mark.parametrize("cols", [3, 12, 16, 21, 40])
def test_what_is_not_finite_stays_in_its_block_and_row(cols: int) -> None:
    layer = layer_of(interleaved(36, 4 * cols, 4), bias=False)
    x = torch.randn(3, 4 * cols)
    x[1, 2] = float("nan")
    found = layer(x).isnan()
    assert not found[[0, 2]].any()
    assert torch.equal(found[1], layer.weight[:, 2] != 0)
    with torch.no_grad():
        layer.blocks[1, 3] = float("inf")
    channel = (layer.topology.row_set == 1).nonzero()[3]
    bad = ~layer(torch.randn(2, 4 * cols)).isfinite()
    assert torch.equal(bad.nonzero(), torch.tensor([[0, channel], [1, channel]]))


@pytest.mark.parametrize("shape", [(1, 64), (8, 64), (2, 2, 64)])
def test_they_have_a_kernel_of_their_own(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    call = few.call
    monkeypatch.setattr(few, "call", lambda name, *arguments: (asked.append(name), call(name, *arguments))[1])
    layer_of(interleaved(64, 64, 8))(torch.randn(shape))
    layer_of(interleaved(64, 64, 8))(torch.randn(9, 64))
    assert asked == ["few_forward"]
