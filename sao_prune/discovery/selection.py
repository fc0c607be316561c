"""Which layers to take: glob patterns and predicates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from .weight import PrunableWeight

Predicate = Callable[[str, nn.Module], bool]
Selector = Sequence[str] | Predicate


@dataclass(frozen=True)
class Selection:
    """Which layers to take.

    Attributes:
        include: glob patterns on module or parameter names, or a predicate ``(name, module) -> bool``; ``None``
            takes every layer. A pattern that ends in the name of a parameter outside the known layers takes it as a
            matrix or, with more than two dimensions, a stack of matrices over the last two; one that ends in a
            wildcard takes layers only, and the members of parameter lists.
        exclude: the same, for layers to skip.
        skip_first: leave the first layer of the model dense. Where the model begins with an embedding, that is it.
        skip_last: leave the last layer (the classifier) dense.
        example_input: a tensor, tuple or dict to run once, so that layers come in the order of their execution;
            without it they come in the order of their registration. Lazy layers get their shapes from it.
    """

    include: Selector | None = None
    exclude: Selector = ()
    skip_first: bool = True
    skip_last: bool = True
    example_input: Any = field(default=None, repr=False)


def check_patterns(option: str, selector: Selector | Mapping[str, Any] | None, found: list[PrunableWeight]) -> None:
    """Refuse a pattern that matches no layer, naming what there is.

    Raises:
        TypeError: for a bare string or for something that is neither patterns nor a predicate.
        ValueError: for a pattern without a match.
    """
    if selector is None or callable(selector):
        return
    if isinstance(selector, str) or not isinstance(selector, Iterable):
        raise TypeError(
            f"{option} must be a list of glob patterns or a predicate (name, module) -> bool, got {selector!r}"
        )
    for pattern in selector:
        if not isinstance(pattern, str):
            raise TypeError(f"{option} patterns must be strings, got {pattern!r}")
        if not any(matches(pattern, weight) for weight in found):
            names = ", ".join(w.module or w.tensor for w in found[:8]) + (", .." if len(found) > 8 else "")
            raise ValueError(f"{option} pattern {pattern!r} matches none of the {len(found)} layers: {names}")


def matches(pattern: str, weight: PrunableWeight) -> bool:
    """Whether a glob pattern names the weight's module or the weight itself, by any of its names."""
    names = [(weight.module, weight.tensor), *weight.aliases]
    return any(
        fnmatchcase(module, pattern) or fnmatchcase(f"{module}.{tensor}" if module else tensor, pattern)
        for module, tensor in names
    )


def selected(selector: Selector, weight: PrunableWeight, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a selector takes a weight."""
    if callable(selector):
        return bool(selector(weight.module, modules[weight.module]))
    return any(matches(pattern, weight) for pattern in selector)


def names_parameter(pattern: object, name: str, owner: nn.Module) -> bool:
    """Whether a pattern means this raw parameter: by its own name, for a wildcard there is meant for layers."""
    if not isinstance(pattern, str) or not fnmatchcase(name, pattern):
        return False
    last = pattern.rpartition(".")[2]
    return isinstance(owner, nn.ParameterList | nn.ParameterDict) or not any(c in last for c in "*?[")
