"""The operators: registered as torch asks for it, equal to dense layers, differentiable to any order, never unsafe."""

from __future__ import annotations

from itertools import cycle, islice, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from sao_prune.blocks import operators, stacks
from sao_prune.blocks.backends import cpu
from sao_prune.blocks.flops import register_flops

from .calls import ACTS, COLS, GROUPS, IMAGES, NAMES, ROWS, TOKENS, Call, make
from .cases import LAYOUTS, assert_all_close, needs_compiler


def _operands(name: str) -> tuple[str, ...]:
    return TOKENS if name in ("linear", "mlp", "stack") else IMAGES


def _covering() -> list[tuple[str, str, str, str]]:
    """Every operator with every layout, and on the way with every activation and every layout of its operand."""
    acts, found = cycle(ACTS), []
    for name in NAMES:
        operands = cycle(_operands(name))
        for layout in LAYOUTS:
            act = next(acts)
            found.append((name, layout, next(operands), "relu" if name == "mlp" and not act else act))
    return found


CASES = _covering()
_ids = ["-".join(case) for case in CASES]


@st.composite
def _calls(draw: st.DrawFn, backend: str) -> Call:
    name = draw(st.sampled_from(NAMES))
    act = draw(st.sampled_from(list(ACTS)[name == "mlp" :]))
    layout, operand = draw(st.sampled_from(list(LAYOUTS))), draw(st.sampled_from(_operands(name)))
    torch.manual_seed(draw(st.integers(0, 99)))
    return make(name, layout, operand, act, backend, draw(st.booleans()), draw(st.sampled_from([1, 1, 2])))


def _gradients(y: Tensor, leaves: list[Tensor], gradient: Tensor, second: bool) -> list[Tensor | None]:
    first = torch.autograd.grad(y, leaves, gradient.to(y.dtype), create_graph=second)
    if not second:
        return list(first)
    total = sum((f * torch.linspace(-1, 1, f.numel(), dtype=f.dtype).view(f.shape)).sum() for f in first)
    return [*first, *torch.autograd.grad(total, leaves, allow_unused=True)]


def _check(call: Call, precise: Call, tolerance: float, second: bool) -> None:
    """Result and derivatives are those of dense layers in double precision, and the result lies as the operand."""
    mine, theirs = call.leaves(), precise.leaves()
    y, expected = call.run(mine), precise.run(theirs, precise.dense)
    assert y.dtype is mine[0].dtype
    gradient = torch.randn_like(expected)
    found = _gradients(y, mine, gradient, second)
    wanted = _gradients(expected, theirs, gradient, second)
    assert_all_close([y.double()], [expected], tolerance)
    # One scale for all: what cancels to zero, as a bias before a norm, keeps the rounding of what it came from.
    scale = max(1.0, *(float(w.detach().abs().max()) for w in wanted if w is not None))
    for one, other in zip(found, wanted):
        if one is not None and other is not None:
            torch.testing.assert_close(one.double(), other, rtol=0, atol=tolerance * scale)
    for leaf, grad in zip(mine, found):
        assert grad is not None
        assert (grad.shape, grad.dtype) == (leaf.shape, leaf.dtype)
    with torch.no_grad():
        assert_all_close([call.run(mine).double()], [expected], tolerance)


@given(_calls(""), st.booleans())
@settings(max_examples=60, deadline=None)
def test_agreement_with_dense_layers(call, second):
    _check(call, call, 1e-8, second)


@needs_compiler
@given(_calls("cpu"), st.booleans())
@settings(max_examples=60, deadline=None)
def test_agreement_of_the_kernels_with_dense_layers(call, second):
    _check(call.to(torch.float32), call, 2e-4, second)


@pytest.mark.parametrize(("name", "layout", "operand", "act"), CASES, ids=_ids)
def test_derivatives(name, layout, operand, act):
    torch.manual_seed(0)
    call = make(name, layout, operand, act, "", bias=layout != "identity")
    leaves = call.leaves()

    def run(*leaves: Tensor) -> Tensor:
        return call.run(list(leaves))

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


_CHECKED = [(*case, backend) for case, backend in zip(islice(CASES, 0, None, 3), cycle(["", "cpu"]))]
_CHECKED += [
    (name, "strided", "rows", "gelu", "cpu") for name in ("linear", "mlp", "stack", "conv2", "norm2", "norm2 eval")
]


@pytest.mark.parametrize(("name", "layout", "operand", "act", "backend"), _CHECKED, ids=map("-".join, _CHECKED))
def test_registration(name, layout, operand, act, backend):
    call = make(name, layout, operand, act, backend).to(torch.float32 if backend else torch.float64)
    given = tuple(None if t is None else t.detach().requires_grad_() for t in call.inputs)
    torch.library.opcheck(call.operator.overload, (*given, *call.rest))


