"""Isometry that lasts: drift and time of a training step, `python benchmarks/hold.py`.

Against the dense orthogonal parametrisation of the same layer and against the same layer left free, forward, backward
and SGD step; ways run in turn, medians, as ratios.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from timing import race
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import sao_prune
from sao_prune.nn import ECOConv2d


def step_of(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """One training step."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()

    return step


def linear(width: int, groups: int, form: str, held: bool) -> nn.Sequential:
    """One sparse layer, masked or compact."""
    model = nn.Sequential(nn.Linear(width, width, bias=False))
    sao_prune.apply(model, groups=groups, skip_first=False, skip_last=False, seed=0)
    if form == "compact":
        sao_prune.compact(model)
    if held:
        sao_prune.hold(model)
    return model


def dense(width: int) -> nn.Sequential:
    """The dense layer that torch keeps orthogonal, with the map that `hold` uses."""
    layer = nn.Linear(width, width, bias=False)
    nn.init.orthogonal_(layer.weight)
    return nn.Sequential(parametrizations.orthogonal(layer, orthogonal_map="cayley"))


def drift(model: nn.Sequential, steps: int, x: Tensor) -> float:
    """Largest |singular value - 1| after so many steps."""
    step = step_of(model, x)
    for _ in range(steps):
        step()
    weight = model[0].weight
    assert isinstance(weight, Tensor)
    return float((torch.linalg.svdvals(weight.detach().double()) - 1).abs().max())


def eco(groups: int, held: bool) -> nn.Sequential:
    """One ECO convolution, 64 channels on 9 x 9."""
    model = nn.Sequential(ECOConv2d(64, 64, 3, groups=groups, input_size=9, bias=False, seed=0))
    if held:
        sao_prune.hold(model)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    x = torch.randn(options.batch, options.width)
    print(f"{options.width} x {options.width}, batch {options.batch}, {options.threads} thread(s)")
    print("| groups | form | drift after 200 steps, free | held | ms a step, held | x the free layer | dense / held |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for groups in (8, 32, 64):
        for form in ("masked", "compact"):
            free, held = (linear(options.width, groups, form, h) for h in (False, True))
            ways = {"free": step_of(free, x), "held": step_of(held, x), "dense": step_of(dense(options.width), x)}
            times = race(ways, options.repeats)
            drifts = [drift(linear(options.width, groups, form, h), 200, x) for h in (False, True)]
            print(
                f"| {groups} | {form} | {drifts[0]:.1e} | {drifts[1]:.1e} | {1e3 * times.median('held'):.1f} "
                f"| {times.ratio('held', 'free'):.1f} | {times.ratio('dense', 'held'):.1f} |",
                flush=True,
            )
    images = torch.randn(16, 64, 9, 9)
    print("\n| ECO 64 -> 64, 9 x 9, groups | ms a step, held | x the free layer |\n| --- | --- | --- |")
    for groups in (1, 8, 16):
        times = race(
            {"free": step_of(eco(groups, False), images), "held": step_of(eco(groups, True), images)}, options.repeats
        )
        print(f"| {groups} | {1e3 * times.median('held'):.1f} | {times.ratio('held', 'free'):.1f} |", flush=True)


if __name__ == "__main__":
    main()
