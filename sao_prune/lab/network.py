"""The dense network that every method of a seed starts from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import nn

import sao_prune.models

from ..seeds import named_generator
from .errors import LabError


def build_network(name: str, options: Mapping[str, Any], classes: int, seed: int = 0) -> nn.Module:
    """A network of timm's registry, on the CPU, with the weights that its constructor draws from ``seed``.

    Raises:
        LabError: if timm does not know the name or the network refuses an option.
    """
    if not timm.is_model(name):
        raise LabError(f"timm knows no network {name!r}; this project's: {', '.join(sao_prune.models.__all__[1:])}")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return timm.create_model(name, num_classes=classes, **options)  # type: ignore[no-any-return]
    except (TypeError, ValueError) as error:
        raise LabError(f"network {name}: {error}") from error


def initial_network(name: str, options: Mapping[str, Any], classes: int, gain: float, seed: int) -> nn.Module:
    """A dense network whose weights are orthogonal times ``gain`` and whose linear and convolution biases are zero.

    Everything is drawn on the CPU from ``seed`` alone, so any device starts from the same weights; the global random
    state is left as it was.

    Example:
        >>> net = initial_network("sao_mlp", {"depth": 2}, classes=10, gain=1.0, seed=0)
        >>> w = net.layers[2].fc.weight
        >>> torch.allclose(w @ w.T, torch.eye(256), atol=1e-5)
        True
    """
    generator = named_generator(seed, "initial weights")
    model = build_network(name, options, classes, generator.initial_seed())
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            nn.init.orthogonal_(module.weight, gain, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model
