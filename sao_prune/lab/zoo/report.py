"""What the zoo shows: tables on the terminal, a page of markdown, JSON."""

from __future__ import annotations

import json
import os
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ...files import write_atomically
from .architecture import KNOWN
from .images import BATCH
from .plans import ZooPlan
from .runs import MEMORY, too_large
from .texts import FAMILIES, PLANNED, RUN, RUN_TITLES
from .trial import ZooRun

Row = Sequence[str]


@dataclass(frozen=True)
class Zoo:
    """All that a visit found.

    Attributes:
        plans: one an architecture.
        runs: those put to work; empty if none was asked for.
        sparsity: what was requested.
        command: the command that made it.
        seconds: wall-clock time.
        left_out: families of transformers without a small model that runs; in none of the others.
    """

    plans: tuple[ZooPlan, ...]
    runs: tuple[ZooRun, ...]
    sparsity: float
    command: str
    seconds: float = 0.0
    left_out: tuple[ZooPlan, ...] = ()

    @property
    def libraries(self) -> list[str]:
        """Names of the libraries that were looked at."""
        return sorted({p.architecture.library for p in (*self.plans, *self.left_out)})

    @property
    def failures(self) -> list[tuple[str, str, str]]:
        """``(stage, architecture, reason)`` of everything that is not as it must be."""
        plans = [("plan", _title(p), p.failure) for p in self.plans if p.failure]
        return plans + [("run", _title(r), r.error) for r in self.runs if r.error]

    @property
    def untouched(self) -> list[ZooPlan]:
        """Architectures whose every layer but first and last is skipped for a reason."""
        return [p for p in self.plans if not p.layers and not p.failure]


