"""Masked or compact: the processor time of an epoch of training in either form.

`OMP_NUM_THREADS=1 python benchmarks/execution.py` prints a row a network and number of blocks. The rule of
``execution: auto`` in a recipe is made from it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import timm
import torch
from torch import nn

import sao_prune
import sao_prune.models
from sao_prune.lab.data import Dataset
from sao_prune.lab.training import History, TrainSpec, train

FORMS = ("dense", "masked", "compact")


def images(channels: int, count: int, size: int) -> Dataset:
    """Random images of ten classes."""
    x = torch.randint(256, (count, channels, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    y = torch.arange(count) % 10
    return Dataset("random", tuple("abcdefghij"), x, y, x[:100], y[:100])


def epoch_seconds(model: nn.Module, data: Dataset, form: str, epochs: int) -> tuple[float, str]:
    """The least processor time of an epoch, and what form it was."""
    spent = [0.0]
    spec = TrainSpec(epochs=epochs, batch_size=128, execution="compact" if form == "compact" else "masked")

    def on_epoch(history: History) -> None:
        spent.append(history.cpu_seconds)

    history = train(model, data, spec, 1e-3, 0, on_epoch)
    return min(after - before for before, after in pairwise(spent)), history.execution


def linear(width: int, depth: int) -> nn.Module:
    """Linear layers of one width."""
    hidden = [m for _ in range(depth) for m in (nn.Linear(width, width), nn.Tanh())]
    return nn.Sequential(nn.Flatten(), nn.Linear(1024, width), nn.Tanh(), *hidden, nn.Linear(width, 10))


def convolutional(width: int) -> nn.Module:
    """Eight convolutions, the second with stride 2."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), nn.ReLU()]
    for stride in (2, 1, 1, 1, 1, 1, 1):
        layers += [nn.Conv2d(width, width, 3, stride, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def measure(name: str, make: Callable[[], nn.Module], data: Dataset, groups: tuple[int, ...], epochs: int = 3) -> None:
    """Print one row for each number of blocks."""
    for count in groups:
        seconds = {}
        for form in FORMS:
            torch.manual_seed(0)
            model = make()
            if form != "dense":
                sao_prune.apply(model, groups=count, seed=0)
            seconds[form], said = epoch_seconds(model, data, form, epochs)
        times = "".join(f"{seconds[form]:9.3f}" for form in FORMS)
        print(f"{name:24}{count:7}{times}{seconds['masked'] / seconds['compact']:9.2f}  {said}", flush=True)


def main() -> None:
    """All networks."""
    torch.set_flush_denormal(True)
    print(f"{'network':24}{'blocks':>7}{'dense':>9}{'masked':>9}{'compact':>9}{'ratio':>9}  seconds an epoch")
    grey, colour, few = images(1, 1280, 32), images(3, 256, 32), images(3, 128, 32)
    measure("50 x linear 256", partial(linear, 256, 50), grey, (2, 4, 16, 48, 64))
    measure("20 x linear 128", partial(linear, 128, 20), grey, (16, 20))
    measure("20 x linear 100", partial(linear, 100, 20), grey, (10, 16))
    measure("20 x linear 64", partial(linear, 64, 20), grey, (12, 16))
    for width in (32, 128):
        measure(f"8 x convolution {width}", partial(convolutional, width), colour, (2, 4, 8, 16, 32), 2)
    for name, options in (
        ("sao_mlp7", {}),
        ("sao_mixer_nano", {"depth": 8}),
        ("sao_resmlp", {}),
        ("sao_resnet", {"depth": 20}),
    ):
        data = grey if name == "sao_mlp7" else few
        make = partial(timm.create_model, name, num_classes=10, in_chans=data.channels, **options)
        measure(name, make, data, (2, 16))


if __name__ == "__main__":
    main()
