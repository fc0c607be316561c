"""Layers are called by name, from several threads or partly compiled, and models give back whatever they like."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from timm.layers import BatchNormAct2d, ScaledStdConv2d, StdConv2dSame
from torch import Tensor, nn

import sao_prune
from sao_prune.blocks import BlockLinear

from .cases import needs_compiler


@pytest.fixture(autouse=True)
def _few_programs():
    """Programs of all models of a class count together, also for the tests that follow."""
    yield
    torch.compiler.reset()


class _Named(nn.Module):
    """Calls its layers with ``input=``, as torch names it."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),
            nn.MaxPool2d(2),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))

    def forward(self, x: Tensor, named: bool) -> Tensor:
        for part in (self.features, self.head):
            for module in part:
                x = module(input=x) if named else module(x)
            x = x.mean((2, 3)) if part is self.features else x
        return x


def _pruned(model: nn.Module, groups: int = 4, **options) -> nn.Module:
    sao_prune.apply(model, groups=groups, seed=0, **options)
    return model.eval()


@pytest.mark.parametrize("made", [None, True, False])
def test_layers_are_called_by_name_too(made):
    torch.manual_seed(0)
    model, x = _pruned(_Named()), torch.randn(2, 3, 12, 12)
    y = model(x, True)
    report = sao_prune.compact(model, example_input=None if made is None else (x, made))
    assert len(report.compact) == 3
    for named in (True, False):
        torch.testing.assert_close(model(x, named), y, rtol=1e-4, atol=1e-5)


class _Timm(nn.Module):
    """timm names it ``x``."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(16, 16, 3), BatchNormAct2d(16), StdConv2dSame(16, 16, 3)])

    def forward(self, x: Tensor) -> Tensor:
        first, norm, last = self.layers
        return last(x=norm(x=first(input=x)))


def test_layers_of_timm_are_called_by_their_own_name():
    torch.manual_seed(0)
    model, x = _pruned(_Timm(), skip_first=False, skip_last=False), torch.randn(2, 16, 6, 6)
    y = model(x)
    report = sao_prune.compact(model, example_input=x)
    assert len(report.compact) == 2
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)


class _Beside(nn.Module):
    """Two layers that take the same, one of them by name."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        first, then, beside = self.layers
        x = self.act(first(x))
        return then(x) + beside(input=x)


def test_what_is_taken_by_name_is_taken():
    model, x = _pruned(_Beside()), torch.randn(3, 16)
    y = model(x)
    sao_prune.compact(model, example_input=x)
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)


def _mlp() -> nn.Module:
    torch.manual_seed(0)
    layers = (m for _ in range(2) for m in (nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)))
    return _pruned(nn.Sequential(*layers), 8, skip_first=False, skip_last=False)


@needs_compiler
@pytest.mark.parametrize("other", [False, True], ids=["alike", "in autocast"])
def test_threads_that_run_one_model(other):
    masked = _mlp()
    model = copy.deepcopy(masked)
    sao_prune.compact(model, example_input=torch.randn(4, 64))
    switch = sys.getswitchinterval()

    @torch.no_grad()
    def run(number: int) -> float:
        x, worst = torch.randn(4, 64, generator=torch.Generator().manual_seed(number)), 0.0
        wanted = masked(x)
        for _ in range(60):
            with torch.autocast("cpu", torch.bfloat16, enabled=other and number % 2 == 1):
                worst = max(worst, float((model(x) - wanted).abs().max()))
        return worst

    try:
        sys.setswitchinterval(1e-6)
        with ThreadPoolExecutor(8) as pool:
            errors = list(pool.map(run, range(8)))
    finally:
        sys.setswitchinterval(switch)
    assert max(errors[::2]) < 1e-4
    assert max(errors) < (0.1 if other else 1e-4)


