"""The Triton kernels in the interpreter, against dense products in float64; run by ``test_triton.py``.

The interpreter must be chosen before Triton is imported, so these run in a process of their own.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from triton.runtime.interpreter import InterpretedFunction, interpreter_builder

from sao_prune.blocks import BlockLinear, operators
from sao_prune.blocks.backends import triton as backend
from sao_prune.blocks.backends.torch import room_for
from sao_prune.blocks.backends.triton import launch, steps, tiles, tuning
from sao_prune.blocks.backends.triton.tiles import Tile
from sao_prune.blocks.functional import MATRIX
from sao_prune.topology import BlockTopology

ACTIVATIONS = {"": lambda h: h, "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}
EVERYTHING = (True, True, True)


@pytest.fixture(autouse=True)
def fast_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Helpers are called as they are, and sums of integers not checked: nine tenths of the interpreter's time.

    A kernel's own call has prepared the language for its helpers, too.
    """
    plain = InterpretedFunction.__call__

    def call(self: InterpretedFunction, *args: object, **kwargs: object) -> object:
        ours = self.fn.__module__ == steps.__name__
        return self.rewrite()(*args, **kwargs) if ours else plain(self, *args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "__call__", call)
    monkeypatch.setattr(interpreter_builder, "options", replace(interpreter_builder.options, sanitize_overflow=False))


@pytest.fixture(autouse=True)
def any_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any tile that a device might take, of shapes other than this one as well, but none of many steps."""
    chance = random.Random(0)
    monkeypatch.setattr(tiles, "_TRIED", 10_000)

    def choose(key: Hashable, found: Sequence[Tile], run: Callable[[Tile], int], device: torch.device) -> Tile:
        return min(chance.sample(found, min(len(found), 8)), key=lambda t: (products(key, t), chance.random()))

    monkeypatch.setattr(tuning, "choose", choose)


def products(key: Hashable, tile: Tile) -> int:
    """Products of one matrix by another that a tile makes of a shape, up to a factor."""
    rows, groups, r, c = (key[i] for i in (1, 3, 4, 5))  # type: ignore[index]
    return -(-rows // tile.BM) * -(-groups // tile.packed) * -(-r // tile.BR) * -(-c // tile.BC)


def table(groups: int, size: int, channels: int, kind: str, seed: int) -> Tensor:
    """A table of channels; ``sparse`` leaves out some and has padding."""
    if kind == "identity":
        return torch.arange(groups * size, dtype=torch.int32)
    if kind == "strided":
        return torch.arange(groups * size, dtype=torch.int32).view(size, groups).t().flatten()
    generator = torch.Generator().manual_seed(seed)
    real = min(groups * size, channels)
    positions = torch.randperm(groups * size, generator=generator)[:real]
    filled = torch.full((groups * size,), -1, dtype=torch.int32)
    filled[positions] = torch.randperm(channels, generator=generator)[:real].int()
    return filled


def dense(weight: Tensor, inputs: Tensor, outputs: Tensor, n: int, m: int) -> Tensor:
    """The weight with zeros between the blocks, differentiable."""
    g, r, c = weight.shape[:3]
    full = weight.new_zeros(m + 1, n + 1, *weight.shape[3:])
    rows, columns = outputs.long().view(g, r, 1), inputs.long().view(g, 1, c)
    full = full.index_put((rows.expand(g, r, c), columns.expand(g, r, c)), weight)
    return full[:m, :n]  # padding was written to the last row and column


def close(got: Tensor | None, want: Tensor, tolerance: float) -> None:
    assert got is not None
    want = want.detach()
    assert got.shape == want.shape
    assert not got.isnan().any()
    scale = max(float(want.abs().max()), 1e-2) if want.numel() else 1.0
    assert not want.numel() or float((got.double() - want).abs().max()) <= tolerance * scale


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody writes is NaN."""
    new_empty, like = Tensor.new_empty, torch.empty_like

    def spoiled(x: Tensor) -> Tensor:
        return x.fill_(float("nan")) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty_like", lambda x, **k: spoiled(like(x, **k)))
    monkeypatch.setattr(Tensor, "new_empty", lambda x, *s, **k: spoiled(new_empty(x, *s, **k)))


