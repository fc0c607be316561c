"""Block values that give on calibration data what the whole matrix gave: least squares, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..topology import BlockTopology, Bucket
from .blocks import Blocks

Chunks = Callable[[], Iterable[tuple[Tensor, Tensor]]]


class BlockFit:
    """The second moments that a matrix's blocks need, and the block values that follow from them.

    With inputs ``x``, outputs ``y`` that are wanted and the entries ``W_C`` that a block keeps, its values are
    ``B = W_C + E[(y - W_C x_C) x_C^T] (E[x_C x_C^T] + lambda I)^-1``, which minimises
    ``E|y - B x_C|^2 + lambda |B - W_C|^2``: never worse on these inputs than keeping ``W_C``, and equal to it where
    that loses nothing. Moments are held for the blocks alone, never for the whole input.

    Args:
        weight: ``(m, n, taps)``, with one tap for a matrix.
        topology: which entries stay.
        chunks: gives anew at every call inputs, ``(rows, n * taps)`` in the order of ``weight.flatten(1)``, each with
            the outputs ``(rows, m)`` that are wanted for them; both centred if the bias makes up for the means.

    Attributes:
        total: squared size of the outputs that are wanted, summed over the rows.
        lost: squared error of the outputs with the entries kept, summed likewise.
        count: rows.

    Raises:
        ValueError: if there is no input at all.

    Example:
        >>> x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
        >>> topology = BlockTopology(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 1]))
        >>> fit = BlockFit(torch.eye(4)[:, :, None], topology, lambda: [(x, x)])
        >>> fit.error_kept, bool(torch.equal(topology.scatter(fit.values(0.01)), torch.eye(4)))
        (0.0, True)
    """

    def __init__(self, weight: Tensor, topology: BlockTopology, chunks: Chunks) -> None:
        self._weight, self._topology, taps = weight, topology, weight.shape[2]
        self._kept = [_block(weight, bucket) for bucket in topology.buckets]
        mask = topology.mask(weight.dtype, weight.device)[:, :, None]
        kept = (weight * mask).flatten(1)
        device = weight.device
        columns = [_columns(bucket, taps).to(device) for bucket in topology.buckets]
        rows = [bucket.rows.to(device) for bucket in topology.buckets]
        self._grams = [weight.new_zeros(*c.shape, c.shape[1]) for c in columns]
        self._cross = [weight.new_zeros(*r.shape, c.shape[1]) for r, c in zip(rows, columns)]
        self.total = self.lost = 0.0
        self.count = 0
        for x, wanted in chunks():
            self.count += len(x)
            missed = wanted - x @ kept.T
            self.total += float(wanted.double().square().sum())
            self.lost += float(missed.double().square().sum())
            for gram, cross, r, c in zip(self._grams, self._cross, rows, columns):
                inputs = x[:, c].movedim(1, 0)
                gram.baddbmm_(inputs.mT, inputs)
                cross.baddbmm_(missed[:, r].permute(1, 2, 0), inputs)
        if not self.count:
            raise ValueError("least squares needs at least one row of inputs")
        for moment in (*self._grams, *self._cross):
            moment /= self.count

    @property
    def error_kept(self) -> float:
        """Squared error of the output relative to its size, with the entries that stay as they were."""
        return self.lost / self.total if self.total > 0 else 0.0

    def error(self, blocks: Blocks) -> float:
        """The same with other values on the blocks."""
        if not self.total > 0:
            return 0.0
        change = 0.0
        for gram, cross, kept, values in zip(self._grams, self._cross, self._kept, blocks):
            moved = (values.to(kept).flatten(2) - kept).double()
            change += float((moved @ gram.double() * moved).sum() - 2 * (moved * cross.double()).sum())
        return max(self.lost + change * self.count, 0.0) / self.total

    def values(self, ridge: float) -> Blocks:
        """The best block values, ``(blocks, r, c)`` or with taps ``(blocks, r, c, taps)``, on the CPU.

        Args:
            ridge: what is added to the moments' diagonal, as a share of its mean.
        """
        out = []
        for gram, cross, kept in zip(self._grams, self._cross, self._kept):
            gram = gram.double()
            diagonal = gram.diagonal(dim1=1, dim2=2)
            added = ridge * diagonal.mean(1).clamp(min=torch.finfo(torch.float32).tiny)
            factor = torch.linalg.cholesky(gram + torch.diag_embed(added[:, None].expand_as(diagonal)))
            moved = torch.cholesky_solve(cross.double().mT, factor).mT
            out.append((kept.double() + moved).to(kept).cpu())
        return tuple(self._shaped(out))

    def orthogonal(self, blocks: Blocks) -> Blocks:
        """The polar factors of block values, times the one factor for all of them that fits the data best."""
        factors = [_polar(values.flatten(2)) for values in blocks]
        along = across = 0.0
        for gram, cross, kept, q in zip(self._grams, self._cross, self._kept, factors):
            gram, q = gram.double(), q.to(gram.device).double()
            along += float((q * (cross.double() + kept.double() @ gram)).sum())
            across += float((q @ gram * q).sum())
        gain = along / across if across > 0 else 1.0
        return tuple(self._shaped([q * gain for q in factors]))

    def _shaped(self, blocks: list[Tensor]) -> Iterable[Tensor]:
        taps = self._weight.shape[2]
        for values in blocks:
            yield values if taps == 1 else values.unflatten(2, (-1, taps))


def kept_blocks(matrix: Tensor, topology: BlockTopology) -> Blocks:
    """The entries of a matrix that stay, as block values on the CPU.

    Args:
        matrix: ``(m, n)``.
        topology: of the same shape.

    Returns:
        A tensor ``(blocks, r, c)`` a bucket.

    Example:
        >>> topology = BlockTopology(torch.tensor([0, 1]), torch.tensor([0, 1]))
        >>> kept_blocks(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), topology)[0].flatten().tolist()
        [1.0, 4.0]
    """
    return tuple(_block(matrix[:, :, None], bucket).cpu() for bucket in topology.buckets)


def _polar(matrices: Tensor) -> Tensor:
    u, _, v = torch.linalg.svd(matrices.double(), full_matrices=False)
    return (u @ v).to(matrices)


def _columns(bucket: Bucket, taps: int) -> Tensor:
    """Places of the blocks' inputs, every tap of them, in a flattened ``(n, taps)``."""
    return (bucket.cols[:, :, None] * taps + torch.arange(taps, device="cpu")).flatten(1)


def _block(weight: Tensor, bucket: Bucket) -> Tensor:
    """The entries of a bucket's blocks, ``(blocks, r, c * taps)``."""
    rows, cols = bucket.rows.to(weight.device), bucket.cols.to(weight.device)
    return weight[rows[:, :, None], cols[:, None, :]].flatten(2)
