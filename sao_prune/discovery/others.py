"""Parameters of two or more dimensions in no layer that is pruned, and what they are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from torch import nn

from ..naming import dotted
from .adapters import adapter_reason
from .endpoints import is_positional
from .kinds import Packed, parameter_of
from .weight import RAW, PrunableWeight

_NORMS = re.compile(r"Norm|GRN|Affine")
_NAMES = (
    (r"token|class_emb|cls_emb|probe", "token"),
    (r"quer(y|ies)|latents?|prompt|anchors|prototypes|centers", "learned input"),
    (r"embed", "embedding"),
    (r"bias", "bias"),
    (r"scale|gamma|alpha|beta|temperature|gate$|time_mix|mu$|gain", "scale"),
    (r"^A_log$|^D$|^dt_|decay|lambda", "state-space parameter"),
)


def untouched(model: nn.Module, found: Sequence[PrunableWeight]) -> list[PrunableWeight]:
    """Every parameter of two or more dimensions that is in none of the given records, with the reason.

    Args:
        model: any module; block layers are taken as known.
        found: from `walk`, over the same model.

    Returns:
        The records, in the order of registration.

    Example:
        >>> from torch import nn
        >>> from sao_prune.discovery import walk
        >>> net = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 10))
        >>> [(w.name, w.reason) for w in untouched(net, walk(net))]
        [('0.weight', 'embedding')]
    """
    modules = dict(model.named_modules())
    known = {id(parameter_of(modules[w.module], w.tensor)) for w in found if w.module in modules}
    computed = {(w.module, w.tensor) for w in found}
    return [
        PrunableWeight(path, tensor, kind, tuple(parameter.shape), reason=reason)
        for path, tensor, kind, parameter, reason in _others(model, modules, known, computed)
    ]


def _others(
    model: nn.Module, modules: dict[str, nn.Module], known: set[int], computed: set[tuple[str, str]]
) -> Iterator[tuple[str, str, str, nn.Parameter, str]]:
    for name, parameter in model.named_parameters():
        lazy = isinstance(parameter, nn.parameter.UninitializedParameter)
        if lazy or parameter.dim() < 2 or id(parameter) in known:
            continue
        path, _, tensor = name.rpartition(".")
        owner, _, parametrized = path.partition("parametrizations.")
        owner = owner.removesuffix(".") if parametrized else path
        source = parametrized.partition(".")[0] or re.sub("_[gv]$", "", tensor)
        sources = {(owner, source), (owner, source.removesuffix("_orig"))}
        if isinstance(modules[owner], Packed) or (source != tensor and sources & computed):
            continue
        module = modules[owner]
        kind = RAW if type(module).__module__.startswith("torch.nn.modules.container") else type(module).__name__
        reason = adapter_reason(modules, owner)
        reason = reason or _reason(module, owner, tensor, parameter, source if parametrized else "")
        yield path, tensor, kind, parameter, reason


def _reason(module: nn.Module, path: str, tensor: str, parameter: nn.Parameter, parametrized: str) -> str:
    """What a parameter is, by its module's class, its name and its shape."""
    if parametrized:
        return f"{parametrized} is computed from it (parametrization)"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "positional embedding" if is_positional(path) else "embedding"
    if _NORMS.search(type(module).__name__):
        return "norm"
    if not parameter.is_floating_point():
        return f"not a floating-point weight ({parameter.dtype})"
    if is_positional(tensor) or (is_positional(path) and not any(True for _ in module.children())):
        return "positional embedding"
    if re.search(r"Router|Gat(e|ing)$", type(module).__name__):
        return "router: it chooses experts"
    if meaning := next((m for pattern, m in _NAMES if re.search(pattern, tensor)), None):
        return meaning
    if parameter.numel() == max(parameter.shape):
        return "a vector: only one of its dimensions is longer than one"
    return f"in no layer of a known kind: include=[{dotted(path, tensor)!r}] prunes it"
