"""Reports: one base, so that each prints, becomes plain data and becomes JSON in the same way."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import sao_prune
from sao_prune.exporting import ExportReport
from sao_prune.tables import TableReport


def net() -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))


def reports() -> dict[str, TableReport]:
    model = net()
    found: dict[str, TableReport] = {"plan": sao_prune.plan(model, groups=4)}
    found["apply"] = sao_prune.apply(model, groups=4, seed=0)
    found["hold"] = sao_prune.hold(model)
    found["release"] = sao_prune.release(model)
    found["compact"] = sao_prune.compact(model)
    found["expand"] = sao_prune.expand(model)
    found["remove"] = sao_prune.remove(model)
    images = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1))
    found["convert_eco"] = sao_prune.nn.convert_eco(images, torch.zeros(1, 3, 9, 9), seed=0)
    found["export_onnx"] = ExportReport(Path("net.onnx"), 10, {"MatMul": 2, "Add": 3}, 2, 0, 1, 1e-7)
    return found


def test_all_reports_are_of_one_kind() -> None:
    for name, report in reports().items():
        assert isinstance(report, TableReport), name
        text = str(report)
        assert report.title in text, name
        assert report.summary().split(";")[0] in text, name
        whole = json.loads(report.to_json())
        assert whole == report.to_dict(), name
        assert whole["rows"] == report.rows(), name
        assert len(report.rows()) == len(report.lines()) > 0, name
        assert all(len(line.cells) == len(report.columns) for line in report.lines()), name


def test_json_of_a_compact_report_has_its_plan() -> None:
    report = reports()["compact"]
    assert isinstance(report, sao_prune.blocks.CompactReport)
    plan = report.to_dict()["plan"]
    assert sao_prune.blocks.Plan.from_json(json.dumps(plan)) == report.plan


@pytest.mark.parametrize(
    ("method", "values"),
    [
        ("sao", "drawn"),
        ("eoi", "drawn"),
        ("rg", "kept"),
        ("gmp", "kept"),
        (sao_prune.RG(values="normal"), "drawn"),
        (sao_prune.Project(inputs=torch.ones(4, 16)), "solved"),
        (sao_prune.Project(inputs=torch.ones(4, 16), values="keep"), "kept"),
    ],
)
def test_a_report_says_where_the_values_come_from(method: object, values: str) -> None:
    for verb in (sao_prune.plan, sao_prune.apply):
        report = verb(net(), sparsity=0.75, method=method)  # type: ignore[operator]
        assert [layer.values for layer in report.layers] == [None, values, values, None]
        assert re.search(rf"^ 1 .* {values}\b", str(report), re.MULTILINE)
