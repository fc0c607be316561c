"""Multiply-adds of a network, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of one image.

    Attributes:
        total: of the whole network.
        layers: by module; what attention and other products without a weight cost is in the total only.
    """

    total: int
    layers: Mapping[str, int]

    def after(self, sparsity: Mapping[str, float]) -> int:
        """What is left when layers lose this share of their weights.

        Args:
            sparsity: by full parameter name.
        """
        saved = sum(share * self.layers.get(name.rpartition(".")[0], 0) for name, share in sparsity.items())
        return self.total - round(saved)


def multiply_adds(model: nn.Module, image_shape: Sequence[int]) -> Cost:
    """Count the multiply-adds of one image in the dense network, by torch's own counter; the model is left alone.

    Example:
        >>> cost = multiply_adds(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)), (8,))
        >>> cost.total, cost.after({"0.weight": 0.75})
        (40, 16)
    """
    # On the meta device nothing is computed; a deep copy there needs no memory for weights.
    with torch.device("meta"):
        copy = deepcopy(model).to("meta").eval()
        image = torch.empty(1, *image_shape)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy(image)
    counts = {name: sum(ops.values()) // 2 for name, ops in counter.get_flop_counts().items()}
    root = type(copy).__name__
    layers = {name.removeprefix(f"{root}."): count for name, count in counts.items() if name.startswith(f"{root}.")}
    return Cost(counts.get("Global", 0), layers)
