"""Measure every ratio that compact execution promises, in one run, and write RESULTS.md.

python benchmarks/run.py                         # all rows but those under torch.compile and those without tuning
python benchmarks/run.py --only compile --out benchmarks/RESULTS-compiled.md
python benchmarks/run.py --only untuned          # compact(model) by its rule alone: never slower than dense
python benchmarks/run.py --only linear,resnet18  # rows whose name contains one of these; nothing is written
SAO_PRUNE_NATIVE=0 python benchmarks/run.py --out benchmarks/RESULTS-no-compiler.md
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter

import layers
import memory
import models
import stacks
import torch
from timing import Row

from sao_prune.blocks.backends.cpu import SWITCH, is_switched_off, library
from sao_prune.lab.work import processor_name

_TIMED = {
    True: "Times are CPU times of the one thread, free of other work on the machine.",
    False: "Times are wall-clock times; the machine must be idle otherwise.",
}
RESULTS = Path(__file__).with_name("RESULTS.md")

BENCHMARKS: dict[str, Callable[[], Iterator[Row]]] = {
    "linear": layers.linear,
    "convolution": layers.convolution,
    "csr": layers.csr,
    "stack-1024": stacks.wide,
    "stack-256": stacks.narrow,
    "memory": memory.peak,
    "mlp-1000": stacks.thousand,
    **{f"train-{name}": partial(models.training, name) for name in models.MODELS},
    **{f"infer-{name}": partial(models.inference, name) for name in models.MODELS},
    **{f"untuned-train-{name}": partial(models.untuned, name, "train") for name in models.MODELS},
    **{f"untuned-infer-{name}": partial(models.untuned, name, "infer") for name in models.MODELS},
    **{f"compile-train-{name}": partial(models.compiled, name, "train") for name in models.MODELS},
    **{f"compile-infer-{name}": partial(models.compiled, name, "infer") for name in models.MODELS},
}


def main() -> None:
    """Run the chosen benchmarks and print their rows; write the file after a full run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="comma-separated parts of names: " + ", ".join(BENCHMARKS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="where to write the table (default: RESULTS.md after a full run)")
    options = parser.parse_args()
    wanted = [part for part in options.only.split(",") if part]
    whole = {n: b for n, b in BENCHMARKS.items() if not n.startswith(("compile-", "untuned-"))}
    chosen = {n: b for n, b in BENCHMARKS.items() if any(part in n for part in wanted)} if wanted else whole
    if not chosen:
        parser.error(f"--only {options.only} matches none of {', '.join(BENCHMARKS)}")
    start, lines = perf_counter(), []
    for name in chosen:
        # Each in a process of its own: the memory that another one left behind changes times by a tenth and more.
        with get_context("spawn").Pool(1) as fresh:
            rows = fresh.apply(_rows, (name, options.threads))
        for row in rows:
            lines.append(_line(name, row))
            print(lines[-1], flush=True)
    out = options.out or (None if wanted else RESULTS)
    if out is not None:
        out.write_text(_document(lines, perf_counter() - start, options.threads))


def _rows(name: str, threads: int) -> list[Row]:
    torch.set_num_threads(threads)
    return list(BENCHMARKS[name]())


def _line(name: str, row: Row) -> str:
    met = {None: "", True: "yes", False: "**no**"}[row.met]
    return f"| {name} | {row.work} | {row.against} | {row.target} | {row.measured} | {row.best} | {met} | {row.note} |"


def _document(lines: list[str], seconds: float, threads: int) -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "numpy", "sao-prune"))
    kernels = "native kernels" if library() else "no native kernels"
    prefix = f"{SWITCH}=0 " if is_switched_off() else ""
    return "\n".join(
        [
            "# Measured speed and memory",
            "",
            f"`{prefix}python {' '.join(sys.argv)}`, {date.today()}, {seconds / 60:.0f} minutes.",
            f"Python {platform.python_version()}, {versions}; {threads} threads; {processor_name()}; {kernels}.",
            "",
            _TIMED[threads == 1],
            "Each part runs in a process of its own. The ways of a row run in turn, twice each, and the second time",
            "counts. *ratio* is of the median times, *best* of the least times; times in the note are medians, the",
            "compared way first. Rows without a target are there for information. The ways of mlp-1000 run once, for",
            "an epoch.",
            "One row alone: `python benchmarks/run.py --only NAME`.",
            "",
            "| name | work | against | target | ratio | best | met | note |",
            "|---|---|---|---|---|---|---|---|",
            *lines,
            "",
        ]
    )


if __name__ == "__main__":
    main()
