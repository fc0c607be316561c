"""What a model's weights cost to store: dense, as CSR, and as blocks (thesis section 4.5, figure 4.25)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..blocks import BlockModule
from ..discovery import PrunableWeight, Selection, walk
from ..topology import BlockTopology, NotBlockStructuredError


@dataclass(frozen=True)
class LayerStorage:
    """Numbers to store for one weight in each scheme; a matrix of kernels counts whole kernels as values.

    Attributes:
        name: parameter name.
        values: weights that stay.
        dense: all weights.
        csr: values, a column for each edge, and row pointers: ``nnz + edges + rows + 1``, ``2 nnz + rows + 1`` for a
            matrix.
        blocks: values, the order of the inputs and the degree: ``nnz + cols + 1``; where outputs are in no strided or
            contiguous order, ``rows`` more. ``None`` where there are no blocks.
        itemsize: bytes of one value.
    """

    name: str
    values: int
    dense: int
    csr: int
    blocks: int | None
    itemsize: int


@dataclass(frozen=True)
class Storage:
    """The layers' storage and its sums; parameters that are no layer's weight are in none of them."""

    layers: tuple[LayerStorage, ...]

    @property
    def dense(self) -> int:
        """Numbers of the dense weights."""
        return sum(layer.dense for layer in self.layers)

    @property
    def csr(self) -> int:
        """Numbers in compressed sparse rows, for layers where that is less than dense."""
        return sum(min(layer.csr, layer.dense) for layer in self.layers)

    @property
    def blocks(self) -> int:
        """Numbers as blocks, where there are blocks; else the lesser of dense and CSR."""
        return sum(min(layer.csr, layer.dense) if layer.blocks is None else layer.blocks for layer in self.layers)

    def bytes(self, scheme: str, index_bytes: int = 4) -> int:
        """Bytes in a scheme, with indices of ``index_bytes`` each.

        Raises:
            ValueError: for a scheme other than ``dense``, ``csr`` and ``blocks``.
        """
        if scheme not in ("dense", "csr", "blocks"):
            raise ValueError(f"scheme must be 'dense', 'csr' or 'blocks', got {scheme!r}")
        return sum(_bytes(layer, scheme, index_bytes) for layer in self.layers)


def _bytes(layer: LayerStorage, scheme: str, index_bytes: int) -> int:
    dense = layer.dense * layer.itemsize
    numbers = layer.blocks if scheme == "blocks" and layer.blocks is not None else layer.csr
    sparse = layer.values * layer.itemsize + (numbers - layer.values) * index_bytes
    if scheme == "dense":
        return dense
    return sparse if scheme == "blocks" and layer.blocks is not None else min(sparse, dense)


def storage(model: nn.Module) -> Storage:
    """Count what storing a model's weights takes in each scheme, from masks, zeros or blocks.

    Args:
        model: dense, masked, baked or compact.

    Returns:
        A `Storage`.

    Example:
        >>> import torch, sao_prune
        >>> net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
        >>> _ = sao_prune.apply(net, groups=16, seed=0)
        >>> layer = storage(net).layers[1]
        >>> layer.dense, layer.csr, layer.blocks
        (4096, 577, 321)
    """
    layers = []
    modules = dict(model.named_modules())
    for weight in walk(model, Selection(skip_first=False, skip_last=False)):
        module = modules[weight.module]
        tensor = module._buffers.get(f"{weight.tensor}_mask")
        tensor = module._parameters.get(weight.tensor) if tensor is None else tensor
        if tensor is not None and weight.shape and not tensor.is_meta:
            layers.append(_count(weight, tensor.detach(), module))
    for path, module in modules.items():
        if isinstance(module, BlockModule):
            name = f"{path}.weight" if path else "weight"
            record = PrunableWeight(path, "weight", type(module).__name__, module.weight_shape, module.parts)
            with torch.no_grad():
                layers.append(_count(record, _support(module.weight_shape, module.topology), module, name))
    return Storage(tuple(layers))


def _support(shape: tuple[int, ...], topology: BlockTopology) -> Tensor:
    """Where a compact layer's blocks are, zeros of their values included."""
    rows, width = shape[:2]
    local = torch.zeros(rows, width, dtype=torch.bool, device="cpu")
    full = topology.mask()
    parts = full.shape[1] // width
    for part in range(parts):
        own = slice(part * rows // parts, (part + 1) * rows // parts)
        local[own] = full[own, part * width : (part + 1) * width]
    return local.reshape(*local.shape, *(1,) * len(shape[2:])).expand(shape)


def _count(weight: PrunableWeight, tensor: Tensor, module: nn.Module, name: str | None = None) -> LayerStorage:
    entries = weight.matrices(tensor != 0)
    units = entries.flatten(3).any(3) if weight.kernel else entries
    kernel = weight.numel // units.numel()
    edges, rows, cols = int(units.sum()), weight.matrix[0], weight.matrix[1]
    values = edges * kernel
    csr = values + edges + weight.parts * (rows + 1)
    blocks = None
    if edges < units.numel():
        try:
            topologies = [BlockTopology.from_mask(part) for part in units]
            blocks = values + sum(_order(t, cols, rows) for t in topologies)
        except NotBlockStructuredError:
            pass
    dtype = next((p for p in module.parameters(recurse=False)), tensor).dtype
    return LayerStorage(name or weight.name, values, weight.numel, csr, blocks, dtype.itemsize)


def _order(topology: BlockTopology, cols: int, rows: int) -> int:
    """Numbers for the orders and the degree: one side is contiguous or strided and needs none."""
    regular = any(_is_regular(sets, topology.groups) for sets in (topology.row_set, topology.col_set))
    longer = cols if _is_regular(topology.row_set, topology.groups) else rows
    return longer + 1 if regular else cols + rows + 1


def _is_regular(sets: Tensor, groups: int) -> bool:
    """Whether the sets are contiguous or dealt in turn, so that their number alone tells them."""
    number = torch.arange(len(sets), device=sets.device)
    return torch.equal(sets, number % groups) or bool((sets.diff() >= 0).all())
