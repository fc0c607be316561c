"""Whether a layer's tensors are plain parameters, which most verbs need; asked before anything is changed."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .held import held_tensors
from .prune import pruning_hooks


def why_not_plain(module: nn.Module, *, masked: bool = False) -> str | None:
    """Why a module's own tensors are more than parameters, and what to do; ``None`` if they are not.

    Args:
        module: one layer; its children are not looked at.
        masked: whether pruned tensors are all right.

    Returns:
        A sentence without its end, to stand after the layer's name.

    Example:
        >>> layer = nn.Linear(4, 4)
        >>> why_not_plain(layer)
        >>> why_not_plain(nn.utils.parametrizations.weight_norm(layer))
        "its weight is parametrized: call torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight') first"
    """
    held = held_tensors(module)
    if held:
        return f"{_its(held[0].removesuffix('_orig'))} held orthogonal: call sao_prune.release(model) first"
    if parametrize.is_parametrized(module):
        name = next(iter(module.parametrizations))  # type: ignore[arg-type]
        way = f"torch.nn.utils.parametrize.remove_parametrizations(layer, {name!r})"
        return f"{_its(name)} parametrized: call {way} first"
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm | SpectralNorm):
            kind = "weight_norm" if isinstance(hook, WeightNorm) else "spectral_norm"
            return f"{_its(hook.name)} computed by {kind}: call torch.nn.utils.remove_{kind}(layer) first"
    for pruning in () if masked else pruning_hooks(module):
        name = pruning._tensor_name
        return f"{_its(name)} pruned: call torch.nn.utils.prune.remove(layer, {name!r}) first"
    return None


def _its(name: str) -> str:
    return f"its {name} {'are' if name == 'blocks' else 'is'}"
