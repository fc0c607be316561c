"""Training steps of deep stacks of linear layers, as in the thesis's MLP-N."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from timing import Row, at_least, clock, race
from torch import Tensor, nn

import sao_prune


def _stack(width: int, depth: int, gain: float = 1.05) -> nn.Sequential:
    """Dense and orthogonal: with torch's default the gradients of 200 layers vanish into denormal numbers, and those
    are 10 times slower to compute with, which would flatter the sparse network."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.Tanh()]
    model = nn.Sequential(nn.Linear(width, width), nn.Tanh(), *layers, nn.Linear(width, 10))
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight, gain)
            nn.init.zeros_(layer.bias)
    return model


def _train(model: nn.Module, x: Tensor, labels: Tensor) -> Callable[[], object]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()

    return step


def _compare(
    width: int, batch: int, groups: int, repeats: int, target: float, target_masked: float | None
) -> Iterator[Row]:
    x, labels = torch.randn(batch, width), torch.randint(10, (batch,))
    dense = _stack(width, 200)
    ways = {"dense": _train(dense, x, labels)}
    for topology in ("interleaved", "ramanujan"):
        model = copy.deepcopy(dense)
        sao_prune.apply(model, groups=groups, method=sao_prune.SAO(topology=topology, gain=1.05), seed=0)
        if topology == "interleaved":
            ways["masked"] = _train(copy.deepcopy(model), x, labels)
        sao_prune.compact(model, example_input=x, tune="train")
        ways[topology] = _train(model, x, labels)
    times = race(ways, repeats, warm_up=1)
    for topology in ("interleaved", "ramanujan"):
        work = f"training step, 200 hidden layers of {width}, tanh, batch {batch}, {groups} blocks, {topology}"
        yield at_least(work, "dense", target, times, "dense", topology)
        asked = target_masked if topology == "interleaved" else None
        yield at_least(work, "masked", asked, times, "masked", topology)


def wide(repeats: int = 5) -> Iterator[Row]:
    """200 hidden layers of 1024, batch 256, 96.875 %."""
    yield from _compare(1024, 256, 32, repeats, 6, 7)


def narrow(repeats: int = 15) -> Iterator[Row]:
    """200 hidden layers of 256, batch 128, degree 4."""
    yield from _compare(256, 128, 64, repeats, 1.9, None)


def thousand() -> Iterator[Row]:
    """MLP-N with 1,000 layers, degree 4: one epoch on digits, and where its time goes."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    x = nn.functional.interpolate(images, 32).flatten(1)
    labels = torch.tensor(digits.target)
    seconds = {}
    for name in ("dense", "interleaved", "ramanujan"):
        torch.manual_seed(0)
        hidden = [nn.Linear(1024, 512), nn.Tanh(), nn.Linear(512, 256), nn.Tanh()]
        for _ in range(999):
            hidden += [nn.Linear(256, 256), nn.Tanh()]
        model = nn.Sequential(*hidden, nn.Linear(256, 10))
        for layer in model:
            if isinstance(layer, nn.Linear):
                nn.init.orthogonal_(layer.weight, 1.1)
        if name != "dense":
            method = sao_prune.SAO(topology=name, gain=1.1)
            sao_prune.apply(model, degree=4, method=method, skip_first=False, seed=0)
            sao_prune.compact(model, example_input=x[:128])
        steps = [_train(model, a, b) for a, b in zip(x.split(128), labels.split(128))]
        steps[0]()
        start = clock()
        for step in steps:
            step()
        seconds[name] = clock() - start
    for name in ("interleaved", "ramanujan"):
        yield Row(
            f"MLP-N, 1,000 layers of 256, degree 4, one epoch on digits ({len(x)} images, batch 128), {name}",
            "dense",
            "",
            f"{seconds['dense'] / seconds[name]:.2f}x",
            note=f"{seconds['dense']:.2f} s / {seconds[name]:.2f} s",
        )
    yield Row("the same: where a step's time goes", "", "", "", note=_profile(steps[0]))


def _profile(step: Callable[[], object]) -> str:
    """Shares of the operations' own time in one step."""
    with torch.profiler.profile() as profile:
        step()
    events = profile.key_averages()
    total = sum(e.self_cpu_time_total for e in events)
    top = sorted(events, key=lambda e: -e.self_cpu_time_total)[:8]
    return "; ".join(
        f"{e.key.replace('autograd::engine::evaluate_function: ', 'engine ')} {e.self_cpu_time_total / total:.0%}"
        for e in top
    )
