"""SkewConv2d: the exponential of a skew-symmetric convolution, which is orthogonal (thesis section 2.5.2.2)."""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..seeds import Seed, base_seed, named_generator
from ..topology import make_topology


class SkewConv2d(nn.Module):
    """Skew orthogonal convolution, ``exp(L) x`` by its Taylor series (Singla and Feizi, ICML 2021).

    ``L`` is a zero-padded convolution minus its transpose, so its Jacobian is skew-symmetric and the exponential is
    orthogonal. The kernel is scaled so that a bound on ``|L|`` is at most one, which makes the error of ``n`` terms
    less than ``1 / n!``: 2e-9 with the 12 terms used in evaluation. Orthogonal during training too, whatever the
    optimizer does.

    Args:
        in_channels: channels in; channels of zeros are added, or the last outputs dropped, where they are not as
            many as go out.
        out_channels: channels out.
        kernel_size: odd.
        stride: space-to-depth factor; it must divide the input size.
        groups: blocks, each its own skew convolution, with the channels shuffled in front by a fixed permutation;
            must divide the larger of ``in_channels * stride^2`` and ``out_channels``.
        terms: of the Taylor series, in training and in evaluation.
        seed: of values and permutation.

    Shape:
        ``(batch, in_channels, h, w)`` to ``(batch, out_channels, h / stride, w / stride)``; ``weight`` is
        ``(channels, channels / groups, kernel_size, kernel_size)``.

    Raises:
        ValueError: for an even kernel, sizes or groups out of range.

    Example:
        >>> import torch
        >>> layer = SkewConv2d(4, 4, 3, bias=False, seed=0).eval()
        >>> x = torch.randn(1, 4, 5, 5)
        >>> torch.allclose(layer(x).norm(), x.norm(), rtol=1e-4)
        True
    """

    order: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        terms: tuple[int, int] = (6, 12),
        seed: Seed = None,
    ) -> None:
        super().__init__()
        channels = max(in_channels * stride**2, out_channels)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd for a skew-symmetric convolution, got {kernel_size}")
        if groups < 1 or channels % groups:
            raise ValueError(f"groups must divide the {channels} channels, got {groups}")
        if min(terms) < 1:
            raise ValueError(f"terms counts Taylor terms in training and evaluation, both positive, got {terms}")
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel_size
        self.stride, self.groups, self.terms, self.channels = stride, groups, terms, channels
        base = base_seed(seed)
        shape = (channels, channels // groups, kernel_size, kernel_size)
        scale = 1 / sqrt(shape[1] * kernel_size**2)
        values = (
            torch.randn(shape, generator=named_generator(base, "values"), dtype=torch.float32, device="cpu") * scale
        )
        self.weight = nn.Parameter(values.to(torch.get_default_device(), torch.get_default_dtype()))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        generator = named_generator(base, "topology")
        order = make_topology("ramanujan", channels, channels, groups=groups, generator=generator).col_order
        self.register_buffer("order", order.to(torch.get_default_device()))

    def skew_kernel(self) -> Tensor:
        """The kernel of ``L``, shape of ``weight``, scaled so that ``|L| <= 1``."""
        blocks = self.weight.unflatten(0, (self.groups, -1))
        skew = blocks - blocks.transpose(1, 2).flip(-1, -2)
        bound = _norm_bound(skew.detach()).view(-1, 1, 1, 1, 1)
        return (skew / bound.clamp(min=1.0)).flatten(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        if any(n % self.stride for n in x.shape[-2:]):
            raise ValueError(
                f"stride {self.stride} must divide the input size, got {x.shape[-2]} x {x.shape[-1]}; "
                "pad or crop the input"
            )
        x = F.pixel_unshuffle(x, self.stride)
        x = F.pad(x, (0, 0, 0, 0, 0, self.channels - x.shape[1]))
        if self.groups > 1:
            x = x.index_select(1, self.order)
        kernel = self.skew_kernel()
        total = term = x
        for power in range(1, self.terms[0 if self.training else 1] + 1):
            term = F.conv2d(term, kernel, padding=self.kernel_size // 2, groups=self.groups) / power
            total = total + term
        y = total[:, : self.out_channels]
        return y if self.bias is None else y + self.bias[:, None, None]

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"groups={self.groups}, bias={self.bias is not None}, terms={self.terms}"
        )


def _norm_bound(kernel: Tensor) -> Tensor:
    """A bound on the spectral norm of a zero-padded convolution, for each block ``(g, r, c, k, k)``.

    ``sqrt(k k)`` times the spectral norm of the kernel reshaped to a matrix, whichever of the reshapings gives less
    (Singla and Feizi, ICLR 2021). A skew kernel needs only one of each transposed pair.
    """
    g, r, c, h, w = kernel.shape
    tall = kernel.permute(0, 1, 3, 2, 4).reshape(g, r * h, c * w)
    flat = kernel.reshape(g, r, c * h * w)
    norms = [_spectral_norm(m.double()) for m in (tall, flat)]
    return (torch.minimum(*norms) * sqrt(h * w)).to(kernel.dtype)


def _spectral_norm(matrix: Tensor) -> Tensor:
    """Largest singular value, from the smaller Gram matrix; NaN if an entry is not finite, as after divergence."""
    gram = matrix @ matrix.mT if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT @ matrix
    finite = torch.isfinite(gram).all(-1).all(-1)
    largest = torch.linalg.eigvalsh(gram.nan_to_num(0.0, 0.0, 0.0))[..., -1]
    return torch.where(finite, largest.clamp(min=0).sqrt(), torch.nan)
