"""Multiply-adds of a network, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of one input.

    Attributes:
        total: of the whole network.
        weights: by full parameter name; what attention and other products without a weight cost is in the total only.
    """

    total: int
    weights: Mapping[str, float]

    def after(self, sparsity: Mapping[str, float]) -> int:
        """What is left when layers lose this share of their weights.

        Args:
            sparsity: by full parameter name.
        """
        saved = sum(share * self.weights.get(name, 0) for name, share in sparsity.items())
        return self.total - round(saved)


def multiply_adds(model: nn.Module, example: Tensor) -> Cost:
    """Count the multiply-adds of one input in the dense network, by torch's own counter; the model is not touched.

    Args:
        model: dense.
        example: a batch of one input; its values do not matter.

    Returns:
        The whole network's, and every weight's. Those of a module with several weights, as recurrent layers have them,
        are shared among them by size, which is exact where each is multiplied with as many vectors as the others.

    Example:
        >>> cost = multiply_adds(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)), torch.zeros(1, 8))
        >>> cost.total, cost.after({"0.weight": 0.75})
        (40, 16)
    """
    # On the meta device nothing is computed; a deep copy there needs no memory for weights.
    with torch.device("meta"):
        copy = deepcopy(model).to("meta").eval()
        nothing = torch.empty(example.shape, dtype=example.dtype)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy(nothing)
    counts = {name: sum(ops.values()) // 2 for name, ops in counter.get_flop_counts().items()}
    root = type(copy).__name__
    layers = {name.removeprefix(f"{root}."): count for name, count in counts.items() if name.startswith(f"{root}.")}
    weights: dict[str, float] = {}
    for name, module in copy.named_modules():
        own = {key: p.numel() for key, p in module.named_parameters(name, recurse=False) if p.dim() > 1}
        weights.update({key: layers.get(name, 0) * size / sum(own.values()) for key, size in own.items()})
    return Cost(counts.get("Global", 0), weights)
