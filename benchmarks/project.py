"""Conversion of trained weights: `python benchmarks/project.py` prints two tables.

The first: how long co-clustering takes, and how much energy it keeps of a Gaussian matrix (random sets keep one in g).
The second: accuracy on scikit-learn's digits, or with `--fashion FOLDER` on Fashion-MNIST, right after a
trained network became blocks, with no training after it.
"""

from __future__ import annotations

import argparse
import copy
import os
import warnings
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from time import perf_counter

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
        first = nn.Conv2d(1, width, 3, stride=1 + size // 14, padding=1, bias=False)
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


def fashion(folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """4,000 training images of Fashion-MNIST and 4,000 test images."""
    data = load_dataset(DataSpec("fashion-mnist", subset=4000), source=DataSource(folder))
    train, test = ((x.float() / 255 - 0.286) / 0.353 for x in (data.train_x, data.test_x[:4000]))
    return train, data.train_y, test, data.test_y[:4000]


def trained(model: nn.Module, x: Tensor, y: Tensor, epochs: int, seed: int) -> nn.Module:
    """AdamW with a cosine schedule."""
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * (len(x) // 64)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
    decay = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for _ in range(steps):
        batch = torch.randint(len(x), (64,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
        decay.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return 100 * float((model.eval()(x).argmax(1) == y).float().mean())


def one_shot(epochs: int, seeds: int, fashion_folder: Path | None) -> None:
    """Accuracy right after the conversion."""
    settings = [("keep", "ramanujan"), ("keep", "clustered"), ("least_squares", "ramanujan")]
    settings.append(("least_squares", "clustered"))
    name = "Fashion-MNIST" if fashion_folder else "digits"
    print(f"\none-shot accuracy in per cent, {name}, {seeds} seeds (mean ± standard deviation)")
    print("| network (dense) | g | " + " | ".join(f"{v}, {t}" for v, t in settings) + " | seconds |")
    print("|---|---:|" + "---:|" * (len(settings) + 1), flush=True)
    for build in (Mixer, Residual):
        scores: dict[tuple[int, str, str], list[float]] = {}
        dense, seconds = [], []
        for seed in range(seeds):
            x, y, test_x, test_y = fashion(fashion_folder) if fashion_folder else digits(seed)
            torch.manual_seed(seed)
            model = trained(build(x.shape[-1]), x, y, epochs, seed)
            dense.append(accuracy(model, test_x, test_y))
            for g, (values, topology) in product(GROUPS, settings):
                converted = copy.deepcopy(model)
                method = sao_prune.Project(inputs=x[:512], values=values, topology=topology)
                start = perf_counter()
                sao_prune.apply(converted, groups=g, method=method, seed=seed)
                seconds.append(perf_counter() - start)
                scores.setdefault((g, values, topology), []).append(accuracy(converted, test_x, test_y))
        for g in GROUPS:
            cells = [scores[g, v, t] for v, t in settings]
            text = " | ".join(f"{mean(c):.1f} ± {stdev(c) if len(c) > 1 else 0:.1f}" for c in cells)
            print(f"| {build.__name__} ({mean(dense):.1f}) | {g} | {text} | {mean(seconds):.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="*", default=list(SIZES))
    parser.add_argument("--groups", type=int, nargs="*", default=list(GROUPS))
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--fashion", type=Path, help="folder of Fashion-MNIST, in place of digits")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", sao_prune.SparsityWarning)
    search(arguments.sizes, arguments.groups)
    if arguments.seeds:
        one_shot(arguments.epochs, arguments.seeds, arguments.fashion)


if __name__ == "__main__":
    main()
