"""Two runs side by side: which rows match, and how they are tested."""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from scipy import stats

from sao_prune.lab.comparison import compare
from sao_prune.lab.errors import ResultsError
from sao_prune.lab.report import print_comparison, write_comparison
from tests.lab.test_report import AMOUNTS, PLAIN, Page, accuracy, made_up

FASTER = PLAIN.replace("epochs: 3", "epochs: 2")
Pair = Callable[..., tuple[Path, Path]]


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    """The folders of two made-up runs; B reads one point higher for every seed."""

    def make(a: str, b: str) -> tuple[Path, Path]:
        return made_up(tmp_path / "first", a), made_up(
            tmp_path / "second", b, level=lambda trial: accuracy(trial) + 0.01
        )

    return make


def test_rows_are_matched_and_paired_by_their_seeds(pair: Pair) -> None:
    found = compare(*pair(PLAIN, FASTER), pytest.fail)
    assert [match.b.configuration.method.name for match in found.matches] == ["dense", "sao", "gmp-t"]
    assert all(match.a.configuration.method == match.b.configuration.method for match in found.matches)
    assert [match.common for match in found.matches] == [2, 2, 2]
    assert [match.difference for match in found.matches] == pytest.approx([0.01] * 3)
    assert found.unmatched == ((), ())
    assert found.changes.splitlines()[-2:] == [
        "-train: {epochs: 3, batch_size: 64}",
        "+train: {epochs: 2, batch_size: 64}",
    ]


def test_only_seeds_in_common_are_paired(pair: Pair) -> None:
    found = compare(*pair(PLAIN.replace("[0, 1]", "[4, 1, 0]"), PLAIN.replace("[0, 1]", "[0, 1, 2]")), pytest.fail)
    assert [match.common for match in found.matches] == [2, 2, 2]
    assert [match.difference for match in found.matches] == pytest.approx([0.01] * 3)


def test_without_seeds_in_common_the_means_are_compared(pair: Pair) -> None:
    found = compare(*pair(PLAIN, PLAIN.replace("[0, 1]", "[7, 9, 11]")), pytest.fail)
    match = found.matches[0]
    assert match.common == 0
    assert match.difference == pytest.approx(0.01 + 0.001 * (9 - 0.5))
    assert match.p == pytest.approx(stats.ttest_ind(match.b.accuracies, match.a.accuracies, equal_var=False).pvalue)


def test_what_only_one_run_has_is_told(pair: Pair, tmp_path: Path) -> None:
    a, b = pair(PLAIN.replace("sao, gmp-t", "sao, lmp-s"), PLAIN)
    console = Console(width=100, color_system=None)
    with console.capture() as captured:
        print_comparison(write_comparison(a, b, tmp_path / "out", pytest.fail), console)
    assert "- only in A: LMP-S" in captured.get()
    assert "- only in B: GMP-T" in (tmp_path / "out" / "comparison.md").read_text()
    rows = list(csv.DictReader((tmp_path / "out" / "comparison.csv").open()))
    assert [(row["method"], row["paired_seeds"]) for row in rows] == [("Dense", "2"), ("SAO", "2")]


def test_other_networks_are_matched_by_method_and_amount(pair: Pair) -> None:
    found = compare(*pair(AMOUNTS.replace("[3, 6]", "3"), AMOUNTS.replace("[3, 6]", "9")), pytest.fail)
    assert len(found.matches) == 1 + 2 * 3
    assert all(match.a.configuration.prune == match.b.configuration.prune for match in found.matches)


def test_runs_that_share_nothing_are_refused(pair: Pair) -> None:
    with pytest.raises(ResultsError, match="no configuration in common"):
        compare(
            *pair(PLAIN.replace("dense, sao, gmp-t", "sao"), PLAIN.replace("dense, sao, gmp-t", "lmp-s")), pytest.fail
        )


def test_the_page_of_a_comparison_stands_alone(pair: Pair, tmp_path: Path) -> None:
    a, b = pair(PLAIN + "title: '<b>A</b>'\n", FASTER)
    write_comparison(a, b, b, pytest.fail)
    found = Page((b / "comparison.html").read_text())
    assert found.all("h1") == ["second against first"]
    assert "<b>A</b>" in found.all("dd")
    assert found.all("td").count("+1.00") == 3
    assert "+train: {epochs: 2, batch_size: 64}" in found.all("code")[0]
