"""What is compared from trained networks: pruning over time, 2:4, further epochs, distillation."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sao_prune.lab.errors import LabError
from sao_prune.lab.recipe import load_recipe
from sao_prune.lab.summary import summarise
from sao_prune.lab.sweep import RunOptions, run_recipe
from sao_prune.lab.trials import Trial

Micro = Callable[..., Path]
METHODS = "[dense, sao, rg-s, gmp-s]"
ONE = [("[0.1, 0.01]", "0.1"), ("seeds: [0, 1]", "seeds: 0")]


@pytest.mark.slow
def test_every_method_prunes_the_same_dense_network(micro: Micro, tmp_path: Path, display) -> None:
    configurations = "[dense, gmp-gradual, two-four-permuted-t]"
    path = micro(
        (METHODS, configurations), ("groups: 4", "groups: 2"), ("epochs: 2", "epochs: 2, further_epochs: 1"), *ONE
    )
    folder = run_recipe(path, RunOptions(tmp_path), display)
    dense, *rows = summarise(folder, pytest.fail).rows
    assert display.done == display.total
    for row in rows:
        assert row.sparsity == pytest.approx(0.5, abs=1e-3)
        assert row.flops == pytest.approx(0.5 * dense.flops, rel=0.1)
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    trained = {line["cell"]["method"]["name"]: line for line in lines if line["cell"]["kind"] == "final"}
    assert {line["cell"]["start"] for name, line in trained.items() if name != "dense"} == {trained["dense"]["key"]}
    epochs = {name: len(line["result"]["curve"]["accuracy"]) for name, line in trained.items()}
    assert epochs == {name: 2 if name == "dense" else 1 for name in epochs}


def test_the_dense_phase_is_shared_by_cases_that_differ_in_what_follows(micro: Micro) -> None:
    cases = "cases: [{label: a}, {label: b, train: {further_epochs: 1}}, {label: c, train: {distill: 0.9}}]\n"
    path = micro((METHODS, "[dense, sao, lmp-t]"), ("seeds: [0, 1]\n", f"seeds: [0, 1]\n{cases}"))
    keys: dict[str, set[str]] = {}
    for configuration in load_recipe(path).configurations():
        start = Trial("final", configuration.dense, 0, 0.1) if configuration.method.is_trained_first else None
        keys.setdefault(configuration.method.name, set()).add(Trial("final", configuration, 0, 0.1, start).key)
        if start is not None:
            keys.setdefault("start", set()).add(start.key)
    assert {name: len(found) for name, found in keys.items()} == {"dense": 1, "sao": 1, "start": 1, "lmp-t": 3}
    assert keys["start"] == keys["dense"]


def test_mistakes_are_told_before_anything_is_trained(micro: Micro, tmp_path: Path, display) -> None:
    two_four = micro((METHODS, "[two-four-t]"), *ONE)
    blocks = micro((METHODS, "[lmp-t]"), ("epochs: 2", "epochs: 2, distill: {blocks: [layer]}"), *ONE, name="b.yaml")
    for path, message in ((two_four, "give sparsity=0.5"), (blocks, "the student has no module 'layer'")):
        with pytest.raises(LabError, match=message):
            run_recipe(path, RunOptions(tmp_path), display)
    assert not list(tmp_path.rglob("results.jsonl"))
