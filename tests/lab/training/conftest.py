"""A task that is learnt in a second, and networks for it."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import sao_prune
from sao_prune.lab.data import Dataset

Factory = Callable[..., nn.Module]


@pytest.fixture
def blobs() -> Dataset:
    """Two classes of 4 x 4 images, one bright and one dark: 40 to train with, 20 to test."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 2
    grey = 128 + 64 * (2 * y - 1).reshape(-1, 1, 1, 1) + 20 * torch.randn(60, 1, 4, 4, generator=generator)
    x = grey.clamp(0, 255).byte()
    return Dataset("blobs", ("a", "b"), x[:40], y[:40], x[40:], y[40:])


@pytest.fixture
def network() -> Factory:
    """A small network: ``kind`` is ``mlp``, ``cnn`` or ``dropout``, pruned in ``groups`` by SAO if there are any."""

    def make(kind: str = "mlp", groups: int = 0, method: str = "sao", seed: int = 0) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if kind == "cnn":
                model = nn.Sequential(
                    nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
                    nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 2),
                )  # fmt: skip
            else:
                last = [nn.Dropout(0.5)] if kind == "dropout" else []
                hidden = [m for _ in range(3) for m in (nn.Linear(16, 16), nn.Tanh())]
                model = nn.Sequential(nn.Flatten(), *hidden, *last, nn.Linear(16, 2))
        if groups:
            sao_prune.apply(model, groups=groups, method=method, seed=seed)
        return model

    return make
