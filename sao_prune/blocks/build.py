"""Compact from the start: block layers straight from a method's draws, without a dense weight in between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from ..algorithms import Draw
from ..prune import MaskPruning, attach_all
from ..seeds import named_generator
from ..topology import BlockTopology
from .autotune import default_execution
from .calls import to_channels_last
from .eligible import Ineligible, check_state, dense_class, read_from_outside
from .modules import BlockModule, joined_topology, stack_blocks
from .swap import Changes, become, block_form, restore


def install(model: nn.Module, draws: Sequence[Draw], hook: type[MaskPruning], seed: int) -> None:
    """Put draws into a model as block layers, in place; layers that have no block form are masked instead.

    A model on the meta device is materialised on the CPU, block layers without ever holding a dense weight.

    Raises:
        ValueError: if a draw has no block structure, or something on the meta device cannot be initialised; the model
            is then as it was.
    """
    modules = dict(model.named_modules())
    outside = read_from_outside(model)
    _check_meta(modules, {draw.weight.module for draw in draws})
    forms: list[tuple[nn.Module, nn.Module]] = []
    masked: list[Draw] = []
    for draw in draws:
        module = modules[draw.weight.module]
        try:
            if draw.weight.tensor != "weight" or draw.weight.aliases or id(module) in outside:
                raise Ineligible(outside.get(id(module), f"no block form of {draw.weight.kind}.{draw.weight.tensor}"))
            dense_class(module)
            check_state(module, meta=True)
            forms.append((module, _form(module, draw, seed)))
        except Ineligible as reason:
            if getattr(module, draw.weight.tensor).is_meta:
                raise ValueError(f"{draw.weight.name} is on the meta device and cannot be compact: {reason}") from None
            masked.append(draw)
    changes: Changes = []
    try:
        for module, form in forms:
            changes.append(become(module, form))
        _materialise(modules, seed)
    except BaseException:
        restore(changes)
        raise
    try:
        attach_all(modules, masked, hook)
    except BaseException:
        restore(changes)
        raise
    settle(model)


def settle(model: nn.Module) -> None:
    """Give the dense convolutions the memory format of the block ones."""
    if any(isinstance(m, BlockModule) and m.execution.channels_last for m in model.modules()):
        to_channels_last(model)


def _form(module: nn.Module, draw: Draw, seed: int) -> nn.Module:
    if not draw.topologies:
        raise ValueError(
            f"{draw.weight.name}: the method chose no blocks, so there is no compact form; use form='masked'"
        )
    topology = joined_topology(draw.topologies)
    weight = module._parameters["weight"]
    assert weight is not None
    blocks = None
    if draw.blocks:
        device = torch.device("cpu") if weight.is_meta else weight.device
        blocks = _blocks(topology, draw, tuple(weight.shape[2:])).to(device, weight.dtype)
    elif weight.is_meta:
        raise ValueError(f"{draw.weight.name} is on the meta device and has no values to keep")
    form = block_form(module, topology, blocks)
    form.run_as(default_execution(form))
    form.__dict__["_masked"] = True
    bias = form._parameters["bias"]
    if bias is not None and bias.is_meta:
        bound = 1 / sqrt(torch.Size(weight.shape[1:]).numel())
        values = torch.rand(bias.shape, generator=named_generator(seed, "bias", draw.weight.name))
        form._parameters["bias"] = nn.Parameter(((values * 2 - 1) * bound).to(bias.dtype), bias.requires_grad)
    return form


def _blocks(topology: BlockTopology, draw: Draw, kernel: tuple[int, ...]) -> Tensor:
    """The draw's values in the order of the joined topology's buckets, lifted to the kernel."""
    centre: Any = (..., *(k // 2 for k in kernel))
    by_shape: dict[tuple[int, int], list[Tensor]] = {}
    for values in (v for part in draw.blocks for v in part):
        if kernel and values.dim() == 3:
            lifted = values.new_zeros(*values.shape, *kernel)
            lifted[centre] = values
            values = lifted
        values = values.reshape(*values.shape[:3], *kernel)
        by_shape.setdefault((values.shape[1], values.shape[2]), []).append(values)
    return stack_blocks(topology, [torch.cat(by_shape[bucket.shape[1:]]) for bucket in topology.buckets]).clone()


def _check_meta(modules: Mapping[str, nn.Module], drawn: set[str]) -> None:
    for path, module in modules.items():
        if path in drawn or hasattr(module, "reset_parameters"):
            continue
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and tensor.is_meta:
                raise ValueError(
                    f"{path}.{name} is on the meta device, and {type(module).__name__} has no reset_parameters() to "
                    "initialise it with: build the model on a real device"
                )


def _materialise(modules: Mapping[str, nn.Module], seed: int) -> None:
    """Initialise what is still on the meta device, as each module does it itself, from a seed of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in modules.values():
            own = (*module._parameters.values(), *module._buffers.values())
            if any(tensor is not None and tensor.is_meta for tensor in own):
                module.to_empty(device="cpu", recurse=False)
                module.reset_parameters()  # type: ignore[operator]
