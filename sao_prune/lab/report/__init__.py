"""The report of a run: on the terminal, and as a page, Markdown, CSV and figures beside the results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ...files import write_atomically
from ..summary import Summary, summarise
from .attacked import attacked_fields
from .compared import print_comparison, write_comparison
from .costs import cost_chart
from .curves import accuracy_chart, spectrum_chart
from .drawing import draw_png, styles
from .pace import PACE_FIELDS
from .pages import html_page, markdown_text
from .spreadsheet import csv_text
from .table import FIELDS
from .terminal import print_report
from .versus import depth_chart, sparsity_chart

__all__ = ["print_comparison", "print_report", "write_comparison", "write_report"]

_CHARTS = {
    "sparsity": sparsity_chart,
    "depth": depth_chart,
    "cost": cost_chart,
    "accuracy": accuracy_chart,
    "jacobian": spectrum_chart,
}


def write_report(folder: Path, warn: Callable[[str], None]) -> Summary:
    """Write ``report.html``, ``report.md``, ``results.csv`` and the figures as PNG into a run's folder.

    A figure of an earlier report that the results no longer make is removed.

    Raises:
        ResultsError: if the folder holds no results.
    """
    summary = summarise(folder, warn)
    style = styles([(row.configuration.method.title, row.configuration.method.is_dense) for row in summary.rows])
    charts = []
    for name, make in _CHARTS.items():
        chart, path = make(summary), folder / f"{name}.png"
        if chart is None:
            path.unlink(missing_ok=True)
        else:
            draw_png(chart, path, summary.heading, style)
            charts.append(chart)
    fields = {**FIELDS, **PACE_FIELDS, **attacked_fields(summary.rows)}
    write_atomically(folder / "results.csv", csv_text(fields, summary.rows))
    write_atomically(folder / "report.md", markdown_text(summary, charts))
    write_atomically(folder / "report.html", html_page(summary, charts, style))
    return summary
