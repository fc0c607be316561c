"""Which weight alone reads another one's outputs, channel by channel."""

from __future__ import annotations

from collections import Counter

from .branch import MAX_POOLS, ODD, PAIRED, POOLS, SAME, WEIGHTED
from .dataflow import Graph, Held, Node, Ref

_ELEMENTWISE = {
    *PAIRED, *ODD, *SAME, "batch_norm", "leaky_relu", "relu6", "elu", "selu", "celu", "mish", "sigmoid", "hardsigmoid",
    "threshold", "logsigmoid",
}  # fmt: skip
_SPATIAL = {*MAX_POOLS, *POOLS, "dropout2d", "dropout3d"} - {"mean"}


def feeds(graph: Graph) -> dict[str, str]:
    """Pairs of linear layers, or of convolutions, the second of which alone takes the first one's outputs.

    Between them are elementwise functions, dropout and batch norms, between convolutions pooling too: what treats every
    channel by itself. Each weight of a pair is used once in the graph.

    Args:
        graph: of a forward pass.

    Returns:
        For the full name of a weight that of the one which reads its outputs.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from sao_prune.discovery.dataflow import record
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4), nn.Softmax(-1), nn.Linear(4, 4))
        >>> feeds(record(net, torch.zeros(1, 4)))
        {'0.weight': '2.weight'}
    """
    times = Counter(name for node in graph.nodes for name in node.held)
    found = {}
    for node in graph.nodes:
        first, then = _weight(node), _consumer(graph, node)
        second = None if then is None else _weight(then)
        if first and second and first != second and times[first] == times[second] == 1:
            found[first] = second
    return found


def _weight(node: Node) -> str | None:
    held = node.argument(1, "weight") if node.op in WEIGHTED else None
    return held.name if isinstance(held, Held) else None


def _consumer(graph: Graph, node: Node) -> Node | None:
    """The layer of the same kind at the end of a chain of channelwise steps without a fork."""
    kind, steps = node.op, _ELEMENTWISE if node.op == "linear" else _ELEMENTWISE | _SPATIAL
    if kind not in WEIGHTED:
        return None
    while len(consumers := graph.consumers[node.index]) == 1:
        then = graph.nodes[consumers[0]]
        if then.argument(0, "input") != Ref(node.index):
            return None
        if then.op == kind:
            return then
        if then.op not in steps or (kind == "linear" and then.op == "batch_norm" and len(then.shape) > 2):
            return None
        node = then
    return None
