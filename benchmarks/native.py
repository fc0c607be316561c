"""The native kernels layer by layer, and for MLPs, on inputs that come from memory as in a model, not from a cache.

python benchmarks/native.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from time import perf_counter

import torch
from torch import Tensor, nn

from sao_prune.blocks import BlockConv2d, BlockLinear, Execution
from sao_prune.blocks.epilogue import Epilogue, attach, detach
from sao_prune.topology import interleaved

GROUPS = 32
BYTES = 4e8
LINEAR = {
    "vit_small qkv": (1576, 384, 1152),
    "vit_small proj": (1576, 384, 384),
    "vit_small fc1": (1576, 384, 1536),
    "vit_small fc2": (1576, 1536, 384),
    "mixer_b16 fc1": (784, 768, 3072),
    "mixer_b16 fc2": (784, 3072, 768),
    "Linear 4096": (256, 4096, 4096),
}
MLPS = {
    "vit_small": (1576, 384, 1536),
    "mixer_b16": (784, 768, 3072),
}
CONVOLUTIONS = {
    "vgg16, 64 on 224": (2, 64, 64, 224),
    "vgg16, 128 on 112": (2, 128, 128, 112),
    "vgg16, 256 on 56": (2, 256, 256, 56),
    "vgg16, 512 on 28": (2, 512, 512, 28),
    "vgg16, 512 on 14": (2, 512, 512, 14),
}


def main() -> None:
    """Print a table of milliseconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    torch.set_num_threads(parser.parse_args().threads)
    print("| layer | copy of the output | dense | without native kernels | native |\n|---|---:|---:|---:|---:|")
    for name, (batch, n, m) in LINEAR.items():
        layers = BlockLinear(interleaved(m, n, GROUPS)), nn.Linear(n, m)
        _print(name, *layers, [torch.randn(batch, n) for _ in range(_many(batch * (n + m)))], torch.randn(batch, m))
    for name, (batch, n, m, size) in CONVOLUTIONS.items():
        layers = BlockConv2d(interleaved(m, n, GROUPS), 3, padding=1), nn.Conv2d(n, m, 3, padding=1)
        inputs = [torch.randn(batch, n, size, size) for _ in range(_many(batch * (n + m) * size**2))]
        inputs = [x.contiguous(memory_format=torch.channels_last) for x in inputs]
        gradient = torch.randn(batch, m, size, size).contiguous(memory_format=torch.channels_last)
        _print(f"{name}, channels last", *layers, inputs, gradient)

    print("\n| MLP | dense | two kernels | one kernel |\n|---|---:|---:|---:|")
    for name, (batch, n, middle) in MLPS.items():
        _print_mlp(name, [torch.randn(batch, n) for _ in range(_many(2 * batch * n))], n, middle)


def _print_mlp(name: str, inputs: list[Tensor], n: int, middle: int) -> None:
    first, second = BlockLinear(interleaved(middle, n, GROUPS)), BlockLinear(interleaved(n, middle, GROUPS))
    second.run_as(Execution(native=True))
    gradient, found = torch.randn_like(inputs[0]), []
    first.run_as(Execution(native=True))
    dense = nn.Sequential(nn.Linear(n, middle), nn.GELU(), nn.Linear(middle, n))
    found.append(_both(dense, inputs, [gradient] * len(inputs)))
    for then in (None, second):
        net = nn.Sequential(first, nn.GELU(), second)
        attach(Epilogue(first, None, net[1], (), then))
        found.append(_both(net, inputs, [gradient] * len(inputs)))
        detach(net)
    print(f"| {name} | {' | '.join(found)} |", flush=True)


def _many(floats: int) -> int:
    return max(8, min(40, int(BYTES / 4 / floats)))


def _print(name: str, block: BlockLinear | BlockConv2d, dense: nn.Module, inputs: list[Tensor], like: Tensor) -> None:
    gradients = [torch.randn_like(like) for _ in inputs]
    found = [f"{_time(lambda i: gradients[i].clone(), len(inputs)):.2f}"]
    last = like.dim() == 4
    executions = [
        None,
        Execution(merge=4 if last else 1, channels_last=last),
        Execution(native=True, channels_last=last),
    ]
    for execution in executions:
        layer: nn.Module = dense
        if execution is not None:
            block.run_as(execution)
            layer = block
        found.append(_both(layer, inputs, gradients))
    print(f"| {name} | {' | '.join(found)} |", flush=True)


def _both(layer: nn.Module, inputs: list[Tensor], gradients: list[Tensor]) -> str:
    """Milliseconds of a forward pass without gradients, and of a forward and a backward pass."""
    with torch.no_grad():
        forward = _time(lambda i: layer(inputs[i]), len(inputs))
    leaves = list(layer.parameters())

    def step(i: int) -> object:
        x = inputs[i].requires_grad_()
        return torch.autograd.grad(layer(x), [x, *leaves], gradients[i])

    return f"{forward:.2f} / {_time(step, len(inputs)):.2f}"


def _time(run: Callable[[int], object], many: int, rounds: int = 5) -> float:
    """Least milliseconds of a call, over rounds through all inputs; a round's results are kept, as activations are."""
    best, kept = float("inf"), [None] * many
    for _ in range(rounds):
        start = perf_counter()
        for i in range(many):
            kept[i] = run(i)  # type: ignore[call-overload]
        best = min(best, (perf_counter() - start) / many)
    return best * 1e3


if __name__ == "__main__":
    main()
