"""Compact from the start: block layers straight from a method's draws, without a dense weight in between."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod, sqrt

import torch
from torch import nn

from ..algorithms import Draw
from ..discovery import PrunableWeight
from ..prune import MaskPruning, attach_all
from ..replaced import warn_replaced
from ..seeds import named_generator
from ..topology import BlockTopology
from .autotune import run_by_rule
from .calls import to_channels_last
from .candidates import composites_of
from .eligible import Eligible, candidates, layers
from .forms import CompositeForm, Given, Ineligible, LayerForm, form_of, given_by, given_of
from .modules import BlockModule
from .swap import Changes, become, restore


def install(model: nn.Module, draws: Sequence[Draw], hook: type[MaskPruning], seed: int) -> None:
    """Put draws into a model as block layers, in place; layers that have no block form are masked instead.

    A model on the meta device is materialised on the CPU, block layers without ever holding a dense weight.

    Raises:
        ValueError: if a draw has no block structure, or something on the meta device cannot be initialised; the model
            is then as it was.
    """
    modules = dict(model.named_modules())
    _check_meta(modules, {draw.weight.module for draw in draws})
    forms, masked = _forms(model, modules, draws, seed)
    # A layer that becomes compact has new parameters; told before anything changes, as a warning may be an error.
    warn_replaced(
        [p for module, _ in forms for p in module._parameters.values() if p is not None and p.dim() > 1], "apply"
    )
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


def settle(model: nn.Module) -> list[nn.Module]:
    """Give the dense convolutions the memory format of the block ones; returns those that had another."""
    last = any(isinstance(m, BlockModule) and m.execution.channels_last for m in model.modules())
    return to_channels_last(model) if last else []


def _forms(
    model: nn.Module, modules: Mapping[str, nn.Module], draws: Sequence[Draw], seed: int
) -> tuple[list[tuple[nn.Module, nn.Module]], list[Draw]]:
    """The block forms to put in place, outer layers first, and the draws of what has none."""
    drawn = {(id(modules[draw.weight.module]), draw.weight.tensor): draw for draw in draws}

    def topologies(module: nn.Module, weight: PrunableWeight) -> tuple[BlockTopology, ...]:
        draw = drawn.get((id(module), weight.tensor))
        if draw is None or draw.weight.aliases:
            raise Ineligible(f"no block form of {weight.kind}.{weight.tensor}")
        if not draw.topologies:
            if isinstance(form_of(module), CompositeForm):
                raise Ineligible("the method chose no blocks")
            raise ValueError(
                f"{draw.weight.name}: the method chose no blocks, so there is no compact form; use form='masked'"
            )
        return draw.topologies

    def given(e: Eligible) -> Given:
        assert e.weight is not None
        return _given(e.module, drawn[id(e.module), e.weight.tensor])

    eligible = candidates(model, list(layers(model)), topologies=topologies, meta=True)
    several = composites_of(eligible, given)
    of = {(id(e.module), e.weight.tensor if e.weight is not None else None): e for e in eligible}
    single: list[tuple[nn.Module, nn.Module]] = []
    masked: list[Draw] = []
    for (module, tensor), draw in drawn.items():
        found = of.get((module, tensor)) or of.get((module, None))
        if found is None or isinstance(found.found, Ineligible):
            if getattr(modules[draw.weight.module], tensor).is_meta:
                reason = f"no block form of {draw.weight.kind}.{tensor}" if found is None else found.found
                raise ValueError(f"{draw.weight.name} is on the meta device and cannot be compact: {reason}")
            masked.append(draw)
        elif isinstance(found.form, LayerForm):
            single.append((found.module, _layer(found.module, found.form, draw, seed)))
    return [*several, *single], masked


def _given(module: nn.Module, draw: Draw) -> Given:
    weight = getattr(module, draw.weight.tensor)
    if draw.blocks:
        return given_by(draw, torch.empty(0, dtype=weight.dtype, device="cpu" if weight.is_meta else weight.device))
    if weight.is_meta:
        raise ValueError(f"{draw.weight.name} is on the meta device and has no values to keep")
    return replace(given_of(module, draw.weight, draw.topologies), masked=True)


def _layer(module: nn.Module, form: LayerForm, draw: Draw, seed: int) -> nn.Module:
    block = form.block(module, {"weight": _given(module, draw)})
    run_by_rule(block)
    bias = block._parameters["bias"]
    if bias is not None and bias.is_meta:
        bound = 1 / sqrt(draw.weight.matrix[1] * prod(draw.weight.kernel))
        generator = named_generator(seed, "bias", draw.weight.name)
        values = torch.rand(bias.shape, generator=generator, dtype=torch.float32, device="cpu")
        block._parameters["bias"] = nn.Parameter(((values * 2 - 1) * bound).to(bias.dtype), bias.requires_grad)
    return block


def _check_meta(modules: Mapping[str, nn.Module], drawn: set[str]) -> None:
    for path, module in modules.items():
        if path in drawn or _initialiser(module) is not None:
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
                initialise = _initialiser(module)
                assert initialise is not None
                initialise()


def _initialiser(module: nn.Module) -> Callable[[], None] | None:
    return getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