@pytest.mark.parametrize("backend", ["", "cpu"])
@pytest.mark.parametrize("name", NAMES)
def test_results_lie_in_memory_as_compilers_are_told(name, backend):
    for operand, act in product(_operands(name), ("", "gelu", "relu")):
        if name == "mlp" and not act:
            continue
        call = make(name, "irregular", operand, act, backend).to(torch.float32 if backend else torch.float64)
        with FakeTensorMode() as mode:
            given = [mode.from_tensor(t) if isinstance(t, Tensor) else t for t in (*call.inputs, *call.rest)]
            told = call.operator.overload(*given, True)
        found = call.operator.overload(*call.inputs, *call.rest, True)
        pairs = [(found, told)] if isinstance(found, Tensor) else list(zip(found, told))
        assert [t.stride() for t, _ in pairs] == [t.stride() for _, t in pairs], (operand, act)


def test_backward_operators_are_registered_too():
    for name, act in (("linear", "gelu"), ("conv2", "tanh"), ("norm2", "relu"), ("mlp", "silu"), ("stack", "tanh")):
        call = make(name, "irregular", "rows", act, "").to(torch.float32)
        found = call.operator.overload(*call.inputs, *call.rest, True)
        y, *kept = (found,) if isinstance(found, Tensor) else found
        kept = [k if k.numel() else None for k in kept]
        backward = getattr(torch.ops.sao_prune, call.operator.name + "_backward").default
        count = sum(isinstance(r, Tensor) or r is None for r in call.rest)
        own = *call.inputs, *call.rest[:count], y, *kept, *call.rest[count:], [True] * len(call.inputs)
        torch.library.opcheck(backward, (torch.randn_like(y), *own), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name", ["linear", "mlp", "stack", "conv2", "norm2"])
def test_second_derivatives_where_the_gradient_depends_on_the_result(name):
    call, found = make(name, "irregular", "rows", "tanh", ""), []
    for how in (None, call.dense):
        leaves = call.leaves()
        first = torch.autograd.grad(call.run(leaves, how).sin().sum(), leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(f.square().sum() for f in first), leaves))
    assert_all_close(list(found[0]), list(found[1]), 1e-7)


@pytest.mark.parametrize("name", ["linear", "mlp", "stack", "conv2", "norm2"])
def test_only_what_is_asked_for_is_differentiated(name):
    call = make(name, "irregular", "rows", "gelu", "cpu").to(torch.float32)
    leaves = call.leaves()
    full = torch.autograd.grad(call.run(leaves).sum(), leaves)
    for chosen in range(len(leaves)):
        some = [t.detach().requires_grad_(i == chosen) for i, t in enumerate(leaves)]
        (found,) = torch.autograd.grad(call.run(some).sum(), some[chosen])
        torch.testing.assert_close(found, full[chosen], rtol=1e-5, atol=1e-5)


# ---- Operands that do not belong together ---------------------------------------------------------------------------


def _spoilt(call: Call) -> dict[str, tuple[tuple[Tensor | None, ...], tuple]]:
    """Calls with one operand that is wrong."""
    inputs, rest = list(call.inputs), list(call.rest)
    x, blocks, bias = inputs[:3]
    dim = 1 if len(rest) > 6 and call.operator not in (operators.block_mlp, stacks.OPERATORS[3]) else -1
    other = {
        k: list(inputs) for k in ("channels", "blocks", "bias", "ints", "mixed", "mixed blocks", "scalar", "kernel")
    }
    other["channels"][0] = x.narrow(dim, 0, COLS - 1)
    other["blocks"][1] = blocks[:-1]
    other["bias"][2] = bias[:-1]
    other["ints"][0] = x.long()
    other["mixed"][0] = x.to(torch.bfloat16)
    other["mixed blocks"][1] = blocks.double()
    other["scalar"][0] = x.sum()
    other["kernel"][1] = blocks.unsqueeze(-1).expand(*blocks.shape, 3)
    found = {k: (tuple(v), tuple(rest)) for k, v in other.items()}
    found["sets"] = tuple(inputs), (rest[0][:-1], *rest[1:])
    found["topology"] = (
        tuple(inputs),
        (torch.full_like(rest[0], rest[0][0]), torch.full_like(rest[1], rest[0][0]), *rest[2:]),
    )
    if len(inputs) == 5 and call.operator is operators.block_conv_norm:
        found["gain"] = (*inputs[:3], inputs[3][:1], inputs[4]), tuple(rest)
        found["geometry"] = tuple(inputs), (*rest[:-4], [], [], [], 1)
    whole, count = [*inputs, *rest], len(inputs)
    for i, value in enumerate(whole):
        instead: dict[str, object] = {}
        if isinstance(value, Tensor):
            instead["meta"] = value.to("meta")
            if i >= count:
                gone = value.clone()
                gone.untyped_storage().resize_(0)
                instead["freed"] = gone
        elif isinstance(value, str) and value and value in ACTS:
            instead["activation"] = "softmax"
        elif isinstance(value, list) and value and isinstance(value[0], str):
            several = value[:-1], [*value, ""], ["gelu", *value[1:]], [*value[:-1], "softmax"]
            instead = {f"activations {names}": names for names in several}
        elif isinstance(value, int) and i == len(whole) - 1:
            instead = {"no merge": 0, "negative merge": -1}
        for what, spoilt in instead.items():
            own = [*whole[:i], spoilt, *whole[i + 1 :]]
            found[f"{what} {i}"] = tuple(own[:count]), tuple(own[count:])
    return found


