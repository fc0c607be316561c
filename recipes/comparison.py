"""Tables of exported files, and what thinned ones of equal accuracy would take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean, median, stdev

from deployed import Row

# Of what thinned files are compared in: size, and times by form and batch size.
Quantity = Callable[[Row], float]


def quantities(row: Row) -> dict[str, Quantity]:
    """What is compared, by the heads of the columns."""
    found: dict[str, Quantity] = {"MB": lambda row: row.megabytes}
    for size in row.runtime:
        found[f"ONNX Runtime, batch {size}, ms"] = lambda row, size=size: row.runtime[size]
        found[f"torch, batch {size}, ms"] = lambda row, size=size: row.eager[size]
    return found


def table(files: Sequence[Sequence[Row]]) -> str:
    """Markdown: every file, and how many times less it takes than the dense one, which is the first.

    Args:
        files: of each the rows of all seeds, in one order. What trainings differ in is their mean and sample standard
            deviation, costs are means, times medians, and so are the ratios to the dense file of the same seed.
    """
    columns = quantities(files[0][0])
    head = ["file", "one-shot", "accuracy", "agreement", "output error (one-shot)", "multiply-adds", "parameters"]
    lines = []
    for rows in files:
        shares = ([getattr(row, name) for row in rows] for name in ("one_shot", "accuracy", "agreement"))
        cells = [rows[0].name, *(spread([100 * share for share in values], 2) + "%" for values in shares)]
        cells += [f"{spread([r.error for r in rows], 3)} ({spread([r.one_shot_error for r in rows], 3)})"]
        cells += [f"{fmean(r.multiply_adds for r in rows):.1%}", f"{round(fmean(r.parameters for r in rows)):,}"]
        for name, take in columns.items():
            middle = fmean if name == "MB" else median
            ratio = middle([take(dense) / take(row) for dense, row in zip(files[0], rows)])
            cells.append(f"{middle([take(row) for row in rows]):.2f} ({ratio:.2f}x)")
        lines.append(cells)
    return markdown([*head, *columns], lines)


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and sample standard deviation; a single value alone."""
    text = f"{fmean(values):.{digits}f}"
    return f"{text} ± {stdev(values):.{digits}f}" if len(values) > 1 else text


def front(rows: Sequence[Row]) -> list[Row]:
    """The dense file and the thinned ones, without those that cost more than a more accurate one; cheapest first."""
    found: list[Row] = []
    for row in sorted((r for r in rows if not r.name.startswith("project")), key=lambda r: r.multiply_adds):
        if not found or row.accuracy > found[-1].accuracy:
            found.append(row)
    return found


def around(row: Row, thinned: Sequence[Row]) -> tuple[Row, Row, float] | None:
    """The two files of a front that a file's accuracy lies between, and where, 0 to 1; ``None`` if above them all.

    Below them all it is the first one twice.
    """
    above = next((place for place, other in enumerate(thinned) if other.accuracy >= row.accuracy), None)
    if above is None:
        return None
    low, high = thinned[max(above - 1, 0)], thinned[above]
    gap = high.accuracy - low.accuracy
    return low, high, (row.accuracy - low.accuracy) / gap if gap else 0.0


def equal(rows: Sequence[Row]) -> str:
    """Markdown: how many times more a thinned file of equal accuracy takes than each converted one.

    Between two thinned files, or a thinned one and the dense one, size and times are interpolated in accuracy.
    """
    thinned, columns, lines = front(rows), quantities(rows[0]), []
    for row in (r for r in rows if r.name.startswith("project")):
        found = around(row, thinned)
        if found is None:
            lines.append([row.name, f"{row.accuracy:.2%}", "none is as accurate", *["" for _ in columns]])
            continue
        low, high, at = found
        names = f"{high.name}, which is more accurate" if low is high else f"{low.name} and {high.name}"
        takes = [(1 - at) * take(low) + at * take(high) for take in columns.values()]
        ratios = [f"{thin / take(row):.2f}x" for thin, take in zip(takes, columns.values())]
        lines.append([row.name, f"{row.accuracy:.2%}", names, *ratios])
    return markdown(["file", "accuracy", "thinned files", *columns], lines)


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table; all columns but the first to the right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, rule, *lines])
