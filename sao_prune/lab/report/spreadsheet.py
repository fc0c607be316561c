"""The results as comma-separated values."""

from __future__ import annotations

import csv
import io

from ..summary import Summary
from .table import FIELDS


def csv_text(summary: Summary) -> str:
    """One line a row, below the names of the columns."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(FIELDS)
    writer.writerows([field(row) for field in FIELDS.values()] for row in summary.rows)
    return text.getvalue()
