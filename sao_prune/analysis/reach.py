"""Which inputs of a layer reach which outputs of a later one, through the masks between them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice, repeat
from math import ceil, log
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..topology import BlockTopology
from .masks import MaskLike, as_dense
from .operators import frozen


def reachability(
    masks: Sequence[MaskLike] | nn.Module, i: int = 0, j: int | None = None, example_input: Any = None
) -> Tensor:
    """Which inputs of layer ``i`` reach which outputs of layer ``j``.

    Thesis section 3.5.1.2; its pictures show the transpose.

    Args:
        masks: one a layer, first layer first; or a sparse model, whose sparse layers are chained.
        i: first layer, counted from 0.
        j: last layer, included; ``None`` for the last one of all.
        example_input: for a model: what to run it on, so that its layers come in the order of execution; without it
            they come in the order of registration.

    Returns:
        Boolean matrix, shape ``(outputs of j, inputs of i)``.

    Raises:
        ValueError: if the layers do not follow one another, or ``i`` and ``j`` are not layers.

    Example:
        >>> import torch
        >>> from sao_prune.topology import interleaved
        >>> t = interleaved(4, 4, 2)
        >>> reachability([t, t]).all().item()
        True
    """
    layers = model_masks(masks, example_input) if isinstance(masks, nn.Module) else list(masks)
    last = len(layers) - 1 if j is None else j
    if not 0 <= i <= last < len(layers):
        raise ValueError(f"layers are numbered 0 .. {len(layers) - 1}, got i={i}, j={j}")
    reached = as_dense(layers[i])
    for number in range(i + 1, last + 1):
        reached = _extend(reached, as_dense(layers[number]), number)
    return reached


def depth_to_full_reachability(masks: MaskLike | Iterable[MaskLike] | nn.Module, max_depth: int = 1000) -> int | None:
    """How many layers it takes until every input reaches every output; ``None`` if that never happens.

    Args:
        masks: one a layer, any iterable, read no further than needed; or a pruned model; or a single square mask,
            which is then every layer's.
        max_depth: where to stop looking.

    Returns:
        The number of layers, or ``None``.

    Example:
        >>> from sao_prune.topology import interleaved
        >>> depth_to_full_reachability(interleaved(128, 128, 32))
        4
    """
    if isinstance(masks, nn.Module):
        masks = model_masks(masks)
    layers = repeat(masks) if isinstance(masks, (Tensor, BlockTopology)) else masks
    seen: set[bytes] = set()
    reached: Tensor | None = None
    for depth, mask in enumerate(islice(layers, max_depth), start=1):
        dense = as_dense(mask)
        reached = dense if reached is None else _extend(reached, dense, depth - 1)
        if bool(reached.all()):
            return depth
        if layers is not masks:
            state = np.packbits(reached.numpy()).tobytes()
            if state in seen:
                return None
            seen.add(state)
    return None


def least_depth(nodes: int, degree: int) -> int | None:
    """The fewest layers in which ``degree`` inputs an output can reach ``nodes`` nodes, ``ceil(log_degree nodes)``.

    Args:
        nodes: of every layer.
        degree: inputs that each output sees.

    Returns:
        The number of layers; ``None`` if a degree of one never gets there.

    Example:
        >>> least_depth(128, 4), least_depth(125, 5), least_depth(8, 1)
        (4, 3, None)
    """
    if nodes <= 1:
        return 1
    if degree <= 1:
        return None
    depth = max(1, ceil(log(nodes) / log(degree)) - 1)
    while degree**depth < nodes:
        depth += 1
    return depth


def model_masks(model: nn.Module, example_input: Any = None) -> list[Tensor]:
    """The masks of a sparse model, ``(outputs, inputs)`` each: pruned, compact and ECO layers; dense ones are left out.

    Args:
        model: the model.
        example_input: a tensor, or a tuple or dict of arguments, to run once so that the masks come in the order of
            execution; without it they come in the order of registration.

    Raises:
        ValueError: if no layer of the model is sparse.
    """
    found: dict[nn.Module, Tensor] = {}
    for module in model.modules():
        mask, topology = module._buffers.get("weight_mask"), getattr(module, "topology", None)
        if mask is not None and mask.dim() >= 2:
            found[module] = as_dense(mask)
        elif isinstance(topology, BlockTopology):
            found[module] = topology.mask()
    if not found:
        raise ValueError("no layer of the model is sparse; prune it first (sao_prune.apply)")
    return [found[m] for m in (found if example_input is None else _execution_order(model, found, example_input))]


def _execution_order(model: nn.Module, modules: Iterable[nn.Module], example_input: Any) -> list[nn.Module]:
    order: dict[nn.Module, None] = {}
    handles = [m.register_forward_pre_hook(lambda module, inputs: order.setdefault(module)) for m in modules]
    try:
        with frozen(model), torch.no_grad():
            if isinstance(example_input, dict):
                model(**example_input)
            else:
                model(*(example_input if isinstance(example_input, tuple) else (example_input,)))
    finally:
        for handle in handles:
            handle.remove()
    return list(order)


def _extend(reached: Tensor, mask: Tensor, number: int) -> Tensor:
    outputs, inputs = reached.shape[0], mask.shape[1]
    if inputs != outputs:
        # A flattened feature map: each channel becomes a run of neighbouring inputs.
        if inputs % outputs:
            raise ValueError(
                f"layer {number} has {inputs} inputs, but the layer before it has {outputs} outputs: give the masks "
                "of one chain, first layer first, each (outputs, inputs)"
            )
        reached = reached.repeat_interleave(inputs // outputs, 0)
    return (mask.float() @ reached.float()) > 0
