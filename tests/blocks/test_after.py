"""Kernels that take norms and activations with them give what torch gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from sao_prune.blocks import BlockConv2d, BlockLinear, BlockModule, Execution
from sao_prune.blocks.native import After, Norm, build, native_conv, native_matmul, native_plane_matmul
from sao_prune.topology import interleaved

from .cases import randomise, topologies

pytestmark = pytest.mark.skipif(build.library() is None, reason="no C compiler that the kernels can be built with")
ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda t: t, "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh,
}  # fmt: skip
_acts = st.sampled_from(list(ACTS))
_norms = st.sampled_from(["none", "training", "eval"])


class _Case:
    """A layer's weight, bias and norm, and the same in double precision."""

    def __init__(self, layer: BlockModule, norm: str, act: str) -> None:
        self.packing, self.norm, self.act = layer.packing, norm, act
        m = layer.topology.shape[0]
        normed = [torch.randn(m), torch.randn(m)] if norm != "none" else [None, None]
        randomise(layer)
        self.tensors = [layer.packed_weight().detach(), torch.randn(m), *normed]
        self.known = torch.randn(m), torch.rand(m) + 0.5

    def after(self, gain: Tensor | None, offset: Tensor | None) -> After:
        if self.norm == "none":
            return After(act=self.act)
        return After(Norm(*(t.clone() for t in self.known), gain, offset, self.norm == "training", 0.3, 1e-3), self.act)

    def check(
        self, x: Tensor, fused: Callable[[Tensor, Tensor, Tensor, After], Tensor], plain: Callable[..., Tensor]
    ) -> None:
        """Outputs, gradients and running averages."""

        def single(*t: Tensor) -> tuple[Tensor, After]:
            after = self.after(*t[3:])
            return fused(*t[:3], after), after

        def double(*t: Tensor) -> tuple[Tensor, list[Tensor]]:
            y, averages = plain(*t[:3]), [k.double() for k in self.known]
            if self.norm != "none":
                y = F.batch_norm(y, *averages, *t[3:], self.norm == "training", 0.3, 1e-3)
            return ACTS[self.act](y), averages

        mine = [None if t is None else t.detach().requires_grad_() for t in (x, *self.tensors)]
        theirs = [None if t is None else t.detach().double().requires_grad_() for t in mine]
        (y, after), (expected, averages) = single(*mine), double(*theirs)
        close = {"rtol": 1e-4, "atol": 1e-4 * max(1.0, float(expected.detach().abs().max()))}
        torch.testing.assert_close(y.double(), expected, **close)
        if after.norm is not None:
            torch.testing.assert_close(after.norm.running_mean.double(), averages[0], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(after.norm.running_var.double(), averages[1], rtol=1e-3, atol=1e-4)
        gradient = torch.randn_like(expected)
        found = torch.autograd.grad(y, [t for t in mine if t is not None], gradient.float())
        wanted = torch.autograd.grad(expected, [t for t in theirs if t is not None], gradient)
        scale = max(float(t.abs().max()) for t in wanted)
        for number, (one, other) in enumerate(zip(found, wanted)):
            # Places of the weight that hold no block's value have no gradient that counts.
            kept = self.tensors[0] != 0 if number == 1 else True
            torch.testing.assert_close(one.double() * kept, other * kept, rtol=1e-3, atol=1e-4 * max(scale, 1.0))
        if self.norm != "training":
            with torch.no_grad():
                torch.testing.assert_close(single(*mine)[0].double(), expected, **close)


@given(
    topologies(24),
    st.sampled_from([1, 3]),
    st.sampled_from([(2, 5, 9), (3, 14, 14), (1, 33, 6), (1, 4, 70)]),
    st.booleans(),
    _norms,
    _acts,
)
@settings(max_examples=150, deadline=None)
def test_images(topology, kernel, space, channels_last, norm, act):
    layer = BlockConv2d(topology, kernel, padding=kernel // 2)
    case = _Case(layer, norm, act)
    x = torch.randn(space[0], layer.in_channels, *space[1:])
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    case.check(
        x,
        lambda x, w, b, after: native_conv(x, w, b, layer.packing, (1, 1), layer._plain, after),
        lambda x, w, b: layer._plain(x, w, b),
    )


@given(
    topologies(40),
    st.sampled_from([2, 15, 37, 200]),
    st.booleans(),
    st.sampled_from([None, True, False]),
    _norms,
    _acts,
)
@settings(max_examples=150, deadline=None)
def test_matrices(topology, batch, columns, features_first, norm, act):
    layer = BlockLinear(topology)
    case = _Case(layer, norm, act)
    x = torch.randn(batch, layer.in_features)
    if columns:
        x = x.t().contiguous().t()
    case.check(
        x,
        lambda x, w, b, after: native_matmul(x, w, b, layer.packing, features_first, after),
        lambda x, w, b: F.linear(x, _dense(layer, w), b),
    )


@given(topologies(40), st.sampled_from([3, 50]), _acts)
@settings(max_examples=40, deadline=None)
def test_transposed_tokens(topology, length, act):
    layer = BlockLinear(topology)
    case = _Case(layer, "none", act)
    case.check(
        torch.randn(2, layer.in_features, length),
        lambda x, w, b, after: native_plane_matmul(x, w, b, layer.packing, after),
        lambda x, w, b: F.linear(x.mT, _dense(layer, w), b).mT,
    )


def _dense(layer: BlockLinear, packed: Tensor) -> Tensor:
    """The dense weight of packed matrices."""
    packing = layer.packing
    whole = torch.block_diag(*packed)
    return whole[packing.outputs.index][:, packing.inputs.inverse]


@pytest.mark.parametrize("act", list(ACTS))
def test_activations_far_out(act):
    layer = BlockLinear(interleaved(32, 32, 32), bias=False)
    x = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 3.9, -3.9, 6.0, -6.0, 30.0, -30.0, 100.0, -100.0, -1e38, float("nan")])
    x = x.repeat(32, 3)[:, :32].contiguous().requires_grad_()
    y = native_matmul(x, torch.ones(32, 1, 1), None, layer.packing, None, After(act=act))
    expected = ACTS[act](x)
    torch.testing.assert_close(y, expected, equal_nan=True, rtol=2e-6, atol=2e-6)
    (mine,), (theirs,) = (torch.autograd.grad(t.sum(), x) for t in (y, expected))
    torch.testing.assert_close(mine, theirs, equal_nan=True, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_variances_far_from_zero_do_not_cancel(offset):
    layer, _ = _conv_norm(offset)
    x = torch.randn(4, 16, 24, 24)
    norm = Norm(torch.zeros(16), torch.ones(16), None, None, True, 1.0, 0.0)
    y = native_conv(x, layer.packed_weight(), layer.bias, layer.packing, (1, 1), layer._plain, After(norm))
    z = layer._plain(x.double(), layer.packed_weight().double(), layer.bias.double())
    torch.testing.assert_close(norm.running_var.double(), z.var((0, 2, 3)), rtol=2e-3, atol=0)
    assert float(y.var((0, 2, 3), correction=0).sub(1).abs().max()) < 1e-2


def _conv_norm(offset: float = 0.0) -> tuple[BlockConv2d, nn.Sequential]:
    layer = BlockConv2d(interleaved(16, 16, 4), 3, padding=1)
    randomise(layer)
    with torch.no_grad():
        layer.bias += offset
    layer.run_as(Execution(native=True))
    return layer, nn.Sequential(layer, nn.BatchNorm2d(16), nn.ReLU(inplace=True))
