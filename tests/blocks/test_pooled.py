"""Max pooling as an operator, and in compact models."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import sao_prune
from sao_prune.blocks import Execution, Plan, compact, expand
from sao_prune.blocks.max_pool import max_pool
from sao_prune.blocks.modules import NativeMaxPool2d
from sao_prune.blocks.plan import Choice

from .cases import needs_compiler

_FORMATS = [torch.contiguous_format, torch.channels_last]


@st.composite
def _cases(draw: st.DrawFn) -> tuple[tuple[int, ...], list[int], list[int], list[int]]:
    kernel = [draw(st.integers(1, 5)) for _ in range(2)]
    padding = [draw(st.integers(0, k // 2)) for k in kernel]
    shape = draw(st.integers(1, 3)), draw(st.integers(1, 40)), *(draw(st.integers(k, 12)) for k in kernel)
    return shape, kernel, [draw(st.integers(1, 4)) for _ in range(2)], padding


@needs_compiler
@given(_cases(), st.sampled_from(_FORMATS), st.sampled_from([torch.float32, torch.float64]), st.booleans())
@settings(max_examples=150, deadline=None)
def test_agreement_with_torch(case, order, dtype, coarse):
    shape, *options = case
    x = torch.randn(shape, dtype=dtype)
    x = (x.round() if coarse else x).contiguous(memory_format=order).requires_grad_()
    y, expected = max_pool(x, *options)[0], F.max_pool2d(x, *options)
    assert torch.equal(y, expected)
    gradient = torch.randn_like(expected)
    found, wanted = (torch.autograd.grad(z, x, gradient)[0] for z in (y, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert found.stride() == x.stride()


@needs_compiler
@pytest.mark.parametrize("channels", [5, 16, 20])
def test_what_has_no_greatest(channels):
    values = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0]
    x = torch.tensor(values)[torch.randint(5, (2, channels, 9, 8), generator=torch.Generator().manual_seed(0))]
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    for options in ((2, 2, 0), (3, 2, 1), (3, 1, 1)):
        y, expected = max_pool(x, *([n, n] for n in options))[0], F.max_pool2d(x, *options)
        torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
        found, wanted = (torch.autograd.grad(z, x, torch.ones_like(z))[0] for z in (y, expected))
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("order", _FORMATS)
def test_registration_and_derivatives(order, dtype):
    x = torch.randn(2, 3, 5, 6, dtype=dtype).contiguous(memory_format=order).requires_grad_()
    options = [3, 2], [2, 1], [1, 0]
    torch.library.opcheck(torch.ops.sao_prune.max_pool.default, (x, *options, True))
    torch.library.opcheck(torch.ops.sao_prune.max_pool.default, (x, *options, False))
    if dtype is torch.float64:
        torch.autograd.gradcheck(lambda x: max_pool(x, *options)[0], x)
        torch.autograd.gradgradcheck(lambda x: max_pool(x, *options)[0], x)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 3, 4), ([2, 2], [2, 2], [0, 0])),
        ((2, 3, 4, 4), ([2, 2], [2, 2], [0])),
        ((2, 3, 4, 4), ([2, 2], [0, 2], [0, 0])),
        ((2, 3, 4, 4), ([2, 2], [2, 2], [2, 0])),
        ((2, 3, 4, 4), ([5, 2], [2, 2], [0, 0])),
        ((2, 3, 40, 40), ([17, 17], [2, 2], [0, 0])),
        ((2, 3, 40, 40), ([2, 2], [2, 2**64], [0, 0])),
        ((2, 3, 40, 40), ([2, 2], [2**63, 2], [0, 0])),
    ],
)
def test_other_windows_are_refused(shape, options):
    with pytest.raises(RuntimeError, match="expected windows of at most 256 places"):
        max_pool(torch.randn(shape), *options)


@needs_compiler
@pytest.mark.parametrize("stride", [2**31, 2**40, 2**63, 2**64])
def test_strides_that_no_kernel_has_room_for_are_torchs(stride):
    """A kernel's numbers would wrap around, and a stride of 2^64 end in a division by zero."""
    x = torch.randn(2, 16, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    found = []
    for kind in (nn.MaxPool2d, NativeMaxPool2d):
        try:
            y = kind(2, stride=stride)(x)
            found.append(torch.autograd.grad(y.sum(), x)[0])
        except (RuntimeError, ValueError) as error:
            found.append(type(error))
    assert found[0] is found[1] or torch.equal(*found)


def test_places_of_another_result_are_refused():
    x, options = torch.randn(2, 16, 8, 8).contiguous(memory_format=torch.channels_last), ([2, 2], [2, 2], [0, 0])
    y, places = torch.ops.sao_prune.max_pool(x, *options, True)
    backward = torch.ops.sao_prune.max_pool_backward
    for wrong in (places[:1], places.int(), None):
        with pytest.raises(RuntimeError, match="expected a gradient and places, as bytes, of shape"):
            backward(y, x, None, wrong, *options, [True])
    with pytest.raises(RuntimeError, match="expected a gradient and places"):
        backward(y[:, :8], x, None, places, *options, [True])


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    convs = [nn.Conv2d(32, 32, 3, padding=1) for _ in range(4)]
    pools = [nn.MaxPool2d(2), nn.MaxPool2d(3, 1, 1), nn.MaxPool2d(2, ceil_mode=True)]
    net = nn.Sequential(nn.Conv2d(3, 32, 3), *(m for pair in zip(convs, pools) for m in pair), convs[3])
    sao_prune.apply(net, groups=4, skip_last=False)
    return net


@needs_compiler
def test_pools_of_a_compact_model(tmp_path):
    net, x = _net(), torch.randn(2, 3, 23, 22)
    kinds = [type(m) for m in net]
    expected = net(x)
    compact(net, example_input=x)
    native = [type(m) is NativeMaxPool2d for m in net]
    assert native == [False, False, True, False, True, False, False, False]
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)
    twin = copy.deepcopy(net)
    torch.testing.assert_close(twin(x), expected, rtol=1e-4, atol=1e-5)
    traced = torch.fx.symbolic_trace(net)
    torch.testing.assert_close(traced(x), expected, rtol=1e-4, atol=1e-5)
    exported = torch.export.export(net, (x,)).module()
    torch.testing.assert_close(exported(x), expected, rtol=1e-4, atol=1e-5)
    sao_prune.save(net, tmp_path / "net.safetensors")
    loaded = _net()
    sao_prune.load(loaded, tmp_path / "net.safetensors")
    assert [type(m) is NativeMaxPool2d for m in loaded] == native
    torch.testing.assert_close(loaded(x), expected, rtol=1e-4, atol=1e-5)
    expand(net)
    assert [type(m) for m in net] == kinds


