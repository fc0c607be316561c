"""What turns a kind of layer into its block form and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod

from ..._torch import ConvNd
from ...algorithms import Draw
from ...discovery import PrunableWeight, is_standardised
from ...discovery.kinds import stored_weights
from ...prune import RefreshAll, RefreshChildren
from ...prune.standardised import Centring
from ...topology import BlockTopology, NotBlockStructuredError
from ..absorbed import OWNERS
from ..layout import layout_of_topology
from ..modules import block_slots, blocks_shape, joined_topology, stack_blocks

# Layers whose own forward computes what that of their stock class does.
_ALIKE = frozenset(("transformers.models.falcon.modeling_falcon.FalconLinear",))
_HOOKS = ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks")

# The blocks of one topology from a weight with several matrices: of one part, or of all, each with inputs of its own
# (as many copies as the topology has) or the same.
Values = Callable[[BlockTopology, "int | None", int], Tensor]


class Ineligible(ValueError):
    """A layer that has to stay as it is; the message says why."""


@dataclass(frozen=True)
class Given:
    """What one weight's block form is made from.

    Attributes:
        topologies: one a matrix of the weight.
        values: where the blocks' values come from.
        masked: whether `sao_prune.expand` gives it a mask again.
    """

    topologies: tuple[BlockTopology, ...]
    values: Values
    masked: bool


class Form(ABC):
    """One kind of layer: which modules it is of, their block form, and the way back.

    Args:
        stock: the dense class.
        block: the class that stands for it.
    """

    def __init__(self, stock: type[nn.Module], block: type[nn.Module]) -> None:
        self.stock, self.block_class = stock, block

    def suits(self, module: nn.Module) -> bool:
        """Whether a dense module is of this kind."""
        return isinstance(module, self.stock)

    def joins(self, module: nn.Module) -> tuple[nn.Module, ...]:
        """Layers inside it whose weight it reads without calling them, unless it is in its block form."""
        return ()

    def check(self, module: nn.Module, *, meta: bool = False) -> None:
        """Refuse a layer whose forward is its own, or whose weights are more than parameters and at most masks.

        Raises:
            Ineligible: telling why.
        """
        if self._has_own_forward(module):
            raise Ineligible(f"{type(module).__name__} has a forward of its own")
        _check_state(module, {weight.tensor for weight in weights_of(module)}, meta)

    def _has_own_forward(self, module: nn.Module) -> bool:
        kind = OWNERS.get(type(module), type(module))
        alike = kind.forward is self.stock.forward or f"{kind.__module__}.{kind.__qualname__}" in _ALIKE
        own = "forward" in module.__dict__ or not alike
        return own or getattr(kind, "_conv_forward", None) is not getattr(self.stock, "_conv_forward", None)

    @abstractmethod
    def block(self, module: nn.Module, given: Mapping[str, Given]) -> nn.Module:
        """The block form, with those of its weights as blocks that are given; the module itself is not touched."""

    @abstractmethod
    def dense(self, module: nn.Module, masked: bool | None) -> nn.Module:
        """The dense layer of a block form, its weights masked or baked, or as they were; the form is not touched."""


def weights_of(module: nn.Module) -> list[PrunableWeight]:
    """The weights of one dense layer that are there."""
    found = []
    for stored in stored_weights(module):
        weight = parameter_of(module, stored.tensor)
        if weight is not None and not isinstance(weight, nn.parameter.UninitializedParameter):
            shape, kind = tuple(weight.shape), OWNERS.get(type(module), type(module)).__name__
            standardised = is_standardised(module)
            found.append(PrunableWeight("", kind=kind, shape=shape, **stored._asdict(), standardised=standardised))
    return found


def parameter_of(module: nn.Module, tensor: str) -> nn.Parameter | None:
    """The parameter that holds a weight's values, masked or not."""
    own = module._parameters.get(f"{tensor}_orig")
    return own if own is not None else module._parameters.get(tensor)


def _check_state(module: nn.Module, tensors: set[str], meta: bool = False) -> None:
    """Refuse a layer with hooks or a computed weight; ``meta`` allows one on the meta device.

    Raises:
        Ineligible: if a weight is more than a parameter and at most a mask.
    """
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in module._parameters.values()):
        raise Ineligible("not initialised yet (lazy): run the model once first")
    if parametrize.is_parametrized(module):
        raise Ineligible("its weight is parametrized")
    ours = (RefreshAll, RefreshChildren, Centring)
    hooks = [h for h in module._forward_pre_hooks.values() if not isinstance(h, ours)]
    foreign = [h for h in hooks if not isinstance(h, BasePruningMethod)]
    foreign += [h for field in _HOOKS for h in getattr(module, field).values() if not _is_centring(h)]
    if foreign:
        raise Ineligible(f"it has a hook: {getattr(foreign[0], '__name__', type(foreign[0]).__name__)}")
    pruned = {h._tensor_name for h in hooks if isinstance(h, BasePruningMethod)}
    if not tensors:
        raise Ineligible("its weight is not a parameter")
    if not pruned <= tensors:
        raise Ineligible("its bias is pruned")
    for tensor in tensors:
        weight = module._parameters.get(f"{tensor}_orig" if tensor in pruned else tensor)
        if weight is None:
            raise Ineligible("its weight is not a parameter")
        if weight.is_meta and not meta:
            raise Ineligible("its weight is on the meta device, so it has no zeros to read")
        if not weight.is_floating_point():
            raise Ineligible(f"not a floating-point weight ({weight.dtype})")


def _is_centring(hook: Any) -> bool:
    """Whether a hook is one of a layer that standardises its weight."""
    return isinstance(getattr(hook, "__self__", hook), Centring)


