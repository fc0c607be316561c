"""Two processes train as one does."""

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import nn

from sao_prune.lab.data import Dataset
from sao_prune.lab.train import History, TrainSpec, train

PROGRAM = """
import json, os, sys
from dataclasses import asdict
from pathlib import Path
import torch
from tests.lab.train.test_distributed import task
from sao_prune.lab.train import train
from sao_prune.lab.train.distributed import process_group, rank
torch.set_num_threads(1)
folder, kind, stop = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
def on_epoch(history):
    if history.epochs == stop:
        raise KeyboardInterrupt
with process_group() as device:
    assert device == torch.device("cpu")
    model, data, spec = task(kind)
    history = train(model, data, spec, 0.05, 0, on_epoch if stop else None, folder / "cell.pt", ("crop",))
    torch.save([model.state_dict(), asdict(history)], folder / f"{rank()}.pt")
"""


def task(kind: str) -> tuple[nn.Module, Dataset, TrainSpec]:
    """Batches of 8, 8, 8, 8 and 1 images, so that shares are unequal and the last process's may be empty."""
    import sao_prune

    generator = torch.Generator().manual_seed(0)
    y = torch.arange(48) % 3
    x = (80 * y.reshape(-1, 1, 1, 1) + 20 * torch.rand(48, 1, 4, 4, generator=generator)).byte()
    data = Dataset("three", ("a", "b", "c"), x[:33], y[:33], x[33:], y[33:])
    torch.manual_seed(0)
    layers: list[nn.Module] = [m for _ in range(3) for m in (nn.Linear(16, 16), nn.Tanh())]
    if kind == "bn":
        layers.insert(1, nn.BatchNorm1d(16))
    model = nn.Sequential(nn.Flatten(), *layers, nn.Linear(16, 3))
    sao_prune.apply(model, groups=4, seed=0)
    batch = 7 if kind == "bn" else 8
    options = {"ema": 0.9, "isometry_every": 1, "cutmix": 0.5, "clip": 1.0, "weight_decay": 1e-3}
    return model, data, TrainSpec(epochs=3, batch_size=batch, **options)


def launch(folder: Path, kind: str, port: int, stop: int = 0) -> list[tuple[int, str]]:
    """Two processes, as ``torchrun`` would start them."""
    processes = []
    for rank in range(2):
        environment = {
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": str(Path(__file__).parents[3]),
            "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": "2",
            "RANK": str(rank),
        }
        command = [sys.executable, "-c", PROGRAM, str(folder), kind, str(stop)]
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    outcomes = []
    for process in processes:
        try:
            _, error = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            _, error = process.communicate()
        outcomes.append((process.returncode, error))
    return outcomes


def assert_good(outcomes: list[tuple[int, str]]) -> None:
    assert [code for code, _ in outcomes] == [0, 0], outcomes


def results(folder: Path) -> list[tuple[dict[str, torch.Tensor], dict[str, object]]]:
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def test_two_processes_train_to_the_weights_and_the_history_of_one(tmp_path: Path) -> None:
    assert_good(launch(tmp_path, "plain", free_port()))
    model, data, spec = task("plain")
    history = train(model, data, spec, 0.05, 0, augment=("crop",))
    (first, said), (second, also_said) = results(tmp_path)
    assert said == also_said
    for key, value in model.state_dict().items():
        assert torch.equal(first[key], second[key])
        assert torch.allclose(first[key], value, atol=1e-5), key
    for name in ("train_loss", "test_loss", "accuracy", "lr"):
        assert said[name] == pytest.approx(getattr(history, name), rel=1e-4)
    assert [record["step"] for record in said["isometry"]] == [0, 1, 2, 3]
    assert said["execution"] == history.execution


def test_batch_normalisation_ends_alike_on_every_process(tmp_path: Path) -> None:
    assert_good(launch(tmp_path, "bn", free_port()))
    (first, said), (second, also_said) = results(tmp_path)
    assert said == also_said
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert History.restored(said).epochs == 3


def test_two_processes_resume(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    launch(whole, "plain", free_port())
    assert launch(cut, "plain", free_port(), stop=2)[0][0] != 0
    assert_good(launch(cut, "plain", free_port()))
    for (one, said), (two, also_said) in zip(results(whole), results(cut)):
        assert all(torch.equal(one[key], two[key]) for key in one)
        assert said["train_loss"] == also_said["train_loss"]


def test_history_survives_the_way_through_a_file(blobs: Dataset) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    history = train(model, blobs, TrainSpec(epochs=2, batch_size=8, isometry_every=1), 0.01, 0)
    assert History.restored(asdict(history)) == history
