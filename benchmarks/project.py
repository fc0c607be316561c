"""Conversion of trained weights: `python benchmarks/project.py` prints tables.

The first: how long co-clustering takes, and how much energy it keeps of a Gaussian matrix (random sets keep one in g).
The second: accuracy on scikit-learn's digits, or with `--fashion FOLDER` on Fashion-MNIST, right after a
trained network became blocks, with no training after it. With `--shares 0.05 0.1 0.3 1` a third: after training on
for these shares of the steps before, rates chosen for each method on held-out images.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from time import perf_counter
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import sao_prune
from sao_prune.lab.data import DataSource, DataSpec, load_dataset
from sao_prune.topology import clustered, kept_energy

SIZES = (256, 512, 1024, 2048, 4096)
GROUPS = (4, 8, 32)


def search(sizes: list[int], groups: list[int]) -> None:
    """Seconds and kept energy of co-clustering, size by size."""
    clustered(torch.rand(8, 8), 2)
    print(f"co-clustering of a Gaussian's squares, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    print("| n | g | seconds | energy kept | random sets |\n|---:|---:|---:|---:|---:|")
    for n, g in product(sizes, groups):
        energy = torch.randn(n, n, generator=torch.Generator().manual_seed(0)).square()
        start = perf_counter()
        found = clustered(energy, g, generator=torch.Generator().manual_seed(0))
        print(
            f"| {n} | {g} | {perf_counter() - start:.2f} | {kept_energy(energy, found):.3f} | {1 / g:.3f} |", flush=True
        )


class Mixer(nn.Module):
    """Four mixer blocks on 49 or 16 patches, 128 wide."""

    def __init__(self, size: int, width: int = 128, depth: int = 4) -> None:
        super().__init__()
        patch = max(size // 7, 2)
        patches = (size // patch) ** 2
        self.stem = nn.Conv2d(1, width, patch, stride=patch)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * depth))
        self.tokens = nn.ModuleList(mlp(patches, 64) for _ in range(depth))
        self.channels = nn.ModuleList(mlp(width, 2 * width) for _ in range(depth))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = self.stem(x).flatten(2).mT
        for number, (tokens, channels) in enumerate(zip(self.tokens, self.channels)):
            x = x + tokens(self.norms[2 * number](x).mT).mT
            x = x + channels(self.norms[2 * number + 1](x))
        return self.head(x.mean(1))


def mlp(width: int, hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class Residual(nn.Module):
    """Three residual blocks of two 3 x 3 convolutions with batch norm, 64 wide."""

    def __init__(self, size: int, width: int = 64, depth: int = 3) -> None:
        super().__init__()
        # 7 x 7 positions from 28 x 28 pixels, 8 x 8 from 8 x 8.
        large = size > 14
        first = nn.Conv2d(1, width, 4 if large else 3, stride=4 if large else 1, padding=int(not large), bias=False)
        self.stem = nn.Sequential(first, nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.ModuleList(residual(width) for _ in range(depth))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = self.stem(x)
        for block in self.blocks:
            x = torch.relu(x + block(x))
        return self.head(x.mean((2, 3)))


def residual(width: int) -> nn.Module:
    first, second = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
    return nn.Sequential(first, nn.BatchNorm2d(width), nn.ReLU(), second, nn.BatchNorm2d(width))


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, test images and labels; 8 x 8 pixels."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(seed))
    x = torch.tensor(data.images, dtype=torch.float32)[order, None] / 8 - 1
    y = torch.tensor(data.target)[order]
    return x[:1200], y[:1200], x[1200:], y[1200:]


def fashion(folder: Path | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """8,000 training images of Fashion-MNIST and 4,000 test images."""
    data = load_dataset(DataSpec("fashion-mnist", subset=8000, test_subset=4000), source=DataSource(folder))
    train, test = ((x.float() / 255 - 0.286) / 0.353 for x in (data.train_x, data.test_x))
    return train, data.train_y, test, data.test_y


def trained(model: nn.Module, x: Tensor, y: Tensor, steps: int, seed: int, rate: float = 3e-3) -> nn.Module:
    """AdamW on batches of 64, one cycle of the learning rate; in place."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05)
    decay = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, max(steps, 2))
    model.train()
    for _ in range(steps):
        batch = torch.randint(len(x), (64,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
        decay.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    found = torch.cat([model.eval()(part).argmax(1) for part in x.split(500)])
    return 100 * float((found == y).float().mean())


# What is trained, what of it stays dense, and what the table calls it.
NETWORKS: dict[str, tuple[Callable[[int], nn.Module], list[str]]] = {
    "mixer-channels": (Mixer, ["tokens.*"]),
    "mixer": (Mixer, []),
    "resnet": (Residual, []),
}
ONE_SHOT: dict[str, dict[str, Any]] = {
    "kept, random": {"values": "keep", "topology": "ramanujan"},
    "kept, clustered": {"values": "keep"},
    "least squares, random": {"topology": "ramanujan"},
    "least squares, clustered": {},
    "without readout": {"readout": False},
}
METHODS: dict[str, Callable[[Tensor], Any]] = {
    "project": lambda x: sao_prune.Project(inputs=x),
    "project-random": lambda x: sao_prune.Project(inputs=x, topology="ramanujan"),
    "rg-t": lambda x: sao_prune.RG(values="keep"),
    "lmp-t": lambda x: sao_prune.LMP(),
}
RATES = (3e-4, 1e-3, 3e-3)


class Study:
    """The tables of one network: a line of JSON for each result in a file, so that nothing is computed twice."""

    def __init__(self, network: str, steps: int, data: Callable[[int], Any], file: Path | None) -> None:
        self.network, self._steps, self._data, self._file = network, steps, data, file
        self.found: dict[str, float] = {}
        if file is not None and file.exists():
            self.found = {line["key"]: line["value"] for line in map(json.loads, file.read_text().splitlines())}
        self._dense: dict[int, dict[str, Tensor]] = {}

    def value(self, key: str, compute: Callable[[], float]) -> float:
        """A result, from the file or computed and written to it."""
        key = f"{self.network} {self._steps} {key}"
        if key not in self.found:
            self.found[key] = compute()
            if self._file is not None:
                with self._file.open("a") as file:
                    file.write(json.dumps({"key": key, "value": self.found[key]}) + "\n")
        return self.found[key]

    def new(self, seed: int) -> nn.Module:
        """The network, untrained."""
        torch.manual_seed(seed)
        return NETWORKS[self.network][0](self._data(seed)[0].shape[-1])

    def dense(self, seed: int) -> nn.Module:
        """The network, trained; its weights lie beside the results, for all tables of networks of its kind."""
        model = self.new(seed)
        file = self._file and self._file.with_name(f"{type(model).__name__.lower()}-{self._steps}-{seed}.pt")
        if seed in self._dense:
            model.load_state_dict(self._dense[seed])
        elif file is not None and file.exists():
            model.load_state_dict(torch.load(file, weights_only=True))
        else:
            trained(model, *self._data(seed)[:2], self._steps, seed)
            if file is not None:
                torch.save(model.state_dict(), file)
        self._dense[seed] = copy.deepcopy(model.state_dict())
        return model.eval()

    def dense_accuracy(self, seed: int) -> float:
        return self.value(f"{seed} dense", lambda: accuracy(self.dense(seed), *self._data(seed)[2:]))

    def converted(self, seed: int, groups: int, method: Any) -> nn.Module:
        model = self.dense(seed)
        sao_prune.apply(model, groups=groups, method=method, seed=seed, exclude=NETWORKS[self.network][1])
        return model

    def one_shot(self, seed: int, groups: int, name: str) -> float:
        """Accuracy right after the conversion."""

        def compute() -> float:
            x, _, *test = self._data(seed)
            method = sao_prune.Project(inputs=x[:512], **ONE_SHOT[name])
            return accuracy(self.converted(seed, groups, method), *test)

        return self.value(f"{seed} {groups} one-shot {name}", compute)

    def fine_tuned(self, seed: int, groups: int, method: str, share: float, rate: float, *, held_out: bool) -> float:
        """Accuracy after a share of the pretraining's steps more; of SAO after as many as these and the pretraining."""

        def compute() -> float:
            x, y, *test = self._data(seed)
            steps = round(share * self._steps)
            if method == "sao":
                model, steps = self.new(seed), self._steps + steps
                sao_prune.apply(model, groups=groups, seed=seed, exclude=NETWORKS[self.network][1])
            else:
                model = self.converted(seed, groups, METHODS[method](x[:512]))
            if not held_out:
                return accuracy(trained(model, x, y, steps, seed, rate), *test)
            cut = len(x) * 7 // 8
            return accuracy(trained(model, x[:cut], y[:cut], steps, seed, rate), x[cut:], y[cut:])

        return self.value(f"{seed} {groups} {method} {share} {rate} {'held-out' if held_out else 'test'}", compute)

    def rate(self, groups: int, method: str, share: float) -> float:
        """The learning rate with most held-out images right, on seed 0."""
        return max(RATES, key=lambda rate: self.fine_tuned(0, groups, method, share, rate, held_out=True))


def row(cells: Iterable[Sequence[float]]) -> str:
    return " | ".join(f"{mean(c):.1f} ± {stdev(c) if len(c) > 1 else 0:.1f}" for c in cells)


def one_shot_table(study: Study, seeds: int, groups: Sequence[int]) -> None:
    print("\n| network (dense) | g | " + " | ".join(ONE_SHOT) + " |\n|---|---:|" + "---:|" * len(ONE_SHOT), flush=True)
    dense = row([[study.dense_accuracy(seed) for seed in range(seeds)]])
    for g in groups:
        cells = ([study.one_shot(seed, g, name) for seed in range(seeds)] for name in ONE_SHOT)
        print(f"| {study.network} ({dense}) | {g} | {row(cells)} |", flush=True)


def fine_tuned_table(study: Study, seeds: int, groups: Sequence[int], shares: Sequence[float]) -> None:
    print("\n| network | g | method | " + " | ".join(f"{share:.0%} more" for share in shares) + " | rates |")
    print("|---|---:|---|" + "---:|" * len(shares) + "---|", flush=True)
    for g, method in product(groups, (*METHODS, "sao")):
        # From scratch a rate that is best for the shortest of these trainings is taken for all.
        rates = [study.rate(g, method, shares[0] if method == "sao" else share) for share in shares]
        cells = [
            [study.fine_tuned(seed, g, method, share, rate, held_out=False) for seed in range(seeds)]
            for share, rate in zip(shares, rates)
        ]
        print(f"| {study.network} | {g} | {method} | {row(cells)} | {' '.join(map(str, rates))} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="*", default=list(SIZES), help="of the matrices to cluster")
    parser.add_argument("--groups", type=int, nargs="*", default=list(GROUPS))
    parser.add_argument("--steps", type=int, default=860, help="of the dense training")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--shares", type=float, nargs="*", default=[], help="of the steps to train on for: 0.05 0.1 ..")
    parser.add_argument("--fashion", type=Path, help="folder of Fashion-MNIST, in place of digits")
    parser.add_argument("--results", type=Path, help="file that keeps results, to go on where a run was stopped")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", sao_prune.SparsityWarning)
    if arguments.sizes:
        search(arguments.sizes, arguments.groups)
    data = cache(lambda seed: digits(seed))
    if arguments.fashion:
        loaded = fashion(arguments.fashion)
        data = cache(lambda seed: loaded)
    name = "Fashion-MNIST" if arguments.fashion else "digits"
    print(f"\naccuracy in per cent, {name}, {arguments.seeds} seeds (mean ± standard deviation)")
    for network in arguments.networks if arguments.seeds else ():
        study = Study(network, arguments.steps, data, arguments.results)
        one_shot_table(study, arguments.seeds, arguments.groups)
        if arguments.shares:
            fine_tuned_table(study, arguments.seeds, arguments.groups, arguments.shares)


if __name__ == "__main__":
    main()
