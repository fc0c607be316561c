"""Where a `Pruner` works: a masked parameter, or the blocks of a compact layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .algorithms import Draw
from .blocks.modules import BlockModule
from .blocks.modules.base import stack_blocks
from .discovery import PrunableWeight
from .optimizers import state_of
from .prune import refresh
from .prune.listening import Listener, listen, stop_listening
from .topology import BlockTopology, encode_sets
from .weights import Blocks
from .weights.rewire import column_sources, move_columns_


class Site:
    """One weight that changes while it trains.

    Args:
        model: whose it is.
        weight: the weight.
        fine: whether single taps of kernels come and go.
    """

    def __init__(self, model: nn.Module, weight: PrunableWeight, fine: bool) -> None:
        self._model, self.weight, self._fine = model, weight, fine
        self._listener: Listener | None = None

    @property
    def parameter(self) -> nn.Parameter:
        """What the optimizer trains.

        Raises:
            RuntimeError: if it is not there any more.
        """
        raise NotImplementedError

    def units(self) -> Tensor:
        """What stays now, on the CPU: ``(parts, m, n)``, with the kernel's taps where those come and go singly."""
        raise NotImplementedError

    def topologies(self) -> tuple[BlockTopology, ...] | None:
        """The topology of every part, where it is known without looking for one in the mask."""
        return None

    def values(self) -> Tensor:
        """The weight, zeros included."""
        raise NotImplementedError

    def prepare(self, draw: Draw) -> Any:
        """All of a draw that can fail, touching nothing."""
        raise NotImplementedError

    def write(self, draw: Draw, prepared: Any, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Carry out a draw: values, gradient and the optimizers' state."""
        raise NotImplementedError

    def listen(self) -> None:
        """Write the gradients of the next passes down as if the weight were dense."""
        self._listener = Listener()

    def stop(self) -> None:
        """Write no more gradients down."""
        self._listener = None

    @property
    def gradient(self) -> Tensor | None:
        """What was written down."""
        return None if self._listener is None else self._listener.gradient


class MaskedSite(Site):
    """A parameter under a mask."""

    @property
    def parameter(self) -> nn.Parameter:
        weight = self.weight
        parameter = self._model.get_submodule(weight.module)._parameters.get(f"{weight.tensor}_orig")
        if parameter is None:
            raise RuntimeError(
                f"{weight.name} is no masked parameter any more (removed, held, compact or parametrized): let the "
                "pruner finish before, or stop calling its step"
            )
        return parameter

    def _mask(self) -> Tensor:
        mask: Tensor = getattr(self._model.get_submodule(self.weight.module), f"{self.weight.tensor}_mask")
        return mask

    def units(self) -> Tensor:
        return mask_units(self.weight, self._mask(), self._fine)

    def values(self) -> Tensor:
        return self.parameter.detach() * self._mask()

    def masked_like(self, other: MaskedSite) -> bool:
        """Whether it has a mask of the shape that another layer's has."""
        shape, modules = other._mask().shape, dict(self._model.named_modules())
        for path, tensor in ((self.weight.module, self.weight.tensor), *self.weight.aliases):
            mask = getattr(modules.get(path), f"{tensor}_mask", None)
            if not isinstance(mask, Tensor) or mask.shape != shape:
                return False
        return True

    @torch.no_grad()
    def follow(self, other: MaskedSite) -> None:
        """Take over the mask of the same layer in another model."""
        mask = other._mask().to(self._mask())
        self.parameter.data.mul_(mask.to(self.parameter.dtype))
        for path, tensor in ((self.weight.module, self.weight.tensor), *self.weight.aliases):
            module = self._model.get_submodule(path)
            getattr(module, f"{tensor}_mask").copy_(mask)
            refresh(module)

    def settle(self) -> None:
        """Make the parameter zero outside its mask, so that entries that come start there."""
        self.parameter.data.mul_(self._mask())

    def prepare(self, draw: Draw) -> Tensor:
        return draw.mask(self.parameter.detach())

    def write(self, draw: Draw, prepared: Tensor, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        weight, original = self.weight, self.parameter
        kept = prepared * self._mask()
        original.data.mul_(kept)
        draw.write_(original.data)
        original.data.mul_(prepared)
        if original.grad is not None:
            original.grad.mul_(kept.to(original.grad.dtype))
        for value in state_of(optimizers, original):
            value.mul_(kept.to(value.dtype))
        for path, tensor in ((weight.module, weight.tensor), *weight.aliases):
            module = self._model.get_submodule(path)
            getattr(module, f"{tensor}_mask").copy_(prepared)
            refresh(module)

    def listen(self) -> None:
        super().listen()
        assert self._listener is not None
        for path, tensor in ((self.weight.module, self.weight.tensor), *self.weight.aliases):
            listen(self._model.get_submodule(path), tensor, self._listener)

    def stop(self) -> None:
        super().stop()
        for path, tensor in ((self.weight.module, self.weight.tensor), *self.weight.aliases):
            stop_listening(self._model.get_submodule(path), tensor)


class CompactSite(Site):
    """The blocks of a compact layer whose inputs change places.

    No dense weight is stored, but one is made for a moment where scores are computed.
    """

    _hook: Any = None

    @property
    def _layer(self) -> BlockModule:
        layer = self._model.get_submodule(self.weight.module)
        if not isinstance(layer, BlockModule):
            raise RuntimeError(
                f"{self.weight.module} is no compact layer any more: let the pruner finish before it is expanded, or "
                "stop calling its step"
            )
        return layer

    @property
    def parameter(self) -> nn.Parameter:
        blocks = self._layer._parameters.get("blocks")
        if blocks is None:
            raise RuntimeError(
                f"{self.weight.name} is held or parametrized: blocks that are kept orthogonal cannot move; call "
                "sao_prune.release(model) first, or stop calling the pruner's step"
            )
        return blocks

    def units(self) -> Tensor:
        return self._layer.topology.mask()[None]

    def topologies(self) -> tuple[BlockTopology, ...]:
        return (self._layer.topology,)

    def values(self) -> Tensor:
        return self._layer.weight.detach()

    def prepare(self, draw: Draw) -> tuple[BlockTopology, BlockTopology, Tensor | None]:
        before, (after,) = self._layer.topology, draw.topologies
        values = None
        if draw.matrices is not None:
            matrix = draw.matrices[0].to(self.parameter)
            values = stack_blocks(after, _gathered(after, matrix)).view(self.parameter.shape)
        return before, after, values

    def write(
        self,
        draw: Draw,
        prepared: tuple[BlockTopology, BlockTopology, Tensor | None],
        optimizers: Sequence[torch.optim.Optimizer],
    ) -> None:
        layer, (before, after, values) = self._layer, prepared
        _move_inputs(layer, before, after, state_of(optimizers, layer.blocks))
        if values is not None:
            layer.blocks.data.copy_(values)

    def listen(self) -> None:
        self.stop()
        super().listen()
        # A hook also keeps the layer from computing an epilogue in its own forward.
        self._hook = self._layer.register_forward_hook(self._note)

    def stop(self) -> None:
        super().stop()
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _note(self, layer: Any, inputs: Any, output: Any) -> None:
        # A layer that was expanded takes its hooks along.
        if not isinstance(layer, BlockModule) or self._listener is None:
            return
        if not isinstance(output, Tensor) or not output.requires_grad:
            return
        x, listener = inputs[0].detach(), self._listener

        def told(gradient: Tensor) -> None:
            weight = torch.zeros(layer.weight_shape, device=x.device, dtype=gradient.dtype, requires_grad=True)
            with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
                y = layer.dense_forward(x.to(gradient.dtype), weight)
                listener(*torch.autograd.grad(y, weight, gradient.detach()))

        output.register_hook(told)


def _move_inputs(layer: BlockModule, before: BlockTopology, after: BlockTopology, states: list[Tensor]) -> None:
    """Give a compact layer's inputs other places, in place: what came to a block starts at zero, without a gradient.

    Args:
        layer: with the topology ``before``.
        before: its topology.
        after: another with the same outputs in every set and as many inputs.
        states: tensors of the shape of the blocks, an optimizer's state, that move along.
    """
    sources = [s.to(layer.blocks.device) for s in column_sources(before, after)]
    layer.blocks.grad = None
    for tensor in (layer.blocks.data, *states):
        whole = tensor.contiguous()
        rest = whole.view(-1, *tensor.shape[3:] if len(before.buckets) == 1 else tensor.shape[2:])
        for bucket, source in zip(before.buckets, sources):
            groups, rows, cols = bucket.shape
            own, rest = rest[: groups * rows * cols], rest[groups * rows * cols :]
            move_columns_(own.view(groups, rows, cols, *own.shape[1:]), source)
        if whole is not tensor:
            tensor.copy_(whole)
    layer.row_set.copy_(encode_sets(after.row_set))
    layer.col_set.copy_(encode_sets(after.col_set))


def site_of(model: nn.Module, weight: PrunableWeight, fine: bool) -> Site:
    """The site of a weight, by what its module is."""
    compact = isinstance(model.get_submodule(weight.module), BlockModule)
    return (CompactSite if compact else MaskedSite)(model, weight, fine)


def mask_units(weight: PrunableWeight, mask: Tensor, fine: bool = False) -> Tensor:
    """The units of a mask, on the CPU; without ``fine`` a kernel is there as a whole or not at all."""
    stacked = weight.matrices(mask != 0)
    return (stacked.flatten(3).any(3) if weight.kernel and not fine else stacked).cpu()


def _gathered(topology: BlockTopology, matrix: Tensor) -> Blocks:
    """Block values ``(blocks, r, c, *kernel)`` of ``(m, n, *kernel)``."""
    flat = matrix.flatten(0, 1)
    return tuple(
        flat[index.to(flat.device)].view(*bucket.shape, *flat.shape[1:])
        for index, bucket in zip(topology.flat_index, topology.buckets)
    )