def check_linear(
    rows: int,
    groups: int,
    r: int,
    c: int,
    *,
    kinds: tuple[str, str] = ("index", "index"),
    spare: tuple[int, int] = (0, 0),
    activation: str = "",
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    needs: tuple[bool, bool, bool] = EVERYTHING,
    apart: int = 0,
) -> None:
    torch.manual_seed(rows + groups)
    n, m = groups * c + spare[0], groups * r + spare[1]
    inputs, outputs = table(groups, c, n, kinds[0], 1), table(groups, r, m, kinds[1], 2)
    x = torch.randn(rows, n + apart, dtype=dtype)[:, :n]
    weight = (torch.randn(groups, r, c) / c**0.5).to(dtype)
    b = torch.randn(m).to(dtype) if bias else None
    grad = torch.randn(rows, m).to(dtype)
    assert backend.suits_linear(x, weight, b, activation)
    y, saved = backend.linear_forward(x, weight, b, inputs, outputs, m, activation, keep=True)
    assert (saved is not None) == (activation in ("gelu", "silu"))
    left = saved if saved is not None else y
    got = backend.linear_backward(grad, x, weight, inputs, outputs, needs, activation, left)
    leaves = [t.double().requires_grad_() for t in (x, weight, torch.zeros(m) if b is None else b)]
    want = ACTIVATIONS[activation](F.linear(leaves[0], dense(leaves[1], inputs, outputs, n, m), leaves[2]))
    tolerance = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    assert y.dtype is dtype
    close(y, want, tolerance)
    for one, asked, ref in zip(got, needs, torch.autograd.grad(want, leaves, grad.double())):
        if asked:
            close(one, ref, tolerance)
        else:
            assert one is None


@pytest.mark.parametrize("kinds", list(product(("identity", "strided", "index"), repeat=2)))
def test_linear_of_every_order(kinds: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)
    check_linear(40, 8, 16, 32, kinds=kinds)
    check_linear(33, 5, 12, 7, kinds=kinds, activation="relu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_linear_with_every_epilogue(activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)
    for bias in (True, False):
        check_linear(20, 4, 6, 9, activation=activation, bias=bias, spare=(3, 5))


@pytest.mark.parametrize("needs", list(product((True, False), repeat=3)))
def test_linear_gives_the_gradients_that_are_asked_for(needs: tuple[bool, bool, bool]) -> None:
    check_linear(13, 3, 4, 5, activation="gelu", needs=needs, spare=(0, 2))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    rows=st.sampled_from([0, 1, 2, 15, 64, 130]),
    groups=st.integers(1, 9),
    r=st.sampled_from([1, 2, 3, 8, 17, 40]),
    c=st.sampled_from([1, 2, 5, 16, 33]),
    spare=st.tuples(st.integers(-4, 4), st.integers(-4, 4)),
    activation=st.sampled_from(list(ACTIVATIONS)),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    apart=st.sampled_from([0, 3]),
)
def test_linear_of_any_shape(rows, groups, r, c, spare, activation, dtype, apart) -> None:  # type: ignore[no-untyped-def]
    # Fewer channels than positions: some are padding. More: some channels are in no group.
    spare = max(spare[0], 1 - groups * c), max(spare[1], 1 - groups * r)
    check_linear(rows, groups, r, c, spare=spare, activation=activation, dtype=dtype, apart=apart)


def test_literal_product() -> None:
    # Two groups: outputs 2, 0 see inputs 1, 3; output 1 sees input 0; channel 2 of the inputs is in no group.
    weight = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 9.0], [9.0, 9.0]]])
    inputs = torch.tensor([1, 3, 0, -1], dtype=torch.int32)
    outputs = torch.tensor([2, 0, 1, -1], dtype=torch.int32)
    x = torch.tensor([[1.0, 10.0, 7.0, 100.0]])
    bias = torch.tensor([0.0, 0.5, 0.0, -6.0])
    y, _ = backend.linear_forward(x, weight, bias, inputs, outputs, 4)
    assert y.tolist() == [[430.0, 5.5, 210.0, -6.0]]
    dx, dw, db = backend.linear_backward(torch.ones(1, 4), x, weight, inputs, outputs, EVERYTHING)
    assert dx.tolist() == [[5.0, 4.0, 0.0, 6.0]]  # type: ignore[union-attr]
    assert dw.tolist() == [[[10.0, 100.0], [10.0, 100.0]], [[1.0, 0.0], [0.0, 0.0]]]  # type: ignore[union-attr]
    assert db.tolist() == [1.0, 1.0, 1.0, 1.0]  # type: ignore[union-attr]


