"""Optimizers that a verb leaves behind: made before it, of parameters that are the model's no longer."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterable
from sys import getrefcount
from weakref import ref

from torch import nn
from torch.optim import Optimizer


class StaleOptimizerWarning(UserWarning):
    """An optimizer holds parameters that a verb replaced, and would train nothing in their place."""


def warn_replaced(parameters: Iterable[nn.Parameter | None], verb: str, stacklevel: int = 3) -> None:
    """Warn if a living optimizer holds parameters that are about to be replaced.

    Nothing is kept from call to call and no optimizer is touched: the living ones are looked up when a verb runs,
    which takes a fraction of a second, and only if something beside the model holds one of the parameters and
    the warning is not ignored anyway.

    Args:
        parameters: the ones that will not be the model's any more, but still are.
        verb: who replaces them.
        stacklevel: of the warning; 3 is whoever called the verb that calls this, 4 if the verb has a decorator.

    Warns:
        StaleOptimizerWarning: naming the optimizers.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 2)
        >>> optimizer = torch.optim.SGD(layer.parameters(), 0.1)
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warn_replaced([layer.weight], "compact")
        >>> print(caught[0].message)
        compact replaces parameters that an optimizer made before holds (SGD, 1 of its 2): make a new one to train on
    """
    known = parameters if isinstance(parameters, list) else list(parameters)
    if not _held_elsewhere(known) or _is_silenced():
        return
    replaced = {id(p) for p in known}
    # What nobody holds any more may wait for the collector in a circle of references, as schedulers make them.
    holders = _optimizers_of(replaced)
    if holders and gc.collect() >= 0 and (found := sorted(text for alive, text in holders if alive() is not None)):
        warnings.warn(
            f"{verb} replaces parameters that an optimizer made before holds ({'; '.join(found)}): make a new one to "
            "train on",
            StaleOptimizerWarning,
            stacklevel=stacklevel,
        )


def _held_elsewhere(parameters: list[nn.Parameter | None]) -> bool:
    """Whether anything has a reference to one beside its module and this list; a graph of the last pass is one."""
    probes = [object()]
    owner = {"weight": probes[0]}
    usual = [getrefcount(each) for each in probes]
    return bool(owner) and any(getrefcount(each) > usual[0] for each in parameters if each is not None)


def _is_silenced() -> bool:
    """Whether the first filter that the warning meets ignores it, wherever it comes from and whatever it says."""
    for action, message, category, module, line in warnings.filters:
        if issubclass(StaleOptimizerWarning, category):
            return action == "ignore" and message is None and module is None and not line
    return False


def _optimizers_of(parameters: set[int]) -> list[tuple[ref[Optimizer], str]]:
    """Each optimizer that holds some of the parameters, told by their ids, with its class and share."""
    found = []
    kinds = {Optimizer}
    while more := {sub for kind in kinds for sub in kind.__subclasses__()} - kinds:
        kinds |= more
    living = gc.get_objects()
    # By their types: `isinstance` would ask every object for its class, and some have side effects.
    if kinds.isdisjoint(map(type, living)):
        return []
    for optimizer in [each for each in living if type(each) in kinds]:
        own = {id(p) for group in getattr(optimizer, "param_groups", ()) for p in group["params"]}
        if own & parameters:
            text = f"{type(optimizer).__name__}, {len(own & parameters)} of its {len(own)}"
            found.append((ref(optimizer), text))
    return found
