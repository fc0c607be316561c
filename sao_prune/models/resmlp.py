"""ResMLP: one linear layer over patches and two over channels, without normalisation (thesis table 3.7)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .classifier import ImageClassifier
from .options import check_img_size, check_rate, check_sizes
from .registry import refuse_pretrained, register_model, without_timm_options


class Affine(nn.Module):
    """A scale and a shift for every channel, ``a * x + b``, where other networks normalise."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.shift = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x + self.shift


class ChannelScale(nn.Module):
    """A trainable factor for every channel, small at first, at the end of a residual branch."""

    def __init__(self, width: int, start: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((width,), float(start)))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


class ResMLPBlock(nn.Module):
    """A linear layer over tokens and an MLP over channels, each with an affine before it and its input added after."""

    def __init__(self, tokens: int, width: int, hidden: int, drop_rate: float, branch_scale: float) -> None:
        super().__init__()
        self.token_affine = Affine(width)
        self.token_mix = nn.Linear(tokens, tokens)
        self.token_scale = ChannelScale(width, branch_scale)
        self.channel_affine = Affine(width)
        self.channel_mix = nn.Sequential(
            nn.Linear(width, hidden),
            nn.GELU(),
            nn.Dropout(drop_rate),
            nn.Linear(hidden, width),
            nn.Dropout(drop_rate),
        )
        self.channel_scale = ChannelScale(width, branch_scale)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.token_mix(self.token_affine(x).transpose(1, 2)).transpose(1, 2)
        x = x + self.token_scale(mixed)
        return x + self.channel_scale(self.channel_mix(self.channel_affine(x)))  # type: ignore[no-any-return]


class SaoResMLP(ImageClassifier):
    """ResMLP: a patch embedding, ``depth`` blocks, an affine, the mean over tokens, a linear classifier.

    The thesis names the block's affine, its three linear layers, dropout and GELU. Where they stand, the affine at the
    end and the factor on each residual branch are those of Touvron et al., ResMLP (2021), whose factor starts at 0.1
    at this depth.

    Args:
        depth: blocks.
        width: channels of a token.
        hidden: hidden width of the MLP over channels.
        patch: height and width of a patch, in pixels.
        drop_rate: of the dropout after each layer of that MLP.
        branch_scale: initial factor of the residual branches.
        img_size: a multiple of ``patch``; the number of tokens is fixed by it.

    Shape:
        ``(batch, in_chans, img_size, img_size)`` to ``(batch, num_classes)``.

    Raises:
        ValueError: for a size below one, a rate outside [0, 1), a factor that is not positive or an image that is no
            whole number of patches.

    Example:
        >>> import torch
        >>> net = SaoResMLP(depth=1, width=8, hidden=16, img_size=8)
        >>> x = torch.zeros(2, 3, 8, 8)
        >>> net.forward_features(x).shape, net(x).shape
        (torch.Size([2, 4, 8]), torch.Size([2, 10]))
    """

    def __init__(
        self,
        depth: int = 12,
        width: int = 48,
        hidden: int = 192,
        patch: int = 4,
        drop_rate: float = 0.0,
        branch_scale: float = 0.1,
        num_classes: int = 10,
        in_chans: int = 3,
        img_size: int = 32,
    ) -> None:
        super().__init__()
        check_sizes(depth=depth, width=width, hidden=hidden, patch=patch, in_chans=in_chans)
        check_rate("drop_rate", drop_rate)
        check_img_size(img_size, "it is cut into patches", multiple=patch)
        if not branch_scale > 0:
            raise ValueError(
                f"branch_scale must be positive, or the blocks start without any effect, got {branch_scale!r}"
            )
        tokens = (img_size // patch) ** 2
        self.stem = nn.Conv2d(in_chans, width, patch, patch)
        self.blocks = nn.Sequential(
            *(ResMLPBlock(tokens, width, hidden, drop_rate, branch_scale) for _ in range(depth))
        )
        self.affine = Affine(width)
        self.add_head(width, num_classes, (in_chans, img_size, img_size), "stem")

    def forward_features(self, x: Tensor) -> Tensor:
        """Tokens after the last block, shape ``(batch, tokens, width)``."""
        tokens = self.stem(x).flatten(2).transpose(1, 2)
        return self.affine(self.blocks(tokens))  # type: ignore[no-any-return]

    def pooled(self, features: Tensor) -> Tensor:
        """The mean over tokens, shape ``(batch, width)``."""
        return features.mean(1)


@register_model
def sao_resmlp(pretrained: bool = False, depth: int = 12, **options: Any) -> SaoResMLP:
    """ResMLP-12 with patches of 4 x 4, width 48 and hidden width 192: 38 trainable layers (thesis table 3.7).

    Args:
        pretrained: refused, there are no weights.
        depth: blocks.
        **options: `SaoResMLP`'s.

    Returns:
        The network, with the weights that torch draws.

    Example:
        >>> sum(p.numel() for p in sao_resmlp().parameters() if p.dim() > 1)
        273120
    """
    refuse_pretrained("sao_resmlp", pretrained)
    return SaoResMLP(depth=depth, **without_timm_options(options))
