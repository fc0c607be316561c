"""The architectures of timm, torchvision and transformers: their names, and how to build them."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..errors import LabError
from .families import families, small_model

Library = Literal["timm", "torchvision", "transformers"]
KNOWN: tuple[Library, ...] = get_args(Library)
# What is looked at unless others are named.
LIBRARIES: tuple[Library, ...] = ("timm", "torchvision")
# What every process of the zoo starts with.
PRELOAD = ("sao_prune.lab.zoo", *LIBRARIES)
_TRANSFORMERS = ("transformers.modeling_utils", "transformers.models.auto.modeling_auto")


class ZooError(LabError, ValueError):
    """No architecture to work on, or the libraries that hold them are missing."""


@dataclass(frozen=True, order=True)
class Architecture:
    """One name of a model zoo.

    Attributes:
        library: "timm", "torchvision" or "transformers".
        family: the module of the library that defines it; the model type, of transformers.
        name: what the library's factory takes; the class, of transformers.
    """

    library: Library
    family: str
    name: str

    def build(self, **options: Any) -> nn.Module:
        """The untrained model, by the library's factory with the given keyword options."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if self.library == "transformers":
                return small_model(self.family, self.name, **options)
            if self.library == "timm":
                import timm

                model: nn.Module = timm.create_model(self.name, pretrained=False, **options)
                return model
            from torchvision.models import get_model, get_model_builder

            accepted = inspect.signature(get_model_builder(self.name)).parameters
            weights = {key: None for key in ("weights", "weights_backbone") if key in accepted}
            built: nn.Module = get_model(self.name, **weights, **options)
            return built

    def build_on_meta(self, **options: Any) -> nn.Module:
        """The model without memory for its weights."""
        try:
            with torch.device("meta"):
                return self.build(**options)
        except NotImplementedError:
            with _WeightsOnMeta():
                return self.build(**options)


class _WeightsOnMeta(TorchFunctionMode):
    """Sends uninitialised tensors, which layers ask for their weights, to the meta device, and nothing else.

    For models that compute their widths with tensors, which a device context would take the values of.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def preload(chosen: Sequence[Architecture]) -> tuple[str, ...]:
    """What a process that works on one of these starts with."""
    return (*PRELOAD, *_TRANSFORMERS) if any(a.library == "transformers" for a in chosen) else PRELOAD


def architectures(pattern: str = "*", libraries: Sequence[Library] = LIBRARIES) -> list[Architecture]:
    """All architectures whose name (of transformers the model type) matches a glob pattern, sorted.

    Raises:
        ZooError: if none matches, a library is missing, or there is no such library.

    Example:
        >>> [a.name for a in architectures("resnet18*", ["timm"])]
        ['resnet18', 'resnet18d']
    """
    unknown = [library for library in libraries if library not in KNOWN]
    if unknown or not libraries:
        raise ZooError(f"unknown library {', '.join(unknown) or 'none'}; known: {', '.join(KNOWN)}")
    found: list[Architecture] = []
    try:
        if "timm" in libraries:
            import timm

            for family in timm.list_modules():
                found += [Architecture("timm", family, name) for name in timm.list_models(module=family)]
        if "torchvision" in libraries:
            from torchvision.models import get_model_builder, list_models

            for name in list_models():
                family = get_model_builder(name).__module__.removeprefix("torchvision.models.")
                found.append(Architecture("torchvision", family, name))
        if "transformers" in libraries:
            found += [Architecture("transformers", family, name) for family, name in families()]
    except ImportError as error:
        raise ZooError(
            f"{' and '.join(libraries)} must be installed for their architectures ({error}): "
            f"pip install 'sao-prune[{'integrations' if 'transformers' in libraries else 'vision'}]'"
        ) from error
    chosen = sorted(a for a in found if fnmatchcase(a.family if a.library == "transformers" else a.name, pattern))
    if not chosen:
        raise ZooError(f"--filter {pattern!r} matches none of the {len(found)} architectures of {', '.join(libraries)}")
    return chosen
