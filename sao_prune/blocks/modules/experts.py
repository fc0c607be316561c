"""The experts of a mixture, each of whose matrices is a block layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import is_plain
from .composite import BlockComposite, child_name


class BlockExperts(BlockComposite):
    """The experts of transformers' mixtures that hold ``gate_up_proj`` (or ``up_proj``) and ``down_proj`` as stacks.

    Those are the classes that run by one of the library's interchangeable implementations (``eager``,
    ``grouped_mm``, ``batched_mm``); this computes what they compute. Every matrix of every expert is a `BlockLinear`;
    biases, gate and activation are the dense layer's own. Made by `sao_prune.compact`.
    """

    num_experts: int
    has_gate: bool
    has_bias: bool
    has_post_expert_norm: bool
    is_transposed: bool

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor | None = None,
        top_k_weights: Tensor | None = None,
        **named: Any,
    ) -> Tensor:
        """Tokens ``(tokens, n)``, for each the experts chosen and their weights ``(tokens, k)``, to ``(tokens, n)``."""
        index = named.get("router_indices", top_k_index)
        weights = named.get("routing_weights", top_k_weights)
        assert index is not None
        assert weights is not None
        tokens, chosen = index.shape
        if is_plain(hidden_states):
            # How many tokens an expert gets is not known: each computes all of them.
            shares = ((weights * (index == e)).sum(-1, keepdim=True) for e in range(self.num_experts))
            results = sum(share * self._expert(e, hidden_states) for e, share in enumerate(shares))
            return results.to(hidden_states.dtype)  # type: ignore[union-attr]
        if not index.numel():
            return torch.zeros_like(hidden_states)
        # Sorted by expert, so that the tokens of each lie together.
        order = torch.argsort(index.flatten(), stable=True)
        counts = torch.bincount(index.flatten(), minlength=self.num_experts).tolist()
        pieces = hidden_states[order // chosen].split(counts)
        found = [self._expert(e, piece) for e, piece in enumerate(pieces[: self.num_experts]) if len(piece)]
        # What was sent to no expert comes last, with zeros.
        found += [piece.new_zeros(piece.shape) for piece in pieces[self.num_experts :]]
        results = torch.cat(found) * weights.flatten()[order].unsqueeze(-1)
        back = torch.argsort(order)
        return results[back].unflatten(0, (tokens, chosen)).sum(1).to(hidden_states.dtype)

    def _expert(self, expert: int, x: Tensor) -> Tensor:
        hidden = self._one("gate_up_proj" if self.has_gate else "up_proj", expert, x)
        kind: Any = self.__dict__["_dense_class"]
        # The dense class's own, which may clamp or interleave.
        hidden = kind._apply_gate(self, hidden) if self.has_gate else self.act_fn(hidden)  # type: ignore[operator]
        y = self._one("down_proj", expert, hidden)
        return self.post_expert_norm(y) if self.has_post_expert_norm else y  # type: ignore[operator,no-any-return]

    def _one(self, name: str, expert: int, x: Tensor) -> Tensor:
        bias: Any = getattr(self, f"{name}_bias")[expert] if self.has_bias else None
        children: Any = self._modules.get(child_name(name))
        if children is not None:
            y: Tensor = children[expert](x)
        else:
            weight: Any = self.dense_weight(name)
            y = x @ (weight[expert] if self.is_transposed else weight[expert].mT)
        return y if bias is None else y + bias
