"""SynFlow: keep the weights that carry most of the network's flow, without looking at any data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .._torch import tree_map
from ..allocation import Allocation
from .base import register
from .draw import Draw
from .flow import Flow, flow_network_
from .magnitude import keep_global
from .saliency import Saliency, check_count, check_scores, examples, seeded, unit_sums, working_copy


@register
@dataclass(frozen=True, eq=False)
class SynFlow(Saliency):
    """Iterative synaptic flow pruning (Tanaka, Kunin, Yamins and Ganguli, NeurIPS 2020).

    The score of a weight is its part ``|w| dR/d|w|`` of the flow ``R = 1^T |W_L| .. |W_1| 1``, the sum of outputs for
    an input of ones with every parameter made positive. Along a chain every layer's scores sum to ``R``, so that no
    layer is emptied before the others as long as the rounds are small: after round ``k`` of ``n`` the share
    ``density^(k/n)`` is left, and scores are taken anew.

    As the formula has it, biases count as zero and saturating activations are passed over; batch norm is in evaluation
    mode. Everything is in double precision, and where even that overflows the flow is rescaled from layer to layer.

    Attributes:
        rounds: how often scores are taken; 100 in the paper.
        inputs: examples in the shape of the model's inputs, of which only the shape is used; by default the shape is
            ``pretrained_cfg["input_size"]`` or, where the model starts with a linear layer, its width.

    Raises:
        TypeError: for inputs that are no tensors.
        ValueError: for a number of rounds below one.

    Example:
        >>> import torch, sao_prune
        >>> net = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(4)))
        >>> sao_prune.apply(net, sparsity=0.75, method="synflow").nnz
        32
    """

    name: ClassVar[str] = "synflow"

    rounds: int = 100
    inputs: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_count("rounds", self.rounds)
        if self.inputs is not None:
            examples("inputs", self.inputs)

    def draw_for(
        self, model: nn.Module, allocations: Sequence[Allocation], weights: Sequence[Tensor], seed: int
    ) -> list[Draw]:
        """Keep the units of highest score, in rounds.

        Raises:
            ValueError: if the shape of the inputs is unknown or wrong, if no flow reaches a layer, or if it leaves the
                range of double precision.
        """
        ones = _ones(model, self.inputs)
        copied, own = working_copy(model, allocations, weights, torch.float64)
        flow_network_(copied)
        total = sum(a.weight.numel for a in allocations)
        budget = round(sum(a.density * a.weight.numel for a in allocations))
        kept = [
            torch.ones(a.weight.parts, *a.weight.matrix, dtype=torch.bool, device=w.device)
            for a, w in zip(allocations, own)
        ]
        flow = Flow(copied, ones, own)
        with seeded(own, seed), torch.enable_grad():
            for step in range(1, self.rounds + 1):
                scores = [unit_sums(a, w.detach() * g) for a, w, g in zip(allocations, own, flow.gradients())]
                if step == 1:
                    check_scores(allocations, scores)
                share = (budget / total) ** (step / self.rounds)
                left = budget if step == self.rounds else max(round(total * share), budget)
                kept = keep_global(allocations, scores, left, kept)
                for allocation, weight, units in zip(allocations, own, kept):
                    _mask_(allocation, weight, units)
        return [Draw(a.weight, units=k) for a, k in zip(allocations, kept)]


@torch.no_grad()
def _mask_(allocation: Allocation, weight: Tensor, units: Tensor) -> None:
    kernel = (1,) * len(allocation.weight.kernel)
    allocation.weight.matrices(weight).mul_(units.view(*units.shape, *kernel))


def _ones(model: nn.Module, inputs: Any) -> Any:
    """One example of ones; integers, which name something, stay."""
    if inputs is not None:
        return tree_map(lambda t: torch.ones_like(t[:1]) if t.is_floating_point() else t[:1], inputs)
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    size = config.get("input_size") if isinstance(config, dict) else getattr(config, "input_size", None)
    if not size:
        layers = (m for m in model.modules() if any(p is not None for p in m._parameters.values()))
        first = next(layers, None)
        size = (first.in_features,) if isinstance(first, nn.Linear) else None
    if not size:
        raise ValueError(
            f"SynFlow does not know the input shape of {type(model).__name__}, which has no pretrained_cfg and starts "
            "with no linear layer: method=sao_prune.SynFlow(inputs=x), of which only the shape is used"
        )
    return torch.ones(1, *size)