def read_topologies(module: nn.Module, weight: PrunableWeight) -> tuple[BlockTopology, ...]:
    """The topology of every matrix of a weight, from its mask or from its zeros.

    Raises:
        Ineligible: if it has none.
    """
    mask = module._buffers.get(f"{weight.tensor}_mask")
    source = module._parameters[weight.tensor] if mask is None else mask
    assert source is not None
    entries = weight.matrices(source.detach() != 0)
    units = entries.flatten(3).any(3) if entries.dim() > 3 else entries
    if mask is not None and entries.dim() > 3 and not torch.equal(units, entries.flatten(3).all(3)):
        raise Ineligible("its mask cuts inside kernels; blocks keep whole kernels")
    if bool(units.all()):
        raise Ineligible("dense: nothing in it is pruned")
    try:
        topologies = tuple(BlockTopology.from_mask(part) for part in units)
    except NotBlockStructuredError as error:
        raise Ineligible(str(error)) from None
    if not any(t.groups for t in topologies):
        raise Ineligible("nothing is left in it")
    packed = _packed_size(topologies, isinstance(module, ConvNd))
    if packed >= units.numel():
        # A dead channel of a depthwise convolution, for one.
        kernels = " kernels" if entries.dim() > 3 else ""
        raise Ineligible(f"as blocks it would be no smaller: {packed:,}{kernels} for {units.numel():,}")
    return topologies


def _packed_size(topologies: Sequence[BlockTopology], joined: bool) -> int:
    """How many units the blocks take, with what pads them to one width; ``joined`` as those of one layer."""
    each = [joined_topology(topologies)] if joined else topologies
    return sum(layout_of_topology(topology).size for topology in each if topology.groups)


def given_of(module: nn.Module, weight: PrunableWeight, topologies: tuple[BlockTopology, ...]) -> Given:
    """A weight's own values, in blocks of these topologies."""

    def read(topology: BlockTopology, part: int | None, copies: int) -> Tensor:
        parameter = parameter_of(module, weight.tensor)
        assert parameter is not None
        return gather(weight, parameter.detach(), topology, part, copies)

    return Given(topologies, read, f"{weight.tensor}_mask" in module._buffers)


def gather(weight: PrunableWeight, tensor: Tensor, topology: BlockTopology, part: int | None, copies: int) -> Tensor:
    """The blocks of a dense weight; see `Values`."""
    matrices = weight.matrices(tensor)
    source = matrices.flatten(0, 1) if part is None else matrices[part]
    slots = block_slots(topology, copies).to(source.device)
    return source.flatten(0, 1)[slots].reshape(blocks_shape(topology, weight.kernel))


def given_by(draw: Draw, like: Tensor) -> Given:
    """A draw's values, of the type and on the device of ``like``."""

    def lifted(values: Tensor) -> Tensor:
        kernel = draw.weight.kernel
        if kernel and values.dim() == 3:
            taps = values.new_zeros(*values.shape, *kernel)
            centre: Any = (..., *(k // 2 for k in kernel))
            taps[centre] = values
            return taps
        return values.reshape(*values.shape[:3], *kernel)

    def read(topology: BlockTopology, part: int | None, copies: int) -> Tensor:
        parts = draw.weight.parts
        if part is None and parts > 1 and copies != parts:
            # The matrices share their inputs' sets, so that blocks of several of them are one.
            dense = torch.zeros(draw.weight.shape, dtype=like.dtype, device="cpu")
            draw.write_(dense)
            return gather(draw.weight, dense, topology, None, copies).to(like)
        by_shape: dict[tuple[int, int], list[Tensor]] = {}
        for values in (v for blocks in (draw.blocks if part is None else [draw.blocks[part]]) for v in blocks):
            by_shape.setdefault((values.shape[1], values.shape[2]), []).append(lifted(values))
        found = [torch.cat(by_shape[bucket.shape[1:]]) for bucket in topology.buckets]
        return stack_blocks(topology, found).clone().to(like)

    return Given(draw.topologies, read, True)


def given_empty(topologies: tuple[BlockTopology, ...], kernel: tuple[int, ...], like: Tensor, masked: bool) -> Given:
    """Blocks without values yet."""

    def read(topology: BlockTopology, part: int | None, copies: int) -> Tensor:
        return torch.empty(blocks_shape(topology, kernel), dtype=like.dtype, device=like.device)

    return Given(topologies, read, masked)


def fields(module: nn.Module) -> dict[str, Any]:
    """A module's attributes, its registries copied one level deep."""
    return {k: v.copy() if isinstance(v, dict) else v for k, v in module.__dict__.items()}


def drop_weight(module: nn.Module, tensor: str) -> None:
    """Take a weight out of a module: parameter, mask and hooks."""
    for name in (tensor, f"{tensor}_orig"):
        module._parameters.pop(name, None)
    module._buffers.pop(f"{tensor}_mask", None)
    module.__dict__.pop(tensor, None)
    for key, hook in list(module._forward_pre_hooks.items()):
        if (isinstance(hook, BasePruningMethod) and hook._tensor_name == tensor) or _is_centring(hook):
            del module._forward_pre_hooks[key]
    for key, hook in list(module._forward_hooks.items()):
        if _is_centring(hook):
            del module._forward_hooks[key]


def reorder(module: nn.Module, first: list[str]) -> None:
    """Register these parameters before the others, as the stock layers do: optimizers number parameters in order."""
    own = module._parameters
    for name in [*(n for n in first if n in own), *(n for n in list(own) if n not in first)]:
        own[name] = own.pop(name)
