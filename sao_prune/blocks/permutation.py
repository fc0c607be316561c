"""Channel permutations of block layers: identity, strided (a reshape and a transpose) or irregular (an index)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

# Elements from which on a gather in parallel pays for its start.
_MANY = 1 << 16


class Kind(Enum):
    """How a permutation is applied: nothing to do, a reshape and a transpose, or an index."""

    IDENTITY = "identity"
    STRIDED = "strided"
    INDEX = "index"


@dataclass(frozen=True, eq=False)
class Permutation:
    """``y[i] = x[index[i]]`` along the channels.

    Attributes:
        index: source channel of every position, shape ``(length,)``; int64.
        inverse: position of every source channel, shape ``(source,)``. Where ``index`` repeats a channel (padding),
            the position whose weights are not zero.
        kind: what ``index`` turned out to be.
        dims: for a strided permutation ``(a, b, run)``: ``index = arange(n).view(a, b, run).transpose(0, 1)``.
    """

    index: Tensor
    inverse: Tensor
    kind: Kind
    dims: tuple[int, int, int]

    @classmethod
    def of(cls, index: Tensor, inverse: Tensor) -> Permutation:
        """Recognise identity and strided permutations."""
        dims = _strides(index) if len(index) == len(inverse) else None
        if dims is None:
            return cls(index, inverse, Kind.INDEX, (0, 0, 0))
        kind = Kind.IDENTITY if dims[0] == 1 or dims[1] == 1 else Kind.STRIDED
        return cls(index, inverse, kind, dims)

    @property
    def reverse(self) -> Permutation:
        """The permutation that undoes this one, padding dropped."""
        a, b, run = self.dims
        return Permutation(self.inverse, self.index, self.kind, (b, a, run))

    def to(self, device: torch.device) -> Permutation:
        """The same permutation with its indices on another device."""
        return Permutation(self.index.to(device), self.inverse.to(device), self.kind, self.dims)

    def __deepcopy__(self, memo: dict[int, object]) -> Permutation:
        return self

    def rows(self, x: Tensor) -> Tensor:
        """Permute a matrix ``(batch, channels)``, as fast as its device can; not differentiable."""
        if self.kind is Kind.IDENTITY:
            return x
        batch, channels = x.shape
        if x.device.type != "cpu" or batch * channels == 0:
            return x.index_select(1, self.index)
        if self._is_shuffle:
            # As one image of 1 x batch pixels, channels last: measured at the speed of a copy.
            image = x.contiguous().as_strided((1, channels, 1, batch), (x.numel(), 1, x.numel(), channels))
            return torch.native_channel_shuffle(image, self.dims[0]).as_strided((batch, channels), (channels, 1))
        # index_select along the last dimension uses one thread, and is fast for single precision only.
        if x.numel() >= _MANY and (torch.get_num_threads() > 1 or x.dtype is not torch.float32):
            return x.gather(1, self.index.expand(batch, -1))
        return x.index_select(1, self.index)

    def channels(self, x: Tensor) -> Tensor:
        """Permute dimension 1 of ``(batch, channels, *space)``; the memory format is kept; not differentiable."""
        if self.kind is Kind.IDENTITY:
            return x
        if x.dim() == 2:
            return x.t().index_select(0, self.index).t() if is_column_major(x) else self.rows(x)
        if is_channels_last(x):
            # A gather from a matrix is several times as fast as one from a tensor of more dimensions.
            pixels = x.movedim(1, -1)
            return self.rows(pixels.flatten(0, -2)).unflatten(0, pixels.shape[:-1]).movedim(-1, 1)
        if x.device.type != "cpu" or x.numel() == 0:
            return self.plain(x, 1)
        batch, channels = x.shape[:2]
        if self._is_shuffle:
            return torch.native_channel_shuffle(x.reshape(batch, channels, 1, -1), self.dims[0]).view(x.shape)
        # A gather of whole rows runs in parallel, one along an inner dimension does not.
        first = torch.arange(0, batch * channels, channels, device=x.device)
        chosen = (first[:, None] + self.index).flatten()
        return x.reshape(batch * channels, -1).index_select(0, chosen).view(batch, len(self.index), *x.shape[2:])

    def plain(self, x: Tensor, dim: int) -> Tensor:
        """Permute one dimension by ordinary operations, which can be differentiated, compiled and exported."""
        if self.kind is Kind.IDENTITY:
            return x
        if self.kind is Kind.INDEX:
            return x.index_select(dim, self.index)
        dim %= x.dim()
        return x.unflatten(dim, self.dims).transpose(dim, dim + 1).flatten(dim, dim + 2)

    @property
    def _is_shuffle(self) -> bool:
        return self.kind is Kind.STRIDED and self.dims[2] == 1


def dense(t: Tensor) -> Tensor:
    """`Tensor.contiguous`, without a new wrapper where there is nothing to do."""
    return t if t.is_contiguous() else t.contiguous()


def is_channels_last(x: Tensor) -> bool:
    """Whether ``(batch, channels, *space)`` has its channels innermost in memory."""
    return x.dim() > 2 and x.shape[1] > 1 and x.stride(1) == 1 and not x.is_contiguous()


def is_column_major(x: Tensor) -> bool:
    """Whether a matrix ``(batch, channels)`` lies in memory column after column."""
    return x.stride(0) == 1 and x.stride(1) == x.shape[0] and x.shape[0] > 1


def _strides(index: Tensor) -> tuple[int, int, int] | None:
    """``(a, b, run)`` when ``index`` is ``arange(n).view(a, b, run).transpose(0, 1)`` flattened."""
    n = len(index)
    natural = torch.arange(n, device=index.device)
    steps = torch.nonzero(index != natural).flatten()
    if len(steps) == 0:
        return 1, 1, n
    run = int(steps[0])
    step = int(index[run]) if run else 0
    if run == 0 or step <= 0 or step % run or n % step:
        return None
    a, b = n // step, step // run
    return (a, b, run) if torch.equal(index, natural.view(a, b, run).transpose(0, 1).flatten()) else None
