"""Linear layers one behind the other in one call: whatever their number, sizes and sets, and whatever is asked for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from sao_prune.blocks import stacks
from sao_prune.blocks.backends import cpu
from sao_prune.blocks.modules import block_slots, blocks_shape
from sao_prune.topology import BlockTopology, encode_sets, interleaved

from .calls import ACTS
from .cases import assert_all_close, needs_compiler, topologies


class _Stack:
    """Layers with random values, in single precision, and the same as dense ones in double precision."""

    def __init__(self, layers: list[BlockTopology], bias: list[bool], acts: list[str]) -> None:
        self.layers, self.acts = layers, acts
        self.sets = [(encode_sets(t.row_set), encode_sets(t.col_set)) for t in layers]
        self.blocks = [torch.randn(blocks_shape(t, ())) for t in layers]
        self.biases = [torch.randn(t.shape[0]) if has else None for t, has in zip(layers, bias)]

    def __call__(self, x: Tensor, backend: str = "cpu") -> Tensor:
        return stacks.block_stack(x, list(zip(self.blocks, self.biases)), self.sets, self.acts, backend)

    def leaves(self) -> list[Tensor]:
        return [t for pair in zip(self.blocks, self.biases) for t in pair if t is not None]

    def dense(self, x: Tensor, leaves: list[Tensor]) -> Tensor:
        given = iter(leaves)
        for t, bias, act in zip(self.layers, self.biases, self.acts):
            rows, cols = t.shape
            empty = torch.zeros(rows * cols, dtype=torch.float64)
            weight = empty.index_copy(0, block_slots(t), next(given).flatten()).view(rows, cols)
            x = ACTS[act](F.linear(x, weight, None if bias is None else next(given)))
        return x


@st.composite
def _stacks(draw: st.DrawFn) -> _Stack:
    torch.manual_seed(draw(st.integers(0, 999)))
    count = draw(st.integers(2, stacks.MOST))
    layers = [draw(topologies())]
    while len(layers) < count:
        layers.append(draw(topologies(cols=layers[-1].shape[0])))
    acts = [draw(st.sampled_from(["relu", "tanh"])) for _ in layers[1:]] + [draw(st.sampled_from(["", "relu", "tanh"]))]
    return _Stack(layers, [draw(st.booleans()) for _ in layers], acts)


@needs_compiler
@given(_stacks(), st.integers(1, 150), st.sampled_from(["rows", "columns", "tokens", "sliced"]), st.data())
@settings(max_examples=60, deadline=None)
def test_results_and_gradients_are_those_of_dense_layers(stack, rows, kind, data):
    n = stack.layers[0].shape[1]
    x = torch.randn(rows, n)
    if kind == "columns":
        x = x.t().contiguous().t()
    elif kind == "tokens":
        x = torch.randn(3, rows, n)
    elif kind == "sliced":
        x = torch.randn(rows, n + 3)[:, 2:-1]
    inputs = [x, *stack.leaves()]
    asked = data.draw(st.lists(st.booleans(), min_size=len(inputs), max_size=len(inputs)).filter(any))
    precise = [t.detach().double().requires_grad_(need) for t, need in zip(inputs, asked)]
    for t, need in zip(inputs, asked):
        t.requires_grad_(need)
    threads = torch.get_num_threads()
    torch.set_num_threads(data.draw(st.sampled_from([1, 2, 3])))
    try:
        y, expected = stack(x), stack.dense(precise[0], precise[1:])
        grad = torch.randn_like(expected)
        if kind == "columns":
            grad = grad.t().contiguous().t()
        found = torch.autograd.grad(y, [t for t in inputs if t.requires_grad], grad.float())
        with torch.no_grad():
            unkept = stack(x)
    finally:
        torch.set_num_threads(threads)
    wanted = torch.autograd.grad(expected, [t for t in precise if t.requires_grad], grad)
    assert torch.equal(y, unkept)
    assert y.stride() == F.linear(x, torch.zeros(y.shape[-1], n)).stride() or kind == "columns"
    assert_all_close([y.double(), *(f.double() for f in found)], [expected, *wanted], 1e-3)


@needs_compiler
@pytest.mark.parametrize("act", ["relu", "tanh"])
def test_the_kernels_compute_what_the_layers_compute_one_by_one(act, monkeypatch):
    layers = [interleaved(48, 40, 8), interleaved(32, 48, 4), interleaved(64, 32, 16)]
    torch.manual_seed(0)
    stack = _Stack(layers, [True] * 3, [act] * 3)
    x = torch.randn(70, 40, requires_grad=True)
    inputs = [x, *(t.requires_grad_() for t in stack.leaves())]

    def run() -> list[Tensor]:
        y = stack(x)
        return [y, *torch.autograd.grad(y.square().sum(), inputs)]

    together, again = run(), run()
    assert all(map(torch.equal, together, again))
    monkeypatch.setattr(cpu, "stack_suits", lambda x: False)
    assert_all_close(together, run(), 1e-5)


@needs_compiler
def test_what_lies_behind_the_last_row_does_not_count():
    """Infinities of an earlier, longer batch stay in no buffer, nor those of padded sets."""
    layers = [BlockTopology(torch.arange(9) % 4, torch.arange(10) % 5 % 4), interleaved(7, 9, 3)]
    stack = _Stack(layers, [True, True], ["relu", "tanh"])
    leaves = [t.requires_grad_() for t in stack.leaves()]
    for rows in (200, 17, 33, 64, 129):
        stack(torch.full((rows + 40, 10), float("nan"))).sum().backward()
        found = torch.autograd.grad(stack(torch.randn(rows, 10)).sum(), leaves)
        assert all(f.isfinite().all() for f in found)


@needs_compiler
def test_layers_that_do_not_belong_together_are_refused():
    stack = _Stack([interleaved(8, 8, 2), interleaved(8, 6, 2)], [True, True], ["relu", ""])
    with pytest.raises(RuntimeError, match="does not take the 8 results"):
        stack(torch.randn(20, 8))
    stack = _Stack([interleaved(8, 8, 2)] * 2, [True, True], ["relu", ""])
    stack.blocks[1] = stack.blocks[1].double()
    with pytest.raises(RuntimeError, match="operands of one type"):
        stack(torch.randn(20, 8))
    stack = _Stack([interleaved(8, 8, 2)] * 2, [True, True], ["relu", ""])
    stack.biases[1] = torch.randn(7)
    with pytest.raises(RuntimeError, match="bias of shape"):
        stack(torch.randn(20, 8))
