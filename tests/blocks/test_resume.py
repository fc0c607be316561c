"""A loaded compact model gives the numbers that it gives without its plan, however its layers follow each other, and is
as fast as the saved one where they follow as they did."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sao_prune
from sao_prune.blocks import Plan
from sao_prune.blocks import confirm as confirming
from sao_prune.blocks import plan as planning
from sao_prune.blocks.backends import cpu
from sao_prune.blocks.example import Example

from .cases import block_layers

needs_kernels = pytest.mark.skipif(cpu.library() is None, reason="no kernels, so no epilogues")

BETWEEN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "nothing": lambda before, after: after,
    "scale": lambda before, after: after * 0.5,
    "skip": lambda before, after: after + before,
    "small skip": lambda before, after: after + 1e-5 * before,
    "flip": lambda before, after: after.flip(-1),
    "view": lambda before, after: after.view(-1, 4, 4).mT.reshape(-1, 16),
}


class _Wired(nn.Module):
    """Layers of the same names and shapes, called in any order, with anything between them and their activations."""

    def __init__(self, order: tuple[int, ...], inner: str = "nothing", outer: str = "nothing") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 4)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.acts = nn.ModuleList([nn.Tanh(), nn.GELU(), nn.Tanh(), nn.Tanh()])
        self.order, self.inner, self.outer = order, BETWEEN[inner], BETWEEN[outer]
        sao_prune.apply(self, groups=4, seed=0, skip_first=False, skip_last=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for i in self.order:
            y = self.layers[i](x)
            y = self.acts[i](self.inner(x, y))
            x = self.outer(x, y)
        return self.last(x)


X = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))


def _names(model: nn.Module) -> list[tuple[str, ...]]:
    return [m.epilogue.names if m.epilogue else () for m in block_layers(model)]


def _saved(model: nn.Module, folder: Path, x: Any = X) -> Path:
    sao_prune.compact(model, example_input=x)
    return sao_prune.save(model, folder / "m.safetensors")


def _edited(path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A checkpoint with another plan."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    plan = json.loads(metadata["plan"])
    changed = path.with_name("edited.safetensors")
    save_file(load_file(path), changed, {**metadata, "plan": json.dumps(change(plan) or plan)})
    return changed


wirings = st.tuples(
    st.one_of(st.permutations(range(4)), st.lists(st.integers(0, 3), min_size=1, max_size=4)).map(tuple),
    st.sampled_from(sorted(BETWEEN)), st.sampled_from(sorted(BETWEEN)),
)  # fmt: skip


@settings(max_examples=15)
@given(source=wirings, target=wirings)
def test_loaded_models_compute_what_they_say(source, target, tmp_path_factory):
    file = _saved(_Wired(*source), tmp_path_factory.mktemp("wired"))
    model, masked = _Wired(*target), _Wired(*target)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sao_prune.load(model, file)
    assert any(type(m).__name__ == "BlockLinear" for m in model.modules())
    plan = sao_prune.compact(_Wired(*source), example_input=X).plan
    planned = _Wired(*target)
    sao_prune.compact(planned, plan=plan, example_input=X)
    for training in (False, True, True):
        wanted = masked.train(training)(X)
        torch.testing.assert_close(model.train(training)(X), wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(planned.train(training)(X), wanted, rtol=1e-4, atol=1e-5)


@needs_kernels
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 0, 1)])
def test_what_follows_as_it_did_is_computed_as_it_was(order, tmp_path):
    net, fresh = _Wired(order), _Wired(order)
    file = _saved(net, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sao_prune.load(fresh, file).title == "model; layers run as the checkpoint's plan says"
    assert any(_names(net))
    assert _names(fresh) == _names(net)
    again = _Wired(order)
    sao_prune.load(again, sao_prune.save(fresh, tmp_path / "again.safetensors"))
    assert _names(again) == _names(net)
    other = _Wired(order[::-1])
    with pytest.warns(RuntimeWarning, match="calls other modules behind some layers"):
        assert "calls other modules" in sao_prune.load(other, file).title


@needs_kernels
def test_without_a_record_an_example_input_tells(tmp_path):
    net = _Wired((0, 1, 2, 3))
    file = _saved(net, tmp_path)
    old = _edited(file, lambda plan: plan.pop("examples") and None)
    fresh = _Wired((0, 1, 2, 3))
    with pytest.warns(RuntimeWarning, match="nothing tells what the model takes; give example_input") as caught:
        report = sao_prune.load(fresh, old)
    assert len(caught) == 1
    assert not any(_names(fresh))
    assert "give example_input" in report.title
    assert [m.execution for m in block_layers(fresh)] == [m.execution for m in block_layers(net)]
    torch.testing.assert_close(fresh(X), net(X), rtol=1e-4, atol=1e-5)
    for path in (old, sao_prune.save(net, tmp_path / "m.pt")):
        for model in (fresh, _Wired((0, 1, 2, 3))):
            sao_prune.load(model, path, example_input=X)
            assert _names(model) == _names(net)
    model = _Wired((0, 1, 2, 3))
    assert sao_prune.load(model, tmp_path / "m.pt").title == "model"
    assert not any(_names(model))


@needs_kernels
def test_on_another_machine_layers_run_by_the_rule_with_what_follows_them(tmp_path, monkeypatch):
    net, fresh = _Wired((0, 1, 2, 3)), _Wired((0, 1, 2, 3))
    file = _saved(net, tmp_path)
    plain = sao_prune.save(_compact(), tmp_path / "plain.safetensors")
    monkeypatch.setattr(planning.platform, "machine", lambda: "another")
    title = sao_prune.load(fresh, file).title
    assert title.startswith("model; layers run by default: the plan in the checkpoint is for ")
    assert "less" not in title
    assert _names(fresh) == _names(net)
    fresh = _Wired((0, 1, 2, 3))
    sao_prune.load(fresh, plain)
    assert not any(_names(fresh))


def _compact() -> nn.Module:
    net = _Wired((0, 1, 2, 3))
    sao_prune.compact(net)
    return net


@pytest.mark.parametrize("compact", [False, True])
def test_an_example_input_that_does_not_fit_changes_nothing(compact, tmp_path):
    net, model = _Wired((0, 1, 2, 3)), _Wired((3, 2, 1, 0))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    file = _saved(net, tmp_path)
    if compact:
        sao_prune.compact(model, example_input=X)
    before, kinds = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    names, y = _names(model), model(X)
    with pytest.raises(ValueError, match="does not run on the example input"):
        sao_prune.load(model, file, example_input=torch.randn(3, 5))
    assert [type(m) for m in model.modules()] == kinds
    assert _names(model) == names
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(X), y)
    sao_prune.load(model, file, example_input=X)
    plain = _Wired((3, 2, 1, 0))
    torch.testing.assert_close(model(X), plain(X), rtol=1e-4, atol=1e-5)


class _Counting(_Wired):
    """A model that changes its buffers whenever it runs, one in place and one by another."""

    def __init__(self, *wiring: Any) -> None:
        super().__init__(*wiring)
        self.register_buffer("runs", torch.zeros(()))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        self.calls = self.calls + 1
        return super().forward(x)


@needs_kernels
def test_the_run_leaves_buffers_modes_and_random_numbers(tmp_path):
    net, fresh = _Counting((0, 1, 2, 3)), _Counting((0, 1, 2, 3))
    file = _saved(net, tmp_path)
    fresh.layers.eval()
    fresh.compile(backend="eager")
    modes, state = [m.training for m in fresh.modules()], torch.random.get_rng_state()
    sao_prune.load(fresh, file)
    assert _names(fresh) == _names(net)
    assert fresh.runs == net.runs
    assert fresh.calls == net.calls
    assert [m.training for m in fresh.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)


class _Wrapper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = _Wired((0, 1, 2, 3))


@needs_kernels
def test_a_part_that_was_made_compact_is_run_as_a_part(tmp_path):
    net, fresh = _Wrapper(), _Wrapper()
    sao_prune.compact(net.body, example_input=X)
    sao_prune.load(fresh, sao_prune.save(net, tmp_path / "m.safetensors"))
    assert any(_names(net))
    assert _names(fresh) == _names(net)
    sao_prune.expand(net)
    assert not planning.plan_of(net).examples


@needs_kernels
def test_of_several_processes_none_runs_the_model_by_itself(tmp_path, monkeypatch):
    file, fresh = _saved(_Wired((0, 1)), tmp_path), _Wired((0, 1))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.warns(RuntimeWarning, match="give example_input in all of them"):
        sao_prune.load(fresh, file)
    assert not any(_names(fresh))
    sao_prune.load(fresh, file, example_input=X)
    assert any(_names(fresh))


@needs_kernels
def test_outputs_that_differ_undo_what_was_joined(tmp_path, monkeypatch):
    file, fresh = _saved(_Wired((0, 1)), tmp_path), _Wired((0, 1))
    monkeypatch.setattr(confirming, "difference", lambda new, old: "output 0")
    with pytest.warns(RuntimeWarning, match="with it output 0 is another"):
        sao_prune.load(fresh, file)
    assert not any(_names(fresh))


FLOAT = {"tensor": [3, 16], "dtype": "float32", "range": [-1, 1]}


@needs_kernels
@pytest.mark.parametrize(
    "data",
    [
        {"value": 3}, {**FLOAT, "tensor": [3, 5]}, {"entries": {"y": FLOAT}}, {"items": [], "tuple": True},
        {**FLOAT, "dtype": "int64"},
    ],
)  # fmt: skip
def test_a_record_that_the_model_does_not_take_is_told(data, tmp_path):
    file, fresh = _saved(_Wired((0, 1)), tmp_path), _Wired((0, 1))
    file = _edited(file, lambda plan: {**plan, "examples": {"": data, "nowhere": FLOAT}})
    with pytest.warns(RuntimeWarning, match="does not run on what the plan says"):
        sao_prune.load(fresh, file)
    assert not any(_names(fresh))
    torch.testing.assert_close(fresh(X), _Wired((0, 1))(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "data",
    [
        None, 3, [], {}, {"tensor": [1]}, {**FLOAT, "more": 1}, {"items": 3, "tuple": True}, {"entries": []},
        {"value": [1]}, {**FLOAT, "tensor": [-1]}, {**FLOAT, "tensor": [1 << 40]}, {**FLOAT, "tensor": [1 << 14] * 2},
        {**FLOAT, "dtype": "Tensor"}, {**FLOAT, "dtype": []}, {**FLOAT, "range": [1, 0]}, {**FLOAT, "range": [1]},
        {**FLOAT, "range": [float("nan"), 1]}, {**FLOAT, "range": [0, 1e39]}, {**FLOAT, "range": ["a", "b"]},
        {"tensor": [1], "dtype": "int8", "range": [0, 300]}, {"tensor": [1], "dtype": "int8", "range": [0.5, 1]},
        {"tensor": [True], "dtype": "int8", "range": [0, 1]}, {"tensor": [1] * 20, "dtype": "int8", "range": [0, 1]},
        {"items": [{"items": [None], "tuple": False}], "tuple": False},
    ],
)  # fmt: skip
def test_records_that_are_none_are_refused(data):
    whole = {"version": 1, "machine": "", "channels_last": False, "layers": {}, "examples": {"": data}}
    with pytest.raises(ValueError, match="not a plan of block layers"):
        Plan.from_json(json.dumps(whole))


TYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
tensors = st.builds(
    lambda shape, dtype, seed: torch.randn(shape, generator=torch.Generator().manual_seed(seed)).abs().mul(9).to(dtype),
    st.lists(st.integers(0, 3), max_size=3), st.sampled_from(TYPES), st.integers(0, 99),
)  # fmt: skip
inputs = st.recursive(
    st.one_of(tensors, st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=3)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(), inner, max_size=3),
    ),
    max_leaves=6,
)


@settings(max_examples=25)
@given(inputs)
def test_a_record_draws_what_is_like_the_example(tree):
    example = Example.of(tree)
    assert example is not None
    assert Example.from_data(json.loads(json.dumps(example.data))) == example
    _assert_alike(example.draw(), tree)


def _assert_alike(new: Any, old: Any) -> None:
    assert type(new) is type(old)
    if isinstance(old, Tensor):
        assert (new.shape, new.dtype) == (old.shape, old.dtype)
        if old.numel() and not old.is_floating_point():
            assert old.min() <= new.min()
            assert new.max() <= old.max()
    elif isinstance(old, dict):
        assert new.keys() == old.keys()
        for key, value in old.items():
            _assert_alike(new[key], value)
    elif isinstance(old, list | tuple):
        assert len(new) == len(old)
        for each in zip(new, old):
            _assert_alike(*each)
    else:
        assert new == old


@pytest.mark.parametrize(
    "example_input",
    [torch.zeros(2, dtype=torch.complex64), torch.zeros(2, device="meta"), {1: 2}, object(), {"a": {3}}],
)
def test_other_things_are_not_recorded(example_input):
    assert Example.of(example_input) is None


def test_ranges_of_what_is_constant_or_not_finite():
    for x, span in [
        (torch.zeros(3), [0, 1]), (torch.ones(3), [0, 1]), (-2 * torch.ones(3), [-2, 0]), (torch.empty(0), [-1, 1]),
        (torch.tensor([1.0, float("inf"), 2.0]), [1, 2]), (torch.tensor([float("nan")]), [-1, 1]),
        (torch.tensor([True, True]), [1, 1]), (torch.tensor([3, 7]), [3, 7]),
    ]:  # fmt: skip
        example = Example.of(x)
        assert example is not None
        assert example.data["range"] == span
