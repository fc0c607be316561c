"""The dense network that every method of a seed starts from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

import sao_prune
import sao_prune.models

from ..seeds import named_generator
from .errors import LabError
from .initialization import fixup_, he_


def build_network(
    name: str, options: Mapping[str, Any], classes: int, sizes: Mapping[str, int], seed: int = 0
) -> nn.Module:
    """A network of timm's registry, on the CPU, with the weights that its constructor draws from ``seed``.

    Args:
        sizes: of the inputs, as `Dataset.sizes` gives them. This project's networks are told all of them; others the
            channels of the images, and the recipe says the size where they must know.

    Raises:
        LabError: if timm does not know the name or the network refuses an option.
    """
    create: Callable[..., nn.Module] = _own(name) if name in _own_names() else _timms(name)
    if name not in _own_names():
        if "in_chans" not in sizes:
            raise LabError(f"network {name} takes images, not sequences; for those: sao_recurrent and sao_decoder")
        sizes = {"in_chans": sizes["in_chans"]}
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return create(num_classes=classes, **{**sizes, **options})
    except (TypeError, ValueError) as error:
        raise LabError(f"network {name}: {error}") from error


def initial_network(
    name: str,
    options: Mapping[str, Any],
    classes: int,
    sizes: Mapping[str, int],
    gain: float = 1.0,
    init: str = "delta",
    seed: int = 0,
) -> nn.Module:
    """A dense network whose weights are orthogonal times ``gain`` and whose biases are zero.

    Linear, convolutional and recurrent layers, every gate of these for itself; forget gates keep their bias.

    Everything is drawn on the CPU from ``seed`` alone, so any device starts from the same weights; the global random
    state is left as it was.

    Args:
        init: for convolutions: ``delta`` (orthogonal on the centre tap; Xiao et al., ICML 2018), ``orthogonal`` (on
            the flattened kernel), ``eco`` (at every frequency); for all layers: ``he``, ``fixup``; ``default`` keeps
            all weights of the constructor.

    Example:
        >>> net = initial_network("sao_mlp", {"depth": 2}, classes=10, sizes={"in_chans": 1, "img_size": 32})
        >>> w = net.layers[2].fc.weight
        >>> torch.allclose(w @ w.T, torch.eye(256), atol=1e-5)
        True
    """
    generator = named_generator(seed, "initial weights")
    model = build_network(name, options, classes, sizes, generator.initial_seed())
    if init == "default":
        return model
    if init in ("he", "fixup"):
        {"he": he_, "fixup": fixup_}[init](model, generator)
        return model
    if init == "eco":
        sao_prune.apply(model, groups=1, method=sao_prune.SAO(conv="eco", gain=gain), seed=generator.initial_seed())
        sao_prune.remove(model)
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            _orthogonal_gates(module, gain, generator)
        if not isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            continue
        if isinstance(module, nn.Linear) or init == "orthogonal":
            nn.init.orthogonal_(module.weight, gain, generator=generator)
        elif init == "delta":
            _delta_orthogonal(module, gain, generator)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    return model


def _orthogonal_gates(module: nn.RNNBase, gain: float, generator: torch.Generator) -> None:
    """An orthogonal matrix for every gate of every layer; biases zero but an LSTM's."""
    for name, parameter in module.named_parameters():
        if name.startswith("weight"):
            for gate in parameter.detach().split(module.hidden_size):
                nn.init.orthogonal_(gate, gain, generator=generator)
        elif not isinstance(module, nn.LSTM):
            nn.init.zeros_(parameter)


def _delta_orthogonal(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, gain: float, generator: torch.Generator) -> None:
    """An orthogonal matrix on the centre tap of every group, zero on the other taps."""
    weight = module.weight.detach()
    out_channels, in_channels, *kernel = weight.shape
    centre: tuple[Any, ...] = (..., *(size // 2 for size in kernel))
    taps = torch.zeros_like(weight)
    for rows in range(0, out_channels, out_channels // module.groups):
        matrix = torch.empty(out_channels // module.groups, in_channels)
        nn.init.orthogonal_(matrix, gain, generator=generator)
        taps[rows : rows + len(matrix)][centre] = matrix
    weight.copy_(taps)


def _timms(name: str) -> Callable[..., nn.Module]:
    # Importing timm takes longer than many a training of a network that is not its.
    import timm

    if not timm.is_model(name):
        raise LabError(f"timm knows no network {name!r}; this project's: {', '.join(_own_names())}")
    return partial(timm.create_model, name)


def _own(name: str) -> Callable[..., nn.Module]:
    entry = getattr(sao_prune.models, name)

    def create(**options: Any) -> nn.Module:
        # What is None has been left out, as timm has it.
        return entry(**{key: value for key, value in options.items() if value is not None})  # type: ignore[no-any-return]

    return create


def _own_names() -> list[str]:
    return [name for name in sao_prune.models.__all__ if name.startswith("sao_")]
