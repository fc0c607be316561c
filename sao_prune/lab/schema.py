"""YAML into frozen dataclasses, with the file, line and key in every complaint."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..naming import dotted, nearest
from .errors import RecipeError

try:
    import yaml
except ImportError as error:
    raise ImportError("the laboratory needs PyYAML: pip install 'sao-prune[lab]'") from error

Scalar = bool | int | float | str


def rule(default: Any = dataclasses.MISSING, **limits: Any) -> Any:
    """A dataclass field with limits on its value (on each value, for a tuple).

    Args:
        limits: ``gt``, ``ge``, ``lt``, ``le`` as in Python's operators, ``choices`` (a collection).
    """
    return dataclasses.field(default=default, metadata=limits)


Pairs = dict[str, tuple[yaml.Node, yaml.Node]]


@dataclasses.dataclass(frozen=True)
class Reader:
    """Turns the nodes of one file into values of the types that a dataclass asks for."""

    path: Path

    def fail(self, node: yaml.Node, key: str, message: str) -> typing.NoReturn:
        where = f"{key}: " if key else ""
        raise RecipeError(f"{self.path}:{node.start_mark.line + 1}: {where}{message}")

    def dataclass(self, node: yaml.Node, cls: Any, key: str) -> Any:
        shorthand = getattr(cls, "shorthand", None)
        if shorthand and isinstance(node, yaml.ScalarNode):
            pairs: Pairs = {shorthand: (node, node)}
        else:
            pairs = self.pairs(node, key)
        hints, fields = typing.get_type_hints(cls), {f.name: f for f in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        for name, (key_node, value_node) in pairs.items():
            inner = dotted(key, name)
            if name not in fields:
                self.fail(key_node, inner, unknown("key", name, fields))
            values[name] = self.value(value_node, hints[name], inner)
            if values[name] == () and fields[name].default != ():
                self.fail(value_node, inner, "an empty list")
            for value in values[name] if isinstance(values[name], tuple) else (values[name],):
                if value is not None:
                    self.check(value_node, inner, value, fields[name].metadata)
        missing = [
            name
            for name, f in fields.items()
            if name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
        if missing:
            self.fail(node, key, f"missing {', '.join(missing)}")
        made = cls(**values)
        problem = made.problem() if hasattr(made, "problem") else None
        if problem is not None:
            name, message = problem
            self.fail(pairs[name][0] if name in pairs else node, dotted(key, name), message)
        return made

    def pairs(self, node: yaml.Node, key: str) -> Pairs:
        if not isinstance(node, yaml.MappingNode):
            self.fail(node, key, f"expected keys and values, got {say(node)}")
        found: Pairs = {}
        for key_node, value_node in node.value:
            name = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else ""
            if not name:
                self.fail(key_node, key, "a key must be a plain word")
            if name in found:
                self.fail(key_node, dotted(key, name), "given twice")
            found[name] = (key_node, value_node)
        return found

    def value(self, node: yaml.Node, hint: Any, key: str) -> Any:
        origin, args = typing.get_origin(hint), typing.get_args(hint)
        if origin in (typing.Union, types.UnionType) and type(None) in args:
            if isinstance(node, yaml.ScalarNode) and node.tag.endswith(":null"):
                return None
            return self.value(node, next(a for a in args if a is not type(None)), key)
        if origin is tuple:
            items = node.value if isinstance(node, yaml.SequenceNode) else [node]
            return tuple(self.value(item, args[0], key) for item in items)
        if origin is Mapping:
            lists = any(typing.get_origin(a) is tuple for a in typing.get_args(args[1]))
            read = self.scalar_or_list if lists else self.scalar
            return {name: read(v, None, f"{key}.{name}") for name, (_, v) in self.pairs(node, key).items()}
        if dataclasses.is_dataclass(hint):
            return self.dataclass(node, hint, key)
        return self.scalar(node, hint, key)

    def scalar_or_list(self, node: yaml.Node, kind: type | None, key: str) -> Any:
        if not isinstance(node, yaml.SequenceNode):
            return self.scalar(node, kind, key)
        if not node.value:
            self.fail(node, key, "an empty list")
        return tuple(self.scalar(item, kind, key) for item in node.value)

    def scalar(self, node: yaml.Node, kind: type | None, key: str) -> Any:
        if not isinstance(node, yaml.ScalarNode):
            self.fail(node, key, f"expected {_KINDS.get(kind, 'one value')}, got {say(node)}")
        value = _plain(node)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        # What YAML 1.1 reads as a number or as off, yes and the like is text where text is meant.
        if kind is str and node.style is None and isinstance(value, bool | int | float):
            value = node.value
        wrong = value is None or (kind is not None and type(value) is not kind)
        if wrong or (isinstance(value, float) and not math.isfinite(value)):
            self.fail(node, key, f"expected {_KINDS.get(kind, 'a value')}, got {node.value!r}")
        return value

    def check(self, node: yaml.Node, key: str, value: Any, limits: Mapping[str, Any]) -> None:
        choices = limits.get("choices")
        if choices is not None and value not in choices:
            self.fail(node, key, unknown("value", value, choices))
        wants = []
        if "gt" in limits and not value > limits["gt"]:
            wants.append(f"above {limits['gt']}")
        if "ge" in limits and not value >= limits["ge"]:
            wants.append(f"at least {limits['ge']}")
        if "lt" in limits and not value < limits["lt"]:
            wants.append(f"below {limits['lt']}")
        if "le" in limits and not value <= limits["le"]:
            wants.append(f"at most {limits['le']}")
        if wants:
            self.fail(node, key, f"must be {' and '.join(wants)}, got {value}")


def unknown(what: str, given: object, allowed: typing.Iterable[str]) -> str:
    """``unknown key 'epoch' (did you mean 'epochs'?); allowed: ...``."""
    names = list(allowed)
    return f"unknown {what} {given!r}{nearest(given, names)}; allowed: {', '.join(names)}"


_KINDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
}


def _plain(node: yaml.ScalarNode) -> Scalar | None:
    value = yaml.SafeLoader("").construct_object(node)
    # YAML 1.1 reads 1e-3 (no dot) as text; nobody means that.
    if isinstance(value, str) and node.style is None:
        try:
            return float(value) if "e" in value.lower() else value
        except ValueError:
            return value
    return value if isinstance(value, bool | int | float | str | None) else str(node.value)


def say(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return repr(node.value)
    return "a list" if isinstance(node, yaml.SequenceNode) else "keys and values"
