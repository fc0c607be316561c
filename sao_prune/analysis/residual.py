"""Extreme singular values of residual blocks and of the network that they make up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import tree_leaves, tree_map
from ..algorithms import ResidualRecord
from ..discovery.dataflow import Graph, Values
from ..discovery.residual import ResidualBlock, find_residuals
from ..seeds import named_generator
from .spectra import jacobian_spectrum

Extremes = tuple[float, float]

#: A network whose singular values differ from 1 by less is called exact.
EXACT = 1e-4


def with_spectra(
    records: tuple[ResidualRecord, ...], model: nn.Module, example_input: Any, after: Mapping[str, Tensor]
) -> tuple[ResidualRecord, ...]:
    """Records of residual blocks with their extreme singular values before and after, and one of the whole network.

    Measured in evaluation mode at the first example. A block that ends in a ReLU is measured between the signals
    whose mirrored halves its channels are, ``h`` with ``x = [relu(h), relu(-h)]``, at a random ``h``. Exact for
    Jacobians of up to 512 rows or columns, Lanczos's extreme values above; they are then never too far out.

    Args:
        records: one for each block that `find_residuals` finds, in its order.
        model: as it is.
        example_input: a batch.
        after: parameters and buffers by name as they will be.
    """
    single = tree_map(lambda leaf: leaf[:1] if isinstance(leaf, Tensor) else leaf, example_input)
    found = find_residuals(model, single)
    before = {name: t.detach() for name, t in (*model.named_buffers(), *model.named_parameters())}
    out = []
    signals = [_signals(found.graph, values) for values in (before, after)]
    for block, record in zip(found.blocks, records):
        pair = [_block_extremes(found.graph, block, v, s) for v, s in zip((before, after), signals)]
        out.append(replace(record, before=pair[0], after=pair[1]))
    whole = [_network_extremes(found.graph, values) for values in (before, after)]
    exact = whole[1] is not None and all(abs(value - 1) < EXACT for value in whole[1])
    note = "" if exact else "from its input to its output, first and last layer and pooling included"
    return (*out, ResidualRecord("", "exact" if exact else "near", note, whole[0], whole[1]))


def _signals(graph: Graph, values: Values) -> dict[int, Tensor]:
    """The input of every node of the graph at its recorded inputs."""
    with torch.no_grad():
        return {node.index: out for node, out in graph.run(values) if isinstance(out, Tensor)}


def _block_extremes(
    graph: Graph, block: ResidualBlock, values: Values, signals: Mapping[int, Tensor]
) -> Extremes | None:
    """Smallest and largest singular value of one block's Jacobian; see `with_spectra`.

    Args:
        graph: of a forward pass with one example.
        block: one of its blocks.
        values: parameters and buffers by name.
        signals: inputs of the graph's nodes.

    Example:
        >>> import timm, sao_prune.models
        >>> model = timm.create_model("sao_resnet", depth=8, norm="none", img_size=8)
        >>> report = sao_prune.apply(model, groups=2, method=sao_prune.SAO(residual="isometric"), seed=0)
        >>> sao_prune.remove(model).title
        'baked'
        >>> found, values = find_residuals(model), {n: p.detach() for n, p in model.named_parameters()}
        >>> low, high = _block_extremes(found.graph, found.blocks[0], values, _signals(found.graph, values))
        >>> abs(low - 1) < 1e-5, abs(high - 1) < 1e-5
        (True, True)
    """
    x = signals.get(block.start)
    if x is None or not x.is_floating_point():
        return None

    def run(start: Tensor) -> Tensor:
        return _last(graph, values, {block.start: start}, block.stop)

    if block.kind == "plain":
        return _extremes(run, x)
    axis = 1 if block.layers and len(graph.shapes[block.layers[0].weight]) > 2 else -1
    if x.shape[axis] % 2:
        return None
    shape = list(x.shape)
    shape[axis] //= 2
    h = torch.randn(shape, generator=named_generator(0, "signals"), device="cpu").to(x)

    def mirrored(signal: Tensor) -> Tensor:
        first, second = run(torch.cat([signal.relu(), (-signal).relu()], axis)).chunk(2, axis)
        return first - second

    return _extremes(mirrored, h)


def _last(graph: Graph, values: Values, start: Mapping[int, Tensor], stop: int | None = None) -> Tensor:
    """What the last node gives, its first tensor."""
    *_, (_, out) = graph.run(values, start, stop)
    return next(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))


def _network_extremes(graph: Graph, values: Values) -> Extremes | None:
    if len(graph.inputs) != 1 or not graph.inputs[0].is_floating_point():
        return None

    def run(x: Tensor) -> Tensor:
        return _last(graph, values, {0: x})

    return _extremes(run, graph.inputs[0])


def _extremes(function: Callable[[Tensor], Tensor], x: Tensor) -> Extremes | None:
    try:
        with torch.enable_grad():
            spectrum = jacobian_spectrum(function, x)
    except (RuntimeError, ValueError):
        # A layer that cannot be differentiated twice, or an output that does not depend on the input.
        return None
    return spectrum.smallest, spectrum.largest
