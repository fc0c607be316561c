"""A whole comparison: fair, complete, resumable and reported."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sao_prune.lab.errors import LabError, ResultsError
from sao_prune.lab.recipe import Configuration, load_recipe
from sao_prune.lab.report import write_report
from sao_prune.lab.summary import summarise
from sao_prune.lab.sweep import RunOptions, run_recipe
from sao_prune.lab.trials import Trial, choose_lr, count_trials, final_trials, selection_trials
from sao_prune.lab.work import Worker, Workplace
from tests.patience import PATIENCE

Micro = Callable[..., Path]
TRIALS = 4 * (1 + 2 + 2)
FEW = ("[dense, sao, rg-s, gmp-s]", "[dense, sao]")
SHORT = (("[0.1, 0.01]", "0.1"), ("[0, 1]", "[0]"))


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def without_clock(record: dict) -> dict:
    result = {key: value for key, value in record["result"].items() if "seconds" not in key}
    return {"key": record["key"], "cell": record["cell"], "result": result}


def test_end_to_end(micro: Micro, tmp_path: Path, display) -> None:
    folder = run_recipe(micro(), RunOptions(tmp_path / "runs"), display)
    assert display.done == display.total
    assert [(m.title, m.done, m.running, m.left) for m in display.told[0]] == [
        (title, 0, 0, 5) for title in ("Dense", "SAO", "RG-S", "GMP-S")
    ]
    assert all(sum(m.running for m in told) == 1 for told in display.told[1::2])
    assert [(m.done, m.running, m.left) for m in display.told[-1]] == [(5, 0, 0)] * 4
    assert Counter(line["cell"]["kind"] for line in lines(folder)) == {"spectrum": 4, "select": 8, "final": 8}
    summary = write_report(folder, pytest.fail)
    assert (summary.done, summary.trials) == (TRIALS, TRIALS)
    assert [m.test for m in display.told[-1]] == [max(row.accuracies) for row in summary.rows]
    dense, sao, *_ = summary.rows
    assert dense.sparsity == 0
    assert sao.sparsity == 0.75
    assert sao.nonzero == sao.parameters - 0.75 * (1024 * 128 + 128 * 64 + 64 * 64)
    assert dense.mean > 0.8
    assert sao.mean > 0.8
    for name in ("accuracy.png", "jacobian.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    table = list(csv.DictReader((folder / "results.csv").open()))
    assert [row["method"] for row in table] == ["Dense", "SAO", "RG-S", "GMP-S"]
    assert float(table[1]["accuracy_mean"]) == pytest.approx(sao.mean)
    assert "| SAO | 75.000 |" in (folder / "report.md").read_text()

    before = (folder / "results.jsonl").read_bytes()
    run_recipe(micro(), RunOptions(tmp_path / "runs"), display)
    assert (folder / "results.jsonl").read_bytes() == before


def test_all_methods_start_from_the_same_dense_network(micro: Micro, tmp_path: Path) -> None:
    recipe = load_recipe(micro(("gmp-s]", "gmp-s, lmp-s, lrp-s, rg-n]")))
    worker = Worker(Workplace(tmp_path))
    networks = {
        configuration.method.name: worker.network(Trial("final", configuration, 1, 0.1))[0]
        for configuration in recipe.configurations()
    }
    dense = networks["dense"].state_dict()
    for name, model in networks.items():
        state = model.state_dict()
        assert torch.equal(state["head.weight"], dense["head.weight"])
        for key in dense:
            if key.endswith("bias"):
                assert torch.equal(state[key], dense[key])
            if name in ("rg-s", "gmp-s", "lmp-s", "lrp-s") and f"{key}_orig" in state:
                assert torch.equal(state[f"{key}_orig"] * state[f"{key}_mask"], dense[key] * state[f"{key}_mask"])


def test_learning_rates_are_chosen_on_the_held_out_part_only(micro: Micro, tmp_path: Path, display) -> None:
    recipe = load_recipe(micro())
    configuration = next(recipe.configurations())
    records = {}
    choosing = selection_trials(configuration, {})
    for lr, trials in choosing.items():
        for trial in trials:
            assert (trial.kind, trial.content()["holdout"]) == ("select", 0.2)
            records[trial.key] = {"result": {"status": "ok", "accuracy": lr, "loss": 1.0}}
    assert choose_lr(configuration, {}) is None
    assert choose_lr(configuration, records) == 0.1
    assert [(trial.lr, trial.content().get("holdout")) for trial in final_trials(configuration, records)] == [
        (0.1, None)
    ] * 2

    best = choosing[0.1][0].key
    records[best]["result"].update(status="diverged", loss=None)
    assert choose_lr(configuration, records) == 0.01
    for record in records.values():
        record["result"].update(status="ok", accuracy=0.5, loss=1.0)
    assert choose_lr(configuration, records) == 0.01
    records[best]["result"].update(loss=0.5)
    assert choose_lr(configuration, records) == 0.1


def test_a_grid_of_one_is_not_searched(micro: Micro) -> None:
    recipe = load_recipe(micro(("[0.1, 0.01]", "0.1, extend: 2")))
    configuration = next(recipe.configurations())
    assert selection_trials(configuration, {}) == {}
    assert count_trials(configuration, {})[0] == 1 + 2
    assert choose_lr(configuration, {}) == 0.1


def tried(configuration: Configuration, best: float) -> list[float]:
    """The rates that are tried, in turn, where accuracy falls from ``best`` to both sides."""
    records: dict[str, dict] = {}
    for _ in range(9):
        choosing = selection_trials(configuration, records)
        missing = [trial for trials in choosing.values() for trial in trials if trial.key not in records]
        if not missing:
            assert choose_lr(configuration, records) == min(choosing, key=lambda lr: abs(math.log(lr / best)))
            return list(choosing)
        assert choose_lr(configuration, records) is None
        assert count_trials(configuration, records)[0] == 1 + len(choosing) + 2
        for trial in missing:
            accuracy = -abs(math.log(trial.lr / best))
            records[trial.key] = {"result": {"status": "ok", "accuracy": accuracy, "loss": 1.0}}
    raise AssertionError(best)


@pytest.mark.parametrize(
    ("grid", "best", "rates"),
    [
        ("[0.3, 0.1, 0.03]", 0.1, [0.3, 0.1, 0.03]),
        ("[0.3, 0.1, 0.03]", 0.01, [0.3, 0.1, 0.03, 0.01, 0.003]),
        ("[0.03, 0.1, 0.3]", 1.0, [0.03, 0.1, 0.3, 1.0, 3.0]),
        ("[0.3, 0.1, 0.03]", 1e-9, [0.3, 0.1, 0.03, 0.01, 0.003, 0.001]),
        ("[0.03, 0.01, 0.001]", 0.1, [0.03, 0.01, 0.001, 0.09, 0.27]),
        ("[0.1, 0.01]", 0.001, [0.1, 0.01, 0.001, 0.0001]),
    ],
)
def test_a_grid_is_extended_until_the_best_rate_is_inside(
    micro: Micro, grid: str, best: float, rates: list[float]
) -> None:
    configuration = next(load_recipe(micro(("[0.1, 0.01]", f"{grid}, extend: 3"))).configurations())
    assert tried(configuration, best) == rates


def test_a_run_extends_its_grids_and_says_so(micro: Micro, tmp_path: Path, display) -> None:
    wide = run_recipe(micro(FEW), RunOptions(tmp_path / "runs"), display)
    before = len(lines(wide))
    folder = run_recipe(micro(FEW, ("[0.1, 0.01]", "[0.1, 0.01], extend: 1")), RunOptions(tmp_path / "runs"), display)
    assert display.done == display.total
    assert len(lines(folder)) > before
    summary = write_report(folder, pytest.fail)
    assert summary.done == summary.trials
    for row in summary.rows:
        rates = [rate.lr for rate in row.rates]
        assert len(rates) == 3
        assert any("edge" in note for note in row.notes) == (row.lr in (min(rates), max(rates)))
    assert "up to 1 beyond it were tried" in (folder / "report.md").read_text()


def test_a_diverged_trial_is_a_result(micro: Micro, tmp_path: Path, display) -> None:
    path = micro(("[0.1, 0.01]", "1e30"), ("[dense, sao, rg-s, gmp-s]", "dense"), ("tanh", "relu"))
    folder = run_recipe(path, RunOptions(tmp_path), display)
    assert display.done == display.total
    finals = [line["result"] for line in lines(folder) if line["cell"]["kind"] == "final"]
    assert [result["status"] for result in finals] == ["diverged"] * 2
    assert all(0 <= result["accuracy"] <= 0.3 for result in finals)
    assert "2 of 2 runs diverged" in write_report(folder, pytest.fail).rows[0].notes


def test_kill_9_loses_at_most_the_trial_in_flight(micro: Micro, tmp_path: Path, display, one_thread: None) -> None:
    path = micro(("epochs: 2", "epochs: 5"), FEW, ("[0, 1]", "[0]"))
    folder = tmp_path / "runs" / "micro"
    command = [sys.executable, "-c", "from sao_prune.cli import main; main()", "run", str(path), "--out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*command, str(folder.parent)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + PATIENCE
        while not (folder / "results.jsonl").exists() or (folder / "results.jsonl").read_bytes().count(b"\n") < 3:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    survived = (folder / "results.jsonl").read_bytes()
    survived = survived[: survived.rfind(b"\n") + 1]
    assert 3 <= survived.count(b"\n") < 8
    with (folder / "results.jsonl").open("ab") as file:
        file.write(b'{"key": "half a li')

    run_recipe(path, RunOptions(folder.parent), display)
    assert any("damaged" in note for note in display.notes)
    assert (folder / "results.jsonl").read_bytes().startswith(survived)
    resumed = lines(folder)
    assert len({line["key"] for line in resumed}) == len(resumed) == 8

    whole = lines(run_recipe(path, RunOptions(tmp_path / "again"), display))
    assert [without_clock(a) for a in resumed] == [without_clock(b) for b in whole]


def test_a_run_leaves_the_process_as_it_was(micro: Micro, tmp_path: Path, display) -> None:
    state = torch.get_rng_state()
    run_recipe(micro(("[dense, sao, rg-s, gmp-s]", "[rg-n]"), *SHORT), RunOptions(tmp_path), display)
    assert torch.equal(torch.get_rng_state(), state)
    assert float(torch.tensor(1e-40) * 1) > 0


def test_a_changed_recipe_trains_what_changed_and_reports_only_that(micro: Micro, tmp_path: Path, display) -> None:
    folder = run_recipe(micro(FEW, *SHORT), RunOptions(tmp_path), display)
    run_recipe(micro(FEW, *SHORT, ("groups: 4", "groups: 8")), RunOptions(tmp_path), display)
    assert len(lines(folder)) == 4 + 2
    assert summarise(folder, pytest.fail).rows[1].sparsity == 0.875


def test_an_unfinished_run_is_reported_as_such(micro: Micro, tmp_path: Path, display) -> None:
    folder = run_recipe(micro(FEW, ("[0.1, 0.01]", "0.1")), RunOptions(tmp_path), display)
    kept = [line for line in lines(folder) if line["cell"]["method"]["name"] == "dense"][:2]
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    summary = write_report(folder, pytest.fail)
    assert (summary.done, summary.trials) == (2, 6)
    assert summary.rows[0].notes == ("1 of 2 runs are done",)
    assert summary.rows[1].mean is None
    assert "unfinished: 2 of 6" in (folder / "report.md").read_text()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("name: sao_mlp,", "name: sao_mpl,"), "timm knows no network 'sao_mpl'"),
        (("activation: tanh", "activation: tahn"), "did you mean 'tanh'"),
    ],
)
def test_what_cannot_work_is_told_before_anything_is_trained(
    micro: Micro, tmp_path: Path, display, change: tuple[str, str], said: str
) -> None:
    with pytest.raises(LabError, match=said):
        run_recipe(micro(change), RunOptions(tmp_path / "runs"), display)
    assert not (tmp_path / "runs").exists()


def test_what_the_library_refuses_is_told_before_anything_is_trained(
    micro: Micro, tmp_path: Path, display, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("too sparse to be true")

    monkeypatch.setattr("sao_prune.plan", refuse)
    with pytest.raises(LabError, match="SAO: too sparse to be true"):
        run_recipe(micro(), RunOptions(tmp_path / "runs"), display)
    assert not (tmp_path / "runs").exists()


def test_a_folder_without_a_run_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="sao-prune run"):
        summarise(tmp_path, pytest.fail)
