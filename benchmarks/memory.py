"""Peak memory of a training step with Adam, each form in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from timing import Row

WIDTH, DEPTH, BATCH = 4096, 8, 64


def peak() -> Iterator[Row]:
    """4096-wide MLP: dense, masked, and compact from the start."""
    peaks = {}
    for form in ("dense", "masked", "compact"):
        command = [sys.executable, str(Path(__file__)), form]
        peaks[form] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    for other, target in (("dense", "<= 1/8"), ("masked", "")):
        ratio = peaks[other] / peaks["compact"]
        yield Row(
            f"peak memory, training step with Adam, {DEPTH} x {WIDTH}, batch {BATCH}, 32 blocks, form='compact'",
            other,
            target,
            f"1/{ratio:.1f}",
            met=ratio >= 8 if target else None,
            note=f"{peaks[other]:.0f} MiB / {peaks['compact']:.0f} MiB over the process before the model",
        )


def _measure(form: str) -> float:
    """MiB by which building a model and one step raise the process's peak memory."""
    import torch
    from torch import nn

    import sao_prune

    # The first step of anything loads libraries and starts threads: do it before the measurement.
    torch.optim.Adam([nn.Parameter(torch.ones(8))]).step()
    warm = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    sao_prune.apply(warm, groups=4, form="compact", seed=0)
    torch.optim.Adam(warm.parameters()).step()
    warm(torch.ones(2, 64)).sum().backward()
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak counts anew from here
    before = _kilobytes("VmRSS")
    device = "meta" if form == "compact" else "cpu"
    with torch.device(device):
        layers = [m for _ in range(DEPTH) for m in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
        model = nn.Sequential(*layers, nn.Linear(WIDTH, 10))
    if form != "dense":
        method = sao_prune.SAO(topology="interleaved")
        sao_prune.apply(model, groups=32, skip_first=False, method=method, seed=0, form=form)
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(BATCH, WIDTH)), torch.randint(10, (BATCH,))).backward()
        optimizer.step()
    return (_kilobytes("VmHWM") - before) / 1024


def _kilobytes(field: str) -> int:
    """A memory counter of this process: ``VmRSS``, what it holds now, or ``VmHWM``, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


if __name__ == "__main__":
    print(_measure(sys.argv[1]))
