"""Where the blocks of a layer lie in its weight: under a mask, in a compact layer, at the frequencies of a kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from .discovery import PrunableWeight
from .nn.eco import pack, unpack
from .topology import BlockTopology
from .weights import Blocks, Mirror, frequencies_from_kernel, kernel_from_frequencies, mirror_blocks


class Layout:
    """How blocks ``(batch, r, c)``, one tensor a bucket, lie in a weight."""

    @property
    def parts(self) -> tuple[BlockTopology, ...]:
        """The topology of each matrix in the weight."""
        raise NotImplementedError

    def onto(self, parts: Sequence[BlockTopology]) -> Layout:
        """The same layout on other topologies of the same shapes, one for each of `parts`."""
        raise NotImplementedError

    def fits(self, parts: Sequence[BlockTopology]) -> bool:
        """Whether the blocks of other topologies are as many and of the same shapes, so that values can change over."""
        return [[b.shape for b in t.buckets] for t in parts] == [[b.shape for b in t.buckets] for t in self.parts]

    def split(self, weight: Tensor) -> Blocks:
        """The blocks of a weight."""
        raise NotImplementedError

    def join(self, blocks: Blocks) -> Tensor:
        """The weight of given blocks; inverse of `split` on a weight that has no other values."""
        raise NotImplementedError


@dataclass(frozen=True)
class MaskedLayout(Layout):
    """A dense tensor that a mask of blocks covers."""

    weight: PrunableWeight
    topologies: tuple[BlockTopology, ...]

    @property
    def parts(self) -> tuple[BlockTopology, ...]:
        return self.topologies

    def onto(self, parts: Sequence[BlockTopology]) -> MaskedLayout:
        return replace(self, topologies=tuple(parts))

    def split(self, weight: Tensor) -> Blocks:
        parts = (
            self.weight.matrices(weight).flatten(3).squeeze(3) if self.weight.kernel else self.weight.matrices(weight)
        )
        return tuple(b for part, t in zip(parts, self.topologies) for b in t.gather(part))

    def join(self, blocks: Blocks) -> Tensor:
        rest, parts = iter(blocks), []
        for topology in self.topologies:
            parts.append(topology.scatter(tuple(next(rest) for _ in topology.buckets)))
        stacked = torch.stack(parts)
        if self.weight.transposed:
            stacked = stacked.transpose(1, 2)
        return stacked.reshape(self.weight.shape)


@dataclass(frozen=True)
class CompactLayout(Layout):
    """The parameter of a compact layer."""

    topology: BlockTopology
    shape: tuple[int, ...]

    @property
    def parts(self) -> tuple[BlockTopology, ...]:
        return (self.topology,)

    def onto(self, parts: Sequence[BlockTopology]) -> CompactLayout:
        return replace(self, topology=parts[0])

    def split(self, weight: Tensor) -> Blocks:
        shapes = [b.shape for b in self.topology.buckets]
        parts = weight.flatten().split([prod(s) for s in shapes])
        return tuple(p.view(s) for p, s in zip(parts, shapes))

    def join(self, blocks: Blocks) -> Tensor:
        return torch.cat([b.flatten() for b in blocks]).view(self.shape)


@dataclass(frozen=True)
class FrequencyLayout(Layout):
    """The weight of an `ECOConv2d`, by its free frequencies."""

    topology: BlockTopology
    kernel: tuple[int, ...]

    @property
    def parts(self) -> tuple[BlockTopology, ...]:
        return (self.topology,)

    def onto(self, parts: Sequence[BlockTopology]) -> FrequencyLayout:
        return replace(self, topology=parts[0])

    def split(self, weight: Tensor) -> Blocks:
        return tuple(frequencies_from_kernel(b, self.kernel).flatten(0, 1) for b in unpack(weight, self.topology))

    def join(self, blocks: Blocks) -> Tensor:
        taps = (
            kernel_from_frequencies(b.unflatten(0, (-1, bucket.shape[0])), self.kernel)
            for b, bucket in zip(blocks, self.topology.buckets)
        )
        return pack(tuple(taps), self.kernel)


@dataclass(frozen=True)
class MaskedFrequencyLayout(Layout):
    """The weight of a dense `ECOConv2d` that a mask of blocks covers, by the free frequencies of each block."""

    topology: BlockTopology
    kernel: tuple[int, ...]

    @property
    def parts(self) -> tuple[BlockTopology, ...]:
        return (self.topology,)

    def onto(self, parts: Sequence[BlockTopology]) -> MaskedFrequencyLayout:
        return replace(self, topology=parts[0])

    def split(self, weight: Tensor) -> Blocks:
        taps = weight.flatten(2).flatten(0, 1)
        chosen = (taps[index.to(taps.device)] for index in self.topology.flat_index)
        return tuple(
            frequencies_from_kernel(values.view(*bucket.shape, -1), self.kernel).flatten(0, 1)
            for values, bucket in zip(chosen, self.topology.buckets)
        )

    def join(self, blocks: Blocks) -> Tensor:
        rows, cols = self.topology.shape
        out = blocks[0].new_zeros(rows * cols, prod(self.kernel))
        for index, b, bucket in zip(self.topology.flat_index, blocks, self.topology.buckets):
            taps = kernel_from_frequencies(b.unflatten(0, (-1, bucket.shape[0])), self.kernel)
            out = out.index_copy(0, index.to(out.device), taps.flatten(0, 2))
        return out.view(rows, cols, *self.kernel)


def mirror_of(blocks: Tensor) -> Mirror | None:
    """Which sides of a batch of blocks come in pairs ``h, -h``."""
    rows, cols = blocks.shape[1:]
    doubled = (
        rows % 2 == 0 and torch.allclose(blocks[:, : rows // 2], -blocks[:, rows // 2 :], atol=1e-6),
        cols % 2 == 0 and torch.allclose(blocks[:, :, : cols // 2], -blocks[:, :, cols // 2 :], atol=1e-6),
    )
    return Mirror(doubled) if any(doubled) else None


def halve(blocks: Tensor, mirror: Mirror | None) -> Tensor:
    """The blocks that are mirrored into the given ones."""
    if mirror is None:
        return blocks
    rows, cols = blocks.shape[1:]
    return blocks[:, : rows // 2 if mirror.rows else rows, : cols // 2 if mirror.cols else cols]


def double(blocks: Tensor, mirror: Mirror | None) -> Tensor:
    """The mirrored blocks; inverse of `halve`."""
    return blocks if mirror is None else mirror_blocks((blocks,), mirror)[0]
