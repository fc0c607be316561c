"""A plan is data: printed, read back, carried out again; timings are taken once."""

from __future__ import annotations

import contextlib
import copy
import json

import pytest
import torch
from torch import nn

import sao_prune
from sao_prune.blocks import Execution, Plan, sequences, tuning, tuning_cache
from sao_prune.blocks.autotune import default_execution
from sao_prune.blocks.backends import cpu

from .cases import block_layers


def _net(width: int = 32) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(),
        nn.Linear(16 * 16, width), nn.GELU(), nn.Dropout(0.0), nn.Linear(width, width), nn.Linear(width, 4),
    )  # fmt: skip
    sao_prune.apply(net, groups=4, seed=0)
    return net.eval()


X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("tune", [None, "infer"])
def test_a_plan_is_carried_out_again(tune):
    net, again = _net(), _net()
    plan = sao_prune.compact(net, example_input=X, tune=tune).plan
    read = Plan.from_json(plan.to_json())
    assert read == plan
    report = sao_prune.compact(again, example_input=X, plan=read)
    assert report.plan.choices == plan.choices
    assert [str(m.execution) for m in block_layers(again)] == [str(m.execution) for m in block_layers(net)]
    epilogues = [[m.epilogue and m.epilogue.names for m in block_layers(n)] for n in (net, again)]
    assert epilogues[0] == epilogues[1]
    torch.testing.assert_close(again(X), net(X), rtol=1e-4, atol=1e-4)


class _Ordered(nn.Module):
    """Layers of the same names and shapes, called in any order."""

    def __init__(self, order: tuple[int, ...]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.order = nn.Linear(16, 16), nn.Linear(16, 4), order
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.acts = nn.ModuleList([nn.Tanh(), nn.GELU(), nn.Tanh()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for i in self.order:
            x = self.acts[i](self.layers[i](x))
        return self.last(x)


@pytest.mark.parametrize("made", [(0, 2, 1), (0, 1, 2)])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (0, 2, 1), (0, 2)])
def test_a_plan_gives_no_wrong_number_where_layers_follow_otherwise(made, order):
    x = torch.randn(3, 16)
    source, target = (_Ordered(each) for each in (made, order))
    for model in (source, target):
        sao_prune.apply(model, groups=4, seed=0)
    expected = target(x)
    plan = sao_prune.compact(source, example_input=x).plan
    checked = copy.deepcopy(target)
    sao_prune.compact(target, plan=plan)
    for _ in range(2):
        torch.testing.assert_close(target(x), expected, rtol=1e-4, atol=1e-5)
    with contextlib.suppress(ValueError):
        sao_prune.compact(checked, plan=plan, example_input=x)
    torch.testing.assert_close(checked(x), expected, rtol=1e-4, atol=1e-5)


def test_a_plan_of_another_model_is_refused():
    plan = sao_prune.compact(_net(), example_input=X).plan
    other = nn.ModuleDict({"fc": nn.Linear(16, 16)})
    sao_prune.apply(other, groups=4, seed=0, skip_first=False, skip_last=False)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="the plan is of another model"):
        sao_prune.compact(other, plan=plan)
    assert other.state_dict().keys() == before.keys()
    with pytest.raises(ValueError, match="either tune"):
        sao_prune.compact(_net(), plan=plan, example_input=X, tune="train")
    with pytest.raises(TypeError, match="plan must be"):
        sao_prune.compact(_net(), plan=plan.to_json())


def test_what_does_not_fit_a_plan_runs_by_the_default_rule():
    net = _net()
    plan = sao_prune.compact(_net(), example_input=X).plan
    whole = json.loads(plan.to_json())
    whole["layers"]["5"]["execution"]["merge"] = 64  # more than there are blocks
    whole["layers"]["1"]["steps"]["norm"] = "nowhere"
    y = net(X)
    sao_prune.compact(net, example_input=X, plan=Plan.from_json(json.dumps(whole)))
    assert net[5].execution.merge == 1
    assert net[1].epilogue is None
    torch.testing.assert_close(net(X), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        lambda w: "{", lambda w: "[]", lambda w: "null", lambda w: {**w, "version": 99},
        lambda w: {k: v for k, v in w.items() if k != "layers"}, lambda w: {**w, "layers": [1]},
        lambda w: {**w, "layers": {"5": {}}}, lambda w: {**w, "layers": {"5": 3}},
        lambda w: {**w, "layers": {"5": {**w["layers"]["5"], "execution": {"merge": 0}}}},
        lambda w: {**w, "layers": {"5": {**w["layers"]["5"], "steps": {**w["layers"]["5"]["steps"], "norm": 3}}}},
        lambda w: {**w, "layers": {"5": {**w["layers"]["5"], "ratio": "fast"}}},
        lambda w: {**w, "layers": {"5": {**w["layers"]["5"], "reason": 3}}},
        lambda w: json.dumps(w).replace('"merge": 1', '"merge": 1e999'), lambda w: "[" * 100_000,
    ],
)  # fmt: skip
def test_bad_json_is_refused(change):
    whole = change(json.loads(sao_prune.compact(_net(), example_input=X).plan.to_json()))
    with pytest.raises(ValueError, match="not a plan of block layers"):
        Plan.from_json(whole if isinstance(whole, str) else json.dumps(whole))


