"""Two linear layers and what is between them in one kernel give what they give one after the other."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import sao_prune
from sao_prune.blocks import BlockLinear, Execution, linear
from sao_prune.blocks.absorb import absorb
from sao_prune.blocks.deferred import Deferred, TooLate
from sao_prune.blocks.native import Half, build, native_pair
from sao_prune.topology import interleaved, ramanujan

from .cases import fuse, randomise, topologies

pytestmark = pytest.mark.skipif(build.library() is None, reason="no C compiler that the kernels can be built with")
ACTS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}
PAIR = ("gelu", "linear")


def _half(layer: BlockLinear, weight: Tensor, bias: Tensor | None) -> Half:
    return Half(weight, bias, layer.packing)


@st.composite
def _layers(draw: st.DrawFn) -> tuple[BlockLinear, BlockLinear]:
    one = draw(topologies(40))
    layers = BlockLinear(one, draw(st.booleans())), BlockLinear(draw(topologies(40, one.shape[0])), draw(st.booleans()))
    for layer in layers:
        randomise(layer)
    return layers


@given(_layers(), st.sampled_from([1, 15, 16, 37, 500]), st.sampled_from([0, 1, 3]), st.sampled_from(list(ACTS)))
@settings(max_examples=150, deadline=None)
def test_results_and_gradients(layers, length, images, act):
    one, two = layers
    x = torch.randn(images, one.in_features, length) if images else torch.randn(length, one.in_features)
    tensors = [x, *(t for layer in layers for t in (layer.packed_weight().detach(), layer.bias))]
    mine = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    theirs = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    y = native_pair(mine[0], _half(one, *mine[1:3]), _half(two, *mine[3:]), act, bool(images))

    def dense(layer: BlockLinear, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        packing = layer.packing
        return F.linear(x, torch.block_diag(*weight)[packing.outputs.index][:, packing.inputs.inverse], bias)

    rows = theirs[0].mT if images else theirs[0]
    expected = dense(two, ACTS[act](dense(one, rows, *theirs[1:3])), *theirs[3:])
    expected = expected.mT if images else expected
    close = {"rtol": 1e-4, "atol": 1e-4 * max(1.0, float(expected.detach().abs().max()))}
    torch.testing.assert_close(y.double(), expected, **close)
    with torch.no_grad():
        again = native_pair(mine[0], _half(one, *mine[1:3]), _half(two, *mine[3:]), act, bool(images))
    assert torch.equal(again, y)
    gradient = torch.randn_like(expected)
    found = torch.autograd.grad(y, [t for t in mine if t is not None], gradient.float())
    wanted = torch.autograd.grad(expected, [t for t in theirs if t is not None], gradient)
    scale = max(1.0, *(float(t.abs().max()) for t in wanted))
    kept = [
        None if t is None else t.detach() != 0 if t.dim() == 3 and i in (1, 3) else True for i, t in enumerate(mine)
    ]
    for one_found, one_wanted, real in zip(found, wanted, [k for k in kept if k is not None]):
        torch.testing.assert_close(one_found.double() * real, one_wanted * real, rtol=1e-3, atol=1e-4 * scale)


@given(st.sets(st.integers(0, 4), min_size=1))
@settings(max_examples=20, deadline=None)
def test_gradients_of_some(wanted):
    one, two = BlockLinear(interleaved(24, 16, 4)), BlockLinear(ramanujan(8, 24, 4))
    tensors = [torch.randn(40, 16), one.blocks, one.bias, two.blocks, two.bias]
    found = []
    for some in (wanted, range(5)):
        mine = [t.detach().clone().requires_grad_(i in some) for i, t in enumerate(tensors)]
        y = native_pair(mine[0], _half(one, *mine[1:3]), _half(two, *mine[3:]), "gelu", False)
        found.append(dict(zip(sorted(some), torch.autograd.grad(y.sum(), [mine[i] for i in sorted(some)]))))
    assert all(torch.equal(found[0][i], found[1][i]) for i in wanted)


def test_what_is_not_a_number_stays_where_it_is():
    one, two = BlockLinear(interleaved(32, 32, 4)), BlockLinear(interleaved(32, 32, 4))
    halves = [_half(layer, layer.blocks.detach(), None) for layer in (one, two)]
    x = torch.randn(37, 32)
    clean = native_pair(x, *halves, "gelu", False)
    bad = x.clone()
    bad[5] = float("nan")
    dirty = native_pair(bad, *halves, "gelu", False)
    assert dirty[5].isnan().all()
    others = torch.arange(37) != 5
    assert torch.equal(dirty[others], clean[others])
    leaf = bad.clone().requires_grad_()
    native_pair(leaf, *halves, "gelu", False).sum().backward()
    assert leaf.grad[others].isfinite().all()
    weight = one.blocks.detach().clone().requires_grad_()
    native_pair(x, _half(one, weight, None), halves[1], "gelu", False).sum().backward()
    assert weight.grad.isfinite().all()


class _Block(nn.Module):
    """As in a transformer."""

    def __init__(self, dropout: float = 0.0, make=interleaved) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.fc1, self.fc2 = BlockLinear(make(48, 16, 4)), BlockLinear(make(16, 48, 4))
        self.drop, self.name = nn.Dropout(dropout), nn.Identity()
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.name(self.drop(self.act(self.fc1(self.norm(x))))))


class _Tokens(_Block):
    """As in a mixer: along the tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.drop(self.act(self.fc1(x.transpose(1, 2))))).transpose(1, 2)