def test_gradients_summed_in_parts_repeat_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    apart = launch.parts

    def several(tile, work):  # type: ignore[no-untyped-def]
        counts.append(min(5, -(-work.rows // tile.BM)))
        assert apart(tile, work) >= 1
        return counts[-1]

    monkeypatch.setattr(launch, "parts", several)
    monkeypatch.setattr(tuning, "choose", lambda key, tiles, run, device: min(tiles, key=lambda t: t.BM))
    check_linear(80, 2, 16, 16, spare=(2, 2), activation="tanh")
    assert counts == [5]
    x, weight = torch.randn(80, 32), torch.randn(2, 16, 16)
    channels = torch.arange(32, dtype=torch.int32)
    grad = torch.randn(80, 32)
    first, second = (backend.linear_backward(grad, x, weight, channels, channels, EVERYTHING) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))  # type: ignore[arg-type]


CONVS = {
    "3x3": ((3, 3), (1, 1), (1, 1), (1, 1)),
    "1x1": ((1, 1), (1, 1), (0, 0), (1, 1)),
    "1x1, stride 2": ((1, 1), (2, 2), (0, 0), (1, 1)),
    "3x3, stride 2": ((3, 3), (2, 2), (1, 1), (1, 1)),
    "2x3, strides 3 and 1, dilations 2 and 1": ((2, 3), (3, 1), (0, 2), (2, 1)),
    "3x3, dilation 3, padding 3": ((3, 3), (1, 1), (3, 3), (3, 3)),
}


def check_conv(
    batch: int,
    groups: int,
    r: int,
    c: int,
    image: tuple[int, int],
    geometry: str,
    *,
    kinds: tuple[str, str] = ("index", "index"),
    spare: tuple[int, int] = (0, 0),
    activation: str = "",
    dtype: torch.dtype = torch.float32,
    needs: tuple[bool, bool, bool] = EVERYTHING,
    crop: int = 0,
) -> None:
    torch.manual_seed(batch + groups)
    size, *rest = CONVS[geometry]
    n, m = groups * c + spare[0], groups * r + spare[1]
    inputs, outputs = table(groups, c, n, kinds[0], 3), table(groups, r, m, kinds[1], 4)
    height, width = image
    x = torch.randn(batch, height + crop, width + crop, n)[:, crop:, :width, :].permute(0, 3, 1, 2).to(dtype)
    weight = (torch.randn(groups, r, c, *size) / (c * size[0] * size[1]) ** 0.5).to(dtype)
    b = torch.randn(m).to(dtype)
    assert backend.suits_conv(x, weight, b, activation)
    y, saved = backend.conv_forward(x, weight, b, inputs, outputs, m, *rest, activation, keep=True)
    leaves = [t.double().requires_grad_() for t in (x, weight, b)]
    full = dense(leaves[1], inputs, outputs, n, m)
    want = ACTIVATIONS[activation](F.conv2d(leaves[0], full, leaves[2], *rest))
    grad = torch.randn(want.shape).to(dtype)  # not channels last
    left = saved if saved is not None else y
    got = backend.conv_backward(grad, x, weight, inputs, outputs, needs, *rest, activation, left)
    tolerance = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    close(y, want, tolerance)
    for one, asked, ref in zip(got, needs, torch.autograd.grad(want, leaves, grad.double())):
        if asked:
            close(one, ref, tolerance)
        else:
            assert one is None


@pytest.mark.parametrize("geometry", CONVS)
def test_conv_of_every_geometry(geometry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)
    check_conv(2, 3, 5, 4, (7, 6), geometry, activation="relu", spare=(1, 2))
    check_conv(1, 4, 16, 16, (5, 8), geometry, kinds=("strided", "identity"))


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    batch=st.sampled_from([0, 1, 3]),
    groups=st.sampled_from([1, 2, 5]),
    r=st.sampled_from([1, 3, 16]),
    c=st.sampled_from([1, 2, 9, 20]),
    image=st.tuples(st.integers(7, 9), st.integers(7, 9)),
    geometry=st.sampled_from(list(CONVS)),
    spare=st.tuples(st.integers(-2, 2), st.integers(-2, 2)),
    activation=st.sampled_from(list(ACTIVATIONS)),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    needs=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    crop=st.integers(0, 1),
)
def test_conv_of_any_shape(batch, groups, r, c, image, geometry, spare, activation, dtype, needs, crop) -> None:  # type: ignore[no-untyped-def]
    spare = max(spare[0], 1 - groups * c), max(spare[1], 1 - groups * r)
    check_conv(
        *(batch, groups, r, c, image, geometry),
        spare=spare,
        activation=activation,
        dtype=dtype,
        needs=needs,
        crop=crop,
    )


def test_one_pixel_and_small_images() -> None:
    check_conv(3, 2, 4, 4, (1, 1), "1x1")
    check_conv(3, 2, 4, 4, (1, 1), "3x3")
    with pytest.raises(ValueError, match="smaller than"):
        check_conv(1, 2, 4, 4, (1, 1), "2x3, strides 3 and 1, dilations 2 and 1")


def test_gradients_of_other_layouts() -> None:
    x, weight = torch.randn(6, 8), torch.randn(2, 4, 4)
    channels = torch.arange(8, dtype=torch.int32)
    grad = torch.randn(6, 8)
    want = backend.linear_backward(grad, x, weight, channels, channels, EVERYTHING)
    for other in (grad.t().contiguous().t(), grad.repeat(1, 2)[:, :8]):
        got = backend.linear_backward(other, x, weight, channels, channels, EVERYTHING)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(want, got))  # type: ignore[arg-type]
    one = torch.ones(1).expand(6, 8)
    got = backend.linear_backward(one, x, weight, channels, channels, EVERYTHING)
    assert torch.allclose(got[2], torch.full((8,), 6.0))  # type: ignore[arg-type]


