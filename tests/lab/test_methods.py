"""What the names of methods do: -T starts from a dense training, saliency sees examples, channels meet SAO's cost."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sao_prune.lab.cost import multiply_adds
from sao_prune.lab.data import load_dataset
from sao_prune.lab.recipe import load_recipe
from sao_prune.lab.results import read_results
from sao_prune.lab.summary import summarise
from sao_prune.lab.sweep import RunOptions, run_recipe
from sao_prune.lab.trials import Trial, final_trials, known_trials, selection_trials
from sao_prune.lab.work import Worker, Workplace, examples

Micro = Callable[..., Path]
METHODS = "[dense, sao, rg-s, gmp-s]"


def test_a_trained_method_prunes_what_the_dense_training_left(micro: Micro, tmp_path: Path, display) -> None:
    path = micro((METHODS, "[dense, gmp-t]"), ("groups: 4", "groups: [2, 4]"))
    folder = run_recipe(path, RunOptions(tmp_path), display)
    assert display.done == display.total
    records = read_results(folder / "results.jsonl", pytest.fail)
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    kinds = [(line["cell"]["method"]["name"], line["cell"]["kind"]) for line in lines]
    # One dense phase a seed (two to choose the rate, two for the table), shared by both amounts.
    assert kinds.count(("dense", "select")) == 2
    assert kinds.count(("dense", "final")) == 2
    assert kinds.count(("gmp-t", "final")) == 4
    assert ("gmp-t", "spectrum") not in kinds

    configuration = list(load_recipe(path).configurations())[2]
    trial = final_trials(configuration, records)[0]
    model, pruned = Worker(Workplace(folder)).network(trial)
    dense = load_file(folder / "weights" / f"{trial.start.key}.safetensors")
    assert pruned.sparsity == pytest.approx(0.75, abs=1e-3)
    for name, module in model.named_modules():
        if hasattr(module, "weight_mask"):
            assert torch.equal(module.weight_orig * module.weight_mask, dense[f"{name}.weight"] * module.weight_mask)
    dense_row, *rows = summarise(folder, pytest.fail).rows
    assert all(row.seconds > dense_row.seconds for row in rows)


def test_a_trained_method_waits_for_the_rate_of_its_dense_phase(micro: Micro) -> None:
    configuration = next(load_recipe(micro((METHODS, "[gmp-t]"))).configurations())
    assert selection_trials(configuration, {}) is None
    assert known_trials(configuration, {}) == []
    dense = selection_trials(configuration.dense, {})
    records = {
        trial.key: {"result": {"status": "ok", "accuracy": lr, "loss": 1.0}}
        for lr, group in dense.items()
        for trial in group
    }
    assert {trial.start.lr for group in selection_trials(configuration, records).values() for trial in group} == {0.1}
    # Rates are chosen from dense phases that have not seen the held-out part.
    assert {trial.start.kind for group in selection_trials(configuration, records).values() for trial in group} == {
        "select"
    }


def test_lost_weights_are_trained_again(micro: Micro, tmp_path: Path, display, one_thread: None) -> None:
    path = micro((METHODS, "[dense, gmp-t]"), ("[0.1, 0.01]", "0.1"))
    folder = run_recipe(path, RunOptions(tmp_path), display)
    whole = (folder / "results.jsonl").read_text().splitlines(keepends=True)
    for file in (folder / "weights").iterdir():
        file.unlink()
    kept = [line for line in whole if '"start"' not in line]
    (folder / "results.jsonl").write_text("".join(kept))
    run_recipe(path, RunOptions(tmp_path), display)
    again = read_results(folder / "results.jsonl", pytest.fail)
    for line in whole:
        record = json.loads(line)
        result = again[record["key"]]["result"]
        assert result.get("accuracy") == record["result"].get("accuracy")


@pytest.mark.parametrize(
    "method", ["snip", "grasp", "synflow", "eoi", "project", pytest.param("project-random", marks=pytest.mark.slow)]
)
def test_every_method_of_the_field_can_be_compared(micro: Micro, tmp_path: Path, display, method: str) -> None:
    path = micro((METHODS, f"[{method}]"), ("[0.1, 0.01]", "0.1"))
    (row,) = summarise(run_recipe(path, RunOptions(tmp_path), display), pytest.fail).rows
    assert row.sparsity == pytest.approx(0.75, abs=0.01)
    assert row.flops == pytest.approx(0.25 * row.dense_flops, rel=0.1)


def test_examples_are_of_every_class_and_depend_on_the_seed_alone() -> None:
    data = load_dataset("digits")
    x, y = examples(data, seed=3)
    assert torch.equal(y.bincount(), torch.full((10,), 10))
    assert torch.equal(x, examples(data, seed=3)[0])
    assert not torch.equal(x, examples(data, seed=4)[0])


def test_channels_go_until_no_more_is_left_than_sao_leaves(micro: Micro, tmp_path: Path, display) -> None:
    pytest.importorskip("torch_pruning")
    path = micro((METHODS, "[sao, structured-s]"), ("[0.1, 0.01]", "0.1"))
    sao, structured = summarise(run_recipe(path, RunOptions(tmp_path), display), pytest.fail).rows
    assert 0.9 * sao.flops < structured.flops <= sao.flops
    assert structured.nonzero < structured.parameters


def test_multiply_adds_by_layer() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 16, 10))
    cost = multiply_adds(model, torch.zeros(1, 3, 4, 4))
    assert cost.weights["0.weight"] == 8 * 3 * 9 * 16
    assert cost.total == 8 * 3 * 9 * 16 + 8 * 16 * 10
    assert cost.after({"0.weight": 0.5}) == cost.total - 4 * 3 * 9 * 16
    assert next(model.parameters()).device.type == "cpu"


def test_cells_keep_their_keys_when_options_with_defaults_are_spelled_out(micro: Micro) -> None:
    def key(*changes: tuple[str, str]) -> str:
        return Trial("final", next(load_recipe(micro(*changes)).configurations()), 0, 0.1).key

    spelled = ("batch_size: 256", "batch_size: 256, momentum: 0.9, label_smoothing: 0, schedule: constant")
    assert key(spelled) == key()
    assert key(("data: digits", "data: {name: digits, size: 32, augment: []}")) == key()
    assert key(("data: digits", "data: {name: digits, size: 24}")) != key()


def test_isometric_residual_blocks_are_counted_in_the_note_and_plain_sao_is_untouched(micro: Micro) -> None:
    mlp = "{name: sao_mlp, depth: 2, width: 64, options: {activation: tanh}}"
    path = micro((METHODS, "[sao, sao-iso]"), (mlp, "{name: sao_resnet, depth: 8, options: {norm: none}}"))
    plain, isometric = load_recipe(path).configurations()
    worker = Worker(Workplace(path.parent))
    notes = [worker.network(Trial("final", configuration, 0, 0.1))[1].note for configuration in (plain, isometric)]
    assert "residual" not in notes[0]
    assert notes[1].startswith("residual blocks: 1 exact, 2 near")


def test_the_measurement_at_initialisation_has_the_extreme_singular_values_of_residual_blocks(micro: Micro) -> None:
    mlp = "{name: sao_mlp, depth: 2, width: 64, options: {activation: tanh}}"
    net = "{name: sao_resnet, depth: 8, options: {norm: none}}"
    path = micro((METHODS, "[sao, sao-iso]"), (mlp, net), ("data: digits", "data: {name: digits, size: 8}"))
    plain, isometric = load_recipe(path).configurations()
    worker = Worker(Workplace(path.parent))
    result = json.loads(json.dumps(worker.work(Trial("spectrum", isometric, 0))["result"]))
    blocks = {record["name"]: record for record in result["residuals"]}
    assert list(blocks) == ["stages.0.0", "stages.1.0", "stages.2.0", ""]
    assert blocks["stages.0.0"]["status"] == "exact"
    assert blocks["stages.0.0"]["after"] == pytest.approx([1, 1], abs=1e-5)
    assert blocks["stages.0.0"]["before"] != pytest.approx([1, 1], abs=1e-2)
    # The network is no block.
    assert result["note"].startswith("residual blocks: 1 exact, 2 near")
    assert "residuals" not in worker.work(Trial("spectrum", plain, 0))["result"]
    assert worker.network(Trial("final", isometric, 0, 0.1))[1].residuals == ()
