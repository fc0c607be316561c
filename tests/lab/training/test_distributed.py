"""Two processes train as one does."""

import copy
import os
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sao_prune
from sao_prune.lab.data import Dataset
from sao_prune.lab.training import DistillSpec, History, TrainSpec, train
from tests.patience import PATIENCE

PROGRAM = """
import shutil, sys
from dataclasses import asdict
from pathlib import Path
import torch
from sao_prune.lab.training import checkpoint, train
from sao_prune.lab.training.distributed import process_group, rank
from tests.lab.training.test_distributed import company, task
torch.set_num_threads(1)
checkpoint.SECONDS_BETWEEN = 0
folder, device = Path(sys.argv[1]), torch.device("cpu")
def keep_second(history):
    if history.epochs == 2:
        shutil.copy(folder / "whole.file", folder / "resumed.file")
with process_group() as given:
    assert given == device
    for name, on_epoch in (("whole", keep_second), ("resumed", None), ("bn", None), ("taught", None)):
        model, data, spec = task(name)
        file = folder / f"{name}.file"
        history = train(model, data, spec, 0.05, 0, on_epoch, file, ("crop",), **company(name, model))
        torch.save([model.state_dict(), asdict(history)], folder / f"{name}{rank()}.pt")
"""

Result = tuple[dict[str, torch.Tensor], dict[str, Any]]


def task(kind: str) -> tuple[nn.Module, Dataset, TrainSpec]:
    """Batches of 8, 8, 8, 8 and 1 images: nothing of the last is left for the second process."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(48) % 3
    x = (80 * y.reshape(-1, 1, 1, 1) + 20 * torch.rand(48, 1, 4, 4, generator=generator)).byte()
    data = Dataset("three", ("a", "b", "c"), x[:33], y[:33], x[33:], y[33:])
    torch.manual_seed(0)
    layers: list[nn.Module] = [m for _ in range(3) for m in (nn.Linear(16, 16), nn.Tanh())]
    first: list[nn.Module] = [nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1)] if kind == "bn" else []
    model = nn.Sequential(*first, nn.Flatten(), *layers, nn.Linear(16, 3))
    if kind != "taught":
        sao_prune.apply(model, groups=4, seed=0)
    options: dict[str, Any] = {"ema": 0.9, "isometry_every": 1, "cutmix": 0.5, "clip": 1.0, "weight_decay": 1e-3}
    distill = DistillSpec(0.5) if kind == "taught" else None
    return model, data, TrainSpec(epochs=3, batch_size=8, execution="compact", distill=distill, **options)


def company(kind: str, model: nn.Module) -> dict[str, Any]:
    """What prunes the model while it trains, and what it learns from."""
    if kind != "taught":
        return {}
    teacher = copy.deepcopy(model)
    teacher[-1].weight.data.mul_(3)
    over = sao_prune.Schedule(start=2, end=9, steps=4)
    return {"teacher": teacher, "pruner": sao_prune.schedule(model, "lmp", 0.75, over=over, seed=0)}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Result]]:
    """What two processes, started as ``torchrun`` starts them, made of the tasks: one result a process."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    common["PYTHONPATH"] = str(Path(__file__).parents[3])
    command = [sys.executable, "-c", PROGRAM, str(folder)]
    processes = [
        subprocess.Popen(command, env={**os.environ, **common, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=PATIENCE)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors
    return {
        name: [torch.load(folder / f"{name}{rank}.pt", weights_only=True) for rank in range(2)]
        for name in ("whole", "resumed", "bn", "taught")
    }


def test_two_processes_train_to_the_weights_and_the_history_of_one(results: dict[str, list[Result]]) -> None:
    model, data, spec = task("whole")
    history = train(model, data, spec, 0.05, 0, augment=("crop",))
    weights, said = results["whole"][0]
    for key, value in model.state_dict().items():
        assert torch.allclose(weights[key], value, atol=1e-5), key
    for name in ("train_loss", "test_loss", "accuracy", "lr"):
        assert said[name] == pytest.approx(getattr(history, name), rel=1e-4)
    assert [record["step"] for record in said["isometry"]] == [0, 1, 2, 3]
    assert said["execution"] == history.execution == "compact: 2 of 4 layers"


@pytest.mark.parametrize("name", ["whole", "resumed", "bn", "taught"])
def test_every_process_has_the_same_weights_and_says_the_same(results: dict[str, list[Result]], name: str) -> None:
    (first, said), (second, also_said) = results[name]
    assert said == also_said
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert History.restored(said).epochs == 3


def test_two_processes_prune_and_are_taught_as_one_is(results: dict[str, list[Result]]) -> None:
    model, data, spec = task("taught")
    history = train(model, data, spec, 0.05, 0, augment=("crop",), **company("taught", model))
    weights, said = results["taught"][0]
    for key, value in model.state_dict().items():
        assert torch.allclose(weights[key], value, atol=1e-5), key
    assert said["train_loss"] == pytest.approx(history.train_loss, rel=1e-4)
    assert sao_prune.report(model).sparsity == 0.75


def test_two_processes_resume_to_the_same_bits(results: dict[str, list[Result]]) -> None:
    (whole, said), (resumed, also_said) = results["whole"][0], results["resumed"][0]
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert said["train_loss"] == also_said["train_loss"]
    assert said["isometry"] == also_said["isometry"]


def test_history_survives_the_way_through_a_file(blobs: Dataset) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    history = train(model, blobs, TrainSpec(epochs=2, batch_size=8, isometry_every=1), 0.01, 0)
    assert History.restored(asdict(history)) == history
