"""The page on methods, topologies and backends of one's own: every snippet runs, is complete and is short."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sao_prune
from sao_prune.algorithms import Draw, register
from sao_prune.algorithms.base import _REGISTRY
from sao_prune.blocks import Backend, BlockConv2d, BlockLinear, register_backend, unregister_backend
from sao_prune.topology import GENERATORS, interleaved, register_support
from sao_prune.topology import register as register_topology

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

    def suits_linear(self, x: Tensor, weight: Tensor, *others: Tensor | None) -> bool:
        return True

    def suits_conv(self, x: Tensor, weight: Tensor, geometry: object, *others: Tensor | None) -> bool:
        return True

    def linear_forward(self, *arguments: object) -> object:  # type: ignore[override]
        self.calls.append("linear")
        return super().linear_forward(*arguments)  # type: ignore[arg-type]

    def linear_backward(self, *arguments: object) -> object:  # type: ignore[override]
        self.calls.append("linear backward")
        return super().linear_backward(*arguments)  # type: ignore[arg-type]

    def conv_forward(self, *arguments: object) -> object:  # type: ignore[override]
        self.calls.append("conv")
        return super().conv_forward(*arguments)  # type: ignore[arg-type]

    def conv_backward(self, *arguments: object) -> object:  # type: ignore[override]
        self.calls.append("conv backward")
        return super().conv_backward(*arguments)  # type: ignore[arg-type]


def test_a_backend_computes_forwards_and_backwards() -> None:
    layers = [BlockLinear(interleaved(8, 8, 2)), BlockConv2d(interleaved(8, 8, 2), 3, padding=1)]
    inputs = [torch.randn(4, 8, requires_grad=True), torch.randn(2, 8, 5, 5, requires_grad=True)]
    expected = [layer(x) for layer, x in zip(layers, inputs)]
    backend = register_backend(Recorded())
    try:
        for layer, x, y in zip(layers, inputs, expected):
            (gradient,) = torch.autograd.grad(y.square().sum(), x)
            found = layer(x)
            assert torch.allclose(found, y, atol=1e-6)
            assert torch.allclose(torch.autograd.grad(found.square().sum(), x)[0], gradient, atol=1e-5)
    finally:
        unregister_backend("recorded")
    assert isinstance(backend, Recorded)
    assert {"linear", "linear backward", "conv", "conv backward"} == set(backend.calls)
