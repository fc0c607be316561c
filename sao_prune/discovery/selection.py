"""Which layers to take: glob patterns and predicates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ..naming import dotted
from .weight import PrunableWeight

NOT_INCLUDED, EXCLUDED = "not included", "excluded"
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

    def __post_init__(self) -> None:
        for option in ("include", "exclude"):
            object.__setattr__(self, option, _kept(getattr(self, option)))


def check_patterns(option: str, selector: Selector | Mapping[str, Any] | None, found: list[PrunableWeight]) -> None:
    """Refuse a pattern that matches no layer, naming what there is.

    Args:
        option: what the user calls it, for the message.
        selector: patterns, as keys too, or a predicate, which is taken as it is.
        found: the layers.

    Raises:
        TypeError: for a bare string or for something that is neither patterns nor a predicate.
        ValueError: for a pattern without a match.

    Example:
        >>> check_patterns("include", ["fc*"], [PrunableWeight("fc1", "weight", "Linear", (8, 8))])
    """
    named = [w.module or w.tensor for w in found]
    _check(option, selector, named, lambda pattern: any(matches(pattern, weight) for weight in found))


def pick(
    layers: Sequence[tuple[str, nn.Module, Sequence[str]]], include: Selector | None, exclude: Selector
) -> list[str | None]:
    """Which layers a verb takes, by the user's selectors.

    Args:
        layers: path, module and names of the tensors of each.
        include: glob patterns on module or tensor names, or a predicate; ``None`` takes all.
        exclude: the same, for layers to skip.

    Returns:
        For each layer why it is skipped, ``None`` if it is taken.

    Raises:
        TypeError: for a bare string or for something that is neither patterns nor a predicate.
        ValueError: for a pattern without a match.

    Example:
        >>> layer = nn.Linear(8, 8)
        >>> pick([("a", layer, ["weight"]), ("b", layer, ["weight"])], None, ["b.weight"])
        [None, 'excluded']
    """
    include, exclude = _kept(include), _kept(exclude)
    names = [[path, *(dotted(path, tensor) for tensor in tensors)] for path, _, tensors in layers]
    known = [each[0] or each[-1] for each in names]
    for option, selector in (("include", include), ("exclude", exclude)):
        _check(option, selector, known, lambda pattern: any(fnmatchcase(n, pattern) for each in names for n in each))

    def takes(selector: Selector, path: str, module: nn.Module, own: Sequence[str]) -> bool:
        if callable(selector):
            return bool(selector(path, module))
        return any(fnmatchcase(name, pattern) for pattern in selector for name in own)

    out: list[str | None] = []
    for (path, module, _), own in zip(layers, names):
        if include is not None and not takes(include, path, module, own):
            out.append(NOT_INCLUDED)
        else:
            out.append(EXCLUDED if exclude and takes(exclude, path, module, own) else None)
    return out


def _kept(selector: Any) -> Any:
    """A selector that can be asked more than once, as a generator of patterns cannot."""
    return tuple(selector) if isinstance(selector, Iterator) else selector


def _check(option: str, selector: object, names: Sequence[str], found: Callable[[str], bool]) -> None:
    if selector is None or callable(selector):
        return
    if isinstance(selector, str) or not isinstance(selector, Iterable):
        raise TypeError(
            f"{option} must be a list of glob patterns or a predicate (name, module) -> bool, got {selector!r}"
        )
    for pattern in selector:
        if not isinstance(pattern, str):
            raise TypeError(f"{option} patterns must be strings, got {pattern!r}")
        if not found(pattern):
            listed = ", ".join(names[:8]) + (", .." if len(names) > 8 else "")
            raise ValueError(f"{option} pattern {pattern!r} matches none of the {len(names)} layers: {listed}")


def matches(pattern: str, weight: PrunableWeight) -> bool:
    """Whether a glob pattern names the weight's module or the weight itself, by any of its names.

    Args:
        pattern: a glob pattern on module or parameter names.
        weight: the weight.

    Returns:
        Whether it does.

    Example:
        >>> matches("blocks.*", PrunableWeight("blocks.0.fc", "weight", "Linear", (8, 8)))
        True
    """
    names = [(weight.module, weight.tensor), *weight.aliases]
    return any(fnmatchcase(module, pattern) or fnmatchcase(dotted(module, tensor), pattern) for module, tensor in names)


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
