"""A small part of the zoo: timm's tiny test models at work, some of torchvision on the meta device."""

import json
import os
import signal
import sys
import time

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

pytest.importorskip("timm")
pytest.importorskip("torchvision")

from sao_prune import prune
from sao_prune.cli import app
from sao_prune.discovery import Selection, walk
from sao_prune.lab.isolate import Outcome, isolated
from sao_prune.lab.zoo import (
    Architecture,
    PlanTask,
    RunTask,
    VisitOptions,
    ZooError,
    ZooPlan,
    architectures,
    plan_one,
    representatives,
    run_one,
    run_zoo,
)
from sao_prune.lab.zoo.architecture import PRELOAD
from sao_prune.lab.zoo.plans import findings

TINY = [a.name for a in architectures("test_*", ["timm"])]


@pytest.fixture(autouse=True)
def _threads_and_seed():
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        yield
    torch.set_num_threads(threads)


def one(name, library="timm"):
    (architecture,) = architectures(name, [library])
    return architecture


def test_the_whole_zoo_is_known():
    everything = architectures()
    assert len({a.family for a in everything if a.library == "timm"}) >= 90
    assert len(everything) == len(set(everything)) > 1300
    assert len(TINY) >= 15
    with pytest.raises(ZooError, match="matches none of the"):
        architectures("no such name")


@pytest.mark.parametrize("name", TINY)
def test_tiny_models_are_planned_and_work(name):
    plan = plan_one(PlanTask(one(name), 0.75))
    run = run_one(RunTask(one(name), 0.75))
    assert plan.failure is None
    assert run.error is None
    assert 0 < run.layers == plan.layers
    assert run.sparsity == pytest.approx(1 - plan.kept / plan.weights)
    assert run.unused == 0


@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("resnet18", 1),
        ("vit_b_32", 1),
        ("swin_t", 1),
        ("regnet_x_400mf", 1),
        ("googlenet", 3),
        ("raft_small", 1),
        ("fasterrcnn_resnet50_fpn", 4),
        ("retinanet_resnet50_fpn", 2),
        ("lraspp_mobilenet_v3_large", 2),
    ],
)
def test_torchvision_on_the_meta_device(name, last):
    plan = plan_one(PlanTask(one(name, "torchvision"), 0.96875))
    assert plan.failure is None
    assert plan.layers > 5
    assert plan.skipped["last layer"] == last
    assert plan.even + plan.uneven == plan.layers
    assert 0.9 < 1 - plan.kept / plan.weights < 0.97


def test_findings_see_what_must_not_be_pruned():
    architecture = one("resnet18", "torchvision")
    model = architecture.build_on_meta()
    everything = walk(model, Selection(skip_first=False, skip_last=False))
    assert list(findings(architecture, model, everything)) == ["conv1.weight reads the image"]
    assert list(findings(architecture, model, [everything[1], everything[1]])) == ["1 parameters are pruned twice"]


def test_findings_see_a_pruned_classifier(monkeypatch):
    monkeypatch.setattr(sys.modules["sao_prune.discovery.endpoints"], "_TORCHVISION_OUTPUTS", ())
    plan = plan_one(PlanTask(one("googlenet", "torchvision"), 0.5))
    assert plan.failure == "aux1.fc2.weight is a classifier; aux2.fc2.weight is a classifier"


@pytest.mark.parametrize("name", ["nf_resnet26", "eca_nfnet_l0", "resnetv2_50x1_bit"])
def test_architectures_that_standardise_their_weights(name):
    plan = plan_one(PlanTask(one(name), 0.5))
    assert plan.failure is None
    assert plan.layers > 20
    assert set(plan.skipped) <= {"first layer", "last layer", "depthwise", "too small"}


