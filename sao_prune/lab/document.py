"""A YAML document that can be taken apart and laid over another before it becomes dataclasses."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

import yaml

from .errors import RecipeError
from .schema import Reader, say

T = TypeVar("T")


@dataclass(frozen=True)
class Document:
    """A YAML node and the file it came from: taken apart, laid over another, built into a dataclass.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.yaml"
        >>> _ = path.write_text("train: {epochs: 90, lr: 0.1}\\nsmoke: {train: {epochs: 1}}\\n")
        >>> whole, smoke = Document.read(path).take("smoke")
        >>> print(whole.overlaid(smoke).text().strip())
        train: {epochs: 1, lr: 0.1}
    """

    path: Path
    node: yaml.Node

    @classmethod
    def read(cls, path: Path) -> Document:
        """Read a file.

        Raises:
            RecipeError: if it cannot be read or is not YAML.
        """
        try:
            root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            raise RecipeError(f"{path}:{line}: not YAML: {error.problem}") from error
        except yaml.YAMLError as error:
            raise RecipeError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
        if root is None:
            raise RecipeError(f"{path}: the file is empty")
        return cls(path, root)

    def build(self, cls: type[T]) -> T:
        """The frozen dataclass ``cls`` that this says.

        Field types may be scalars, ``tuple[X, ...]`` (one value counts as a tuple of one), ``Mapping[str, Scalar]``
        (also with tuples as values), other dataclasses, and any of these ``| None``. A class with an attribute
        ``shorthand`` may be written as that field's value alone; one with a method ``problem()`` may return ``(key,
        complaint)`` about the object as a whole.

        Raises:
            RecipeError: naming file, line and key.
        """
        return cast(T, Reader(self.path).dataclass(self.node, cls, ""))

    def error(self, message: str) -> RecipeError:
        """A complaint about this place."""
        return RecipeError(f"{self.path}:{self.node.start_mark.line + 1}: {message}")

    def take(self, key: str) -> tuple[Document, Document | None]:
        """This without a key, and what stood there."""
        pairs = Reader(self.path).pairs(self.node, "")
        found = pairs.pop(key, None)
        return self._mapping(pairs.values()), None if found is None else Document(self.path, found[1])

    def split(self, *keys: str) -> tuple[Document, Document]:
        """The part with these keys, and the rest."""
        pairs = Reader(self.path).pairs(self.node, "")
        return (
            self._mapping(pair for name, pair in pairs.items() if name in keys),
            self._mapping(pair for name, pair in pairs.items() if name not in keys),
        )

    def names(self) -> tuple[str, ...]:
        """Its keys."""
        return tuple(Reader(self.path).pairs(self.node, ""))

    def child(self, key: str) -> Document | None:
        """What stands at a key."""
        return self.take(key)[1]

    def items(self) -> list[Document]:
        """The items of a list.

        Raises:
            RecipeError: if it is none, or empty.
        """
        if not isinstance(self.node, yaml.SequenceNode) or not self.node.value:
            raise self.error(f"expected a list of cases, got {say(self.node)}")
        return [Document(self.path, item) for item in self.node.value]

    def overlaid(self, other: Document) -> Document:
        """This with the other's keys in place of its own, mapping by mapping; a list or a value replaces the whole.

        A value alone that a mapping is laid over stands for that mapping's ``name``.
        """
        reader = Reader(self.path)
        mine, yours = reader.pairs(self.node, ""), reader.pairs(other.node, "")
        merged = dict(mine)
        for key, (key_node, value) in yours.items():
            if key in mine and isinstance(value, yaml.MappingNode):
                below = Document(self.path, _as_mapping(mine[key][1]))
                value = below.overlaid(Document(self.path, value)).node
            merged[key] = (key_node, value)
        return self._mapping(merged.values())

    def with_suffix(self, key: str, suffix: str) -> Document:
        """This with text added to a scalar, if it is there."""
        pairs = Reader(self.path).pairs(self.node, "")
        if key in pairs and isinstance(pairs[key][1], yaml.ScalarNode):
            old = pairs[key][1]
            node = yaml.ScalarNode(old.tag, f"{old.value}{suffix}", old.start_mark, old.end_mark)
            pairs[key] = (pairs[key][0], node)
        return self._mapping(pairs.values())

    def text(self) -> str:
        """It as YAML, without comments."""
        return str(yaml.serialize(self.node, Dumper=yaml.SafeDumper, width=120))

    def _mapping(self, pairs: Iterable[tuple[yaml.Node, yaml.Node]]) -> Document:
        node, flow = self.node, getattr(self.node, "flow_style", None)
        return Document(self.path, yaml.MappingNode(node.tag, [*pairs], node.start_mark, node.end_mark, flow))


def _as_mapping(node: yaml.Node) -> yaml.Node:
    if not isinstance(node, yaml.ScalarNode):
        return node if isinstance(node, yaml.MappingNode) else yaml.MappingNode("tag:yaml.org,2002:map", [])
    name = yaml.ScalarNode("tag:yaml.org,2002:str", "name", node.start_mark, node.end_mark)
    return yaml.MappingNode("tag:yaml.org,2002:map", [(name, node)], node.start_mark, node.end_mark)
