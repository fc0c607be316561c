"""The smallest images that an architecture takes."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from .architecture import Architecture

SIZES = (64, 96, 128, 160, 192, 224, 256)
BATCH = 2


def smallest_input(architecture: Architecture) -> tuple[dict[str, Any], tuple[int, int, int]]:
    """Options and image shape for the smallest square images that an architecture takes, tried on the meta device.

    Returns:
        Keyword options for `Architecture.build` and ``(channels, height, width)``; the model's own where none of the
        smaller sizes works.
    """
    default = architecture.build_on_meta()
    channels, height, width = _default_size(default)
    for size in SIZES:
        if size >= height:
            break
        for option in _size_options(architecture):
            options = {option: size} if option else {}
            if _runs_on_meta(architecture, options, (channels, size, size)):
                return options, (channels, size, size)
    return {}, (channels, height, width)


def _default_size(model: nn.Module) -> tuple[int, int, int]:
    config = getattr(model, "pretrained_cfg", None) or {}
    channels, height, width = config.get("input_size") or (3, 224, 224)
    if hasattr(model, "AuxLogits"):
        height = width = 299
    return channels, height, width


def _size_options(architecture: Architecture) -> tuple[str, ...]:
    if architecture.library == "torchvision":
        from torchvision.models import get_model_builder

        source = inspect.getsource(inspect.getmodule(get_model_builder(architecture.name)))  # type: ignore[arg-type]
        return ("image_size",) if "image_size" in source else ("",)
    return ("img_size", "")


def _runs_on_meta(architecture: Architecture, options: dict[str, Any], size: tuple[int, int, int]) -> bool:
    try:
        model = architecture.build_on_meta(**options)
        with torch.no_grad(), torch.device("meta"):
            model.train()(torch.empty(BATCH, *size))
    except Exception:
        return False
    return True
