"""Every support on the same footing: `python benchmarks/supports.py` writes the table of docs/properties.md.

Columns: connected components; gap to the Ramanujan bound by the thesis's and by the standard definition; layers until
everything is reached, and the fewest possible; isometry error (largest |singular value - 1|, and the root mean square
of the Gram matrix's error); values that are not zero; milliseconds to build mask and values; whether it runs compactly.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

from sao_prune import NotBlockStructuredError, analysis
from sao_prune.topology import BlockTopology, make_support, make_topology
from sao_prune.weights import approximate_isometry, givens_matrix, orthogonal_blocks

SIZES = (128, 256, 1024)
DENSITIES = (1 / 8, 1 / 32, 1 / 64)
NAMES = ("ramanujan", "interleaved", "expander", "radix", "product", "eoi")
DEPTH = 24


def build(name: str, size: int, density: float, place: int) -> tuple[Tensor, Callable[[], Tensor]]:
    """Mask of one layer, and a function that makes its values."""
    generator = torch.Generator().manual_seed(1000 * size + place)
    if name in ("ramanujan", "interleaved"):
        topology = make_topology(name, size, size, groups=round(1 / density), generator=generator)
        return topology.mask(), lambda: topology.scatter(orthogonal_blocks([topology], [generator])[0])
    if name == "eoi":
        matrix = givens_matrix(size, size, round(density * size * size), generator)
        return matrix != 0, lambda: matrix
    mask = make_support(name, size, size, density, place=place, generator=generator)
    steps = 200 if size < 1024 else 50
    return mask, lambda: approximate_isometry(mask, generator, iterations=steps).matrix


def compact(mask: Tensor) -> bool:
    try:
        BlockTopology.from_mask(mask)
    except NotBlockStructuredError:
        return False
    return True


def row(name: str, size: int, density: float) -> list[str]:
    times = []
    for _ in range(3):
        start = perf_counter()
        build(name, size, density, 0)
        times.append(perf_counter() - start)
    mask, values = build(name, size, density, 0)
    start = perf_counter()
    weight = values().double()
    took = median(times) + perf_counter() - start
    gap = analysis.ramanujan_gap(mask)
    depth = analysis.depth_to_full_reachability(build(name, size, density, place)[0] for place in range(DEPTH))
    singular = torch.linalg.svdvals(weight)
    gram = ((singular**2 - 1) ** 2).mean().sqrt()
    return [
        name,
        str(size),
        f"{100 * (1 - density):.4g}",
        str(analysis.component_count(mask)),
        f"{gap.distinct:+.2f}",
        f"{gap.standard:+.2f}",
        f"{depth if depth is not None else f'> {DEPTH}'} / {analysis.least_depth(size, round(density * size))}",
        f"{float((singular - 1).abs().max()):.1g}",
        f"{float(gram):.1g}",
        f"{100 * float((weight.abs() > 1e-3).sum() / mask.sum()):.0f}",
        f"{1e3 * took:.3g}",
        "yes" if compact(mask) else "no",
    ]


HEAD = [
    "support",
    "n",
    "sparsity %",
    "components",
    "gap (distinct)",
    "gap (standard)",
    "layers to reach all / least",
    "largest error",
    "r.m.s. error",
    "non-zero %",
    "build ms",
    "compact",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write the Markdown table here too")
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES)
    options = parser.parse_args()
    lines = ["| " + " | ".join(HEAD) + " |", "|" + " --- |" * len(HEAD)]
    print("\n".join(lines))
    for size in options.sizes:
        for density in DENSITIES:
            for name in NAMES:
                lines.append("| " + " | ".join(row(name, size, density)) + " |")
                print(lines[-1], flush=True)
    if options.out is not None:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
