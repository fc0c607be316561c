"""Layers on a GPU: dense, batched products between separate shuffles, our kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from gpu_timing import Device, Roof, Way
from torch import Tensor, nn
from torch.nn import functional as F

from sao_prune.blocks.backends import triton as backend
from sao_prune.blocks.backends.triton.tables import table_of
from sao_prune.topology import BlockTopology, interleaved, ramanujan

EVERYTHING = (True, True, True)


@dataclass(frozen=True)
class Layer:
    """A layer of ``width`` channels in ``groups`` blocks; a convolution if ``side`` is the side of its images."""

    name: str
    width: int
    batch: int
    groups: int = 32
    side: int = 0


LAYERS = [
    Layer("Linear 4096, batch 4096", 4096, 4096),
    Layer("Linear 4096, batch 256", 4096, 256),
    Layer("Conv 512, 7 x 7, 3 x 3, batch 32", 512, 32, side=7),
]
SMOKE = [Layer("Linear 32, batch 16", 32, 16, 2), Layer("Conv 16, 2 x 2, 3 x 3, batch 1", 16, 1, 2, side=2)]


def topologies(layer: Layer) -> dict[str, BlockTopology]:
    """The regular one and the thesis's."""
    width, groups = layer.width, layer.groups
    return {
        "interleaved": interleaved(width, width, groups),
        "ramanujan": ramanujan(width, width, groups, torch.Generator().manual_seed(0)),
    }


@dataclass(frozen=True)
class Operands:
    """Inputs, a gradient, and the parameters of a layer's ways."""

    x: Tensor
    grad: Tensor
    dense: Tensor
    blocks: Tensor
    bias: Tensor
    inputs: Tensor
    outputs: Tensor


def operands(layer: Layer, topology: BlockTopology, device: Device) -> Operands:
    """Random ones, channels last."""

    def random(*size: int) -> Tensor:
        return torch.randn(size, device=device.name).to(device.dtype)

    width, size = layer.width, layer.width // layer.groups
    kernel = (3, 3) if layer.side else ()
    shape = (layer.batch, layer.side, layer.side, width) if layer.side else (layer.batch, width)
    x, grad = (random(*shape).permute(0, 3, 1, 2) if layer.side else random(*shape) for _ in range(2))
    dense = random(width, width, *kernel) / width**0.5
    tables = (table_of(s, layer.groups).to(device.name) for s in (topology.col_set, topology.row_set))
    return Operands(
        x,
        grad,
        dense.to(memory_format=torch.channels_last) if layer.side else dense,
        random(layer.groups, size, size, *kernel) / size**0.5,
        random(width),
        *tables,
    )


def ways(layer: Layer, topology: BlockTopology, device: Device) -> dict[str, dict[str, Way]]:
    """For ``forward`` and ``step`` (forward and all gradients) the ways of a layer, which compute the same product."""
    o = operands(layer, topology, device)
    index, back = o.inputs.long(), torch.argsort(o.outputs.long())
    g, size = layer.groups, layer.width // layer.groups

    def dense(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias, padding=1) if layer.side else F.linear(x, weight, bias)

    def shuffled(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x = x.index_select(1, index)
        if layer.side:
            y = F.conv2d(x, weight.flatten(0, 1), None, padding=1, groups=g)
        else:
            y = torch.bmm(x.view(-1, g, size).transpose(0, 1), weight.mT).transpose(0, 1).reshape(len(x), -1)
        return y.index_select(1, back) + (bias[:, None, None] if layer.side else bias)

    def ours() -> Tensor:
        if layer.side:
            return backend.conv_forward(*o_forward, layer.width, padding=(1, 1))[0]
        return backend.linear_forward(*o_forward, layer.width)[0]

    def ours_step() -> object:
        ours()
        if layer.side:
            return backend.conv_backward(*o_backward, EVERYTHING, padding=(1, 1))
        return backend.linear_backward(*o_backward, EVERYTHING)

    o_forward = (o.x, o.blocks, o.bias, o.inputs, o.outputs)
    o_backward = (o.grad, o.x, o.blocks, o.inputs, o.outputs)
    separate = "torch's grouped convolution and shuffles" if layer.side else "torch.bmm and shuffles"
    other = {"dense": (dense, o.dense), separate: (shuffled, o.blocks)}
    forward: dict[str, Way] = {name: _forward(run, o.x, weight, o.bias) for name, (run, weight) in other.items()}
    step: dict[str, Way] = {name: _step(run, o.x, weight, o.bias, o.grad) for name, (run, weight) in other.items()}
    return {"forward": {**forward, "ours": ours}, "training step": {**step, "ours": ours_step}}


def agreement(layer: Layer, topology: BlockTopology, device: Device) -> float:
    """The largest relative distance of our result and gradients from those in float64: only what is right is timed."""
    o = operands(layer, topology, device)
    padding = {"padding": (1, 1)} if layer.side else {}
    forward, backward = (
        (backend.conv_forward, backend.conv_backward)
        if layer.side
        else (backend.linear_forward, backend.linear_backward)
    )
    y, _ = forward(o.x, o.blocks, o.bias, o.inputs, o.outputs, layer.width, **padding)
    got = y, *backward(o.grad, o.x, o.blocks, o.inputs, o.outputs, EVERYTHING, **padding)
    leaves = [t.double().requires_grad_() for t in (o.x, o.blocks, o.bias)]
    x, blocks, bias = leaves
    rows, columns = (t.long().view(layer.groups, -1) for t in (o.outputs, o.inputs))
    weight = torch.zeros(o.dense.shape, dtype=torch.float64, device=device.name)
    weight = weight.index_put((rows[:, :, None], columns[:, None, :]), blocks)
    want = F.conv2d(x, weight, bias, **padding) if layer.side else F.linear(x, weight, bias)
    wanted = want, *torch.autograd.grad(want, leaves, o.grad.double())
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(got, wanted))


def limits(layer: Layer, roof: Roof, device: Device) -> dict[str, float]:
    """The least milliseconds of forward and step: every operand read once, every result written once."""
    size = torch.finfo(device.dtype).bits // 8
    positions = layer.batch * (layer.side**2 or 1)
    values = positions * layer.width
    weights = layer.width**2 // layer.groups * (9 if layer.side else 1)
    products = 2 * positions * weights
    forward = roof.time(size * (2 * values + weights), products)
    # The gradient pass reads the gradient, the input and the weight, and writes the gradients of the last two.
    return {
        "forward": forward,
        "training step": forward + roof.time(size * (3 * values + 2 * weights), 2 * products),
    }


def _forward(run: Callable[..., Tensor], *inputs: Tensor) -> Way:
    def infer() -> Tensor:
        with torch.no_grad():
            return run(*inputs)

    return infer


def _step(run: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> Way:
    leaves = [nn.Parameter(t) for t in (x, weight, bias)]
    return lambda: torch.autograd.grad(run(*leaves), leaves, grad)
