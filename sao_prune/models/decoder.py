"""A decoder-only transformer over tokens: attention that sees the past alone, and MLPs (thesis, recommendation 2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .options import check_rate, check_sizes
from .registry import refuse_pretrained, register_model, without_timm_options
from .sequence import SequenceClassifier


class CausalAttention(nn.Module):
    """Self-attention of several heads in which no step sees a later one, ``(batch, steps, width)`` to the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class DecoderBlock(nn.Module):
    """Attention and an MLP, each behind a layer norm, dropout after it, its input added."""

    def __init__(self, width: int, heads: int, hidden: int, drop_rate: float) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), CausalAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attn(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))  # type: ignore[no-any-return]


class SaoDecoder(SequenceClassifier):
    """A small language model in the manner of GPT-2: embeddings of tokens and places, blocks, a norm, a classifier.

    Args:
        tokens: size of the vocabulary.
        steps: the longest sequence.
        depth: blocks.
        width: channels of a token, a multiple of ``heads``.
        hidden: of the MLP; four times the width if None.
        num_classes: what is predicted at every step; ``tokens`` if None.

    Shape:
        ``(batch, steps)``, int64, to ``(batch, num_classes, steps)``.

    Raises:
        ValueError: for a size below one, a rate outside [0, 1) or heads that do not divide the width.

    Example:
        >>> import torch
        >>> SaoDecoder(tokens=20, steps=8, depth=1, width=16)(torch.zeros(2, 8, dtype=torch.long)).shape
        torch.Size([2, 20, 8])
    """

    def __init__(
        self,
        tokens: int = 96,
        steps: int = 128,
        depth: int = 4,
        width: int = 128,
        heads: int = 4,
        hidden: int | None = None,
        drop_rate: float = 0.0,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        hidden = 4 * width if hidden is None else hidden
        check_sizes(steps=steps, depth=depth, width=width, heads=heads, hidden=hidden)
        check_rate("drop_rate", drop_rate)
        if width % heads:
            raise ValueError(f"width must be a multiple of heads, got {width} and {heads}")
        self.read_tokens(tokens, width)
        self.places = nn.Parameter(torch.zeros(steps, width))
        nn.init.normal_(self.places, std=0.02)
        self.blocks = nn.Sequential(*(DecoderBlock(width, heads, hidden, drop_rate) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.add_head(width, tokens if num_classes is None else num_classes, (1, 1, steps), "embedding")

    def forward_sequence(self, steps: Tensor) -> Tensor:
        """What the last block makes of every token.

        Raises:
            ValueError: if the sequence is longer than the model has places.
        """
        if steps.shape[1] > len(self.places):
            raise ValueError(f"a sequence may have {len(self.places)} steps, got {steps.shape[1]}")
        return self.norm(self.blocks(steps + self.places[: steps.shape[1]]))  # type: ignore[no-any-return]


@register_model
def sao_decoder(pretrained: bool = False, depth: int = 4, **options: Any) -> SaoDecoder:
    """A decoder of four blocks, 128 wide, four heads.

    Args:
        pretrained: refused, there are no weights.
        depth: blocks.
        **options: `SaoDecoder`'s.

    Returns:
        The network, with the weights that torch draws.

    Raises:
        ValueError: if an option is refused or ``pretrained`` is asked for.

    Example:
        >>> sum(p.numel() for p in sao_decoder(tokens=64).blocks.parameters() if p.dim() == 2)
        786432
    """
    refuse_pretrained("sao_decoder", pretrained)
    return SaoDecoder(depth=depth, **without_timm_options(options))
