"""Convolutions that standardise their weight before they use it, on their blocks alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import wrap
from torch.nn import functional as F

from ..functional import each
from .conv import BlockConv2d


class BlockStdConv2d(BlockConv2d):
    """A weight-standardised convolution: timm's ``StdConv2d`` and ``ScaledStdConv2d``, transformers' of BiT.

    Each output's kept weights lose their mean and are divided by ``sqrt(sum of squares / N + eps)``, ``N`` the whole
    fan-in of the dense layer: what the masked layer computes, see `sao_prune.prune.standardised`.

    Attributes:
        eps: added to the variance.
        gain: what every output is multiplied by, with ``scale``; ``None`` where the dense layer has none.
        same_pad: whether the input is padded so that the output is as large as the input divided by the stride.

    Example:
        >>> import torch
        >>> from sao_prune.topology import interleaved
        >>> layer = BlockStdConv2d(interleaved(8, 12, 4), 3, padding=1)
        >>> layer.dense(layer.values()).flatten(1).sum(1).abs().max() < 1e-4
        tensor(True)
    """

    eps: float = 1e-6
    gain: Tensor | None
    scale: float = 1.0
    same_pad: bool = False
    pad: nn.Module | None

    def forward(self, x: Tensor) -> Tensor:
        """As of any block convolution; its libraries name the input so."""
        return super().forward(x)

    def values(self) -> Tensor:
        """The standardised blocks."""
        blocks, fan_in = self.blocks, self.in_channels // self.groups
        for size in self.kernel_size:
            fan_in *= size
        gain = getattr(self, "gain", None)
        buckets = self.topology.buckets
        if len(buckets) == 1:
            return self._standardised(blocks, fan_in, gain, buckets[0].rows)
        parts, first = [], 0
        for bucket in buckets:
            count = bucket.rows.numel() * bucket.cols.shape[1]
            own = blocks.narrow(0, first, count).reshape(*bucket.shape, *self.kernel_size)
            first += count
            parts.append(self._standardised(own, fan_in, gain, bucket.rows).flatten(0, 2))
        return torch.cat(parts).view_as(blocks)

    def _standardised(self, blocks: Tensor, fan_in: int, gain: Tensor | None, rows: Tensor) -> Tensor:
        over = tuple(range(2, 3 + len(self.kernel_size)))
        centred = blocks - blocks.mean(over, keepdim=True)
        scale = (centred.square().sum(over, keepdim=True) / fan_in + self.eps).rsqrt()
        if gain is not None:
            scale = scale * (gain.flatten()[rows.to(gain.device)] * self.scale).view_as(scale)
        return centred * scale

    def _formatted(self, x: Tensor) -> Tensor:
        if self.same_pad:
            dims = len(self.kernel_size)
            x = _same_padded(x, self.kernel_size, each(self.stride, dims), each(self.dilation, dims))
        pad = getattr(self, "pad", None)
        return super()._formatted(x if pad is None else pad(x))


@wrap
def _same_padded(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]) -> Tensor:
    """Zeros around an image, one more behind than before where their number is odd, as TensorFlow's "same" has them."""
    sides: list[int] = []
    for size, k, s, d in zip(x.shape[2:], kernel, stride, dilation):
        missing = max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0)
        sides = [missing // 2, missing - missing // 2, *sides]
    return F.pad(x, sides)
