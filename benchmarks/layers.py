"""One layer at a time: the block layer against the dense, the masked, the bare product and torch's CSR."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from timing import Row, at_least, at_most, race
from torch import Tensor, nn

import sao_prune
from sao_prune.blocks import BlockLinear
from sao_prune.topology import BlockTopology, interleaved, ramanujan

GROUPS = 32
WIDTH = 4096
BATCH = 256


def _step(run: Callable[[Tensor], Tensor], x: Tensor, leaves: list[Tensor], gradient: Tensor) -> Callable[[], object]:
    x = x.requires_grad_()
    return lambda: torch.autograd.grad(run(x), [x, *leaves], gradient)


def linear(repeats: int = 15) -> Iterator[Row]:
    """Linear 4096, batch 256, forward and backward."""
    torch.manual_seed(0)
    set_size = WIDTH // GROUPS
    dense = nn.Linear(WIDTH, WIDTH)
    masked = nn.Linear(WIDTH, WIDTH)
    torch.nn.utils.prune.custom_from_mask(masked, "weight", interleaved(WIDTH, WIDTH, GROUPS).mask())
    layers = {
        "interleaved": BlockLinear(interleaved(WIDTH, WIDTH, GROUPS)),
        "ramanujan": BlockLinear(ramanujan(WIDTH, WIDTH, GROUPS, torch.Generator().manual_seed(0))),
    }
    rows, columns = torch.randn(BATCH, WIDTH), torch.randn(WIDTH, BATCH).t()
    ways: dict[str, Callable[[], object]] = {
        "dense": _step(dense, rows.clone(), list(dense.parameters()), rows.clone()),
        "masked": _step(masked, rows.clone(), list(masked.parameters()), rows.clone()),
    }
    weight = torch.randn(GROUPS, set_size, set_size, requires_grad=True)
    for name, shape in (("features first", (set_size, BATCH)), ("batch first", (BATCH, set_size))):
        first = name == "features first"
        ways[f"bare, {name}"] = _step(
            (lambda x: torch.bmm(weight, x)) if first else (lambda x: torch.bmm(x, weight.mT)),
            torch.randn(GROUPS, *shape),
            [weight],
            torch.randn(GROUPS, *shape),
        )
    for name, layer in layers.items():
        # The bare product has no bias either.
        plain = BlockLinear(layer.topology, bias=False)
        ways[name] = _step(layer, columns.clone(), list(layer.parameters()), columns.clone())
        ways[f"{name}, no bias"] = _step(plain, columns.clone(), list(plain.parameters()), columns.clone())
        for bias, note in ((True, ""), (False, ", no bias")):
            tuned = _tuned(layer.topology, bias, rows)
            ways[f"{name}, rows{note}"] = _step(tuned, rows.clone(), list(tuned.parameters()), rows.clone())
    times = race(ways, repeats)
    bare = min(("bare, features first", "bare, batch first"), key=times.median)
    work = f"Linear {WIDTH}, batch {BATCH}, {GROUPS} blocks, forward+backward"
    for order, note in (("", "features first, as within a stack"), (", rows", "row-major input and output, as tuned")):
        for name, limit in (("interleaved", 1.25), ("ramanujan", 2.5)):
            first = not order
            label = f"{work}, {name}, {note}"
            yield at_least(label, "dense", 12 if first else None, times, "dense", name + order)
            yield at_least(label, "masked", 16 if first else None, times, "masked", name + order)
            yield at_most(f"{label}, no bias", bare, limit, times, f"{name}{order}, no bias", bare)


def _tuned(topology: BlockTopology, bias: bool, x: Tensor) -> nn.Linear:
    layer = nn.Linear(WIDTH, WIDTH, bias)
    torch.nn.utils.prune.custom_from_mask(layer, "weight", topology.mask())
    sao_prune.compact(layer, example_input=x, tune="train")
    return layer


def convolution(repeats: int = 15) -> Iterator[Row]:
    """Convolution 512 on 7 x 7 maps, batch 32, forward and backward."""
    torch.manual_seed(0)
    x = torch.randn(32, 512, 7, 7)
    dense = nn.Conv2d(512, 512, 3, padding=1)
    ways: dict[str, Callable[[], object]] = {"dense": _step(dense, x.clone(), list(dense.parameters()), x.clone())}
    chosen = {}
    for topology in ("interleaved", "ramanujan"):
        layer = nn.Conv2d(512, 512, 3, padding=1)
        sao_prune.prune.sao(layer, groups=GROUPS, seed=0, method=sao_prune.SAO(topology=topology))
        report = sao_prune.compact(layer, example_input=x, tune="train")
        y = x.contiguous(memory_format=torch.channels_last) if "last" in report.layers[0].execution else x
        ways[topology] = _step(layer, y.clone(), list(layer.parameters()), y.clone())
        chosen[topology] = report.layers[0].execution
    times = race(ways, repeats)
    for topology, execution in chosen.items():
        work = f"Conv 512, 7 x 7, 3 x 3, batch 32, {GROUPS} blocks, forward+backward, {topology}"
        yield at_least(work, "dense", 8, times, "dense", topology, execution)


def csr(repeats: int = 15) -> Iterator[Row]:
    """Linear 4096, inference, against torch.sparse CSR."""
    torch.manual_seed(0)
    x = torch.randn(BATCH, WIDTH)
    layers = {
        "interleaved": BlockLinear(interleaved(WIDTH, WIDTH, GROUPS), bias=False),
        "ramanujan": BlockLinear(ramanujan(WIDTH, WIDTH, GROUPS, torch.Generator().manual_seed(0)), bias=False),
    }
    with torch.no_grad():
        sparse = layers["interleaved"].weight.to_sparse_csr()
        transposed = x.t().contiguous()

    def without_gradients(run: Callable[[], Tensor]) -> Callable[[], object]:
        def infer() -> Tensor:
            with torch.no_grad():
                return run()

        return infer

    columns = transposed.t()
    stored = layers["interleaved"].blocks.detach()
    with torch.no_grad():
        diagonal = torch.block_diag(*stored).to_sparse_bsr(stored.shape[1:])
    sets = transposed.view(GROUPS, -1, BATCH)
    ways: dict[str, Callable[[], object]] = {
        "csr": without_gradients(lambda: sparse @ transposed),
        "csr, rows": without_gradients(lambda: nn.functional.linear(x, sparse)),
        "bsr": without_gradients(lambda: diagonal @ transposed),
        "bare": without_gradients(lambda: torch.bmm(stored, sets)),
    }
    for name, layer in layers.items():
        ways[name] = without_gradients(lambda layer=layer: layer(columns))
        ways[f"{name}, rows"] = without_gradients(lambda layer=layer: layer(x))
    times = race(ways, repeats)
    for order, note in (("", "features first for both"), (", rows", "row-major input and output for both")):
        for name in layers:
            work = f"Linear {WIDTH}, batch {BATCH}, {GROUPS} blocks, inference, {name}, {note}"
            yield at_least(work, "torch.sparse CSR", 5, times, "csr" + order, name + order)
    work = f"Linear {WIDTH}, batch {BATCH}, {GROUPS} blocks, inference, features first for both"
    yield at_least(f"{work}, the limit: the bare product", "torch.sparse CSR", None, times, "csr", "bare")
    label = "torch.sparse BSR of the blocks in a row, in which no channel has to move"
    yield at_least(f"{work}, interleaved", label, None, times, "bsr", "interleaved")
