"""The permutations behind a model's block topologies, as tables."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from .blocks.modules import BlockModule
from .discovery import ALREADY_PRUNED, Selection, walk
from .sites import mask_units
from .topology import BlockTopology, NotBlockStructuredError


@dataclass(frozen=True)
class BlockOrder:
    """The orders of a matrix's channels in which it is block-diagonal.

    Attributes:
        rows: output channels, block after block; those joined to nothing are left out.
        cols: input channels, block after block.
        row_sizes: outputs of each block.
        col_sizes: inputs of each block.
    """

    rows: Tensor
    cols: Tensor
    row_sizes: Tensor
    col_sizes: Tensor


def permutations(model: nn.Module) -> dict[str, tuple[BlockOrder, ...]]:
    """The row and column permutation of every weight that is made of blocks, masked or compact; what `Rewire` learned.

    Returns:
        By full name of the weight one `BlockOrder` a matrix: groups of a convolution, gates, experts have one each.

    Raises:
        TypeError: if the model is no module.

    Example:
        >>> import torch, sao_prune
        >>> net = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3)))
        >>> _ = sao_prune.apply(net, groups=4, seed=0)
        >>> (order,) = permutations(net)["1.weight"]
        >>> weight = net[1].weight[order.rows][:, order.cols]
        >>> blocks = torch.block_diag(*(weight[i : i + 2, i : i + 2] for i in range(0, 8, 2)))
        >>> torch.equal(weight, blocks)
        True
    """
    tables = {}
    for weight in walk(model, Selection(skip_first=False, skip_last=False)):
        if weight.reason == ALREADY_PRUNED:
            mask = getattr(model.get_submodule(weight.module), f"{weight.tensor}_mask")
            try:
                parts = [BlockTopology.from_mask(part) for part in mask_units(weight, mask)]
            except NotBlockStructuredError:
                continue
            tables[weight.name] = tuple(_order(part) for part in parts)
    for path, module in model.named_modules():
        if isinstance(module, BlockModule):
            tables[f"{path}.weight" if path else "weight"] = (_order(module.topology),)
    return tables


def _order(topology: BlockTopology) -> BlockOrder:
    return BlockOrder(topology.row_order, topology.col_order, topology.row_sizes, topology.col_sizes)
