"""Time to build sparse orthogonal layers, as ratios to `torch.nn.init.orthogonal_` on the same shapes.

    python benchmarks/build.py [--repeats 9] [--threads N] [--output FILE.json]

Both sides run in turn in one process and their medians are compared. A layer is a topology, its mask, and orthogonal
values written into an existing weight; whole models are one call of `sao_prune.apply`.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import sao_prune
from sao_prune.algorithms import SAO
from sao_prune.allocation import Allocation
from sao_prune.discovery import PrunableWeight, weight_of
from sao_prune.prune import attach


def medians(
    repeats: int, sides: dict[str, tuple[Callable[[], object], Callable[[object], object]]]
) -> dict[str, float]:
    """Median seconds of each ``(prepare, run)`` pair, run in turn."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, (prepare, run) in sides.items():
            subject = prepare()
            start = time.perf_counter()
            run(subject)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def build_layer(layer: nn.Linear, groups: int) -> None:
    """Everything that a sparse layer needs: topology, mask, values, hook."""
    (draw,) = SAO().draw([Allocation(weight_of(layer), 1 / groups, groups)], [layer.weight.detach()], 0)
    attach(layer, draw)


def pruned_weights(model: nn.Module, **options: object) -> list[nn.Parameter]:
    """The weights that `sao_prune.apply` prunes."""
    names = [layer.name for layer in sao_prune.plan(model, **options).pruned]
    return [model.get_parameter(name) for name in names]


def orthogonal(weights: list[nn.Parameter]) -> None:
    """torch's own orthogonal initialisation of the same layers."""
    for weight in weights:
        nn.init.orthogonal_(weight)


def mlp(depth: int) -> nn.Module:
    """The thesis's MLP-N."""
    hidden = [nn.Linear(256, 256) for _ in range(depth - 1)]
    return nn.Sequential(nn.Linear(1024, 512), nn.Linear(512, 256), *hidden, nn.Linear(256, 10))


def vit_large() -> nn.Module:
    """timm's vit_large_patch16_224."""
    import timm

    return timm.create_model("vit_large_patch16_224")


def layer_rows(repeats: int) -> list[tuple[str, dict[str, float], float]]:
    """Single layers against their targets."""
    rows = []
    for side, target in ((1024, 100.0), (4096, 50.0)):
        result = medians(
            repeats if side <= 1024 else max(3, repeats // 3),
            {
                "sao": (lambda side=side: nn.Linear(side, side), lambda layer: build_layer(layer, 32)),
                "orthogonal_": (
                    lambda side=side: nn.Linear(side, side),
                    lambda layer: nn.init.orthogonal_(layer.weight),
                ),
            },
        )
        rows.append((f"Linear {side} x {side}, 32 groups", result, target))
    return rows


def model_rows(repeats: int) -> list[tuple[str, dict[str, float], float]]:
    """Whole models against their targets."""
    rows = []
    for name, make, options in (
        ("MLP-1000, 256 wide, degree 4", lambda: mlp(1000), {"groups": 64}),
        ("vit_large_patch16_224, 96.875 %", vit_large, {"sparsity": 0.96875}),
    ):
        result = medians(
            max(2, repeats // 3),
            {
                "sao": (make, lambda model, options=options: sao_prune.apply(model, seed=0, **options)),
                "orthogonal_": (lambda make=make, options=options: pruned_weights(make(), **options), orthogonal),
            },
        )
        rows.append((name, result, 20.0))
    return rows


def growth_rows(repeats: int) -> list[tuple[int, int, float]]:
    """Seconds to draw a 4096 x 4096 layer against its number of non-zeros."""
    rows = []
    weight = PrunableWeight("layer", "weight", "Linear", (4096, 4096))
    for groups in (16, 32, 64, 128, 256, 512):
        allocation = Allocation(weight, 1 / groups, groups)
        result = medians(
            repeats, {"draw": (lambda: None, lambda _, a=allocation: SAO().draw([a], [torch.empty(0)], 0))}
        )
        rows.append((groups, 4096 * 4096 // groups, result["draw"]))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="also write the numbers as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    console = Console()
    console.print(
        f"torch {torch.__version__}, Python {platform.python_version()}, {args.threads} threads, {platform.machine()}"
    )
    build_layer(nn.Linear(64, 64), 4)
    table = Table("work", "sao_prune", "orthogonal_", "ratio", "target")
    rows = [*layer_rows(args.repeats), *model_rows(args.repeats)]
    for name, result, target in rows:
        ratio = result["orthogonal_"] / result["sao"]
        table.add_row(
            name,
            *(f"{1e3 * result[side]:.1f} ms" for side in ("sao", "orthogonal_")),
            f"{ratio:.0f}x",
            f">= {target:.0f}x",
        )
    console.print(table)
    growth = growth_rows(args.repeats)
    table = Table("groups", "non-zeros", "draw", "ns a non-zero", title="4096 x 4096: topology and values alone")
    for groups, nnz, seconds in growth:
        table.add_row(str(groups), f"{nnz:,}", f"{1e3 * seconds:.2f} ms", f"{1e9 * seconds / nnz:.1f}")
    console.print(table)
    if args.output:
        numbers = {"torch": torch.__version__, "threads": args.threads, "rows": rows, "growth": growth}
        args.output.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
