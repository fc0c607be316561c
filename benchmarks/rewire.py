"""What a move of `Rewire` costs beside a training step: ``python benchmarks/rewire.py``.

One compact layer, SGD with momentum. *step* is a training step, *heard* one that also writes the dense gradient down,
*move* all of `Pruner.step` that moves inputs: scores, swaps and the rebuild; *rebuild* the blocks,
their momentum and the sets alone. Medians in milliseconds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median

import torch
from timing import clock
from torch import nn

import sao_prune
from sao_prune import sites
from sao_prune.blocks import BlockModule


def _layer(width: int, groups: int) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(width, width, bias=False))
    sao_prune.apply(model, groups=groups, seed=0, skip_first=False, skip_last=False)
    sao_prune.compact(model)
    return model


def _timed(times: list[float], run: Callable[[], object]) -> None:
    start = clock()
    run()
    times.append(1e3 * (clock() - start))


def measure(width: int, groups: int, batch: int, repeats: int) -> list[float]:
    """Milliseconds of a step, a step that is heard, a move and a rebuild."""
    model, x = _layer(width, groups), torch.randn(batch, width)
    over = sao_prune.Moves(steps=4 * repeats, every=2, until=1.0)
    pruner = sao_prune.schedule(model, sao_prune.Rewire(), over=over, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    found: dict[str, list[float]] = {name: [] for name in ("step", "heard", "move", "rebuild")}
    rebuild = sites._move_inputs
    sites._move_inputs = lambda *arguments: _timed(found["rebuild"], lambda: rebuild(*arguments))
    try:
        for _ in range(repeats):
            _timed(found["step"], step)
            pruner.step(optimizer)
            _timed(found["heard"], step)
            _timed(found["move"], lambda: pruner.step(optimizer))
    finally:
        sites._move_inputs = rebuild
    assert isinstance(model[0], BlockModule)
    return [median(times) for times in found.values()]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=11)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("| layer | blocks | step, ms | heard, ms | move, ms | rebuild, ms |\n|---|---:|---:|---:|---:|---:|")
    for width, groups in ((1024, 8), (1024, 32), (4096, 8), (4096, 32)):
        cells = (f"{ms:.1f}" for ms in measure(width, groups, 64, options.repeats))
        print(f"| {width} x {width} | {groups} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
