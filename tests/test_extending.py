"""The page on methods, topologies and backends of one's own: every snippet runs, is complete and is short."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sao_prune
from sao_prune.algorithms import Draw, register
from sao_prune.algorithms.base import _REGISTRY
from sao_prune.blocks import Backend, BlockConv2d, BlockLinear, register_backend, unregister_backend
from sao_prune.blocks.backends.registry import registered
from sao_prune.blocks.functional import Geometry
from sao_prune.blocks.layout import Layout
from sao_prune.topology import GENERATORS, interleaved, register_support
from sao_prune.topology import register as register_topology

from .blocks.calls import ROWS, make

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_snippets_are_complete_and_short(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(SNIPPETS) == 3
    assert max(len(snippet.splitlines()) for snippet in SNIPPETS) < 40
    try:
        for snippet in SNIPPETS:
            exec(compile(snippet, "extending.md", "exec"), {})
    finally:
        _REGISTRY.pop("top-rows", None)
        GENERATORS.pop("rotated", None)
    assert "applied: top-rows" in capsys.readouterr().out


def test_names_are_unique() -> None:
    class Nameless(sao_prune.Method):
        pass

    class Second(sao_prune.Method):
        name = "sao"

    for method in (Nameless, Second):
        with pytest.raises(ValueError, match="needs a name of its own"):
            register(method)
    with pytest.raises(TypeError, match="a method is a subclass"):
        register(dict)  # type: ignore[type-var]
    for name in ("ramanujan", "expander", ""):
        with pytest.raises(ValueError, match="needs a name of its own"):
            register_topology(name)
        with pytest.raises(ValueError, match="needs a name of its own"):
            register_support(name)
    with pytest.raises(ValueError, match="needs a name of its own"):
        register_backend(Backend())
    with pytest.raises(TypeError, match="a backend is an instance"):
        register_backend(Backend)  # type: ignore[arg-type]


def test_a_method_derived_from_sao_is_one() -> None:
    class Mine(sao_prune.SAO):
        def draw(self, allocations: object, weights: object, seed: int) -> list[Draw]:
            return super().draw(allocations, weights, seed + 1)  # type: ignore[arg-type]

    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    sao_prune.apply(model, groups=2, method=Mine(), seed=0)
    hooks = [type(hook) for hook in model[1]._forward_pre_hooks.values()]
    assert sao_prune.prune.SAOPruning in hooks


class Recorded(Backend):
    name = "recorded"

    def __init__(self) -> None:
        self.calls: list[str] = []

    def suits(self, x: Tensor, weight: Tensor, geometry: Geometry, *others: Tensor | None) -> bool:
        return True

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, layout: Layout, *others: Any) -> Any:
        self.calls.append("conv" if others[0].stride else "linear")
        return super().forward(x, weight, bias, layout, *others)

    def backward(self, grad: Tensor, x: Tensor, weight: Tensor, layout: Layout, *others: Any) -> Any:
        self.calls.append("conv backward" if others[0].stride else "linear backward")
        return super().backward(grad, x, weight, layout, *others)


@pytest.fixture
def recorded() -> Iterator[Recorded]:
    backend = Recorded()
    yield backend
    if "recorded" in registered():
        unregister_backend("recorded")


def test_a_backend_computes_forwards_and_backwards(recorded: Recorded) -> None:
    layers = [BlockLinear(interleaved(8, 8, 2)), BlockConv2d(interleaved(8, 8, 2), 3, padding=1)]
    inputs = [torch.randn(4, 8, requires_grad=True), torch.randn(2, 8, 5, 5, requires_grad=True)]
    expected = [layer(x) for layer, x in zip(layers, inputs)]
    register_backend(recorded)
    for layer, x, y in zip(layers, inputs, expected):
        (gradient,) = torch.autograd.grad(y.square().sum(), x)
        found = layer(x)
        assert torch.allclose(found, y, atol=1e-6)
        assert torch.allclose(torch.autograd.grad(found.square().sum(), x)[0], gradient, atol=1e-5)
    assert {"linear", "linear backward", "conv", "conv backward"} == set(recorded.calls)


@pytest.mark.parametrize(
    ("name", "act", "products"), [("mlp", "gelu", 2), ("mlp", "relu", 2), ("norm2", "relu", 1), ("norm2 eval", "", 1)]
)
def test_layers_that_compute_more_than_a_product_ask_too(
    name: str, act: str, products: int, recorded: Recorded
) -> None:
    call = make(name, "irregular", "rows", act, "cpu").to(torch.float32)
    leaves = call.leaves()
    with torch.no_grad():
        alone = call.run(leaves)
    y = call.run(leaves)
    gradients = torch.autograd.grad(y.square().sum(), leaves)
    register_backend(recorded)
    with torch.no_grad():
        torch.testing.assert_close(call.run(leaves), alone, rtol=1e-5, atol=1e-5)
    assert len(recorded.calls) == products
    found = call.run(leaves)
    torch.testing.assert_close(found, y, rtol=1e-5, atol=1e-5)
    for one, other in zip(torch.autograd.grad(found.square().sum(), leaves), gradients):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert sum("backward" in each for each in recorded.calls) == products


def test_a_backend_that_suits_one_of_two_layers_computes_that_one(recorded: Recorded) -> None:
    call = make("mlp", "strided", "rows", "gelu", "cpu").to(torch.float32)
    expected = call()
    recorded.suits = lambda x, weight, geometry, *others: x.shape[-1] == ROWS  # type: ignore[method-assign]
    register_backend(recorded)
    torch.testing.assert_close(call(), expected, rtol=1e-5, atol=1e-5)
    assert recorded.calls == ["linear"]
