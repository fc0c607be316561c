"""What files of several seeds say together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from statistics import fmean, median, stdev
from typing import Any

from deployed import Row

# What trainings differ in from seed to seed, by the names of a row's fields.
SPREAD = ("one_shot", "one_shot_error", "accuracy", "agreement", "error")


def by_file(runs: Sequence[Sequence[Row]]) -> list[list[Row]]:
    """The rows of every file that all seeds have, in the first one's order; within a file in that of the seeds.

    Args:
        runs: the rows of every seed.
    """
    named = [{row.name: row for row in rows} for rows in runs]
    return [[rows[name] for rows in named] for name in named[0] if all(name in rows for rows in named)]


def missing(runs: Mapping[int, Sequence[Row]]) -> dict[str, list[int]]:
    """The seeds that lack a file, by the names of those files that not every seed has."""
    names = dict.fromkeys(row.name for rows in runs.values() for row in rows)
    lack = {name: [seed for seed, rows in runs.items() if name not in {r.name for r in rows}] for name in names}
    return {name: seeds for name, seeds in lack.items() if seeds}


def mean(rows: Sequence[Row]) -> Row:
    """One row for a file of several seeds: means, and medians of times."""
    values = {name: fmean(getattr(row, name) for row in rows) for name in (*SPREAD, "multiply_adds", "megabytes")}
    runtime, eager = (
        {size: median(times[size] for times in all_times) for size in all_times[0]}
        for all_times in ([row.runtime for row in rows], [row.eager for row in rows])
    )
    parameters = round(fmean(row.parameters for row in rows))
    return replace(rows[0], parameters=parameters, runtime=runtime, eager=eager, **values)


def said(rows: Sequence[Row]) -> dict[str, Any]:
    """That row for JSON, with the sample standard deviations of what trainings differ in."""
    return {**asdict(mean(rows)), "deviations": {name: stdev(getattr(row, name) for row in rows) for name in SPREAD}}