def _fused(net: nn.Module, x: Tensor) -> nn.Module:
    for module in net.modules():
        if isinstance(module, BlockLinear):
            randomise(module)
            module.run_as(Execution(native=True))
    fuse(net, x)
    return net


def _apart(net: nn.Module) -> nn.Module:
    net = copy.deepcopy(net)
    for module in net.modules():
        if isinstance(module, BlockLinear):
            module.__dict__.update(execution=Execution(native=True), followers=())
    return net


@pytest.fixture
def pairs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One activation for every call of the kernel."""
    seen: list[str] = []

    def noted(x: Tensor, first: Half, second: Half, act: str, planes: bool) -> Tensor:
        seen.append(act)
        return native_pair(x, first, second, act, planes)

    monkeypatch.setattr(linear, "native_pair", noted)
    return seen


@pytest.mark.parametrize("kind", [_Block, _Tokens])
@pytest.mark.parametrize("make", [interleaved, ramanujan])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_model(kind, make, mode, pairs):
    x = torch.randn(3, 7, 16) if kind is _Block else torch.randn(3, 16, 7)
    net = _fused(kind(make=make), x)
    assert net.fc1.execution.fused == PAIR
    assert net.fc2.execution.fused == ()
    assert str(net.fc1.execution) == "blocks, native + gelu + linear"
    with mode():
        y, expected = net(x), _apart(net)(x)
    assert pairs == ["gelu"]
    assert type(y) is Tensor
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    if mode is torch.enable_grad:
        found = [
            torch.autograd.grad(m(x).pow(2).sum(), list(m.parameters()), allow_unused=True) for m in (net, _apart(net))
        ]
        for one, other in zip(*found):
            if other is not None:
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))


def test_a_model_its_copies_and_what_it_was(pairs):
    net = nn.Sequential(nn.Linear(64, 512), nn.GELU(), nn.Linear(512, 64), nn.LayerNorm(64), nn.Linear(64, 4))
    sao_prune.apply(net, sparsity=0.875, seed=0, skip_first=False, method=sao_prune.SAO(topology="interleaved"))
    x = torch.randn(300, 64)
    expected = net(x)
    sao_prune.compact(net, example_input=x)
    for layer in (net[0], net[2]):
        layer.fold()
        layer.run_as(Execution(native=True))
    absorb(net)
    fuse(net, x)
    for model in (net, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert len(pairs) == 3
    sao_prune.expand(net)
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-4)


def test_dropout_that_drops_comes_between(pairs):
    x = torch.randn(3, 7, 16)
    net = _fused(_Block(0.5), x)
    results = []
    for model in (net, _apart(net)):
        torch.manual_seed(3)
        results.append(model.train()(x))
    assert pairs == []
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    net.eval()(x)
    assert pairs == ["gelu"]


def test_somebody_else_reads_it_too(pairs):
    x = torch.randn(3, 7, 16)
    net = _fused(_Block(), x)
    kept = []
    act = net.act.forward
    net.act.forward = lambda t: kept.append(act(t)) or kept[-1]  # no hook, so nothing tells
    (net(x).sum() + kept[0].square().sum()).backward()
    assert pairs == ["gelu"]
    assert type(kept[0]) is Deferred
    plain = _apart(net)
    plain.act = nn.GELU()
    hidden = plain.act(plain.fc1(plain.norm(x)))
    (plain(x).sum() + hidden.square().sum()).backward()
    for one, other in zip(net.parameters(), plain.parameters()):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-3 * float(other.grad.abs().max()))
    with pytest.raises(TooLate, match="no gradients of it"):
        kept[0].retain_grad()


@pytest.mark.parametrize("name", ["act", "drop", "name", "fc2"])
def test_hooks_see_what_they_would_see(name, pairs):
    x = torch.randn(3, 7, 16)
    net = _fused(_Block(), x)
    seen: list[Tensor] = []
    handle = net.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    net(x)
    assert pairs == []
    assert type(seen[0]) is Tensor
    handle.remove()
    net(x)
    assert pairs == ["gelu"]


class _Two(nn.Module):
    """Two layers read one activation, and one layer reads another twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(BlockLinear(interleaved(16, 16, 4)) for _ in range(7))

    def forward(self, x: Tensor) -> Tensor:
        a, b, c, d, e, f, g = self.layers
        both = F.gelu(a(x))
        twice = F.gelu(d(x))
        return b(both) + c(both) + e(twice) + e(twice * 2) + torch.tanh(g(F.relu(f(x))))


