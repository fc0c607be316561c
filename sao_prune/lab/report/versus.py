"""Figures that the comparison is about: final accuracy against what the recipe varies."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from statistics import fmean

from ..recipe import Configuration, LearningRates
from ..summary import Row, Summary
from .chart import Chart, Line, Panel, accuracy_limits, at_most, over_seeds, rows_by
from .table import groups


def sparsity_chart(summary: Summary) -> Chart | None:
    """Final accuracy against sparsity, a panel for every network that has several amounts."""
    panels: list[Panel] = []
    ticks: dict[float, str] = {}
    for group in groups(summary):
        amounts = group.rows[0].configuration.setting.prune.grid()
        pruned = [row for row in group.rows if row.accuracies and not row.configuration.method.is_dense]
        if len(amounts) < 2 or len({row.sparsity for row in pruned}) < 2:
            continue
        lines = list(_levels(group.rows))
        for members in rows_by(pruned, lambda row: row.configuration.method.title).values():
            members.sort(key=lambda row: row.sparsity or 0.0)
            lines.append(_points([_place(row.sparsity) for row in members], members))
        for amount, rows in rows_by(pruned, lambda row: tuple(row.configuration.prune.items())).items():
            share = dict(amount).get("sparsity") or fmean(row.sparsity or 0.0 for row in rows)
            ticks[_place(share)] = f"{100 * share:.5g}"
        panels.append(Panel(group.title, tuple(lines)))
    shown, left_out = at_most(panels)
    if not shown:
        return None
    return Chart(
        "sparsity",
        "Accuracy against sparsity",
        "Final accuracy on the test set: mean over seeds, with bars from the lowest to the highest. The horizontal "
        f"axis is logarithmic in the weights that are left.{_dense_level(shown)}{left_out}",
        shown,
        ("sparsity of the pruned layers (%)", "test accuracy (%)"),
        accuracy_limits(shown),
        ticks=tuple(sorted(ticks.items())),
        headline=True,
    )


def depth_chart(summary: Summary) -> Chart | None:
    """Final accuracy against depth, a panel for everything else that varies.

    Drawn where one training is given several depths, and not more amounts than depths.
    """
    panels: list[Panel] = []
    depths: set[int] = set()
    finished = [row for row in summary.rows if row.accuracies]
    for rows in rows_by(finished, lambda row: _all_but_depth(row.configuration)).values():
        there, amounts = {_depth(row) for row in rows}, rows[0].configuration.setting.prune.grid()
        if len(there) < max(2, len(amounts)):
            continue
        for amount in amounts:
            members = [row for row in rows if row.configuration.prune in ({}, amount)]
            panels.append(Panel(_title_without_depth(members[-1].configuration), tuple(_by_depth(members))))
        depths |= there
    shown, left_out = at_most(panels)
    if not shown:
        return None
    return Chart(
        "depth",
        "Accuracy against depth",
        "Final accuracy on the test set: mean over seeds, with bars from the lowest to the highest. The horizontal "
        f"axis is logarithmic.{left_out}",
        shown,
        ("depth N", "test accuracy (%)"),
        accuracy_limits(shown),
        ticks=tuple((math.log2(depth), f"{depth:,}") for depth in sorted(depths)),
        headline=True,
    )


def _by_depth(rows: Iterable[Row]) -> Iterator[Line]:
    for members in rows_by(rows, lambda row: row.configuration.method.title).values():
        members.sort(key=_depth)
        yield _points([math.log2(_depth(row)) for row in members], members)


def _points(x: Sequence[float], rows: Sequence[Row]) -> Line:
    return over_seeds(rows[0].configuration.method.title, tuple(x), [row.accuracies for row in rows], "bars")


def _levels(rows: Iterable[Row]) -> Iterator[Line]:
    """Dense, which no amount changes."""
    for row in rows:
        if row.configuration.method.is_dense and row.accuracies:
            yield over_seeds(row.configuration.method.title, (0.0,), [row.accuracies], "level")


def _dense_level(panels: Iterable[Panel]) -> str:
    levels = dict.fromkeys(line.method for panel in panels for line in panel.lines if line.form == "level")
    return f" {', '.join(levels)}: the horizontal line." if levels else ""


def _place(sparsity: float | None) -> float:
    """Where a sparsity stands: a step to the right for every halving of what is left."""
    return -math.log2(max(1 - (sparsity or 0.0), 2.0**-40))


def _depth(row: Row) -> int:
    """Of its network; 1 for one that has no such option."""
    depth = row.configuration.options.get("depth")
    return depth if isinstance(depth, int) else 1


def _all_but_depth(configuration: Configuration) -> str:
    """What two rows share that differ at most in depth, method, amount and learning rate."""
    setting, options = (
        configuration.setting,
        {key: value for key, value in configuration.options.items() if key != "depth"},
    )
    network = replace(setting.network, depth=None)
    return repr((options, replace(setting, network=network, label=None, methods=(), lr=LearningRates((1.0,)))))


def _title_without_depth(configuration: Configuration) -> str:
    options = {key: value for key, value in configuration.options.items() if key != "depth"}
    network = replace(configuration.setting.network, depth=None)
    return ", ".join([*network.varying(options), *configuration.setting.prune.varying(configuration.prune)])
