"""The weights of any model to prune, in execution order, and why others are skipped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from ..naming import dotted
from .adapters import adapter_reason
from .endpoints import first_and_last, gives_output, image_channels, reads_input, token_embeddings
from .kinds import Packed, known_weights, parameter_of, raw_weight, stored_weights, unmasked_name
from .lazy import initialised
from .selection import EXCLUDED, NOT_INCLUDED, Selection, Selector, check_patterns, names_parameter, selected
from .ties import merge_tied
from .trace import first_uses
from .weight import ALREADY_PRUNED, RAW, PrunableWeight


def walk(model: nn.Module, selection: Selection | None = None) -> list[PrunableWeight]:
    """Find every prunable weight of a model, and every other one of those layers with the reason it is skipped.

    Linear, convolutions of 1 to 3 dimensions (grouped and transposed too), the projections of
    `torch.nn.MultiheadAttention`, recurrent layers and cells, experts held in one parameter, and raw parameters named
    in ``include``; `untouched` tells of all other parameters. Works on the meta device and touches no weight.

    Args:
        model: any module.
        selection: which layers to take.

    Returns:
        One record a weight, tied weights once; in execution order if ``selection.example_input`` is given.

    Raises:
        TypeError: if ``model`` is no module.
        ValueError: if a pattern matches nothing, or the example input does not run.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> [(w.name, w.reason) for w in walk(net)]
        [('0.weight', 'first layer'), ('2.weight', None), ('4.weight', 'last layer')]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    selection = selection or Selection()
    model = initialised(model, selection.example_input)
    modules = dict(model.named_modules())
    known = [weight for path, module in modules.items() for weight in known_weights(path, module)]
    found = merge_tied(modules, [*known, *_raw_parameters(model, modules, selection.include)])
    check_patterns("include", selection.include, found)
    check_patterns("exclude", selection.exclude, found)
    unused: set[str] = set()
    if selection.example_input is None:
        embedded = _embedding_registered_first(modules, {weight.module for weight in known})
    else:
        found, embedded, unused = _in_execution_order(model, modules, found, selection.example_input)
        known = [weight for weight in found if weight.kind != RAW]
    known = [weight for weight in known if adapter_reason(modules, weight.module) is None]
    layers = [(weight.module, image_channels(modules[weight.module])) for weight in known]
    ends = first_and_last(model, layers, embedded=embedded, unused=unused)
    return [_judge(weight, modules, selection, *ends) for weight in found]


def weight_of(module: nn.Module, tensor: str = "weight") -> PrunableWeight:
    """The record of one weight of one module, as if the module were the whole model.

    Args:
        module: a layer.
        tensor: name of its weight.

    Returns:
        The record, with a path of ``""`` and without a reason.

    Raises:
        TypeError: if ``module`` is no module.
        ValueError: if it has no such weight, or one that cannot be pruned.

    Example:
        >>> from torch import nn
        >>> weight_of(nn.GRU(8, 16), "weight_hh_l0").parts
        3
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(module).__name__}")
    found = [*known_weights("", module), *_raw_parameters(module, {"": module}, [tensor])]
    for weight in found:
        if weight.tensor == tensor:
            if weight.reason not in (None, ALREADY_PRUNED):
                raise ValueError(f"{weight.kind}.{tensor} cannot be pruned: {weight.reason}")
            return replace(weight, reason=None)
    known = ", ".join(w.tensor for w in found) or "none"
    raise ValueError(f"{type(module).__name__} has no prunable weight {tensor!r}; it has: {known}")


def _raw_parameters(
    model: nn.Module, modules: Mapping[str, nn.Module], include: Selector | None
) -> Iterator[PrunableWeight]:
    """Parameters in no known layer: those that ``include`` names, and those that are pruned already."""
    patterns = () if include is None or callable(include) or isinstance(include, str) else include
    known = {id(parameter_of(m, stored.tensor)) for m in modules.values() for stored in stored_weights(m)}
    for name, parameter in model.named_parameters():
        path, _, tensor = name.rpartition(".")
        if path not in modules:
            continue
        owner = modules[path]
        lazy = isinstance(parameter, nn.parameter.UninitializedParameter)
        if id(parameter) in known or lazy or parameter.dim() < 2 or isinstance(owner, Packed):
            continue
        plain = unmasked_name(owner, tensor)
        names = {name, dotted(path, plain)}
        wanted = any(names_parameter(pattern, name, owner) for pattern in patterns for name in names)
        if (wanted or plain != tensor) and not isinstance(owner, nn.Embedding | nn.EmbeddingBag):
            yield raw_weight(path, plain, owner, parameter)


def _embedding_registered_first(modules: Mapping[str, nn.Module], layers: set[str]) -> bool:
    embeddings = token_embeddings(modules)
    return next((path in embeddings for path in modules if path in embeddings or path in layers), False)


def _in_execution_order(
    model: nn.Module, modules: Mapping[str, nn.Module], found: list[PrunableWeight], example_input: Any
) -> tuple[list[PrunableWeight], bool, set[str]]:
    """The weights in the order of their first use, those without one at the end; whether the model uses an embedding
    before any of them; and the modules that have no use: auxiliary heads, for one, that only training has."""
    parameters = [parameter_of(modules[w.module], w.tensor) for w in found]
    embeddings = [w for m in token_embeddings(modules).values() if (w := m._parameters.get("weight")) is not None]
    uses = first_uses(model, [p for p in parameters if p is not None], embeddings, example_input)
    order = [use.key for use in uses if not use.embedding]
    rank = {key: position for position, key in enumerate(order)}
    ordered = sorted(zip(parameters, found), key=lambda pair: rank.get(id(pair[0]), len(rank)))
    layers = {id(p) for p, w in ordered if w.kind != RAW}
    embedded = next((use.embedding for use in uses if use.embedding or use.key in layers), False)
    used = {w.module for p, w in ordered if id(p) in rank}
    return [w for _, w in ordered], embedded, {w.module for _, w in ordered} - used


def _judge(
    weight: PrunableWeight,
    modules: Mapping[str, nn.Module],
    selection: Selection,
    first: frozenset[str],
    last: frozenset[str],
) -> PrunableWeight:
    names = [(modules[path], path, tensor) for path, tensor in ((weight.module, weight.tensor), *weight.aliases)]
    is_first = weight.kind != RAW and any(path in first and reads_input(m, t) for m, path, t in names)
    is_last = weight.kind != RAW and any(path in last and gives_output(m, t) for m, path, t in names)
    weight = replace(weight, last=is_last, reason=weight.reason or adapter_reason(modules, weight.module))
    if weight.reason not in (None, ALREADY_PRUNED):
        return weight
    if selection.include is not None and not selected(selection.include, weight, modules):
        return replace(weight, reason=NOT_INCLUDED)
    if selection.exclude and selected(selection.exclude, weight, modules):
        return replace(weight, reason=EXCLUDED)
    if selection.skip_first and is_first:
        return replace(weight, reason="first layer")
    if selection.skip_last and is_last:
        return replace(weight, reason="last layer")
    return weight
