"""The first and the last layer of a model: as timm names them, else by position."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from .._torch import ConvNd
from .kinds import is_experts, stored_weights

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


def first_and_last(
    model: nn.Module,
    layers: Sequence[tuple[str, int | None]],
    *,
    embedded: bool = False,
    unused: Collection[str] = (),
) -> tuple[frozenset[str], frozenset[str]]:
    """Paths of the modules that count as first and as last.

    Where the first in order is a convolution that reads the image, all that read as many channels are first: a
    model may have several encoders or scales. Where an embedding comes before all layers, it is the first layer, and
    of the others only convolutions that read an image are first.

    Args:
        model: any module; timm models name their ends in ``pretrained_cfg`` and ``get_classifier``.
        layers: ``(module path, image channels)`` of every candidate, in order; ``None`` for one that reads no image.
        embedded: whether the model begins with an embedding.
        unused: paths of those at the end of the order that the model was not seen to use, so that none is its last.

    Example:
        >>> first_and_last(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), [("0", None), ("1", None)])
        (frozenset({'0'}), frozenset({'1'}))
    """
    paths = [path for path, _ in layers]
    channels, used = dict(layers), [path for path in paths if path not in unused] or paths
    if not paths:
        return frozenset(), frozenset()
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    first = _below(paths, _names(_entry(config, "first_conv")))
    last = _below(paths, [*_names(_entry(config, "classifier")), *_classifier_paths(model)])
    if type(model).__module__.startswith("torchvision.models."):
        ends = [path for path in paths if any(fnmatchcase(path, pattern) for pattern in _TORCHVISION_OUTPUTS)]
        last = list({*last, *ends, used[-1]})
    if not first:
        read = next((c for c in channels.values() if c is not None), None) if embedded else channels[paths[0]]
        images = [path for path in paths if read is not None and channels[path] == read]
        first = images if images or embedded else paths[:1]
    return frozenset(first), frozenset(last or used[-1:])


def token_embeddings(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The embeddings of a model that read its input; those of positions are none."""
    kinds = (nn.Embedding, nn.EmbeddingBag)
    return {path: m for path, m in modules.items() if isinstance(m, kinds) and not is_positional(path)}


def is_positional(name: str) -> bool:
    """Whether the last part of a name speaks of positions: ``pos_embed``, ``embed_positions``, ``wpe``, ``rel_h``."""
    pattern = r"(^|_)pos|^wpe$|(^|_)rel(ative)?_(pos|attention_bias|bias|emb|[hw]$)"
    return re.search(pattern, name.rpartition(".")[2].lower()) is not None


def image_channels(module: nn.Module) -> int | None:
    """Input channels of a convolution that can read an image: up to four, for colour and depth, made into more."""
    if not isinstance(module, ConvNd) or module.groups > 1:
        return None
    return module.in_channels if module.in_channels <= 4 and module.in_channels < module.out_channels else None


def reads_input(module: nn.Module, tensor: str) -> bool:
    """Of a recurrent module's weights those that read its input, of experts the first; of others all."""
    if is_experts(module):
        return tensor == next(stored.tensor for stored in stored_weights(module))
    return not isinstance(module, nn.RNNBase) or tensor.startswith("weight_ih_l0")


def gives_output(module: nn.Module, tensor: str) -> bool:
    """Of a recurrent module's weights those of its top layer, of experts the last; of others all."""
    if is_experts(module):
        return tensor == [stored.tensor for stored in stored_weights(module)][-1]
    return not isinstance(module, nn.RNNBase) or tensor.removesuffix("_reverse").endswith(f"_l{module.num_layers - 1}")


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
