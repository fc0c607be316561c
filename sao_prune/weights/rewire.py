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
