"""Results on disk survive whatever ends a run."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sao_prune.lab.errors import ResultsError
from sao_prune.lab.results import ResultsLog, read_results

NO_WARNING = pytest.fail


def record(key: str, value: float = 1.0) -> dict:
    return {"key": key, "result": {"accuracy": value}}


def test_what_is_appended_is_there_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "results.jsonl"
    with ResultsLog(path, NO_WARNING) as log:
        log.append(record("a"))
    with ResultsLog(path, NO_WARNING) as log:
        log.append(record("b"))
        assert set(log.records) == {"a", "b"}
    assert read_results(path, NO_WARNING) == {"a": record("a"), "b": record("b")}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(1, 200))
def test_a_file_cut_anywhere_loses_at_most_the_cells_behind_the_cut(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "results.jsonl"
    path.unlink(missing_ok=True)
    with ResultsLog(path, NO_WARNING) as log:
        for key in "abc":
            log.append(record(key))
    whole = path.read_bytes()
    cut = cut % len(whole)
    path.write_bytes(whole[:cut])
    whole_lines = whole[:cut].count(b"\n")
    with ResultsLog(path, lambda _: None) as log:
        assert list(log.records)[:whole_lines] == list("abc")[:whole_lines]
        log.append(record("z"))
        kept = set(log.records)
    assert set(read_results(path, NO_WARNING)) == kept
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_damaged_last_line_is_dropped_with_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    sound = json.dumps(record("a")) + "\n"
    path.write_text(sound + '{"key": "b", "resu')
    told: list[str] = []
    with ResultsLog(path, told.append) as log:
        assert set(log.records) == {"a"}
    assert path.read_text() == sound
    assert len(told) == 1
    assert f"{path}:2" in told[0]


def test_a_damaged_line_in_the_middle_is_ignored_and_left_for_the_user_to_see(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    text = json.dumps(record("a")) + "\nrubbish\n" + json.dumps(record("b")) + "\n"
    path.write_text(text)
    told: list[str] = []
    assert set(read_results(path, told.append)) == {"a", "b"}
    assert path.read_text() == text
    assert ":2:" in told[0]


def test_numbers_that_json_has_no_word_for_become_null(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    with ResultsLog(path, NO_WARNING) as log:
        log.append({"key": "a", "result": {"loss": math.nan, "curve": [1.0, math.inf, (-math.inf,)]}})
    assert read_results(path, NO_WARNING)["a"]["result"] == {"loss": None, "curve": [1.0, None, [None]]}


def test_two_runs_do_not_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    with ResultsLog(path, NO_WARNING), pytest.raises(ResultsError, match="another run"):
        ResultsLog(path, NO_WARNING)
    with ResultsLog(path, NO_WARNING):
        pass


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultsError, match="cannot write"):
        ResultsLog(tmp_path / "file" / "results.jsonl", NO_WARNING)
