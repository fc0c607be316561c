"""Two processes of ``torchrun`` go through a recipe as one does."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sao_prune.lab.sweep import RunOptions, run_recipe
from tests.lab.test_sweep import lines
from tests.patience import PATIENCE

Micro = Callable[..., Path]

pytestmark = pytest.mark.slow


def torchrun(*arguments: object, timeout: float = PATIENCE) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    return subprocess.run(
        [*command, "--nproc-per-node", "2", "-m", "sao_prune", "run", *map(str, arguments), "--device", "cpu"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def said(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith("sao-prune: ")]


def test_two_processes_give_the_results_of_one(micro: Micro, tmp_path: Path, display, one_thread: None) -> None:
    path = micro(("gmp-s]", "gmp-t]"))
    ran = torchrun(path, "--out", tmp_path / "two")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("report, table and figures:") == 1
    two, one = tmp_path / "two" / "micro", run_recipe(path, RunOptions(tmp_path / "one"), display)
    ours, theirs = ({line["key"]: line for line in lines(folder)} for folder in (two, one))
    assert len(lines(two)) == len(ours)
    assert {line["environment"]["processes"] for line in ours.values()} == {2}
    # Choices of the learning rate agree, so the same trials were trained.
    assert ours.keys() == theirs.keys()
    for key, line in ours.items():
        a, b = line["result"], theirs[key]["result"]
        if line["cell"]["kind"] == "spectrum":
            assert a == b
        else:
            # One of 360 test images may lie on the border between two classes.
            assert a["curve"]["accuracy"] == pytest.approx(b["curve"]["accuracy"], abs=1.5 / 287)
            assert a["curve"]["train_loss"] == pytest.approx(b["curve"]["train_loss"], rel=1e-3)
            assert a["nonzero"] == b["nonzero"]


def test_an_error_in_a_trial_ends_all(micro: Micro, tmp_path: Path, display) -> None:
    path = micro(("[dense, sao, rg-s, gmp-s]", "[dense, gmp-t]"), ("[0.1, 0.01]", "0.1"))
    folder = run_recipe(path, RunOptions(tmp_path), display)
    kept = [line for line in lines(folder) if line["cell"]["method"]["name"] == "dense"]
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    for weights in (folder / "weights").iterdir():
        weights.write_bytes(b"damaged")
    ran = torchrun(path, "--out", tmp_path)
    assert ran.returncode != 0
    first, *others = sorted(said(ran.stderr), key=lambda line: "process 1" in line)
    assert "cannot read the dense weights" in first
    assert all("process 1" in line for line in others)
    assert len(others) <= 1
    assert len(lines(folder)) == len(kept)


def test_what_cannot_work_is_told_once(micro: Micro, tmp_path: Path) -> None:
    ran = torchrun(micro(("data: digits", "data: mnist")), "--data-dir", tmp_path, "--out", tmp_path / "runs")
    assert ran.returncode != 0
    assert len(said(ran.stderr)) == 1
    assert "mnist is not on this machine" in said(ran.stderr)[0]
    assert not (tmp_path / "runs").exists()


def test_jobs_and_torchrun_exclude_each_other(micro: Micro, tmp_path: Path) -> None:
    ran = torchrun(micro(), "--out", tmp_path, "--jobs", "2")
    assert ran.returncode != 0
    assert len(said(ran.stderr)) == 1
    assert "start them without torchrun" in said(ran.stderr)[0]
