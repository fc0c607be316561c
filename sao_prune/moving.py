"""How a topology begins to move: masks that are drawn now, or those that a model has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from .algorithms import Method
from .allocation import Allocation, Amount
from .blocks.modules import BlockModule
from .discovery import ALREADY_PRUNED, PrunableWeight, Selection, Selector, pick, walk
from .held import held_tensors
from .model import apply
from .options import PlanOptions
from .reporting import Report, block_count
from .sites import mask_units

Items = list[Allocation | PrunableWeight]
_AMOUNTS = ("degree", "groups", "budget")


def begin(
    model: nn.Module, method: Method, sparsity: Amount | None, seed: int, options: PlanOptions
) -> tuple[Items, Report | None]:
    """Draw masks if there is an amount, and tell what of a model may move.

    Args:
        model: any module.
        method: one that moves.
        sparsity: as for `apply`; without this and other amounts the model's own masks count.
        seed: of the draw.
        options: as for `apply`.

    Returns:
        What moves, and the weights that do not with the reason; and the report of the draw.

    Raises:
        TypeError: for options that only a draw needs.
        ValueError: as for `apply`, or if nothing is there to move.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    report = None
    if sparsity is not None or any(options.get(unit) is not None for unit in _AMOUNTS):
        report = apply(model, sparsity, method=method, seed=seed, **options)
        chosen = {record.name for record in report.pruned}
        return [item for item in present(model, method, {}) if _is_one_of(item, chosen)], report
    if isinstance(selection := options.get("selection"), Selection):
        return present(model, method, {"include": selection.include, "exclude": selection.exclude}), None
    needless = sorted(set(options) - {"include", "exclude", "selection"})
    if needless:
        raise TypeError(
            f"{needless[0]}= says what is drawn: give an amount too (sparsity=, degree= or groups=), or leave it out "
            "for the masks that the model has"
        )
    return present(model, method, options), None


def present(model: nn.Module, method: Method, options: PlanOptions) -> Items:
    """What of a model may move as it is.

    Raises:
        ValueError: if nothing may, or a layer is held.
    """
    items: Items = []
    modules = dict(model.named_modules())
    for weight in walk(model, Selection(skip_first=False, skip_last=False)):
        if weight.reason == ALREADY_PRUNED:
            items.append(_masked(weight, modules[weight.module], method))
        else:
            items.append(replace(weight, reason=weight.reason or "it has no mask"))
    items += [_compact(path, module, method) for path, module in modules.items() if isinstance(module, BlockModule)]
    items = _picked(items, modules, options.get("include"), options.get("exclude", ()))
    for item in items:
        if isinstance(item, Allocation) and held_tensors(modules[item.weight.module]):
            raise ValueError(
                f"{item.weight.name} is held: hold keeps the blocks that it has orthogonal, so that they cannot move; "
                "call sao_prune.release(model) first, or exclude it"
            )
    if not any(isinstance(item, Allocation) for item in items):
        kind = "a block topology" if method.structured else "a mask"
        raise ValueError(
            f"nothing can move: no layer of {type(model).__name__} has {kind}; give an amount (sparsity=, degree= or "
            "groups=) to draw one, or call sao_prune.apply(model, ..) before"
        )
    return items


def _masked(weight: PrunableWeight, module: nn.Module, method: Method) -> Allocation | PrunableWeight:
    units = mask_units(weight, getattr(module, f"{weight.tensor}_mask"), method.fine)
    groups = block_count(units) if method.structured else 1
    if groups is None:
        return replace(weight, reason="its mask is not made of blocks")
    return Allocation(replace(weight, reason=None), float(units.double().mean()), groups)


def _compact(path: str, module: Any, method: Method) -> Allocation | PrunableWeight:
    weight = PrunableWeight(path, "weight", type(module).__name__, tuple(module.weight_shape))
    if not method.structured:
        return replace(weight, reason="it is compact, and this method leaves no blocks: expand the model first")
    if module.parts != 1 or type(module).values is not BlockModule.values:
        return replace(weight, reason="it is compact, and not a single matrix of blocks")
    return Allocation(weight, 1 - module.topology.sparsity, module.topology.groups)


def _picked(items: Items, modules: Mapping[str, nn.Module], include: Selector | None, exclude: Selector) -> Items:
    """The items that the selectors take; a tied weight is taken under any of its names."""
    names = []
    for index, item in enumerate(items):
        weight = item.weight if isinstance(item, Allocation) else item
        names += [(index, path, tensor) for path, tensor in ((weight.module, weight.tensor), *weight.aliases)]
    reasons = pick([(path, modules[path], [tensor]) for _, path, tensor in names], include, exclude)
    skipped = {index: reason for (index, _, _), reason in zip(names, reasons) if reason is not None}
    for (index, _, _), reason in zip(names, reasons):
        if reason is None:
            skipped.pop(index, None)
    return [
        replace(item.weight, reason=skipped[index]) if isinstance(item, Allocation) and index in skipped else item
        for index, item in enumerate(items)
    ]


def _is_one_of(item: Allocation | PrunableWeight, names: set[str]) -> bool:
    return not isinstance(item, Allocation) or item.weight.name in names
