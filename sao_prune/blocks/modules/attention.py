"""Multi-head attention whose projections are block layers."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional as F

from ..._torch import without_subclasses
from .composite import BlockComposite


class DenseView(Tensor):
    """A dense weight for those who read it without calling the layer; whatever is computed from it is a plain tensor.

    torch's fused transformer layers leave a layer alone whose weights are tensors of another class.
    """

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Computes as for a plain tensor."""
        with without_subclasses():
            return func(*args, **kwargs or {})


class BlockAttention(BlockComposite):
    """`torch.nn.MultiheadAttention` with block weights; made by `sao_prune.compact`.

    Query, key and value are projected by a block layer each: ``in_proj`` is the list of them where the dense layer has
    one stacked weight, else they are ``q_proj``, ``k_proj`` and ``v_proj``. The biases are the dense layer's own.
    Without ``need_weights`` it computes by `torch.nn.functional.scaled_dot_product_attention`.
    """

    embed_dim: int
    num_heads: int
    head_dim: int
    dropout: float
    batch_first: bool
    add_zero_attn: bool
    in_proj_bias: Tensor | None
    bias_k: Tensor | None
    bias_v: Tensor | None
    out_proj: nn.Module

    # As of a layer with three separate projections: by that, `torch.nn.TransformerEncoderLayer` calls this layer
    # where it would else compute with the weights itself.
    _qkv_same_embed_dim = property(lambda self: False)

    @property
    def in_proj_weight(self) -> Tensor | None:
        """The dense weight of the three projections, zeros included; ``None`` where they are separate."""
        children = self._modules.get("in_proj")
        if children is not None:
            weight = torch.cat([layer.dense(layer.stored()) for layer in children])  # type: ignore[attr-defined,misc]
        else:
            weight = self.dense_weight("in_proj_weight")  # type: ignore[assignment]
        return weight if weight is None or torch.compiler.is_compiling() else weight.as_subclass(DenseView)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As that of `torch.nn.MultiheadAttention`.

        Raises:
            RuntimeError: for inputs that do not fit each other, or ``is_causal`` without a mask.
        """
        if isinstance(query, Proxy):
            masks = key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            return self.step(query, key, value, *masks)  # type: ignore[no-any-return]
        if query.is_nested or key.is_nested or value.is_nested:
            raise RuntimeError(
                "block attention takes no nested tensors: pad them (nn.TransformerEncoder makes them of a padding mask "
                "unless it has enable_nested_tensor=False)"
            )
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        batched = query.dim() == 3
        first = batched and self.batch_first
        self._check(query, key, value)
        q, k, v = self._projected(query, key, value)
        if not batched:
            q, k, v = q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        q, k, v = (x if first else x.transpose(0, 1) for x in (q, k, v))
        if self.bias_k is not None and self.bias_v is not None:
            added = (k, self.bias_k), (v, self.bias_v)
            k, v = (torch.cat([x, b.to(x).expand(x.shape[0], 1, -1)], 1) for x, b in added)
        extra = (self.bias_k is not None) + self.add_zero_attn
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        # As in torch, the hint stands for the mask where it can.
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else self._mask(q, k.shape[2] - extra, key_padding_mask, attn_mask, extra)
        p = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * sqrt(1.0 / self.head_dim)) @ k.transpose(-2, -1)
            weights = torch.softmax(scores if mask is None else scores + mask, -1)
            weights = F.dropout(weights, p) if p > 0 else weights
            heads = weights @ v
        else:
            heads = F.scaled_dot_product_attention(q, k, v, mask, p, causal)
        y = heads.transpose(1, 2).flatten(2)
        y = self.out_proj(y if first else y.transpose(0, 1))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return y.squeeze(1), None if weights is None else weights.squeeze(0)
        return y, weights

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Refuse inputs that do not fit each other.

        Raises:
            RuntimeError: telling what was given.
        """
        fits = query.dim() in (2, 3) and key.dim() == query.dim() and key.shape[:-1] == value.shape[:-1]
        batch = 0 if self.batch_first else 1
        if not fits or (query.dim() == 3 and key.shape[batch] != query.shape[batch]):
            shapes = ", ".join(str(tuple(t.shape)) for t in (query, key, value))
            raise RuntimeError(f"query, key and value of shapes {shapes} do not fit each other")

    def reset_parameters(self) -> None:
        """Draw the weights that are not blocks, and the biases, as torch does."""
        for name, parameter in self.named_parameters(recurse=False):
            if name == "in_proj_bias":
                nn.init.zeros_(parameter)
            elif name.startswith("bias"):
                nn.init.xavier_normal_(parameter)
            else:
                nn.init.xavier_uniform_(parameter)

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        bias: Any = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        inputs = query, key, value
        stacked = self._modules.get("in_proj")
        if stacked is not None:
            products = tuple(layer(x) for layer, x in zip(stacked, inputs))  # type: ignore[call-overload]
            return tuple(y if b is None else y + b.to(y.dtype) for y, b in zip(products, bias))
        weight = self.dense_weight("in_proj_weight")
        if weight is None:
            return tuple(self.product(f"{n}_proj_weight", x, b) for n, x, b in zip("qkv", inputs, bias))
        if query is key and key is value:
            return F.linear(query, weight, self.in_proj_bias).chunk(3, -1)
        return tuple(F.linear(x, w, b) for x, w, b in zip(inputs, weight.chunk(3), bias))

    def _mask(
        self, q: Tensor, keys: int, key_padding_mask: Tensor | None, attn_mask: Tensor | None, extra: int
    ) -> Tensor | None:
        """Both masks as one to be added to the scores ``(batch, heads, queries, keys)``.

        Raises:
            RuntimeError: for a mask of another shape.
        """
        batch, heads, queries, _ = q.shape
        allowed: dict[str, list[tuple[int, ...]]] = {
            "attn_mask": [(queries, keys), (batch * heads, queries, keys)],
            "key_padding_mask": [(batch, keys)],
        }
        added: Tensor | None = None
        for mask, name in ((attn_mask, "attn_mask"), (key_padding_mask, "key_padding_mask")):
            if mask is None:
                continue
            # Of its own number of dimensions only: programs are captured for batches of any size.
            if not any(len(shape) == mask.dim() and shape == mask.shape for shape in allowed[name]):
                shapes = " or ".join(str(shape) for shape in allowed[name])
                raise RuntimeError(f"expected {name} of shape {shapes}, got {tuple(mask.shape)}")
            own: Tensor = F._canonical_mask(mask, name, None, "", q.dtype, check_other=False)  # type: ignore
            if name == "key_padding_mask":
                own = own[:, None, None]
            elif own.dim() == 3:
                own = own.unflatten(0, (batch, heads))
            own = F.pad(own, (0, extra)) if extra else own
            added = own if added is None else added + own
        return added

    def extra_repr(self) -> str:
        """Sizes, and what is dense."""
        dense = super().extra_repr()
        return f"{self.embed_dim}, {self.num_heads}{f', {dense}' if dense else ''}"
