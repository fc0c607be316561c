"""Whole models on a GPU, dense and compact, eager and compiled, and with small batches as CUDA graphs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import timm
import torch
from gpu_timing import Device, Way, graphed
from torch import Tensor, nn

import sao_prune

SPARSITY = 0.96875
# How torch.compile is asked for CUDA graphs, and what stands for that where there are none.
_GRAPHS: dict[bool, dict[str, Any]] = {False: {"mode": "reduce-overhead"}, True: {"backend": "eager"}}


@dataclass(frozen=True)
class Model:
    """A timm model and its batch.

    Attributes:
        target: how many times as fast as compiled dense a training step must be; 0 if nothing was asked.
        never_below: whether it must never be slower than the fastest dense one.
    """

    name: str
    batch: int
    image: int = 224
    target: float = 0.0
    never_below: bool = False


MODELS = [
    Model("vit_small_patch16_224", 128),
    Model("vit_base_patch16_224", 128, target=1.5),
    Model("mixer_b16_224", 128, target=1.5),
    Model("resnet50", 128, never_below=True),
    Model("vgg16_bn", 64),
]
SMOKE = [Model("test_vit", 2, image=160, target=1.5), Model("test_resnet", 2, image=32, never_below=True)]


def works(model: Model, device: Device) -> Iterator[tuple[str, int, dict[str, Way]]]:
    """Pass, batch and ways: a training step, inference, and inference of one image."""
    torch.manual_seed(0)
    dense = timm.create_model(model.name).to(device.name, memory_format=torch.channels_last)
    for what, batch in (("training step", model.batch), ("inference", model.batch), ("inference", 1)):
        x = torch.randn(batch, 3, model.image, model.image, device=device.name)
        x = x.contiguous(memory_format=torch.channels_last)
        training = what == "training step"
        found: dict[str, Way] = {}
        for name, net in (("dense", copy.deepcopy(dense)), ("compact", compact(dense, x))):
            compiled = torch.compile(copy.deepcopy(net), backend="eager" if device.smoke else "inductor")
            make = step if training else infer
            found[name] = make(net, x, device)
            found[f"{name}, compiled"] = make(compiled, x, device)
            if batch == 1 and not training:
                found[f"{name}, CUDA graph"] = graphed(found[name], device)
                fast = torch.compile(copy.deepcopy(net), **_GRAPHS[device.smoke])
                found[f"{name}, compiled, CUDA graph"] = make(fast, x, device)
        yield what, batch, found
        del found
        torch.compiler.reset()


def compact(dense: nn.Module, x: Tensor) -> nn.Module:
    """The same model with block layers."""
    net = copy.deepcopy(dense)
    groups = {"sparsity": SPARSITY} if x.shape[-1] == 224 else {"sparsity": 0.75}
    sao_prune.apply(net, method=sao_prune.SAO(topology="interleaved"), seed=0, **groups)
    sao_prune.compact(net, example_input=x)
    return net


def infer(model: Callable[[Tensor], Tensor], x: Tensor, device: Device) -> Way:
    """A forward pass in half precision."""
    _module(model).eval()

    def run() -> Tensor:
        with torch.no_grad(), torch.autocast(device.name, torch.bfloat16, enabled=not device.smoke):
            return model(x)

    return run


def step(model: Callable[[Tensor], Tensor], x: Tensor, device: Device) -> Way:
    """A step of SGD with momentum in mixed precision."""
    optimizer = torch.optim.SGD(_module(model).train().parameters(), lr=1e-3, momentum=0.9)
    classes = 1000
    labels = torch.randint(classes, (len(x),), device=device.name)

    def run() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.name, torch.bfloat16, enabled=not device.smoke):
            loss = nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()

    return run


def _module(model: Callable[[Tensor], Tensor]) -> nn.Module:
    assert isinstance(model, nn.Module)
    return model