def test_what_does_not_suit() -> None:
    x, weight = torch.randn(6, 8), torch.randn(2, 4, 4)
    assert backend.suits_linear(x, weight)
    assert not backend.suits_linear(x.t().contiguous().t(), weight)
    assert not backend.suits_linear(x.double(), weight.double())
    assert not backend.suits_linear(x.half(), weight)
    assert not backend.suits_linear(x, weight, None, "elu")
    assert not backend.suits_linear(x[None], weight)
    assert not backend.suits_linear(x, weight.mT)
    image, kernel = torch.randn(2, 8, 5, 5), torch.randn(2, 4, 4, 3, 3)
    assert not backend.suits_conv(image, kernel)
    assert backend.suits_conv(image.contiguous(memory_format=torch.channels_last), kernel)


@pytest.mark.parametrize(
    ("channels", "said"),
    [
        ([0, 1, 1, 2], "channel 1 2 times"),
        ([0, 1, 2, 8], "0 to 8 of 8"),
        ([0, 1, -2, 3], "-2 to 3"),
        ([0] * 3, "shape"),
    ],
)
def test_bad_tables(channels: list[int], said: str) -> None:
    bad, good = torch.tensor(channels, dtype=torch.int32), torch.arange(4, dtype=torch.int32)
    x, weight = torch.randn(2, 8), torch.randn(2, 2, 2)
    with pytest.raises(ValueError, match=said):
        backend.linear_forward(x, weight, None, bad, good, 4)
    with pytest.raises(ValueError, match="int32"):
        backend.linear_forward(x, weight, None, good.long(), good, 4)


def test_a_changed_table_is_looked_at_again() -> None:
    x, weight = torch.tensor([[1.0, 2.0]]), torch.tensor([[[1.0]], [[10.0]]])
    channels, outputs = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    assert backend.linear_forward(x, weight, None, channels, outputs, 2)[0].tolist() == [[1.0, 20.0]]
    channels.copy_(torch.tensor([1, 0]))
    assert backend.linear_forward(x, weight, None, channels, outputs, 2)[0].tolist() == [[2.0, 10.0]]


def test_float32_is_multiplied_as_torch_is_told() -> None:
    assert launch.precision(torch.float32, conv=False) == "ieee"
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    assert launch.precision(torch.float32, conv=False) == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = before
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        assert launch.precision(torch.float32, conv=True) == "ieee"


def test_the_benchmark_of_layers_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--smoke", "--only", "Linear"])
    import gpu

    gpu.main()
    said = capsys.readouterr().out
    assert "training step | ours |" in said
    assert "failed" not in said


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("order", ["rows", "columns", "transposed tokens", "channels moved last"])
def test_results_lie_as_compilers_are_told(order: str, channels: int) -> None:
    layer = BlockLinear(BlockTopology(torch.zeros(3, dtype=torch.long), torch.zeros(channels, dtype=torch.long)))
    x = {
        "rows": torch.randn(5, channels),
        "columns": torch.randn(channels, 5).t(),
        "transposed tokens": torch.randn(2, channels, 5).mT,
        "channels moved last": torch.randn(1, channels, 2, 5).permute(0, 2, 3, 1),
    }[order]
    y, _ = operators.block_linear(x, layer.blocks, layer.bias, *layer.sets, "", "triton")
    torch.testing.assert_close(y, F.linear(x, layer.weight, layer.bias), check_stride=False)
    assert y.stride() == room_for(x, 3, (), MATRIX).stride()