_ODD: list[dict[str, Any]] = [
    {"kernel_size": [2, 2]},
    {"kernel_size": (2,)},
    {"kernel_size": 2, "stride": (2,)},
    {"kernel_size": 2, "padding": (1,)},
    {"kernel_size": np.int64(2)},
]


@needs_compiler
@pytest.mark.parametrize("options", _ODD, ids=str)
def test_options_in_every_spelling_of_torch(options):
    net, x = _net(), torch.randn(2, 3, 23, 22)
    net[2] = nn.MaxPool2d(**options)
    expected = net(x)
    compact(net, example_input=x)
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize(
    "change",
    [
        {"kernel_size": 3},
        {"kernel_size": (3,)},
        {"kernel_size": 20},
        {"stride": None},
        {"padding": 1},
        {"dilation": 2},
        {"ceil_mode": True},
        {"return_indices": True},
    ],
    ids=str,
)
def test_options_that_change_afterwards(change):
    net, x = _net(), torch.randn(2, 16, 23, 22).contiguous(memory_format=torch.channels_last)
    pool = copy.deepcopy(net[2])
    compact(net)
    assert type(net[2]) is NativeMaxPool2d
    for each in (net[2], pool):
        each.__dict__.update(change)
    found, expected = net[2](x), pool(x)
    assert type(found) is type(expected)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@needs_compiler
@pytest.mark.parametrize("verb", ["compact", "compact by a plan", "load", "load what runs otherwise"])
def test_pools_and_formats_after_an_error(verb, tmp_path):
    """Of a model of which a part is compact, or that runs as no plan says."""
    torch.manual_seed(0)
    stages = [(nn.Conv2d(n, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)) for n in (3, 32, 32)]
    whole, x = nn.Sequential(*(m for stage in stages for m in stage)), torch.randn(2, 3, 33, 32)
    sao_prune.apply(whole, groups=4, skip_last=False)
    net = copy.deepcopy(whole)
    plan = compact(whole, example_input=x).plan
    sao_prune.save(whole, tmp_path / "net.safetensors")
    if verb == "load what runs otherwise":
        compact(net, plan=Plan({name: Choice(Execution()) for name in ("4", "8")}))
    else:
        compact(net[4])
    kinds = [type(m) for m in net]
    strides = [p.stride() for p in net.parameters()]
    act: Any = partial(compact, net, plan=plan if "plan" in verb else None)
    if "load" in verb:
        act = partial(sao_prune.load, net, tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match="does not run on the example input"):
        act(example_input=torch.randn(2, 4, 33, 32))
    assert [type(m) for m in net] == kinds
    assert [p.stride() for p in net.parameters()] == strides
