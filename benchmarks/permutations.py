"""Ways to permute channels and to multiply blocks, each beside the plain copy or the product it could at best be.

`python benchmarks/permutations.py` prints milliseconds: what `sao_prune.blocks.permutation` and
`sao_prune.blocks.backends.torch` choose from these.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from timing import race

from sao_prune.blocks.permutation import Permutation

GROUPS = 32
SIZES = {"vit_small rows": (1576, 384), "vit_small hidden": (1576, 1536), "mixer_b16 rows": (784, 768)}
PRODUCTS = {"vit_small fc1": (1576, 384, 1536), "vit_small fc2": (1576, 1536, 384), "mixer_b16 fc2": (784, 3072, 768)}


def permutations(rows: int, channels: int) -> dict[str, Callable[[], object]]:
    """Permute by the interleaved order of 32 sets along the contiguous dimension."""
    x = torch.randn(rows, channels)
    index = torch.arange(channels).view(-1, GROUPS).t().flatten()
    order = Permutation.of(index, index.argsort())
    return {
        "copy": lambda: x.clone(),
        "shuffle (used)": lambda: order.rows(x),
        "index_select": lambda: x.index_select(1, index),
        "gather": lambda: x.gather(1, index.expand(rows, -1)),
        "view, transpose, copy": lambda: x.view(rows, -1, GROUPS).transpose(1, 2).contiguous(),
        "advanced index": lambda: x[:, index],
    }


def products(batch: int, inputs: int, outputs: int) -> dict[str, Callable[[], object]]:
    """Multiply 32 blocks: from and to rows or columns (column-major)."""
    weight = torch.randn(GROUPS, outputs // GROUPS, inputs // GROUPS)
    rows = torch.randn(batch, inputs).view(batch, GROUPS, -1).permute(1, 2, 0)
    columns = torch.randn(inputs, batch).view(-1, GROUPS, batch).transpose(0, 1)
    dense, x = torch.randn(outputs, inputs), torch.randn(batch, inputs)
    y = torch.empty(batch, outputs).view(batch, GROUPS, -1)
    z = torch.empty(GROUPS, outputs // GROUPS, batch)
    return {
        "dense": lambda: x @ dense.t(),
        "rows to rows": lambda: torch.bmm(rows.mT, weight.mT, out=y.transpose(0, 1)),
        "rows to columns": lambda: torch.bmm(weight, rows, out=z),
        "columns to columns": lambda: torch.bmm(weight, columns, out=z),
        "columns to rows": lambda: torch.bmm(columns.mT, weight.mT, out=y.transpose(0, 1)),
        "columns to rows, by a copy (used)": lambda: y.copy_(torch.bmm(columns.mT, weight.mT).transpose(0, 1)),
    }


def main() -> None:
    """Both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    torch.set_num_threads(parser.parse_args().threads)
    torch.manual_seed(0)
    for make, sizes in ((permutations, SIZES), (products, PRODUCTS)):
        for name, size in sizes.items():
            ways = make(*size)
            times = race(ways, 30, warm_up=3)
            print(f"\n{make.__name__}, {name}, {' x '.join(map(str, size))}")
            for way in ways:
                print(f"  {way:36}{1e3 * times.median(way):8.3f} ms")


if __name__ == "__main__":
    main()
