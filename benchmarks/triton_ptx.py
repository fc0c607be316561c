"""Registers, spills and shared memory of the Triton kernels, compiled without a GPU; ends with 1 if one spills.

python benchmarks/triton_ptx.py                           # every tile that a device would try, for sm_80 and sm_90
python benchmarks/triton_ptx.py --only 4096 --tiles 1     # some shapes, the most promising tiles alone
python benchmarks/triton_ptx.py --out benchmarks/TRITON.md
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch

from sao_prune.blocks.backends.triton.compiled import Resources, resources
from sao_prune.blocks.backends.triton.launch import (
    Arguments,
    Epilogue,
    Source,
    Window,
    product_arguments,
    weight_arguments,
)
from sao_prune.blocks.backends.triton.tables import side_of, table_of
from sao_prune.blocks.backends.triton.tiles import Tile, product_tiles, weight_tiles
from sao_prune.topology import BlockTopology, interleaved, ramanujan

GROUPS = 32
# Multiprocessors of the smallest of each kind that is in wide use.
PROCESSORS = {80: 108, 90: 132}


@dataclass(frozen=True)
class Shape:
    """``outputs x inputs`` channels, ``rows`` rows or pixels of ``side x side`` images, the activation that follows."""

    name: str
    inputs: int
    outputs: int
    rows: int
    activation: str = ""
    kernel: int = 1
    side: int = 1


SHAPES = [
    Shape("Linear 4096", 4096, 4096, 4096),
    Shape("Linear 4096, batch 256", 4096, 4096, 256),
    *(
        Shape(f"{model}, {layer}", width * a, width * b, 64 * 197, "gelu" if layer == "fc1" else "")
        for model, width in (("vit_small", 384), ("vit_base", 768))
        for layer, a, b in (("qkv", 1, 3), ("proj", 1, 1), ("fc1", 1, 4), ("fc2", 4, 1))
    ),
    Shape("Conv 512, 7 x 7", 512, 512, 32 * 49, "relu", 3, 7),
]


def kernels(shape: Shape, topology: BlockTopology) -> Iterator[tuple[str, str, Arguments]]:
    """The passes of a layer: their names, kernels and arguments, without memory behind them."""

    def empty(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    n, m, g = shape.inputs, shape.outputs, topology.groups
    ins = side_of(table_of(topology.col_set, g), g, n)
    outs = side_of(table_of(topology.row_set, g), g, m)
    conv = shape.kernel > 1
    images = shape.rows // shape.side**2
    if conv:
        size = (images, shape.side, shape.side)
        x, y = (empty(*size, channels).permute(0, 3, 1, 2) for channels in (n, m))
        weight = empty(g, m // g, n // g, shape.kernel, shape.kernel)
        window = Window((shape.kernel,) * 2, padding=(shape.kernel // 2,) * 2)
    else:
        x, y, weight, window = empty(shape.rows, n), empty(shape.rows, m), empty(g, m // g, n // g), Window()
    kept = y if shape.activation == "gelu" else None
    derivative = {"": "", "gelu": "kept"}.get(shape.activation, shape.activation)
    after = Epilogue(empty(m), shape.activation, kept)
    grad = Source(y, y if derivative else None, derivative)
    yield "forward", "product", product_arguments(Source(x), weight, y, ins, outs, window, after, False)
    yield "input gradient", "product", product_arguments(grad, weight, x, outs, ins, window, Epilogue(), True)
    sums = empty(*weight.shape, dtype=torch.float32), empty(m, dtype=torch.float32)
    yield "weight gradient", "weight_gradient", weight_arguments(Source(x), grad, *sums, ins, outs, window)


def tried(kernel: str, arguments: Arguments, capability: int) -> list[Tile]:
    """The tiles that a device of this kind would time."""
    work = replace(arguments[2], processors=PROCESSORS[capability])
    return product_tiles(work) if kernel == "product" else weight_tiles(work)


def as_launched(kernel: str, arguments: Arguments, tile: Tile, capability: int) -> Resources:
    """What a tile needs; as on a device, all registers are there for one that spills."""
    found = resources(kernel, arguments, tile, capability)
    return resources(kernel, arguments, tile.roomy, capability) if found.spills else found


def row(shape: Shape, kind: str, name: str, capability: int, found: list[tuple[Tile, Resources]]) -> str:
    """A line of the table: the most promising tile, and the largest of all."""
    tile, first = found[0]
    sizes = f"{tile.BM} x {tile.BR} x {tile.BC}, {tile.Q} x {tile.P}, {tile.warps}"
    most = [max(getattr(r, what) for _, r in found) for what in ("registers", "spills", "shared")]
    return (
        f"| {shape.name} | {kind} | {name} | {capability} | {sizes} | {first.instruction} | {first.registers} | "
        f"{first.spills} | {first.shared} | {len(found)} | {most[0]} | {most[1]} | {most[2]} |"
    )


HEAD = [
    "| layer | topology | pass | sm | rows x outputs x inputs, products x groups, warps | by | registers | spills | "
    "shared | tiles | registers | spills | shared |",
    "|---|---|---|---:|---|---|---:|---:|---:|---:|---:|---:|---:|",
]


def main() -> None:
    """Print the table as it is made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of a layer's name")
    parser.add_argument("--topology", default="", help="interleaved or ramanujan (default: both)")
    parser.add_argument("--sm", type=int, choices=sorted(PROCESSORS), help="one kind of device alone")
    parser.add_argument("--tiles", type=int, default=100, help="compile only this many tiles of each pass")
    parser.add_argument("--verbose", action="store_true", help="print each tile that spills")
    parser.add_argument("--out", type=Path, help="write the table to this file as well")
    options = parser.parse_args()
    generators = {
        "interleaved": lambda m, n: interleaved(m, n, GROUPS),
        "ramanujan": lambda m, n: ramanujan(m, n, GROUPS, torch.Generator().manual_seed(0)),
    }
    lines, spilled = [], 0
    print(*HEAD, sep="\n")
    for shape in SHAPES:
        for kind, make in generators.items():
            if options.only not in shape.name or options.topology not in kind:
                continue
            for name, kernel, arguments in kernels(shape, make(shape.outputs, shape.inputs)):
                for capability in [options.sm] if options.sm else sorted(PROCESSORS):
                    tiles = tried(kernel, arguments, capability)[: options.tiles]
                    found = [(tile, as_launched(kernel, arguments, tile, capability)) for tile in tiles]
                    lines.append(row(shape, kind, name, capability, found))
                    print(lines[-1], flush=True)
                    for tile, one in found:
                        spilled += one.spills > 0
                        if one.spills and options.verbose:
                            print(f"    {tile} {one}", flush=True)
    print(f"{spilled} kernels spill registers")
    if options.out:
        options.out.write_text(document(lines, spilled))
    sys.exit(spilled > 0)


def document(lines: list[str], spilled: int) -> str:
    """The table with its heading."""
    return "\n".join(
        [
            "# What the Triton kernels need of a GPU",
            "",
            f"`python {' '.join(sys.argv)}`, Triton {version('triton')}, without a GPU: bfloat16, {GROUPS} blocks.",
            "",
            "Registers are a thread's, of 255; spills are bytes a thread stores to and loads from memory for want of",
            "registers; shared memory is bytes a program. The first group of columns is of the tile that the model of",
            "costs puts first, the second the largest of all the tiles that a device times. A tile for which the",
            "assembler would rather spill, to run more programs at once, is compiled with all registers allowed, here",
            "as on a device. No number here says how fast a kernel is.",
            "",
            *HEAD,
            *lines,
            "",
            f"{spilled} kernels spill registers.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
