"""Two runs side by side: the rows that mean the same in both, seed by seed where the seeds agree."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from scipy import stats

from .errors import ResultsError
from .summary import Row, Summary, paired, summarise


@dataclass(frozen=True)
class Match:
    """A row of run A and the row of run B that means the same.

    Attributes:
        difference: accuracy of B minus that of A: over the seeds that both have if there are two of them or more, else
            of the means; ``None`` while a run has none.
        p: of a two-sided t-test, paired or Welch's; ``None`` where there is nothing to test with.
        common: seeds in common that were paired; 0 where none were.
    """

    a: Row
    b: Row
    difference: float | None
    p: float | None
    common: int


@dataclass(frozen=True)
class Comparison:
    """Run B against run A.

    Attributes:
        names: what the runs are called.
        summaries: of the two runs.
        matches: in the order of B's rows.
        unmatched: rows of A, and of B, that the other has not.
        changes: the lines in which the recipes differ, as a unified diff.
    """

    names: tuple[str, str]
    summaries: tuple[Summary, Summary]
    matches: tuple[Match, ...]
    unmatched: tuple[tuple[Row, ...], tuple[Row, ...]]
    changes: str


def compare(a: Path, b: Path, warn: Callable[[str], None]) -> Comparison:
    """Read the folders of two runs and match their rows.

    Rows match that have the same case, network, options, method and amount. Where no row of one run has one in the
    other by all of these, the case is left out of the comparison, then the network's name, its options, the amount.

    Raises:
        ResultsError: if a folder holds no run, or they have no row in common.
    """
    summaries = summarise(a, warn), summarise(b, warn)
    for identity in _IDENTITIES:
        there, here = (_unique(summary.rows, identity) for summary in summaries)
        common = [key for key in here if key in there]
        if common:
            break
    else:
        raise ResultsError(
            f"{a} and {b} have no configuration in common: compare runs that share methods, and networks or amounts"
        )
    matches = tuple(match(there[key], here[key]) for key in common)
    return Comparison(
        _names(a, b),
        summaries,
        matches,
        (
            _others(summaries[0].rows, [found.a for found in matches]),
            _others(summaries[1].rows, [found.b for found in matches]),
        ),
        _changes(summaries),
    )


def match(a: Row, b: Row) -> Match:
    """Two rows compared."""
    both = paired(b.by_seed, a.by_seed)
    if both is not None:
        return Match(a, b, both.difference, both.p, len(set(a.seeds) & set(b.seeds)))
    if not a.accuracies or not b.accuracies:
        return Match(a, b, None, None, 0)
    tested = min(len(a.accuracies), len(b.accuracies)) > 1 and max(a.spread or 0, b.spread or 0) > 1e-12
    p = float(stats.ttest_ind(b.accuracies, a.accuracies, equal_var=False).pvalue) if tested else None
    return Match(a, b, fmean(b.accuracies) - fmean(a.accuracies), p, 0)


def _identity(*parts: str) -> Callable[[Row], Hashable]:
    """A row's key, made of the named parts and of its method."""

    def key(row: Row) -> Hashable:
        configuration = row.configuration
        every = {
            "case": configuration.setting.label,
            "network": configuration.setting.network.name,
            "options": tuple(sorted(configuration.options.items())),
            "amount": tuple(sorted(configuration.prune.items())),
        }
        method = configuration.method.name, tuple(sorted(configuration.method.options.items()))
        return method, *(every[part] for part in parts)

    return key


_IDENTITIES = (
    _identity("case", "network", "options", "amount"),
    _identity("network", "options", "amount"),
    _identity("options", "amount"),
    _identity("amount"),
    _identity(),
)


def _unique(rows: Iterable[Row], identity: Callable[[Row], Hashable]) -> dict[Hashable, Row]:
    """Rows by a key that no other row of the run has."""
    rows = list(rows)
    counts = Counter(map(identity, rows))
    return {identity(row): row for row in rows if counts[identity(row)] == 1}


def _others(rows: Iterable[Row], matched: Sequence[Row]) -> tuple[Row, ...]:
    return tuple(row for row in rows if not any(row is other for other in matched))


def _names(a: Path, b: Path) -> tuple[str, str]:
    """The folders' own names, or their paths where those are the same."""
    short = a.resolve().name, b.resolve().name
    return short if short[0] != short[1] else (str(a), str(b))


def _changes(summaries: tuple[Summary, Summary]) -> str:
    old, new = (summary.recipe_text.splitlines() for summary in summaries)
    return "\n".join(list(difflib.unified_diff(old, new, "A/recipe.yaml", "B/recipe.yaml", lineterm="", n=1)))