def test_only_a_sole_reader_that_has_nothing_to_follow_is_joined(pairs):
    x = torch.randn(9, 16)
    net = _fused(_Two(), x)
    fused = [layer.execution.fused for layer in net.layers]
    assert fused == [("gelu",), (), (), ("gelu",), (), ("relu",), ("tanh",)]
    torch.testing.assert_close(net(x), _apart(net)(x), rtol=1e-4, atol=1e-4)
    assert pairs == []


def test_second_derivatives(pairs):
    x = torch.randn(3, 7, 16)
    net = _fused(_Block(), x)
    found = []
    for model in (net, _apart(net)):
        start = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(model(start).pow(3).sum(), start, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), [start, *model.parameters()], allow_unused=True))
    assert pairs == ["gelu"]
    for one, other in zip(*found):
        if other is not None:
            torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3 * float(other.abs().max()))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant, pairs):
    net = _fused(_Block(), torch.randn(3, 7, 16))
    x, other = (torch.ones(3, 7, 16, requires_grad=True) for _ in range(2))
    checkpoint(net, x, use_reentrant=reentrant).sum().backward()
    _apart(net)(other).sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-3, atol=1e-3)


def test_an_input_that_was_changed_meanwhile():
    x = torch.randn(5, 16)
    net = _fused(nn.Sequential(BlockLinear(interleaved(16, 16, 4)), nn.GELU(), BlockLinear(interleaved(16, 16, 4))), x)
    assert net[0].execution.fused == PAIR
    with torch.no_grad():
        hidden = net[1](net[0](x))
        x += 1
        with pytest.raises(TooLate, match="changed in place"):
            net[2](hidden)


def test_nothing_of_what_is_between_is_kept():
    net = _fused(_Block(), torch.randn(3, 7, 16))
    sizes: list[int] = []

    def noted(t: Tensor) -> Tensor:
        sizes.append(t.numel())
        return t

    for model, kept in ((net, False), (_apart(net), True)):
        sizes.clear()
        with torch.autograd.graph.saved_tensors_hooks(noted, lambda t: t):
            model(torch.randn(3, 7, 16))
        assert (3 * 7 * 48 in sizes) == kept


class _Keeps(_Block):
    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.act(self.fc1(self.norm(x)))
        return x + self.fc2(self.kept)


def test_a_hidden_tensor_that_is_put_aside_is_computed(pairs):
    x = torch.randn(3, 7, 16)
    net = _fused(_Keeps(), x)
    assert net.fc1.execution.fused == ("gelu",)
    with torch.inference_mode():
        given = x.clone()
        net(given)
        given.zero_()
    torch.testing.assert_close(net.kept, net.act(_apart(net).fc1(net.norm(x))), rtol=1e-4, atol=1e-4)
    assert pairs == []


@pytest.mark.parametrize("how", ["compile", "wrapper"])
def test_compiled_parts_get_ordinary_tensors(how, pairs):
    x = torch.randn(3, 7, 16)
    net = _fused(_Block(), x)
    plain = _apart(net)
    try:
        if how == "compile":
            net.fc2.compile(backend="eager")
        else:
            net.fc2 = torch.compile(net.fc2, backend="eager")
        net(x).square().sum().backward()
    finally:
        torch.compiler.reset()
    plain(x).square().sum().backward()
    assert pairs == []
    for one, other in zip(net.parameters(), plain.parameters()):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-3 * float(other.grad.abs().max()))


def test_a_parametrization_is_computed_once():
    x = torch.randn(3, 7, 16)
    net = _fused(_Block(), x)
    calls = []

    class Counted(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            calls.append(1)
            return w * 1

    nn.utils.parametrize.register_parametrization(net.fc2, "blocks", Counted())
    calls.clear()
    with torch.autocast("cpu", torch.bfloat16):
        net(x)
    assert len(calls) == 1
