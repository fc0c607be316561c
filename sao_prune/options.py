"""The options that the verbs share: how sparse, which layers; and what each weight is asked for by them."""

from __future__ import annotations

from typing import Any, TypedDict

from torch import nn

from .allocation import Allocation, Amount, Budget, Distribution, Fit, allocate
from .discovery import ALREADY_PRUNED, PrunableWeight, Selection, Selector, initialised, walk

_BUDGET = ("degree", "groups", "fit", "distribution")
_SELECTION = ("include", "exclude", "skip_first", "skip_last", "example_input")


class PlanOptions(TypedDict, total=False):
    """Keyword options that `plan`, `apply` and `schedule` share; see `Budget` and `Selection` for what they mean.

    ``budget`` and ``selection`` give the same as an object, which can be kept and handed on.
    """

    degree: Amount | None
    groups: Amount | None
    fit: Fit
    distribution: Distribution
    budget: Budget | None
    include: Selector | None
    exclude: Selector
    skip_first: bool
    skip_last: bool
    example_input: Any
    selection: Selection | None


def asked(sparsity: Amount | None, options: PlanOptions) -> tuple[Budget, Selection]:
    """The budget and the selection that a user's options make.

    Args:
        sparsity: as for `apply`.
        options: the others.

    Returns:
        Both.

    Raises:
        TypeError: for an unknown option, one of the wrong type, or one beside the object that holds it.
        ValueError: for an amount out of range.

    Example:
        >>> budget, selection = asked(None, {"budget": Budget(degree=4), "exclude": ["head"]})
        >>> budget.degree, selection.exclude
        (4, ['head'])
    """
    known = set(PlanOptions.__annotations__)
    unknown = sorted(set(options) - known)
    if unknown:
        raise TypeError(f"unknown option {unknown[0]!r}; known: {', '.join(sorted(known))}")
    loose: dict[str, Any] = dict(options)
    budget, selection = loose.pop("budget", None), loose.pop("selection", None)
    if isinstance(sparsity, Budget):
        raise TypeError("sparsity is a number or a mapping; give a Budget as budget=")
    for name, value, kind in (("budget", budget, Budget), ("selection", selection, Selection)):
        if value is not None and not isinstance(value, kind):
            raise TypeError(f"{name} must be a sao_prune.{kind.__name__}, got {value!r}")
    beside = [name for name in _BUDGET if name in loose] + (["sparsity"] if sparsity is not None else [])
    if budget is not None and beside:
        raise TypeError(f"budget= says how sparse: leave out {', '.join(beside)}, or give it within the Budget")
    beside = [name for name in _SELECTION if name in loose]
    if selection is not None and beside:
        raise TypeError(f"selection= says which layers: leave out {', '.join(beside)}, or give it within the Selection")
    if budget is None:
        budget = Budget(sparsity, **{k: v for k, v in loose.items() if k in _BUDGET})
    if selection is None:
        selection = Selection(**{k: v for k, v in loose.items() if k in _SELECTION})
    return budget, selection


def allocate_model(
    model: nn.Module, budget: Budget, selection: Selection
) -> tuple[nn.Module, list[Allocation | PrunableWeight]]:
    """The model, or a copy whose lazy layers have their shapes, and what each of its weights is asked for.

    Args:
        model: any module; it stays as it is.
        budget: how sparse.
        selection: which layers.

    Returns:
        The model or the copy; and for each weight in the order of the walk an `Allocation`, or the weight with the
        reason why it is skipped.

    Raises:
        TypeError: if the model is no module.
        ValueError: as `apply` has it.

    Example:
        >>> net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
        >>> [type(item).__name__ for item in allocate_model(net, Budget(groups=4), Selection())[1]]
        ['PrunableWeight', 'Allocation', 'PrunableWeight']
    """
    if isinstance(model, nn.Module):
        model = initialised(model, selection.example_input)
    weights = walk(model, selection)
    pruned = [w.name for w in weights if w.reason == ALREADY_PRUNED]
    if pruned:
        raise ValueError(
            f"{len(pruned)} of the chosen layers are pruned already ({', '.join(pruned[:4])}"
            f"{', ..' if len(pruned) > 4 else ''}): call sao_prune.remove(model) first, or exclude them"
        )
    items = allocate(weights, budget)
    if not any(isinstance(item, Allocation) for item in items):
        raise ValueError(_nothing_to_prune(model, [i for i in items if isinstance(i, PrunableWeight)]))
    return model, items


def _nothing_to_prune(model: nn.Module, weights: list[PrunableWeight]) -> str:
    if not weights:
        return (
            f"{type(model).__name__} has no layer that can be pruned: looked for linear, convolutional, recurrent and "
            "attention layers; name raw parameters with include=[...]"
        )
    reasons = "; ".join(f"{w.name}: {w.reason}" for w in weights[:6]) + ("; .." if len(weights) > 6 else "")
    return f"no layer of {type(model).__name__} is left to prune ({reasons})"
