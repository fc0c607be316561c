"""Layers with several weights: attention, recurrent layers and cells, experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ...discovery.kinds import is_experts, stored_weights
from ...prune import MaskPruning, refresh
from ...topology import BlockTopology
from ..modules import (
    BlockAttention,
    BlockComposite,
    BlockExperts,
    BlockGRU,
    BlockGRUCell,
    BlockLinear,
    BlockLSTM,
    BlockLSTMCell,
    BlockRNN,
    BlockRNNCell,
    Execution,
    child_name,
    joined_topology,
)
from .base import Form, Given, Ineligible, drop_weight, fields, parameter_of, reorder, weights_of

_OWN_FIELDS = ("_dense_class", "_compact_weights")
_EXPERTS = ("num_experts", "has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "down_proj")


class CompositeForm(Form):
    """A layer with several weights, each of which becomes a block layer: one for all its matrices.

    Args:
        stock: the dense class.
        block: the class that stands for it.
        apart: whether every matrix becomes a block layer of its own.
    """

    block_class: type[BlockComposite]

    def __init__(self, stock: type[nn.Module], block: type[BlockComposite], *, apart: bool = False) -> None:
        super().__init__(stock, block)
        self.apart = apart

    def block(self, module: nn.Module, given: Mapping[str, Given]) -> BlockComposite:
        """See `Form`."""
        new: BlockComposite = self.block_class.__new__(self.block_class)
        new.__dict__.update(fields(module))
        records = {}
        for weight in weights_of(module):
            own, parameter = given.get(weight.tensor), parameter_of(module, weight.tensor)
            if own is None or parameter is None:
                continue
            drop_weight(new, weight.tensor)
            new._modules[child_name(weight.tensor)] = self._children(own, parameter)
            records[weight.tensor] = weight
        new.__dict__.update(_dense_class=type(module), _compact_weights=records)
        return new

    def _children(self, own: Given, parameter: nn.Parameter) -> nn.Module:
        grad, count = parameter.requires_grad, len(own.topologies)
        if not self.apart or count == 1:
            topology, copies = stacked(own.topologies)
            layer = _linear(topology, copies, own.values(topology, None, copies), own.masked, grad)
            layer.__dict__["stacked"] = count // copies
            return layer
        parts = [own.values(topology, part, 1) for part, topology in enumerate(own.topologies)]
        return nn.ModuleList(_linear(t, 1, values, own.masked, grad) for t, values in zip(own.topologies, parts))

    def dense(self, module: nn.Module, masked: bool | None) -> nn.Module:
        """See `Form`."""
        assert isinstance(module, BlockComposite)
        kind: type[nn.Module] = module.__dict__["_dense_class"]
        new = kind.__new__(kind)
        new.__dict__.update(fields(module))
        for name in _OWN_FIELDS:
            new.__dict__.pop(name, None)
        masks: dict[str, Tensor] = {}
        for tensor in module.compact_weights:
            del new._modules[child_name(tensor)]
            layers = module.layers_of(tensor)
            with torch.no_grad():
                weight = self._stored(module, [layer.dense(layer.stored()) for layer in layers])
                mask = self._stored(module, [layer.dense(torch.ones_like(layer.stored())) for layer in layers])
            grad = any(layer.blocks.requires_grad for layer in layers)
            new._parameters[tensor] = nn.Parameter(weight, requires_grad=grad)
            if layers[0].__dict__.get("_masked", False) if masked is None else masked:
                masks[tensor] = mask
        reorder(new, self._order(new))
        self._complete(new)
        for tensor, mask in masks.items():
            MaskPruning.register(new, tensor, mask)
        if masks:
            refresh(new)
        return new

    def _order(self, new: nn.Module) -> list[str]:
        return [stored.tensor for stored in stored_weights(new)]

    def _complete(self, new: nn.Module) -> None:
        """Whatever else the dense layer holds."""

    def _stored(self, module: BlockComposite, matrices: list[Tensor]) -> Tensor:
        return torch.cat(matrices)


class AttentionForm(CompositeForm):
    """`torch.nn.MultiheadAttention`."""

    def __init__(self) -> None:
        super().__init__(nn.MultiheadAttention, BlockAttention, apart=True)

    def joins(self, module: nn.Module) -> tuple[nn.Module, ...]:
        """See `Form`."""
        return (module.out_proj,)  # type: ignore[return-value]

    def _order(self, new: nn.Module) -> list[str]:
        return [*super()._order(new), "in_proj_bias"]


class RecurrentForm(CompositeForm):
    """`torch.nn.RNNBase` of one kind."""

    def block(self, module: nn.Module, given: Mapping[str, Given]) -> BlockComposite:
        """See `Form`."""
        new = super().block(module, given)
        for name in ("_flat_weights", "_flat_weight_refs"):
            new.__dict__.pop(name, None)
        return new

    def _order(self, new: nn.Module) -> list[str]:
        names: list[str] = new._flat_weights_names  # type: ignore[assignment]
        return names

    def _complete(self, new: nn.Module) -> None:
        new._init_flat_weights()  # type: ignore[operator]


class ExpertsForm(CompositeForm):
    """Experts of transformers that run by one of its interchangeable implementations."""

    def __init__(self) -> None:
        super().__init__(nn.Module, BlockExperts, apart=True)

    def suits(self, module: nn.Module) -> bool:
        """See `Form`."""
        return is_experts(module)

    def check(self, module: nn.Module, *, meta: bool = False) -> None:
        """See `Form`; experts with a forward that only they know stay as they are."""
        gate = getattr(module, "has_gate", None)
        names = (*_EXPERTS, *(("gate_up_proj",) if gate else ("up_proj", "act_fn")))
        kind = type(module)
        known = all(hasattr(module, name) for name in names) and "forward" not in module.__dict__
        if not known or not hasattr(kind.forward, "__wrapped__") or not hasattr(kind, "_apply_gate"):
            raise Ineligible(f"the forward of {kind.__name__} reads its experts' weights in a way that is not known")
        if getattr(module, "_is_expert_parallel", False):
            raise Ineligible("its experts are spread over several devices")
        super().check(module, meta=meta)

    def _has_own_forward(self, module: nn.Module) -> bool:
        return False

    def _stored(self, module: BlockComposite, matrices: list[Tensor]) -> Tensor:
        weight = torch.stack(matrices)
        return weight.mT.contiguous() if module.is_transposed else weight


def stacked(topologies: Sequence[BlockTopology]) -> tuple[BlockTopology, int]:
    """One topology for matrices that read the same inputs, and how often it has every input.

    Where all have the same sets of inputs, blocks of several matrices stand one above the other in one block; else
    each matrix has the inputs for itself.

    Example:
        >>> from sao_prune.topology import interleaved
        >>> stacked([interleaved(4, 4, 2), interleaved(4, 4, 2)])
        (BlockTopology(8 x 4, groups=2, sparsity=50.0000%), 1)
    """
    if len(topologies) == 1:
        return topologies[0], 1
    labels = [_by_first_input(t) for t in topologies]
    if all(torch.equal(cols, labels[0][1]) for _, cols in labels):
        return BlockTopology(torch.cat([rows for rows, _ in labels]), labels[0][1]), 1
    return joined_topology(topologies), len(topologies)


def _by_first_input(topology: BlockTopology) -> tuple[Tensor, Tensor]:
    """The sets of outputs and of inputs, numbered by the first input of each."""
    groups, cols = topology.groups, topology.col_set
    first = cols.new_full((groups + 1,), len(cols))
    natural = torch.arange(len(cols), device=cols.device)
    first.scatter_reduce_(0, torch.where(cols < 0, groups, cols), natural, "amin")
    first[-1] = -1
    return first[topology.row_set], first[topology.col_set]


def _linear(topology: BlockTopology, copies: int, blocks: Tensor, masked: bool, grad: bool) -> BlockLinear:
    new = BlockLinear.__new__(BlockLinear)
    nn.Module.__init__(new)
    rows, cols = topology.shape
    new.__dict__.update(out_features=rows, in_features=cols // copies, copies=copies)
    new.__dict__.update(_masked=masked, execution=Execution())
    new.set_topology(topology, nn.Parameter(blocks.contiguous(), requires_grad=grad))
    new.register_parameter("bias", None)
    return new


COMPOSITES: tuple[CompositeForm, ...] = (
    AttentionForm(),
    RecurrentForm(nn.LSTM, BlockLSTM),
    RecurrentForm(nn.GRU, BlockGRU),
    RecurrentForm(nn.RNN, BlockRNN),
    CompositeForm(nn.LSTMCell, BlockLSTMCell),
    CompositeForm(nn.GRUCell, BlockGRUCell),
    CompositeForm(nn.RNNCell, BlockRNNCell),
    ExpertsForm(),
)
