"""Values for what stands between sparse layers: norms that start as the identity, dense layers with mirrored sides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..discovery.dataflow import Graph, Held, Node, Values
from ..weights import Mirror


def identity_norms(graph: Graph, values: Values, layer_norms: set[str]) -> dict[str, Tensor]:
    """Parameters and statistics with which norms give the recorded batch back, found one after another.

    A batch norm with ``weight = std`` and ``bias = mean`` of every channel is the identity on that batch, in training
    and in evaluation. A layer norm gets the mean scale of its inputs, so that it only centres and evens out.

    Args:
        graph: a forward pass on the calibration batch.
        values: parameters and buffers by name, those of the model as it will be.
        layer_norms: paths of the layer norms to set; batch norms are set wherever they are.

    Returns:
        New values by name.

    Raises:
        ValueError: if a norm gets values that are not finite.
    """
    found: dict[str, Tensor] = {}

    def override(node: Node, tensors: tuple[Any, ...], held: Values) -> Mapping[str, Tensor]:
        if node.op == "batch_norm":
            new = _batch_norm(node, tensors[0], held)
        elif node.op == "layer_norm" and node.held and node.held[0].rpartition(".")[0] in layer_norms:
            new = _layer_norm(node, tensors[0], held)
        else:
            return {}
        for name, value in new.items():
            if not bool(value.isfinite().all()):
                raise ValueError(f"{name} would not be finite on the example input: is the batch valid?")
        found.update(new)
        return new

    with torch.no_grad():
        for _ in graph.run(values, override=override):
            pass
    return found


def _batch_norm(node: Node, x: Tensor, held: Values) -> dict[str, Tensor]:
    """Of a call of `torch.nn.functional.batch_norm`."""
    weight, bias = _name(node, 3, "weight"), _name(node, 4, "bias")
    if weight is None or bias is None:
        return {}
    variance, mean = torch.var_mean(x, [d for d in range(x.dim()) if d != 1], correction=0)
    new = {weight: (variance + node.argument(7, "eps", 1e-5)).sqrt(), bias: mean}
    for name, value in ((_name(node, 1, "running_mean"), mean), (_name(node, 2, "running_var"), variance)):
        if name is not None:
            new[name] = value
    return {name: value.to(held[name]) for name, value in new.items()}


def _layer_norm(node: Node, x: Tensor, held: Values) -> dict[str, Tensor]:
    """Of a call of `torch.nn.functional.layer_norm`."""
    weight, bias = _name(node, 2, "weight"), _name(node, 3, "bias")
    over = list(range(-len(node.argument(1, "normalized_shape")), 0))
    variance, mean = torch.var_mean(x, over, correction=0)
    new: dict[str, Tensor] = {}
    if weight is not None:
        new[weight] = torch.full_like(held[weight], float(variance.mean().sqrt()))
    if bias is not None:
        new[bias] = torch.full_like(held[bias], float(mean.mean()))
    return new


def _name(node: Node, position: int, keyword: str) -> str | None:
    given = node.argument(position, keyword)
    return given.name if isinstance(given, Held) else None


def mirrored_polar(weight: Tensor, mirror: Mirror) -> Tensor:
    """A dense weight made looks-linear: the orthogonal factor of its first half, mirrored along the given sides.

    Args:
        weight: shape ``(m, n, *kernel)``; its own values are kept as far as an orthogonal matrix can.
        mirror: which sides meet mirrored channels.

    Example:
        >>> mirrored_polar(torch.tensor([[3.0], [1.0]]), Mirror.ENTRY).tolist()
        [[1.0], [-1.0]]
    """
    rows, cols = mirror.half(weight.shape[0], weight.shape[1])
    half = weight[:rows, :cols].float()
    left, values, right = torch.linalg.svd(half.flatten(1), full_matrices=False)
    # Directions in which the half is zero, as off the centre tap of a delta kernel, stay zero.
    alive = (values > values.max() * 1e-5).to(left)
    factor = ((left * alive) @ right).view(half.shape)
    for dim in [d for d, doubled in enumerate(mirror.value) if doubled]:
        factor = torch.cat([factor, -factor], dim)
    return factor.to(weight)