def versions() -> dict[str, str]:
    """Versions of what a visit depends on."""
    found = {"python": platform.python_version()}
    for package in ("torch", *KNOWN, "sao-prune"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def print_zoo(zoo: Zoo, console: Console) -> None:
    """Totals, reasons, the runs, and every failure."""
    sections = [
        (f"The zoo at {_percent(zoo.sparsity)} sparsity", *_plan_totals(zoo)),
        ("Layers skipped", *_reasons(zoo)),
        *([("Architectures skipped", *untouched(zoo))] if zoo.untouched else []),
        *([("Families left out", *left_out(zoo))] if zoo.left_out else []),
        *([("At work", *_run_totals(zoo))] if zoo.runs else []),
        *([("Failures", *failures(zoo))] if zoo.failures else []),
    ]
    for title, head, rows in sections:
        table = Table(title=title, title_justify="left")
        for index, column in enumerate(head):
            table.add_column(column, overflow="fold", justify="right" if _numeric(rows, index) else "left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    total = f"{len(zoo.plans)} planned, {len(zoo.runs)} put to work"
    console.print(f"{len(zoo.failures)} failures: {total}, {zoo.seconds:.0f} s", highlight=False)


def write_markdown(zoo: Zoo, path: Path) -> None:
    """The page ``docs/zoo.md``."""
    parts = [_intro(zoo, path), "## Planned", PLANNED, FAMILIES if "transformers" in zoo.libraries else ""]
    parts += [_markdown(*_plan_totals(zoo)), _markdown(*_reasons(zoo))]
    parts += [_markdown(*left_out(zoo))] if zoo.left_out else []
    if zoo.untouched:
        parts += [
            "Skipped as a whole, because every layer but the first and the last is:",
            _markdown(*untouched(zoo)),
        ]
    parts += ["## Failures", _markdown(*failures(zoo)) if zoo.failures else "None."]
    if zoo.runs:
        parts += ["## At work", _at_work(zoo), _markdown(*_run_totals(zoo)), _not_run(zoo)]
        for library, title in RUN_TITLES.items():
            head, rows = runs(zoo, library)
            parts += [f"### {title}", _markdown(head, rows)] if rows else []
    parts += ["## Families", _markdown(*families(zoo))]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "\n\n".join(part for part in parts if part) + "\n")


def write_json(zoo: Zoo, path: Path) -> None:
    """Every record, with the versions."""
    content = {"command": zoo.command, "sparsity": zoo.sparsity, "seconds": zoo.seconds, "versions": versions()}
    records = {
        name: [asdict(record) for record in found]
        for name, found in (("plans", zoo.plans), ("runs", zoo.runs), ("left_out", zoo.left_out))
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps({**content, **records}, indent=1) + "\n")


def _plan_totals(zoo: Zoo) -> tuple[Row, list[Row]]:
    """One column a library and one for both."""
    columns = _by_library(zoo.plans)
    measures: list[tuple[str, Callable[[Sequence[ZooPlan]], str]]] = [
        ("architectures", lambda ps: f"{len(ps):,}"),
        ("with layers to prune", lambda ps: f"{sum(p.layers > 0 for p in ps):,}"),
        ("skipped as a whole", lambda ps: f"{sum(not p.layers and not p.failure for p in ps):,}"),
        ("failures", lambda ps: f"{sum(p.failure is not None for p in ps):,}"),
        ("layers to prune", lambda ps: f"{_sum(ps, 'layers'):,}"),
        ("of these with even sets", lambda ps: f"{_sum(ps, 'even'):,}"),
        ("of these with uneven sets", lambda ps: f"{_sum(ps, 'uneven'):,}"),
        ("of these over a percentage point off", lambda ps: f"{_sum(ps, 'off_target'):,}"),
        ("weights in them", lambda ps: f"{_sum(ps, 'weights'):,}"),
        ("of these kept", lambda ps: f"{_sum(ps, 'kept'):,}"),
        ("sparsity", lambda ps: _percent(1 - _sum(ps, "kept") / max(1, _sum(ps, "weights")))),
        ("layers skipped", lambda ps: f"{sum(sum(p.skipped.values()) for p in ps):,}"),
        ("weights skipped", lambda ps: f"{_sum(ps, 'skipped_weights'):,}"),
        ("weights in no known layer", lambda ps: f"{_sum(ps, 'outside'):,}"),
    ]
    return ("", *columns), [(name, *(measure(ps) for ps in columns.values())) for name, measure in measures]


def _reasons(zoo: Zoo) -> tuple[Row, list[Row]]:
    """How many layers are skipped for which reason."""
    columns = _by_library(zoo.plans)
    counts = {name: sum((Counter(p.skipped) for p in plans), Counter[str]()) for name, plans in columns.items()}
    names = [reason for reason, _ in sum(counts.values(), Counter[str]()).most_common()]
    return ("reason", *columns), [(reason, *(f"{counts[c][reason]:,}" for c in columns)) for reason in names]


def untouched(zoo: Zoo) -> tuple[Row, list[Row]]:
    """Architectures without a layer to prune, by family and reason."""
    told = [
        (p.architecture.library, p.architecture.family, _main_reason(p), p.architecture.name) for p in zoo.untouched
    ]
    rows: list[Row] = []
    for key, group in groupby(sorted(told), key=lambda row: row[:3]):
        rows.append((*key, ", ".join(row[3] for row in group)))
    return ("library", "family", "reason", "architectures"), rows


def left_out(zoo: Zoo) -> tuple[Row, list[Row]]:
    """How many families of transformers are left out for which reason."""
    counts = Counter(str(p.left_out) for p in zoo.left_out)
    return ("left out, because", "families"), [(reason, f"{count:,}") for reason, count in counts.most_common()]


def failures(zoo: Zoo) -> tuple[Row, list[Row]]:
    """Every failure with its reason."""
    return ("stage", "architecture", "reason"), [tuple(row) for row in zoo.failures]


def _run_totals(zoo: Zoo) -> tuple[Row, list[Row]]:
    """One column a library and one for both."""
    columns = _by_library(zoo.runs)
    measures: list[tuple[str, Callable[[Sequence[ZooRun]], str]]] = [
        ("architectures", lambda rs: f"{len(rs):,}"),
        ("families", lambda rs: f"{len({(r.architecture.library, r.architecture.family) for r in rs}):,}"),
        ("failures", lambda rs: f"{sum(r.error is not None for r in rs):,}"),
        ("layers pruned", lambda rs: f"{_sum(rs, 'layers'):,}"),
        ("largest peak memory, MiB", lambda rs: f"{max((r.peak for r in rs), default=0) / 2**20:,.0f}"),
        ("seconds in all", lambda rs: f"{sum(r.seconds for r in rs):,.0f}"),
    ]
    return ("", *columns), [(name, *(measure(rs) for rs in columns.values())) for name, measure in measures]


def runs(zoo: Zoo, library: str) -> tuple[Row, list[Row]]:
    """One row for each architecture of a library that was put to work."""
    head = ("family", "model", "parameters", "input", "layers", "sparsity", "seconds", "peak MiB", "result")
    rows: list[Row] = [
        (
            run.architecture.family,
            run.architecture.name,
            f"{run.parameters:,}",
            " x ".join(map(str, run.image)),
            f"{run.layers:,}",
            _percent(run.sparsity),
            f"{run.seconds:.1f}",
            f"{run.peak / 2**20:,.0f}",
            run.error or "passed",
        )
        for run in zoo.runs
        if run.architecture.library == library
    ]
    return head, rows


def families(zoo: Zoo) -> tuple[Row, list[Row]]:
    """One row a family: what was planned."""
    head = ("library", "family", "architectures", "layers", "uneven", "skipped", "sparsity", "failures")
    rows: list[Row] = []
    ordered = sorted(zoo.plans, key=lambda p: p.architecture)
    for (library, family), group in groupby(ordered, key=lambda p: (p.architecture.library, p.architecture.family)):
        plans = list(group)
        weights = _sum(plans, "weights")
        row = (
            f"{len(plans):,}",
            f"{_sum(plans, 'layers'):,}",
            f"{_sum(plans, 'uneven'):,}",
            f"{sum(sum(p.skipped.values()) for p in plans):,}",
            _percent(1 - _sum(plans, "kept") / weights) if weights else "-",
            f"{sum(p.failure is not None for p in plans):,}",
        )
        rows.append((library, family, *row))
    return head, rows


def _intro(zoo: Zoo, path: Path) -> str:
    measured = ", ".join(f"{name} {number}" for name, number in versions().items())
    return (
        f"# The zoo\n\nWhich architectures of {' and '.join(zoo.libraries)} `sao_prune` can prune, at "
        f"{_percent(zoo.sparsity)} "
        f"sparsity. This page was written by\n\n```\n{zoo.command} --output {path}\n```\n\n"
        f"in {zoo.seconds / 60:.0f} minutes on {os.cpu_count()} CPU cores, with {measured}."
    )


def _at_work(zoo: Zoo) -> str:
    return RUN.format(batch=BATCH)


def _not_run(zoo: Zoo) -> str:
    """Who is missing, and why."""
    planned = {p.architecture.family for p in zoo.plans if p.architecture.library == "timm"}
    seen = {r.architecture.family for r in zoo.runs if r.architecture.library == "timm"}
    large = too_large(zoo.plans)
    if not planned and not large:
        return ""
    lines = [f"Families without a run, having no layer to prune: {', '.join(sorted(planned - seen)) or 'none'}."]
    if large:
        lines.append(f"torchvision's models too large for {MEMORY / 2**30:.0f} GiB, not run: {', '.join(large)}.")
    return " ".join(lines)


def _markdown(head: Row, rows: Iterable[Row]) -> str:
    rows = [tuple(cell.replace("|", "\\|") for cell in row) for row in rows]
    rule = ["--:" if _numeric(rows, index) else "---" for index in range(len(head))]
    return "\n".join(f"| {' | '.join(cell.strip() for cell in row)} |" for row in (head, rule, *rows))


def _numeric(rows: Sequence[Row], index: int) -> bool:
    cells = [row[index] for row in rows]
    return bool(cells) and all(cell[:1].isdigit() or cell == "-" for cell in cells)


def _by_library(records: Sequence[Any]) -> dict[str, list[Any]]:
    names = sorted({record.architecture.library for record in records})
    columns = {name: [r for r in records if r.architecture.library == name] for name in names}
    return columns | {"all": list(records)} if len(columns) > 1 else columns


def _sum(records: Iterable[Any], attribute: str) -> int:
    return sum(getattr(record, attribute) for record in records)


def _main_reason(plan: ZooPlan) -> str:
    inner = {reason: count for reason, count in plan.skipped.items() if reason not in ("first layer", "last layer")}
    return max(inner, key=lambda reason: inner[reason])


def _title(record: ZooPlan | ZooRun) -> str:
    return f"{record.architecture.library}: {record.architecture.name}"


def _percent(share: float) -> str:
    return f"{100 * share:.3f} %"
