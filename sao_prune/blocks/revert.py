"""The verb `expand`."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import nn

from ..discovery import Selector, pick
from ..naming import dotted
from ..plain import why_not_plain
from ..prune import RefreshAll, RefreshChildren, pruning_hooks, settle_all, watch
from ..replaced import warn_replaced
from .calls import to_contiguous
from .epilogue import detach
from .example import keep_example
from .forms import dense_form
from .modules import BlockComposite, BlockModule
from .report import EXPANDED, CompactRecord, CompactReport
from .swap import become

Block: TypeAlias = BlockModule | BlockComposite


@torch.inference_mode(False)  # its parameters could never be trained
def expand(
    model: nn.Module,
    form: Literal["masked", "baked"] | None = None,
    *,
    include: Selector | None = None,
    exclude: Selector = (),
) -> CompactReport:
    """Turn block layers back into their dense ones, in place; all of them, unless some are chosen.

    Args:
        model: any module.
        form: ``"masked"`` puts ``weight_orig`` and ``weight_mask`` back, so that training keeps the zeros;
            ``"baked"`` plain weights; ``None`` what each layer was before.
        include: glob patterns on module or parameter names, or a predicate ``(name, module) -> bool``; only these
            layers. Layers inside one with several weights, as in attention, go with it.
        exclude: the same, for layers that stay compact.

    Returns:
        A `CompactReport` with the expanded layers in its ``expanded``, and those that stay compact.

    Raises:
        TypeError: if a selector is neither patterns nor a predicate.
        ValueError: if no chosen layer is compact, a pattern matches nothing, or for an unknown form.

    Example:
        >>> import torch, sao_prune
        >>> net = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3)))
        >>> _ = sao_prune.apply(net, groups=4, seed=0)
        >>> _ = sao_prune.compact(net)
        >>> _ = sao_prune.expand(net)
        >>> type(net[1]).__name__, sorted(net[1].state_dict())
        ('Linear', ['bias', 'weight_mask', 'weight_orig'])
    """
    if form not in (None, "masked", "baked"):
        raise ValueError(f"form must be 'masked', 'baked' or None, got {form!r}")
    inner = {id(m.layer) for owner in model.modules() if isinstance(owner, BlockComposite) for m in owner.matrices()}
    kinds = (BlockModule, BlockComposite)
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, kinds) and id(m) not in inner]
    targets = _chosen(found, include, exclude)
    if not targets:
        raise ValueError(f"nothing to expand: {'no chosen layer' if found else 'no layer of the model'} is compact")
    for name, module in targets:
        _check_plain(name, module)
    blocks = [m for _, target in targets for m in target.modules() if isinstance(m, BlockModule)]
    warn_replaced([module._parameters.get("blocks") for module in blocks], "expand", 4)
    settle_all(model)
    # All of them first: if one fails, for want of memory say, the model is as it was.
    forms = [dense_form(module, None if form is None else form == "masked") for _, module in targets]
    detach(model)
    kept = [each for each in found if all(each[1] is not module for _, module in targets)]
    records = [record for name, module in kept for record in _records(name, module)]
    for (name, module), dense in zip(targets, forms):
        records += _records(name, module, dense)
        become(module, dense)
        if any(True for _ in pruning_hooks(module)):
            watch(model, RefreshAll)
            if name:
                watch(model.get_submodule(name.rpartition(".")[0]), RefreshChildren)
    to_contiguous(model.modules())
    if not kept:
        for part in model.modules():
            keep_example(part, None)
    return CompactReport(tuple(records), EXPANDED)


def _chosen(found: list[tuple[str, Block]], include: Selector | None, exclude: Selector) -> list[tuple[str, Block]]:
    """The block layers to expand; those below one with several weights go with it, because it reads theirs."""
    names = [("blocks", "weight") if isinstance(m, BlockModule) else _weights(m) for _, m in found]
    reasons = pick([(name, m, tensors) for (name, m), tensors in zip(found, names)], include, exclude)
    taken = [each for each, reason in zip(found, reasons) if reason is None]
    above = {id(inner) for _, m in taken if isinstance(m, BlockComposite) for inner in m.modules()}
    return [each for each, reason in zip(found, reasons) if reason is None or id(each[1]) in above]


def _weights(module: nn.Module) -> tuple[str, ...]:
    return module.compact_weights if isinstance(module, BlockComposite) else ()


def _records(name: str, module: Block, dense: nn.Module | None = None) -> list[CompactRecord]:
    """The records of a layer that stays compact, or of the dense one that it becomes."""
    kind, reason = type(module if dense is None else dense).__name__, None if dense is None else EXPANDED
    if isinstance(module, BlockModule):
        weights = [(name, module.weight_shape, [module])]
    else:
        own = module.compact_records.items()
        weights = [(dotted(name, tensor), record.shape, [*module.layers_of(tensor)]) for tensor, record in own]
    records = []
    for path, shape, layers in weights:
        groups, execution = sum(layer.topology.groups for layer in layers), str(layers[0].execution)
        records.append(CompactRecord(path, kind, shape, groups, execution if dense is None else "", reason=reason))
    return records


def _check_plain(name: str, module: nn.Module) -> None:
    """Refuse a block layer whose parameters something else computes.

    Raises:
        ValueError: telling what to do first.
    """
    for matrix in module.matrices() if isinstance(module, BlockComposite) else ():
        _check_plain(dotted(name, matrix.path), matrix.layer)
    # Weights of a layer with several may be masked beside those that are blocks.
    reason = why_not_plain(module, masked=isinstance(module, BlockComposite))
    if reason is not None:
        raise ValueError(f"{name}: {reason}; nothing was expanded")
    if isinstance(module, BlockModule) and "blocks" not in module._parameters:
        raise ValueError(f"{name}: its blocks are no parameter of its own: undo what replaced them first")