def test_timings_are_taken_once(monkeypatch, tmp_path):
    monkeypatch.setenv("SAO_PRUNE_TUNING_CACHE", "1")
    monkeypatch.setattr(cpu, "cache_folder", lambda: tmp_path)
    first = sao_prune.compact(_net(), example_input=X, tune="infer").plan
    assert [f.name.startswith("timings-") for f in tmp_path.iterdir()] == [True]
    for name in ("time_layer", "time_model"):
        monkeypatch.setattr(tuning, name, lambda *_: pytest.fail("timed again"))
    again = sao_prune.compact(_net(), example_input=X, tune="infer").plan
    assert again == first
    (file,) = tmp_path.iterdir()
    monkeypatch.undo()
    monkeypatch.setenv("SAO_PRUNE_TUNING_CACHE", "1")
    monkeypatch.setattr(cpu, "cache_folder", lambda: tmp_path)
    for text in ("{", "[]", json.dumps(dict.fromkeys(json.loads(file.read_text()), "nonsense"))):
        file.write_text(text)
        assert sao_prune.compact(_net(), example_input=X, tune="infer").plan is not None
    monkeypatch.setattr(tuning_cache, "_code", lambda: "another version")
    sao_prune.compact(_net(), example_input=X, tune="infer")
    assert len(list(tmp_path.iterdir())) == 2


def test_the_default_rule():
    net = _net()
    sao_prune.compact(net, fuse=False)
    native = cpu.library() is not None
    assert net[5].execution == Execution(native=native)
    assert net[1].execution == (
        Execution(native=True, channels_last=True) if native else Execution(merge=2, channels_last=True)
    )
    net.double()
    assert default_execution(net[5]) == Execution()
    assert default_execution(net[1]) == Execution(merge=2, channels_last=True)


class _Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.memory = nn.GRU(16, 16, batch_first=True)

    def forward(self, x):
        return self.memory(self.attention(x, x, x, need_weights=False)[0])[0]


@pytest.mark.parametrize("tune", ["train", "infer"])
def test_layers_inside_others_are_timed_too(tune, monkeypatch, tmp_path):
    monkeypatch.setenv("SAO_PRUNE_TUNING_CACHE", "1")
    monkeypatch.setattr(cpu, "cache_folder", lambda: tmp_path)
    torch.manual_seed(0)
    model, x = _Parts(), torch.randn(2, 3, 16)
    sao_prune.apply(model, groups=2, seed=0, skip_first=False, skip_last=False)
    y, other, before = model(x), copy.deepcopy(model), torch.random.get_rng_state()
    report = sao_prune.compact(model, example_input=x, tune=tune)
    assert all(record.ratio is not None and record.ratio > 0 for record in report.compact)
    inner = [f"attention.in_proj.{i}" for i in range(3)] + ["memory.weight_ih_l0", "memory.weight_hh_l0"]
    assert all(report.plan.choices[name].execution is not None for name in inner)
    assert all(p.grad is None for p in model.parameters())
    torch.testing.assert_close(model(x), y)
    for name in ("time_layer", "race"):
        monkeypatch.setattr(tuning if name == "time_layer" else sequences, name, lambda *_: pytest.fail("timed again"))
    assert sao_prune.compact(other, example_input=x, tune=tune).plan == report.plan
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("dense", "lengths"),
    [((), [6]), ((0,), [5]), ((0, 5), [4]), ((2,), [2, 3]), ((1, 3), [1, 1, 2]), ((0, 1, 4), [2, 1])],
)
def test_dense_layers_in_a_row_leave_the_others_together(dense, lengths):
    torch.manual_seed(0)
    net = nn.Sequential(*(m for _ in range(6) for m in (nn.Linear(16, 16), nn.Tanh())))
    exclude = [str(2 * i) for i in dense]
    sao_prune.apply(net, groups=4, seed=0, skip_first=False, skip_last=False, exclude=exclude)
    x = torch.randn(3, 16)
    y = net(x)
    sao_prune.compact(net, example_input=x)
    found = [(len(m.epilogue.names) + 1) // 2 for m in block_layers(net) if m.epilogue]
    assert found == (lengths if cpu.library() is not None else [])
    torch.testing.assert_close(net(x), y, rtol=1e-4, atol=1e-5)
