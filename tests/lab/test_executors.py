"""Trials in processes of their own: the same results, and no death that costs more than its trial."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import pytest

from sao_prune.lab.errors import LabError
from sao_prune.lab.executors import InProcess, WorkerLost
from sao_prune.lab.recipe import load_recipe
from sao_prune.lab.results import ResultsLog
from sao_prune.lab.sweep import TRIES, RunOptions, Sweep, run_recipe
from sao_prune.lab.trials import Trial
from sao_prune.lab.work import Workplace
from tests.lab.test_sweep import lines, without_clock
from tests.patience import PATIENCE

Micro = Callable[..., Path]
FEW = ("[dense, sao, rg-s, gmp-s]", "[dense, sao]")
LONG = ("epochs: 2", "epochs: 10")
DENSE = ("[dense, sao, rg-s, gmp-s]", "[dense]")
ONE_SEED = ("[0, 1]", "[0]")

linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up in /proc")


def by_key(folder: Path) -> dict[str, dict]:
    return {line["key"]: without_clock(line) for line in lines(folder)}


def descendants(root: int) -> set[int]:
    """Ids of the processes below one, those that have ended apart."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if state != "Z":
            parents[int(path.parent.name)] = int(parent)
    found = {root}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {root}


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@contextmanager
def driver(path: Path, out: Path, records: int) -> Iterator[tuple[subprocess.Popen, set[int]]]:
    """A run with two jobs in a session of its own, after so many records, and the processes below it."""
    command = [sys.executable, "-m", "sao_prune", "run", str(path), "--out", str(out), "--jobs", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    results = out / "micro" / "results.jsonl"
    with subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # What a shell starts in the background ignores interrupts, and so would what these tests start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        try:
            until(
                lambda: (
                    process.poll() is not None or (results.exists() and results.read_bytes().count(b"\n") >= records)
                )
            )
            below = descendants(process.pid)
            assert process.poll() is None, process.stderr.read()
            yield process, below
        finally:
            process.kill()
    until(lambda: not any(map(alive, below)))


def test_two_jobs_give_the_records_of_one(micro: Micro, tmp_path: Path, display, one_thread: None) -> None:
    path = micro(("[dense, sao, rg-s, gmp-s]", "[dense, sao, gmp-t]"), ONE_SEED)
    one = run_recipe(path, RunOptions(tmp_path / "one"), display)
    two = run_recipe(path, RunOptions(tmp_path / "two", jobs=2), display)
    assert by_key(one) == by_key(two)
    assert {line["environment"]["threads"] for line in lines(two)} == {1}
    assert not multiprocessing.active_children()
    assert [note.split(":")[0] for note in display.notes].count("SAO") == 2


def test_a_killed_worker_costs_its_trial_only(micro: Micro, tmp_path: Path, display, one_thread: None) -> None:
    path = micro(FEW, ONE_SEED, LONG)
    killed: list[int] = []

    def kill() -> None:
        results = tmp_path / "two" / "micro" / "results.jsonl"
        until(lambda: results.exists() and results.read_bytes().count(b"\n") >= 2)
        victim = multiprocessing.active_children()[0].pid
        assert victim is not None
        os.kill(victim, signal.SIGKILL)
        killed.append(victim)

    killer = Thread(target=kill)
    killer.start()
    two = run_recipe(path, RunOptions(tmp_path / "two", jobs=2), display)
    killer.join()
    assert killed
    assert sum("its worker was lost" in note for note in display.notes) == 1
    assert len(lines(two)) == 8
    assert by_key(two) == by_key(run_recipe(path, RunOptions(tmp_path / "one"), display))


@linux
@pytest.mark.slow
def test_a_killed_driver_leaves_no_worker(micro: Micro, tmp_path: Path, display) -> None:
    path, out = micro(DENSE, LONG), tmp_path / "runs"
    with driver(path, out, 2) as (process, below):
        process.send_signal(signal.SIGKILL)
        process.wait()
        until(lambda: not any(map(alive, below)))
    assert len(below) >= 2
    survived = len((out / "micro" / "results.jsonl").read_text().splitlines())
    assert survived >= 2
    keys = [line["key"] for line in lines(run_recipe(path, RunOptions(out), display))]
    assert len(keys) == len(set(keys)) == 5


@linux
def test_an_interrupt_ends_all_at_once(micro: Micro, tmp_path: Path) -> None:
    # Long enough that it cannot be over before the interrupt, however busy the machine is.
    with driver(micro(DENSE, ("epochs: 2", "epochs: 5000")), tmp_path / "runs", 1) as (process, below):
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 130
        until(lambda: not any(map(alive, below)))
    assert err == "interrupted: finished trials are on the disk, the same command goes on from there\n"


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_trial_that_fails_is_told_and_the_others_finish(micro: Micro, tmp_path: Path, display, jobs: int) -> None:
    dense = ("[dense, sao, rg-s, gmp-s]", "[dense, gmp-t]")
    folder = run_recipe(micro(dense), RunOptions(tmp_path), display)
    weights = sorted((folder / "weights").glob("*.safetensors"))
    kept = [line for line in lines(folder) if line["cell"]["method"]["name"] == "dense"]
    finals = [line["key"] for line in kept if line["cell"]["kind"] == "final"]
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    assert {path.stem for path in weights} >= set(finals)
    (folder / "weights" / f"{finals[0]}.safetensors").write_bytes(b"damaged")

    with pytest.raises(LabError, match=r"^1 trials failed; .* The first: .*cannot read the dense weights") as caught:
        run_recipe(micro(dense), RunOptions(tmp_path, jobs=jobs), display)
    assert "\n" not in str(caught.value)
    assert len(lines(folder)) == len(kept) + 3
    assert sum(note.startswith("failed: ") for note in display.notes) == 1


class Failing(InProcess):
    """Fails the trials of one method, as a worker does that is lost or an error that comes back."""

    def __init__(self, place: Workplace, method: str, error: Exception) -> None:
        super().__init__(place, lambda trial: lambda history: None)
        self.method, self.error = method, error
        self.submitted: list[Trial] = []

    def submit(self, trial: Trial) -> Future:
        self.submitted.append(trial)
        if trial.configuration.method.name != self.method:
            return super().submit(trial)
        future: Future = Future()
        future.set_exception(self.error)
        return future


def sweep_with(path: Path, folder: Path, display, method: str, error: Exception) -> tuple[list[str], str]:
    place = Workplace(folder)
    with ResultsLog(folder / "results.jsonl", display.note) as log, Failing(place, method, error) as executor:
        with pytest.raises(LabError) as caught:
            Sweep(load_recipe(path), log, display, place).run(executor)
        return [trial.key for trial in executor.submitted], str(caught.value)


def test_a_lost_worker_is_replaced_so_often_and_no_more(micro: Micro, tmp_path: Path, display) -> None:
    path = micro(FEW, ("[0.1, 0.01]", "0.1"))
    keys, said = sweep_with(path, tmp_path, display, "sao", WorkerLost("gone"))
    assert said.startswith("3 trials failed")
    assert sorted(map(keys.count, set(keys))) == [1, 1, 1, TRIES, TRIES, TRIES]


def test_dense_weights_that_cannot_be_trained_again_end_the_run(micro: Micro, tmp_path: Path, display) -> None:
    path = micro(("[dense, sao, rg-s, gmp-s]", "[dense, gmp-t]"), ("[0.1, 0.01]", "0.1"))
    folder = run_recipe(path, RunOptions(tmp_path), display)
    kept = [line for line in lines(folder) if line["cell"]["method"]["name"] == "dense"]
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    for path_of_weights in (folder / "weights").iterdir():
        path_of_weights.unlink()
    keys, said = sweep_with(path, folder, display, "dense", ValueError("no"))
    assert said.startswith("2 trials failed")
    assert len(keys) == len(set(keys)) == 2


def test_dense_weights_that_are_gone_are_trained_once(micro: Micro, tmp_path: Path, display) -> None:
    path = micro(("[dense, sao, rg-s, gmp-s]", "[dense, gmp-t, lmp-t]"), ("[0.1, 0.01]", "0.1"), ONE_SEED)
    folder = run_recipe(path, RunOptions(tmp_path), display)
    whole = by_key(folder)
    kept = [line for line in lines(folder) if line["cell"]["method"]["name"] == "dense"]
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    for path_of_weights in (folder / "weights").iterdir():
        path_of_weights.unlink()
    run_recipe(path, RunOptions(tmp_path), display)
    assert by_key(folder) == whole
    assert len(lines(folder)) == len(whole) + 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"jobs": 0}, "at least 1, got 0"),
        ({"jobs": 2, "ray": "auto"}, "--jobs is for this machine"),
        ({"ray": "auto", "gpus": -1}, "cannot be negative"),
    ],
)
def test_options_that_contradict_each_other(options: dict, said: str) -> None:
    with pytest.raises(LabError, match=said):
        RunOptions(**options)
