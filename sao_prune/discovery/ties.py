"""Tied weights: one parameter under several names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from ..naming import dotted
from .kinds import parameter_of
from .weight import PrunableWeight


def merge_tied(modules: Mapping[str, nn.Module], found: list[PrunableWeight]) -> list[PrunableWeight]:
    """Keep the first of several names of one parameter; the others become its aliases.

    A parameter that something else uses as well, an embedding say, is skipped: its mask would not hold there.
    """
    names: dict[int, list[str]] = {}
    for path, module in modules.items():
        for tensor, parameter in module._parameters.items():
            if parameter is not None:
                names.setdefault(id(parameter), []).append(dotted(path, tensor))
    ours = {f"{w.name}{suffix}" for w in found for suffix in ("", "_orig")}
    merged = _merge_names(modules, found)
    for index, weight in enumerate(merged):
        parameter = parameter_of(modules[weight.module], weight.tensor)
        others = [name for name in names.get(id(parameter), ()) if name not in ours]
        if others and weight.reason is None:
            merged[index] = replace(weight, reason=f"tied to {others[0]}, which is no layer to prune")
    return merged


def _merge_names(modules: Mapping[str, nn.Module], found: list[PrunableWeight]) -> list[PrunableWeight]:
    owner: dict[int, int] = {}
    merged: list[PrunableWeight] = []
    for weight in found:
        parameter = parameter_of(modules[weight.module], weight.tensor)
        key = id(parameter if parameter is not None else object())
        if parameter is not None and key in owner:
            first = merged[owner[key]]
            alias = (weight.module, weight.tensor)
            merged[owner[key]] = replace(first, aliases=(*first.aliases, alias), reason=first.reason or weight.reason)
        else:
            if parameter is not None:
                owner[key] = len(merged)
            merged.append(weight)
    return merged