@needs_compiler
def test_one_part_compiled_and_the_other_not():
    masked, x = _mlp(), torch.randn(3, 64)
    model = copy.deepcopy(masked)
    sao_prune.compact(model, example_input=x)
    head, tail = (torch.compile(lambda part, x: part(x), backend="eager", fullgraph=True) for _ in range(2))
    wanted = masked(x)
    # What is compiled leaves no result by which one that is not could know it.
    y = head(model[0], x)
    with pytest.raises(RuntimeError, match="runs otherwise"):
        model[1:](y)
    torch.testing.assert_close(tail(model[1:], model[0](x)), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tail(model[1:], head(model[0], x)), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)
    # After a whole run parts compute themselves.
    torch.testing.assert_close(head(model, x), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model[1](x), masked[1](x))


def _images() -> nn.Module:
    torch.manual_seed(0)
    layers = (m for _ in range(2) for m in (nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU()))
    model = nn.Sequential(*layers, nn.Conv2d(16, 16, 3))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
    return _pruned(model, skip_first=False, skip_last=False)


def _instead(number: int, make) -> Callable[[nn.Sequential], list[nn.Module]]:
    def change(model: nn.Sequential) -> list[nn.Module]:
        before = model[number]
        model[number] = make(before)
        return [before]

    return change


def _swapped(one: int, other: int) -> Callable[[nn.Sequential], list[nn.Module]]:
    def change(model: nn.Sequential) -> list[nn.Module]:
        model[one], model[other] = model[other], model[one]
        return []

    return change


# What a change returns is kept: a module that somebody still has is not gone.
CHANGES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Sequential], object]]] = {
    "activation": (_mlp, _instead(1, lambda old: nn.ReLU())),
    "no activation": (_mlp, _instead(1, lambda old: nn.Identity())),
    "wrapped activation": (_mlp, _instead(1, lambda old: nn.Sequential(old))),
    "next layer": (_mlp, _instead(2, lambda old: nn.Identity())),
    "option": (_mlp, lambda model: setattr(model[1], "approximate", "tanh")),
    "forward": (_mlp, lambda model: setattr(model[1], "forward", torch.sin)),
    "norm": (_images, _instead(1, lambda old: nn.BatchNorm2d(16).eval())),
    "swapped norms": (_images, _swapped(1, 4)),
    "swapped layers": (_images, _swapped(0, 3)),
    "activation of a norm": (_images, _instead(2, lambda old: nn.Tanh())),
}


_COMPILED = ("next layer", "forward", "swapped norms")
_CASES = [(change, how) for change in CHANGES for how in ("as it is", "pickled")]
_CASES += [(change, "compiled") for change in _COMPILED]


@needs_compiler
@pytest.mark.parametrize(("change", "how"), _CASES)
def test_modules_that_are_replaced_while_somebody_has_them(change, how):
    make, alter = CHANGES[change]
    masked = make()
    x = torch.randn(3, 64) if make is _mlp else torch.randn(2, 16, 9, 9)
    model = copy.deepcopy(masked)
    sao_prune.compact(model, example_input=x)
    model = pickle.loads(pickle.dumps(model)) if how == "pickled" else model
    run = torch.compile(model, backend="eager") if how == "compiled" else model
    torch.testing.assert_close(run(x), masked(x), rtol=1e-4, atol=1e-5)
    kept = alter(masked), alter(model)
    assert len(kept) == 2
    torch.testing.assert_close(run(x), masked(x), rtol=1e-5, atol=1e-5)


@dataclass
class _Record:
    logits: Tensor
    name: str = ""


class _Giving(nn.Module):
    def __init__(self, give) -> None:
        super().__init__()
        self.layers, self.give = _mlp(), give

    def forward(self, x: Tensor):
        return self.give(self.layers(x))


