"""Training steps and inference of timm models at 96.875 % sparsity, against the dense models."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import timm
import torch
from limits import without_block_layers
from timing import Row, at_least, race
from torch import Tensor, nn

import sao_prune

# Batch size, and the targets for a training step and for inference.
MODELS = {
    "vgg16_bn": (2, 10.0, 9.0),
    "mixer_b16_224": (4, 6.0, 7.0),
    "vit_small_patch16_224": (8, 3.3, 3.4),
    "resnet50": (8, 2.7, 2.7),
    "resnet18": (16, 3.0, 3.0),
}
SPARSITY = 0.96875


def training(name: str, repeats: int = 3) -> Iterator[Row]:
    """A step of SGD with momentum."""
    batch, target, _ = MODELS[name]
    yield from _compare(name, batch, target, "train", repeats)


def inference(name: str, repeats: int = 5) -> Iterator[Row]:
    """A forward pass in eval mode."""
    batch, _, target = MODELS[name]
    yield from _compare(name, batch, target, "infer", repeats)


def _compare(name: str, batch: int, target: float, mode: str, repeats: int) -> Iterator[Row]:
    torch.manual_seed(0)
    x, labels = torch.randn(batch, 3, 224, 224), torch.randint(1000, (batch,))
    dense = timm.create_model(name)
    ways = _dense_ways(dense, x, labels, mode)
    worst = []
    for topology in ("interleaved", "ramanujan"):
        model = copy.deepcopy(dense)
        sao_prune.apply(model, sparsity=SPARSITY, method=sao_prune.SAO(topology=topology), seed=0)
        report = sao_prune.compact(model, example_input=x, tune=mode)
        worst += [(layer.ratio, layer.name, topology) for layer in report.layers if layer.ratio is not None]
        ways[topology] = _way(model, x, labels, mode)
        if topology == "interleaved":
            ways["limit"] = _way(without_block_layers(model), x, labels, mode)
    times = race(ways, repeats, warm_up=1)
    work = f"{'training step' if mode == 'train' else 'inference'}, {name}, batch {batch}, {SPARSITY:.3%}"
    yield at_least(work, "dense", target, times, "dense", "interleaved", "interleaved")
    yield at_least(work, "dense", None, times, "dense", "ramanujan", "ramanujan")
    if "dense, channels last" in ways:
        yield at_least(work, "dense, channels last", None, times, "dense, channels last", "interleaved", "interleaved")
    yield at_least(f"{work}, the limit: block layers take no time", "dense", None, times, "dense", "limit")
    ratio, layer, topology = min(worst)
    yield Row(
        f"slowest of {len(worst)} layers of {name}, {'training' if mode == 'train' else 'inference'}",
        "dense layer",
        ">= 0.95x",
        f"{ratio:.2f}x",
        met=ratio >= 0.95,
        note=f"{layer}, {topology}, as tuned",
    )


def untuned(name: str, mode: str, repeats: int = 3) -> Iterator[Row]:
    """Compact by the rule alone, with an example input and without: never slower than dense by more than 5 %."""
    torch.manual_seed(0)
    batch = MODELS[name][0]
    x, labels = torch.randn(batch, 3, 224, 224), torch.randint(1000, (batch,))
    dense = timm.create_model(name)
    ways = _dense_ways(dense, x, labels, mode)
    kinds = list(ways)
    for kind, example in (("fused", x), ("without example_input", None)):
        model = copy.deepcopy(dense)
        sao_prune.apply(model, sparsity=SPARSITY, method=sao_prune.SAO(topology="interleaved"), seed=0)
        sao_prune.compact(model, example_input=example)
        ways[kind] = _way(model, x, labels, mode)
    times = race(ways, repeats, warm_up=1)
    work = f"{'training step' if mode == 'train' else 'inference'}, {name}, batch {batch}, {SPARSITY:.3%}, not tuned"
    fastest = min(kinds, key=times.median)
    for kind in ("fused", "without example_input"):
        yield at_least(f"{work}, {kind}", fastest, 0.95, times, fastest, kind)


def compiled(name: str, mode: str, repeats: int = 3) -> Iterator[Row]:
    """Eager and under torch.compile, dense and compact; never slower compiled than eager."""
    torch.manual_seed(0)
    batch = MODELS[name][0]
    x, labels = torch.randn(batch, 3, 224, 224), torch.randint(1000, (batch,))
    dense = timm.create_model(name)
    model = copy.deepcopy(dense)
    sao_prune.apply(model, sparsity=SPARSITY, method=sao_prune.SAO(topology="interleaved"), seed=0)
    sao_prune.compact(model, example_input=x, tune="train" if mode == "train" else "infer")
    ways = {}
    for kind, each in (("dense", dense), ("compact", model)):
        ways[kind] = _way(each, x, labels, mode)
        ways[f"{kind}, compiled"] = _way(torch.compile(copy.deepcopy(each), fullgraph=True), x, labels, mode)
    times = race(ways, repeats, warm_up=2)
    work = f"{'training step' if mode == 'train' else 'inference'}, {name}, batch {batch}, {SPARSITY:.3%}"
    yield at_least(f"{work}, compact compiled", "compact, eager", 0.95, times, "compact", "compact, compiled")
    fastest = min(("dense", "dense, compiled"), key=times.median)
    note = f"fastest dense form: {fastest}"
    yield at_least(f"{work}, compact eager", "fastest dense", None, times, fastest, "compact", note)
    yield at_least(f"{work}, compact compiled", "fastest dense", None, times, fastest, "compact, compiled", note)


def _dense_ways(dense: nn.Module, x: Tensor, labels: Tensor, mode: str) -> dict[str, Callable[[], object]]:
    """The dense model as it is, and in channels last."""
    ways = {"dense": _way(dense, x, labels, mode)}
    if any(isinstance(m, nn.Conv2d) for m in dense.modules()):
        channels_last = copy.deepcopy(dense).to(memory_format=torch.channels_last)
        ways["dense, channels last"] = _way(
            channels_last, x.contiguous(memory_format=torch.channels_last), labels, mode
        )
    return ways


def _way(model: nn.Module, x: Tensor, labels: Tensor, mode: str) -> Callable[[], object]:
    if mode == "infer":
        model.eval()

        def infer() -> object:
            with torch.no_grad():
                return model(x)

        return infer
    optimizer = torch.optim.SGD(model.train().parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()

    return step
