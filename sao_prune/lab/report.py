"""The report of a run: a table on the terminal, and report.md, results.csv and figures beside the results."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .figures import draw_accuracy, draw_spectra
from .results import write_atomically
from .summary import Row, Summary, summarise


def write_report(folder: Path, warn: Callable[[str], None]) -> Summary:
    """Write ``report.md``, ``results.csv``, ``accuracy.png`` and ``jacobian.png`` into a run's folder.

    Raises:
        ResultsError: if the folder holds no results.
    """
    summary = summarise(folder, warn)
    figures = [
        name
        for name, draw in (("accuracy.png", draw_accuracy), ("jacobian.png", draw_spectra))
        if draw(summary, folder / name)
    ]
    write_atomically(folder / "results.csv", _csv(summary))
    write_atomically(folder / "report.md", _markdown(summary, figures))
    return summary


def print_report(summary: Summary, console: Console) -> None:
    """The table, and below it what a reader must know about its rows."""
    table = Table(title=escape(heading(summary)), title_justify="left", caption=escape(caption(summary)))
    table.caption_justify = "left"
    columns = [_COLUMNS.index(name) for name in (_COLUMNS if console.width >= _WIDE else _NARROW)]
    table.add_column(_COLUMNS[0], overflow="fold", min_width=6)
    for index in columns[1:]:
        table.add_column(_COLUMNS[index], justify="right", no_wrap=True)
    for row in summary.rows:
        texts = _texts(row)
        table.add_row(*(escape(texts[index]) for index in columns))
    console.print(table)
    for line in remarks(summary):
        console.print(escape(f"- {line}"), highlight=False, soft_wrap=True)


def heading(summary: Summary) -> str:
    """The comparison's title."""
    return summary.recipe.title or summary.recipe.name


def caption(summary: Summary) -> str:
    """How the numbers came about, in two sentences."""
    settings = summary.recipe.settings
    first = settings[0]
    epochs = _several(f"{setting.train.epochs}" for setting in settings)
    rates = _several(", ".join(f"{lr:g}" for lr in setting.lr.grid) for setting in settings)
    chosen = (
        f"lr of each method chosen from {rates} on a held-out {first.data.holdout:.0%} of the training set"
        if any(len(setting.lr.grid) > 1 for setting in settings)
        else f"lr {rates}"
    )
    return (
        f"Accuracy on the test set of {_several(setting.data.name for setting in settings)} after {epochs} epochs (a "
        "-T method trains as many more before it is pruned): mean, standard deviation and range over seeds "
        f"{_several(', '.join(map(str, setting.seeds)) for setting in settings)}; beside it the mean difference from "
        "SAO and the p-value of a paired t-test. Sparsity is that of the pruned layers, MACs are multiply-adds with a "
        "weight that is not zero as a share of the dense network's, time is that of one training (median, its dense "
        f"phase included). For a seed every method has the same initial dense weights, batches and order; {chosen}."
    )


def _several(values: Iterable[str]) -> str:
    """Each different value once."""
    return " / ".join(dict.fromkeys(values))


def remarks(summary: Summary) -> list[str]:
    """What is unfinished, and the notes of the rows."""
    lines = []
    if summary.done < summary.cells:
        lines.append(f"unfinished: {summary.done} of {summary.cells} cells are done; the same `sao-prune run` goes on")
    return lines + [f"{row.arm.title}: {note}" for row in summary.rows for note in row.notes]


_COLUMNS = (
    "method",
    "sparsity %",
    "accuracy %",
    "range",
    "vs SAO",
    "p",
    "lr",
    "non-zero",
    "MACs %",
    "time s",
    "CPU s",
)
# What fits into 80 characters beside the name of a method.
_NARROW = ("method", "sparsity %", "accuracy %", "vs SAO", "lr", "non-zero", "time s")
_WIDE = 120


def _texts(row: Row) -> list[str]:
    mean, spread, paired = row.mean, row.spread, row.against_sao
    accuracy = "-" if mean is None else f"{100 * mean:.2f}" + ("" if spread is None else f" ± {100 * spread:.2f}")
    extent = f"{100 * min(row.accuracies):.2f}–{100 * max(row.accuracies):.2f}" if row.accuracies else "-"
    return [
        row.arm.title,
        "-" if row.sparsity is None else f"{100 * row.sparsity:.3f}",
        accuracy,
        extent,
        "-" if paired is None else f"{100 * paired.difference:+.2f}",
        "-" if paired is None or paired.p is None else f"{paired.p:.2g}",
        "-" if row.lr is None else f"{row.lr:g}",
        "-" if row.nonzero is None else f"{row.nonzero:,}",
        "-" if row.flops is None or not row.dense_flops else f"{100 * row.flops / row.dense_flops:.1f}",
        "-" if row.seconds is None else f"{row.seconds:.1f}",
        "-" if row.cpu_seconds is None else f"{row.cpu_seconds:.1f}",
    ]


def _markdown(summary: Summary, figures: list[str]) -> str:
    lines = [f"# {heading(summary)}", "", caption(summary), ""]
    lines += ["| " + " | ".join(_COLUMNS) + " |", "|---" + "|---:" * (len(_COLUMNS) - 1) + "|"]
    lines += ["| " + " | ".join(text.replace("|", "\\|") for text in _texts(row)) + " |" for row in summary.rows]
    lines += [""] + [f"- {line}" for line in remarks(summary)]
    lines += [f"- made with {environment}" for environment in summary.environments]
    for name in figures:
        lines += ["", f"![{_FIGURES[name]}]({name})"]
    lines += [
        "",
        "To run it again: `sao-prune run recipe.yaml`, with the recipe in this folder. Every training is a line of "
        "`results.jsonl`; the table above is also in `results.csv`.",
    ]
    return "\n".join(lines) + "\n"


_FIGURES = {
    "accuracy.png": "Accuracy on the test set over epochs: mean over seeds and lowest to highest",
    "jacobian.png": "Singular values of the Jacobian from the input to every layer, at initialisation",
}


def _csv(summary: Summary) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        [
            "method",
            "network",
            "sparsity",
            "accuracy_mean",
            "accuracy_sd",
            "accuracy_min",
            "accuracy_max",
            "seeds",
            "lr",
            "nonzero",
            "parameters",
            "seconds_median",
            "cpu_seconds_median",
            "flops",
            "dense_flops",
            "difference_from_sao",
            "p_value",
            "execution",
        ]
    )
    for row in summary.rows:
        found = row.accuracies
        extent = [min(found), max(found)] if found else [None, None]
        writer.writerow(
            [
                row.arm.title,
                row.arm.setting.network.name,
                row.sparsity,
                row.mean,
                row.spread,
                *extent,
                len(found),
                row.lr,
                row.nonzero,
                row.parameters,
                row.seconds,
                row.cpu_seconds,
                row.flops,
                row.dense_flops,
                row.against_sao and row.against_sao.difference,
                row.against_sao and row.against_sao.p,
                row.execution,
            ]
        )
    return text.getvalue()
