"""The first and the last layer of a model: as timm names them, else by position."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

# torchvision names no output layers, and has models with several: auxiliary classifiers, detectors, segmentation.
_TORCHVISION_OUTPUTS = (
    "aux1.fc2",
    "aux2.fc2",
    "AuxLogits.fc",
    "rpn.head.cls_logits",
    "rpn.head.bbox_pred",
    "roi_heads.box_predictor.*",
    "roi_heads.mask_predictor.mask_fcn_logits",
    "roi_heads.keypoint_predictor.kps_score_lowres",
    "head.classification_head.cls_logits",
    "head.regression_head.bbox_*",
    "head.*_head.module_list.?",
    "head.*_head.module_list.?.1",
    "aux_classifier.4",
    "classifier.low_classifier",
    "classifier.high_classifier",
)


def first_and_last(model: nn.Module, layers: Sequence[tuple[str, int | None]]) -> tuple[frozenset[str], frozenset[str]]:
    """Paths of the modules that count as first and as last.

    Where the first in order is a convolution that reads the image, all that read as many channels are first: a
    model may have several encoders or scales.

    Args:
        model: any module; timm models name their ends in ``pretrained_cfg`` and ``get_classifier``.
        layers: ``(module path, image channels)`` of every candidate, in order; ``None`` for one that reads no image.

    Example:
        >>> first_and_last(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), [("0", None), ("1", None)])
        (frozenset({'0'}), frozenset({'1'}))
    """
    paths = [path for path, _ in layers]
    channels = dict(layers)
    if not paths:
        return frozenset(), frozenset()
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    first = _below(paths, _names(_entry(config, "first_conv")))
    last = _below(paths, [*_names(_entry(config, "classifier")), *_classifier_paths(model)])
    if type(model).__module__.startswith("torchvision.models."):
        ends = [path for path in paths if any(fnmatchcase(path, pattern) for pattern in _TORCHVISION_OUTPUTS)]
        last = list({*last, *ends, paths[-1]})
    if not first:
        read = channels[paths[0]]
        first = paths[:1] if read is None else [path for path in paths if channels[path] == read]
    return frozenset(first), frozenset(last or paths[-1:])


def _entry(config: Any, key: str) -> Any:
    return config.get(key) if isinstance(config, dict) else getattr(config, key, None)


def _names(entry: Any) -> list[str]:
    if isinstance(entry, str):
        return [entry] if entry else []
    return [name for name in entry if isinstance(name, str) and name] if isinstance(entry, Iterable) else []


def _classifier_paths(model: nn.Module) -> list[str]:
    """Where the modules that `get_classifier` returns live in the model."""
    getter = getattr(model, "get_classifier", None)
    if not callable(getter):
        return []
    try:
        classifier = getter()
    except (AttributeError, TypeError, NotImplementedError):
        return []
    members = classifier if isinstance(classifier, (tuple, list)) else [classifier]
    wanted = {id(m) for m in members if isinstance(m, nn.Module)}
    return [path for path, module in model.named_modules() if id(module) in wanted and path]


def _below(paths: list[str], names: Iterable[str]) -> list[str]:
    prefixes = [f"{name}." for name in names]
    return [path for path in paths if any(f"{path}.".startswith(prefix) for prefix in prefixes)]
