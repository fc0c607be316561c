"""The copy of a model that is converted in its place, and a first run of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.prune import remove as torch_remove

from .._torch import tree_map
from ..allocation import Allocation
from ..discovery import call
from ..discovery.dataflow import record
from ..discovery.feeding import feeds
from .tracer import Tracer


def evaluated(model: nn.Module) -> nn.Module:
    """A copy in eval mode, at least in single precision, earlier masks baked in.

    Raises:
        ValueError: if the model cannot be copied.
    """
    try:
        copied = copy.deepcopy(model)
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} cannot be copied, and layers are converted on a copy: {error}"
        ) from error
    for module in copied.modules():
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, BasePruningMethod):
                torch_remove(module, hook._tensor_name)
    if any(p.is_floating_point() and p.element_size() < 4 for p in copied.parameters()):
        copied.float()
    return copied.eval().requires_grad_(False)


def one_by_one(model: nn.Module) -> nn.Module:
    """The same model, a copy, with experts of transformers that are computed one after another, not grouped."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "_experts_implementation", None) is not None:
            config._experts_implementation = "eager"
    return model


def trial(model: nn.Module, batch: object, weights: Iterable[int]) -> Tracer:
    """Run two examples: does it work, and where do the outputs of these weights, given by their ids, go?

    Raises:
        ValueError: if the model does not run on them.
    """
    few, tracer = _few(batch), Tracer(weights, model.parameters())
    try:
        with tracer:
            call(model, few)
    except Exception as error:
        raise ValueError(f"{type(model).__name__} does not run on the calibration data: {error}") from error
    return tracer


def consumers(model: nn.Module, batch: object, allocations: Sequence[Allocation]) -> dict[int, tuple[int, Tensor]]:
    """For a weight the one that alone reads its outputs, where both are single matrices, and the energy of that one.

    Raises:
        ValueError: if the model does not run on the batch.
    """
    try:
        pairs = feeds(record(model, _few(batch)))
    except ValueError as error:
        raise ValueError(f"{type(model).__name__} does not run on the calibration data: {error}") from error
    index = {a.weight.name: i for i, a in enumerate(allocations) if a.weight.parts == 1 and a.groups > 1}
    found = {}
    for first, then in pairs.items():
        if first in index and then in index:
            weight = allocations[index[then]].weight
            matrix = weight.matrices(getattr(model.get_submodule(weight.module), weight.tensor).detach())[0]
            found[index[first]] = (index[then], matrix[..., None].flatten(2).square().sum(2))
    return found


def _few(batch: object) -> object:
    return tree_map(lambda t: t[:2].clone() if isinstance(t, Tensor) and t.dim() else t, batch)


@contextmanager
def progress_bar(total: int) -> Iterator[Callable[[], None]]:
    """A progress bar, if somebody is there to see it."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda: None
        return
    from rich.progress import Progress

    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("converting layers", total=total)
        yield lambda: progress.advance(task)