OUTPUTS = {
    "tensor": lambda y: y,
    "nest": lambda y: {"a": [None, (y,)]},
    "dataclass": _Record,
    "object": lambda y: SimpleNamespace(inner=SimpleNamespace(y=y), count=1),
    "complex": torch.fft.rfft,
    "sparse": lambda y: y.to_sparse(),
    "half": lambda y: y.half(),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs_of_every_kind_are_verified(kind, monkeypatch):
    model, x = _Giving(OUTPUTS[kind]), torch.randn(3, 64)
    other = copy.deepcopy(model)
    sao_prune.compact(model, example_input=x)
    values = BlockLinear.values
    monkeypatch.setattr(BlockLinear, "values", lambda layer: 1.1 * values(layer))
    with pytest.raises(ValueError, match="differs from the original's"):
        sao_prune.compact(other, example_input=x)


def test_outputs_that_are_missing_are_noticed():
    model = _mlp()
    count = [0, 0]

    def give(y):
        count[0] += 1
        return (y, y) if count[0] == 1 else (y,)

    with pytest.raises(ValueError, match=r"number of outputs \(1, not 2\)"):
        sao_prune.compact(nn.Sequential(model, _Only(give)), example_input=torch.randn(3, 64))


class _Only(nn.Module):
    def __init__(self, give) -> None:
        super().__init__()
        self.give = give

    def forward(self, x: Tensor):
        return self.give(x)


class _First(nn.Module):
    """A layer between two others, by its first result."""

    def __init__(self, layer: nn.Module, kind: str) -> None:
        super().__init__()
        self.before, self.layer, self.kind = nn.Identity(), layer, kind

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        found = self.layer(x, x, x, need_weights=False) if self.kind == "attention" else self.layer(x)
        return torch.relu(found[0] if self.kind in ("attention", "lstm", "gru", "lstm cell") else found)


TRACED = {
    "attention": (lambda: nn.MultiheadAttention(16, 2, batch_first=True), (2, 5, 16)),
    "lstm": (lambda: nn.LSTM(16, 16, bidirectional=True), (2, 5, 16)),
    "gru": (lambda: nn.GRU(16, 16), (5, 16)),
    "lstm cell": (lambda: nn.LSTMCell(16, 16), (3, 16)),
    "gru cell": (lambda: nn.GRUCell(16, 16), (3, 16)),
    "standardised": (lambda: ScaledStdConv2d(16, 16, 3), (2, 16, 5, 5)),
    "standardised, same": (lambda: StdConv2dSame(16, 16, 3, stride=2), (2, 16, 6, 6)),
    "linear": (lambda: nn.Linear(16, 16), (2, 16)),
    "convolution": (lambda: nn.Conv1d(16, 16, 3, padding="same"), (2, 16, 6)),
}


@pytest.mark.parametrize("amount", [{"groups": 4}, {"sparsity": 0.7, "fit": "exact"}], ids=["even", "uneven"])
@pytest.mark.parametrize("kind", TRACED)
def test_graphs_of_every_layer(kind, amount):
    make, shape = TRACED[kind]
    torch.manual_seed(0)
    model, x = _First(make(), kind).eval(), torch.randn(shape)
    sao_prune.apply(model, seed=0, skip_first=False, skip_last=False, **amount)
    y = model(x)
    sao_prune.compact(model)
    graph = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(graph(x), y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pickle.loads(pickle.dumps(graph))(x), y, rtol=1e-4, atol=1e-5)


class _Writing(nn.Module):
    """Writes to what it is given, and to buffers of its own on which its results depend."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = _mlp()
        self.register_buffer("mean", torch.zeros(64))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, same: Tensor) -> Tensor:
        assert x is same
        self.calls = self.calls + 1
        self.mean.lerp_(x.mean(0), 0.5)
        return self.layers(x.sub_(self.mean)) * self.calls


@pytest.mark.parametrize("tune", [None, "infer", "train"])
def test_models_that_write_to_their_input_and_buffers(tune, monkeypatch):
    monkeypatch.setenv("SAO_PRUNE_TUNING_CACHE", "0")
    model, x = _Writing(), torch.randn(3, 64)
    before, state = x.clone(), copy.deepcopy(dict(model.named_buffers()))
    other = copy.deepcopy(model)
    report = sao_prune.compact(model, example_input=(x, x), tune=tune)
    assert report.layers
    assert torch.equal(x, before)
    assert all(torch.equal(dict(model.named_buffers())[name], state[name]) for name in ("mean", "calls"))
    y, wanted = (each(*(given,) * 2) for each, given in ((model, x.clone()), (other, x.clone())))
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-5)
