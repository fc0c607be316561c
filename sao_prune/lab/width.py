"""Width and density: networks that are as much wider as they are sparser, and rates and scales that follow both."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf, prod, sqrt
from numbers import Real

import torch
from torch import nn

from ..blocks import BlockModule
from ..prune import refresh
from .schema import Scalar


def widened(value: int, groups: float, multiple: int = 8) -> int:
    """A width times the square root of the number of blocks: products of two such widths cost what they did dense.

    Args:
        value: the width of the dense network.
        groups: blocks of every layer, or one over its density.
        multiple: the result is the nearest multiple of this one.

    Returns:
        The width.

    Raises:
        ValueError: for a width or multiple that is no whole number of at least 1, or groups below 1.

    Source: Sparse-IFT (Thangarasa et al., 2023), https://arxiv.org/abs/2303.11525.

    Example:
        >>> widened(64, 4), widened(64, 8), widened(64, 1)
        (128, 184, 64)
    """
    for name, given in (("value", value), ("multiple", multiple)):
        if isinstance(given, bool) or not isinstance(given, int) or given < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {given!r}")
    if isinstance(groups, bool) or not isinstance(groups, Real) or not 1 <= groups < inf:
        raise ValueError(f"groups must be a number of at least 1, got {groups!r}")
    return max(multiple, round(value * sqrt(groups) / multiple) * multiple)


def groups_of(prune: Mapping[str, Scalar]) -> float:
    """One over the density that an amount asks for; 1 for none.

    Example:
        >>> groups_of({"groups": 8}), groups_of({"sparsity": 0.75}), groups_of({})
        (8.0, 4.0, 1.0)
    """
    if "groups" in prune:
        return float(prune["groups"])
    return 1 / (1 - float(prune.get("sparsity", 0.0)))


def fan_ins(model: nn.Module) -> dict[str, float]:
    """The effective fan-in of every weight of two or more dimensions: its non-zeros for each output.

    Args:
        model: dense, masked or compact.

    Returns:
        By full name of the weight as it is in the dense model.

    Example:
        >>> fan_ins(nn.Sequential(nn.Linear(8, 4), nn.Conv2d(4, 2, 3)))
        {'0.weight': 8.0, '1.weight': 36.0}
    """
    found = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for tensor, parameter in module._parameters.items():
            if parameter is None or parameter.dim() < 2:
                continue
            if isinstance(module, BlockModule) and tensor == "blocks":
                found[f"{prefix}weight"] = parameter.numel() / module.weight_shape[0]
            elif (mask := module._buffers.get(f"{tensor.removesuffix('_orig')}_mask")) is not None:
                found[prefix + tensor.removesuffix("_orig")] = int(mask.count_nonzero()) / mask.shape[0]
            else:
                found[prefix + tensor] = float(prod(parameter.shape[1:]))
    return found


def rate_factors(model: nn.Module, base: Mapping[str, float]) -> dict[int, float]:
    """What the learning rate of every parameter is multiplied with: one over the width and the density of its weight.

    Args:
        model: the model to train.
        base: effective fan-ins of the dense network that rates were chosen for, from `fan_ins`.

    Returns:
        By `id` of the parameter; those of fewer than two dimensions keep the rate and are not in it.

    Raises:
        ValueError: if the base network has no weight of this name.

    Source: sparse maximal update parametrization, SuPar (Dey et al., 2024), https://arxiv.org/abs/2405.15743: the rate
    of a hidden weight under Adam is divided by the multipliers of its width and of its density.

    Example:
        >>> layer = nn.Sequential(nn.Linear(8, 4))
        >>> list(rate_factors(layer, {"0.weight": 2.0}).values())
        [0.25]
    """
    own = fan_ins(model)
    missing = sorted(set(own) - set(base))
    if missing:
        raise ValueError(f"the base network has no weight {missing[0]!r}")
    factors = {}
    for name, parameter in model.named_parameters():
        path, _, tensor = name.rpartition(".")
        plain = "weight" if isinstance(model.get_submodule(path), BlockModule) and tensor == "blocks" else tensor
        whole = (f"{path}." if path else "") + plain.removesuffix("_orig")
        if parameter.dim() >= 2:
            factors[id(parameter)] = base[whole] / max(own[whole], 1.0)
    return factors


@torch.no_grad()
def scale_to_density(model: nn.Module) -> None:
    """Divide masked weights by the square root of their density, so that outputs have the variance that they had dense.

    Args:
        model: with masks on values that were drawn for the dense weight.

    Example:
        >>> import sao_prune
        >>> net = nn.Sequential(nn.Linear(8, 8))
        >>> before = net[0].weight.detach().clone()
        >>> _ = sao_prune.apply(net, sparsity=0.75, method="lmp", skip_first=False, skip_last=False)
        >>> scale_to_density(net)
        >>> torch.allclose(net[0].weight, 2 * before * net[0].weight_mask)
        True
    """
    for module in model.modules():
        for tensor, mask in module._buffers.items():
            original = module._parameters.get(f"{tensor.removesuffix('_mask')}_orig")
            if tensor.endswith("_mask") and mask is not None and original is not None:
                original.div_(sqrt(max(int(mask.count_nonzero()), 1) / mask.numel()))
                refresh(module)
