"""timm's model registry: entered when timm is imported, be that before or after this, and not touched otherwise."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any, TypeVar

from torch import nn

Entry = TypeVar("Entry", bound=Callable[..., nn.Module])

# What timm.create_model hands to every entry point; none of it means anything without pretrained weights.
_TIMM_ONLY = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")


def register_model(entry: Entry) -> Entry:
    """Make ``timm.create_model(entry.__name__)`` work; returns ``entry`` unchanged.

    This does not import timm, which takes longer than torch does and is not needed to build the network.

    Example:
        >>> @register_model
        ... def tiny_linear(pretrained: bool = False, **options: object) -> nn.Module:
        ...     return nn.Linear(2, 2)
    """
    models = sys.modules.get(_Waiting.MODULE)
    if hasattr(models, "register_model"):
        models.register_model(entry)  # type: ignore[union-attr]
    else:
        _waiting.entries.append(entry)
        if _waiting not in sys.meta_path:
            sys.meta_path.insert(0, _waiting)
    return entry


class _Waiting(MetaPathFinder):
    """Sees timm's models being imported, and enters what was defined before."""

    MODULE = "timm.models"

    def __init__(self) -> None:
        self.entries: list[Callable[..., nn.Module]] = []

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.MODULE:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            while self.entries:
                module.register_model(self.entries.pop(0))

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


_waiting = _Waiting()


def without_timm_options(options: dict[str, Any]) -> dict[str, Any]:
    """The options that a model's constructor should see: all but those that timm adds to every call."""
    return {key: value for key, value in options.items() if key not in _TIMM_ONLY}


def refuse_pretrained(name: str, pretrained: bool) -> None:
    """No network of the experiments has published weights.

    Raises:
        ValueError: if ``pretrained`` is true.
    """
    if pretrained:
        raise ValueError(f"{name} has no pretrained weights; create it with pretrained=False and train it")
