"""Numbers as comma-separated values."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")


def csv_text(fields: Mapping[str, Callable[[T], object]], rows: Iterable[T]) -> str:
    """One line a row, below the names of the columns.

    Example:
        >>> print(csv_text({"n": int, "half": lambda n: n / 2}, [1, 2]).strip())
        n,half
        1,0.5
        2,1.0
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(fields)
    writer.writerows([field(row) for field in fields.values()] for row in rows)
    return text.getvalue()
