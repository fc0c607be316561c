"""Adapters that fine-tuning libraries put beside the layers of a model: small, dense by design, merged later."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..naming import dotted

#: Names under which adapters live where their library does not name them itself.
_NAMES = ("lora_", "modules_to_save")


def adapter_reason(modules: Mapping[str, nn.Module], path: str) -> str | None:
    """Why a module is skipped if it is part of an adapter, as PEFT makes them; ``None`` if it is not.

    PEFT's layers list the names of what they add in ``adapter_layer_names``.

    Args:
        modules: the model's modules by path.
        path: of the module in question.

    Returns:
        A few words, or ``None``.

    Example:
        >>> layer = nn.ModuleDict({"base_layer": nn.Linear(8, 8), "lora_A": nn.ModuleList([nn.Linear(8, 2)])})
        >>> modules = dict(layer.named_modules())
        >>> adapter_reason(modules, "lora_A.0")
        'part of an adapter (lora_A)'
        >>> adapter_reason(modules, "base_layer") is None
        True
    """
    owner = ""
    for name in path.split("."):
        named = getattr(modules.get(owner), "adapter_layer_names", ())
        if name.startswith(_NAMES) or (isinstance(named, (tuple, list)) and name in named):
            return f"part of an adapter ({name})"
        owner = dotted(owner, name)
    return None
