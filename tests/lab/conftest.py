"""A comparison small enough to run to its end in a second or two."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from sao_prune.lab.display import MethodProgress

MICRO = """\
name: micro
data: digits
network: {name: sao_mlp, depth: 2, width: 64, options: {activation: tanh}}
prune: {groups: 4, skip_first: false}
methods: [dense, sao, rg-s, gmp-s]
seeds: [0, 1]
lr: {grid: [0.1, 0.01]}
train: {epochs: 2, batch_size: 256}
"""


@pytest.fixture
def micro(tmp_path: Path) -> Callable[..., Path]:
    """Write the micro recipe, with pieces of its text replaced; returns its path."""

    def write(*changes: tuple[str, str], name: str = "micro.yaml") -> Path:
        text = MICRO
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums in one order, so that results can be compared bit by bit with those of another process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Silent:
    """A display that remembers what it was told."""

    def __init__(self) -> None:
        self.total = 0
        self.done = 0
        self.notes: list[str] = []
        self.told: list[list[MethodProgress]] = []

    def stage(self, text: str) -> None:
        pass

    def start(self, steps: int, done: int) -> None:
        self.total, self.done = steps, done

    def expect(self, steps: int) -> None:
        self.total = steps

    def step(self, title: str, detail: str, steps: int = 1) -> None:
        self.done += steps

    def methods(self, progress: list[MethodProgress]) -> None:
        self.told.append(progress)

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def display() -> Silent:
    return Silent()
