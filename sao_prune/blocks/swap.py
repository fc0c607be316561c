"""Make a module another one in place, so that every reference to it stays good, and undo that."""

from __future__ import annotations

from typing import Any

from torch import nn

Changes = list[tuple[nn.Module, type[nn.Module], dict[str, Any]]]


def become(module: nn.Module, other: nn.Module) -> tuple[nn.Module, type[nn.Module], dict[str, Any]]:
    """Make ``module`` what ``other`` is; returns what undoes it with `restore`."""
    undo = module, type(module), module.__dict__.copy()
    module.__class__ = type(other)
    module.__dict__.clear()
    module.__dict__.update(other.__dict__)
    return undo


def restore(changes: Changes) -> None:
    """Undo `become`, last change first."""
    for module, kind, fields in reversed(changes):
        module.__class__ = kind
        module.__dict__.clear()
        module.__dict__.update(fields)
