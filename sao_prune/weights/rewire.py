"""What becomes of values, gradients and optimizer states when the inputs of a block topology change places."""

from __future__ import annotations

import torch
from torch import Tensor

from ..topology import BlockTopology


def keep_common(tensor: Tensor, before: BlockTopology, after: BlockTopology) -> Tensor:
    """Values on edges that both topologies have, zeros elsewhere: new edges start at zero, momentum is forgotten.

    Args:
        tensor: ``(m, n, *kernel)``: a weight, or an optimizer's state of its shape.
        before: the topology that it is on.
        after: the topology that it shall be on.

    Example:
        >>> from sao_prune.topology import BlockTopology
        >>> one = BlockTopology(torch.tensor([0, 1]), torch.tensor([0, 0, 1, 1]))
        >>> other = BlockTopology(torch.tensor([0, 1]), torch.tensor([0, 1, 1, 0]))
        >>> keep_common(torch.ones(2, 4), one, other).tolist()
        [[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]
    """
    common = (before.mask() & after.mask()).to(tensor.device)
    return tensor * common.view(*common.shape, *(1,) * (tensor.dim() - 2)).to(tensor.dtype)


def exchange_columns(tensor: Tensor, swaps: Tensor) -> Tensor:
    """Each input of a swap takes over what stood at the other's edges; orthogonal blocks stay orthogonal.

    A block's columns are the same as before, read by another input: its Gram matrices do not change.

    Args:
        tensor: ``(m, n, *kernel)``: a weight, or an optimizer's state of its shape.
        swaps: pairs of inputs, each input at most once, shape ``(swaps, 2)``.

    Example:
        >>> exchange_columns(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0, 2]])).tolist()
        [[3.0, 2.0, 1.0]]
    """
    source = torch.arange(tensor.shape[1], device=tensor.device)
    pairs = swaps.to(tensor.device)
    source[pairs[:, 0]], source[pairs[:, 1]] = pairs[:, 1], pairs[:, 0]
    return tensor.index_select(1, source)


def column_sources(before: BlockTopology, after: BlockTopology) -> list[Tensor]:
    """Where the columns of every block were, for a topology whose inputs alone have changed places.

    Args:
        before: a topology.
        after: one with the same outputs in every set and as many inputs.

    Returns:
        One tensor ``(blocks, c)`` a bucket: the position in the same block, or -1 for a column that was in another.

    Raises:
        ValueError: if the outputs or the sizes of the sets differ.

    Example:
        >>> one = BlockTopology(torch.tensor([0, 1]), torch.tensor([0, 0, 1, 1]))
        >>> other = BlockTopology(torch.tensor([0, 1]), torch.tensor([1, 0, 0, 1]))
        >>> [s.tolist() for s in column_sources(one, other)]
        [[[1, -1], [-1, 1]]]
    """
    if not torch.equal(before.row_set, after.row_set) or not torch.equal(before.col_sizes, after.col_sizes):
        raise ValueError("the topologies differ in more than the places of their inputs")
    inputs = len(before.col_set)
    place = torch.full((inputs,), -1, device="cpu")
    for bucket in before.buckets:
        place[bucket.cols] = torch.arange(bucket.cols.shape[1], device="cpu").expand_as(bucket.cols)
    return [torch.where(before.col_set[b.cols] == b.sets[:, None], place[b.cols], -1) for b in after.buckets]


@torch.no_grad()
def move_columns_(blocks: Tensor, source: Tensor) -> None:
    """Give the columns of blocks other places, in place; zeros where a column has no source.

    Args:
        blocks: ``(blocks, r, c, *kernel)``.
        source: ``(blocks, c)``, from `column_sources`.

    Example:
        >>> blocks = torch.tensor([[[1.0, 2.0]]])
        >>> move_columns_(blocks, torch.tensor([[1, -1]]))
        >>> blocks.tolist()
        [[[2.0, 0.0]]]
    """
    # Block by block: a gather of all together takes an index as large as the values.
    for block, place in zip(blocks, source):
        values = block.index_select(1, place.clamp(min=0))
        block.copy_(values.index_fill_(1, (place < 0).nonzero().flatten(), 0))