@pytest.mark.parametrize("backend", ["", "cpu"])
@pytest.mark.parametrize("name", ["linear", "mlp", "stack", "conv0", "conv1", "conv2", "norm2", "norm2 eval"])
def test_operands_that_do_not_fit_are_refused(name, backend):
    call = make(name, "strided", "rows", "gelu", backend).to(torch.float32)
    for what, (inputs, rest) in _spoilt(call).items():
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            pytest.fail(f"{what}: {call.operator.overload(*inputs, *rest)}")


@pytest.mark.parametrize("backend", ["", "cpu"])
@pytest.mark.parametrize("name", ["linear", "mlp", "stack", "conv1", "conv2", "norm2"])
def test_gradients_of_another_shape_are_refused(name, backend):
    call = make(name, "strided", "rows", "relu", backend).to(torch.float32)
    found = call.operator.overload(*call.inputs, *call.rest, True)
    y, *kept = (found,) if isinstance(found, Tensor) else found
    kept = [k if k.numel() else None for k in kept]
    backward = getattr(torch.ops.sao_prune, call.operator.name + "_backward").default
    count = sum(isinstance(r, Tensor) or r is None for r in call.rest)
    own = *call.inputs, *call.rest[:count], y, *kept, *call.rest[count:], [True] * len(call.inputs)
    assert backward(torch.ones_like(y), *own)[0].shape == call.inputs[0].shape
    for dim in range(y.dim()):
        for grad in (y.narrow(dim, 0, y.shape[dim] - 1), torch.cat([y, y], dim), y.unsqueeze(0)):
            with pytest.raises(RuntimeError, match="expected"):
                backward(grad, *own)


@needs_compiler
def test_kernels_take_only_what_they_can_read():
    assert not cpu.ready(torch.ones(1, device="meta"), torch.ones(1))
    assert not cpu.ready(torch.ones(1), torch.ones(1, dtype=torch.float64))
    assert not cpu.ready(torch.ones(0))
    gone = torch.ones(4)
    gone.untyped_storage().resize_(0)
    assert not cpu.ready(gone)
    assert cpu.ready(torch.ones(1), None)


@pytest.mark.parametrize("name", ["linear", "conv2", "norm2", "mlp", "stack"])
def test_costs_are_those_of_the_blocks(name):
    register_flops()
    call = make(name, "strided", "rows", "gelu", "")
    counts = []
    for how in (None, call.dense):
        leaves = call.leaves()
        with FlopCounterMode(display=False) as counter:
            call.run(leaves, how).sum().backward()
        counts.append(counter.get_total_flops())
    if name == "mlp":  # what is between is computed twice
        assert counts[0] == 2 * 15 * (ROWS * COLS // GROUPS * 4 + 6 * ROWS // 2 * 3)
    elif name == "stack":
        assert counts[0] == 2 * 18 * 3 * (ROWS * COLS // GROUPS + 2 * 6 * ROWS // 2)
    else:
        assert counts[0] * GROUPS == counts[1]


@pytest.mark.parametrize(("act", "backend"), list(product(ACTS, ["", "cpu"])))
def test_activations_far_out(act, backend):
    topology = LAYOUTS["identity"](32, 32, 32)
    sets = ((topology.row_set * 4 + 6).to(torch.uint8), (topology.col_set * 4 + 6).to(torch.uint8))
    x = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 3.9, -3.9, 6.0, -6.0, 30.0, -30.0, 100.0, -100.0, -1e38, float("nan")])
    x = x.repeat(32, 3)[:, :32].contiguous().requires_grad_()
    y = operators.block_linear(x, torch.ones(32, 1, 1), None, *sets, act, backend)[0]
    expected = ACTS[act](x)
    torch.testing.assert_close(y, expected, equal_nan=True, rtol=2e-6, atol=2e-6)
    (mine,), (theirs,) = (torch.autograd.grad(t.sum(), x) for t in (y, expected))
    finite = theirs.isfinite()
    torch.testing.assert_close(mine[finite], theirs[finite], rtol=2e-6, atol=2e-6)
