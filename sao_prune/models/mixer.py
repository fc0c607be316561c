"""MLP-Mixer-Nano: layers that mix patches, layers that mix channels, by turns (thesis table 3.6)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .classifier import ImageClassifier
from .options import check_img_size, check_rate, check_sizes
from .registry import refuse_pretrained, register_model, without_timm_options


class MixerBlock(nn.Module):
    """A mixer over tokens and one over channels, each with a layer norm before it and its input added after it."""

    def __init__(self, tokens: int, width: int, token_width: int, channel_width: int, drop_rate: float) -> None:
        super().__init__()
        self.token_norm = nn.LayerNorm(width)
        self.token_mix = nn.Sequential(
            nn.Conv1d(tokens, token_width, 1),
            nn.GELU(),
            nn.Dropout(drop_rate),
            nn.Conv1d(token_width, tokens, 1),
            nn.Dropout(drop_rate),
        )
        self.channel_norm = nn.LayerNorm(width)
        self.channel_mix = nn.Sequential(
            nn.Linear(width, channel_width),
            nn.GELU(),
            nn.Dropout(drop_rate),
            nn.Linear(channel_width, width),
            nn.Dropout(drop_rate),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.token_mix(self.token_norm(x))
        return x + self.channel_mix(self.channel_norm(x))  # type: ignore[no-any-return]


class SaoMixer(ImageClassifier):
    """MLP-Mixer: a patch embedding, ``depth`` mixer blocks, layer norm, the mean over tokens, a linear classifier.

    The tables leave two things open. The embedding is printed as ``conv[128, 3 x 3, 1]``, which would give 1024 tokens
    of a 32 x 32 image instead of the 64 printed beside it; with the patch size of 4 from the text, kernel and stride
    are 4 here. The text counts 33 trainable layers for depth 8 and 65 for 16: four a block and the classifier, so
    without the embedding, which is a 34th and 66th here.

    Args:
        depth: blocks.
        width: channels of a token.
        channel_width: hidden width of the layers that mix channels.
        token_width: hidden width of the layers that mix tokens, which are convolutions with kernel 1 over tokens.
        patch: height and width of a patch, in pixels.
        drop_rate: of the dropout after each layer of a block.
        img_size: a multiple of ``patch``; the number of tokens is fixed by it.

    Shape:
        ``(batch, in_chans, img_size, img_size)`` to ``(batch, num_classes)``.

    Raises:
        ValueError: for a size below one, a rate outside [0, 1) or an image that is no whole number of patches.

    Example:
        >>> import torch
        >>> net = SaoMixer(depth=1, width=8, channel_width=16, token_width=4, img_size=8)
        >>> x = torch.zeros(2, 3, 8, 8)
        >>> net.forward_features(x).shape, net(x).shape
        (torch.Size([2, 4, 8]), torch.Size([2, 10]))
    """

    def __init__(
        self,
        depth: int = 8,
        width: int = 128,
        channel_width: int = 512,
        token_width: int = 64,
        patch: int = 4,
        drop_rate: float = 0.0,
        num_classes: int = 10,
        in_chans: int = 3,
        img_size: int = 32,
    ) -> None:
        super().__init__()
        check_sizes(depth=depth, width=width, channel_width=channel_width, token_width=token_width)
        check_sizes(patch=patch, in_chans=in_chans)
        check_rate("drop_rate", drop_rate)
        check_img_size(img_size, "it is cut into patches", multiple=patch)
        tokens = (img_size // patch) ** 2
        self.stem = nn.Conv2d(in_chans, width, patch, patch)
        self.blocks = nn.Sequential(
            *(MixerBlock(tokens, width, token_width, channel_width, drop_rate) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(width)
        self.add_head(width, num_classes, (in_chans, img_size, img_size), "stem")

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalised tokens after the last block, shape ``(batch, tokens, width)``."""
        tokens = self.stem(x).flatten(2).transpose(1, 2)
        return self.norm(self.blocks(tokens))  # type: ignore[no-any-return]

    def pooled(self, features: Tensor) -> Tensor:
        """The mean over tokens, shape ``(batch, width)``."""
        return features.mean(1)


@register_model
def sao_mixer_nano(pretrained: bool = False, depth: int = 8, **options: Any) -> SaoMixer:
    """MLP-Mixer-Nano: patch 4, width 128, channel width 512, token width 64 (thesis table 3.6).

    Args:
        pretrained: refused, there are no weights.
        depth: blocks; the thesis has 8 and 16, by its count 33 and 65 trainable layers.
        **options: `SaoMixer`'s.

    Returns:
        The network, with the weights that torch draws.

    Example:
        >>> sum(p.numel() for p in sao_mixer_nano().parameters() if p.dim() > 1)
        1121536
    """
    refuse_pretrained("sao_mixer_nano", pretrained)
    return SaoMixer(depth=depth, **without_timm_options(options))