def test_a_model_whose_every_layer_is_skipped_is_no_failure(monkeypatch):
    class Ends(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.deep, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Linear(8, 10)

    monkeypatch.setattr(Architecture, "build_on_meta", lambda self, **options: Ends())
    plan = plan_one(PlanTask(Architecture("timm", "ends", "ends"), 0.5))
    assert (plan.layers, plan.failure) == (0, None)
    assert plan.skipped == {"first layer": 1, "depthwise": 1, "last layer": 1}


def test_a_run_names_the_stage_that_fails(monkeypatch):
    monkeypatch.setattr(
        sys.modules["sao_prune.prune.hooks"],
        "derive",
        lambda module, name: (getattr(module, f"{name}_orig") + 1).as_subclass(prune.MaskedWeight),
    )
    run = run_one(RunTask(one("test_vit"), 0.5))
    assert run.error.startswith("train: BrokenLawError")
    assert "masked entries are not zero" in run.error


def test_a_run_sees_a_weight_that_is_transformed(monkeypatch):
    def standardised(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    monkeypatch.setattr(nn.Conv2d, "forward", standardised)
    run = run_one(RunTask(one("test_resnet"), 0.5))
    assert "masked weights are read by mean" in run.error


def test_representatives():
    def plan(name, family, parameters, layers=1, library="timm"):
        return ZooPlan(Architecture(library, family, name), parameters=parameters, layers=layers)

    plans = [
        plan("big", "a", 20),
        plan("small", "a", 10),
        plan("smaller but empty", "a", 5, layers=0),
        plan("test_tiny", "a", 1),
        plan("alone", "b", 30),
        plan("resnet18", "resnet", 10**7, library="torchvision"),
        plan("vit_h_14", "vision_transformer", 633 * 10**6, library="torchvision"),
        plan("fcos_resnet50_fpn", "detection.fcos", 10**7, library="torchvision"),
    ]
    assert [a.name for a in representatives(plans)] == ["small", "test_tiny", "alone", "resnet18"]


def behave(what):
    """Run in another process: give a value, fail, hang or die."""
    if what == "fail":
        raise ValueError("no\ngood")
    if what == "hang":
        time.sleep(60)
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    return what.upper()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs signals")
def test_one_bad_item_does_not_end_the_others():
    outcomes = {o.item: o for o in isolated(behave, ["fail", "die", "fine"], jobs=2, preload=PRELOAD)}
    assert outcomes["fine"].value == "FINE"
    assert outcomes["fail"].error == "ValueError: no good"
    assert outcomes["die"].error == "the process ended with signal 9 (out of memory?)"
    (hung,) = isolated(behave, ["hang"], timeout=1, preload=PRELOAD)
    assert hung.error == "took longer than 1 s and was stopped"
    with pytest.raises(ValueError, match="jobs must be at least 1"):
        list(isolated(behave, ["fine"], jobs=0))


def test_the_command(tmp_path):
    page, records = tmp_path / "docs" / "zoo.md", tmp_path / "zoo.json"
    arguments = ["zoo", "--filter", "test_resnet", "--run", "--json", str(records), "--output", str(page)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "0 failures: 1 planned, 1 put to work" in result.output
    content = json.loads(records.read_text())
    assert content["plans"][0]["architecture"]["name"] == content["runs"][0]["architecture"]["name"] == "test_resnet"
    assert content["runs"][0]["error"] is None
    assert content["left_out"] == []
    text = page.read_text()
    assert "sao-prune zoo --filter 'test_resnet' --run --output" in text
    assert f"torch {torch.__version__.partition('+')[0]}" in text
    assert "| resnet | test_resnet | 469,688 |" in text


@pytest.mark.parametrize("options", [{"sparsity": 1.0}, {"jobs": 0}, {"pattern": ""}])
def test_bad_options(options):
    with pytest.raises(ZooError):
        VisitOptions(**options)


def test_a_model_whose_process_dies_is_tried_again_alone(monkeypatch):
    calls = []

    def isolated(function, items, *, jobs=1, **options):
        calls.append(([task.architecture.name for task in items], jobs))
        for task in items:
            died = task.architecture.name == "test_vit" and jobs > 1
            yield Outcome(task, None if died else function(task), "died" if died else None, died)

    monkeypatch.setattr(sys.modules["sao_prune.lab.zoo.runs"], "isolated", isolated)
    runs = list(run_zoo([one("test_vit"), one("test_resnet")], 0.5, jobs=2))
    assert [(r.architecture.name, r.error) for r in runs] == [("test_resnet", None), ("test_vit", None)]
    assert calls == [(["test_vit", "test_resnet"], 2), (["test_vit"], 1)]
