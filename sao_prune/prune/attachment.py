"""Put draws on modules: all of them or, if anything fails, none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import PruningContainer

from .._torch import is_fake
from ..algorithms import Draw
from .derived import MaskedWeight, settle
from .frozen import thaw
from .hooks import MaskPruning, RefreshAll, RefreshChildren, is_pruned_tensor, pruning_hooks, refresh, watch

P = TypeVar("P", bound=MaskPruning)


class Snapshot:
    """Parameters, buffers and hooks of modules, to put back after a failure."""

    _FIELDS = (
        "_parameters",
        "_buffers",
        "_forward_pre_hooks",
        "_forward_pre_hooks_with_kwargs",
        "_forward_hooks",
        "_state_dict_pre_hooks",
        "_load_state_dict_post_hooks",
    )

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._fields = [
            (module, field, dict(getattr(module, field)))
            for module in {id(m): m for m in modules}.values()
            for field in self._FIELDS
        ]

    def restore(self) -> None:
        """Make everything what it was."""
        for module, field, items in self._fields:
            live = getattr(module, field)
            live.clear()
            live.update(items)
        for module, field, items in self._fields:
            if field == "_parameters":
                for name, parameter in items.items():
                    module.__dict__.pop(name, None)
                    setattr(module, name, parameter)
        for module in {id(m): m for m, _, _ in self._fields}.values():
            refresh(module)


def check_writable(name: str, weight: Tensor) -> None:
    """Refuse weights that cannot be pruned in place.

    Raises:
        ValueError: for weights on the meta device or fake ones, made in inference mode, or that lie on themselves.
    """
    if is_fake(weight):
        raise ValueError(f"{name} is a fake tensor, which has no values: plan() takes it, pruning needs real weights")
    if weight.is_meta:
        raise ValueError(f"{name} is on the meta device: plan() works there, pruning needs real weights")
    if weight.is_inference() or torch.is_inference_mode_enabled():
        raise ValueError(f"{name} belongs to inference mode, where weights cannot be trained again: leave it first")
    if any(stride == 0 and size > 1 for stride, size in zip(weight.stride(), weight.shape)):
        raise ValueError(f"{name} is an expanded tensor whose entries share memory: make it contiguous first")


@contextmanager
def written(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Write parameters and buffers, in place; if what is done inside fails, they get back what they were.

    Args:
        model: whose they are.
        values: new values by full name.

    Returns:
        A context; nothing to use.

    Raises:
        ValueError: from `check_writable`.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> with written(layer, {"bias": torch.ones(2)}):
        ...     layer.bias.tolist()
        [1.0, 1.0]
    """
    held: dict[str, Tensor] = dict([*model.named_buffers(), *model.named_parameters()]) if values else {}
    for name in values:
        check_writable(name, held[name].detach())
    before = {name: held[name].detach().clone() for name in values}
    try:
        with torch.no_grad():
            for name, value in values.items():
                held[name].copy_(value)
        yield
    except BaseException:
        with torch.no_grad():
            for name, value in before.items():
                held[name].copy_(value)
        raise


def attach(module: nn.Module, draw: Draw, method: type[MaskPruning] = MaskPruning) -> None:
    """Put one draw's mask and values on one module, or raise and leave it as it was.

    Args:
        module: the layer, changed in place.
        draw: what to put on it; its weight is of the module alone, with a path of ``""``.
        method: the class of the hook.

    Raises:
        ValueError: from `check_writable`.

    Example:
        >>> from sao_prune.discovery import weight_of
        >>> layer = nn.Linear(4, 4)
        >>> attach(layer, Draw(weight_of(layer), units=torch.eye(4)[None] > 0))
        >>> int(layer.weight_mask.sum())
        4
    """
    attach_all({draw.weight.module: module}, [draw], method)


def attach_all(modules: Mapping[str, nn.Module], draws: Sequence[Draw], method: type[MaskPruning]) -> None:
    """Put draws on the modules of a model, under every name of a tied weight, and keep their masked weights fresh.

    Args:
        modules: the model's modules by path; the model itself, under ``""``, is watched if it is there.
        draws: what to put where.
        method: the class of the hooks.

    Raises:
        ValueError: from `check_writable`.

    Example:
        >>> from sao_prune.discovery import Selection, walk
        >>> net = nn.Sequential(nn.Linear(4, 4))
        >>> (weight,) = walk(net, Selection(skip_first=False, skip_last=False))
        >>> attach_all(dict(net.named_modules()), [Draw(weight, units=torch.eye(4)[None] > 0)], MaskPruning)
        >>> int(net[0].weight_mask.sum())
        4
    """
    names = [((draw.weight.module, draw.weight.tensor), *draw.weight.aliases) for draw in draws]
    for draw in draws:
        check_writable(draw.weight.name, stored(modules[draw.weight.module], draw.weight.tensor))
    masks = [draw.mask(stored(modules[draw.weight.module], draw.weight.tensor)) for draw in draws]
    owned = {path for owners in names for path, _ in owners}
    consumers = {path.rpartition(".")[0] for path in owned if path} & set(modules)
    snapshot = Snapshot(modules[path] for path in (owned | consumers | {""}) & set(modules))
    try:
        for owners, mask in zip(names, masks):
            for path, tensor in owners:
                thaw(modules[path], tensor)
                method.register(modules[path], tensor, mask)
        for path in owned:
            refresh(modules[path])
        for path in consumers - {""}:
            watch(modules[path], RefreshChildren)
        if owned != {""} and "" in modules:
            watch(modules[""], RefreshAll)
    except BaseException:
        snapshot.restore()
        raise
    _write_all(modules, [(draw, owners) for draw, owners in zip(draws, names) if not draw.keeps_values])


def _write_all(modules: Mapping[str, nn.Module], pending: list[tuple[Draw, Sequence[tuple[str, str]]]]) -> None:
    """Write the values, when nothing is left that can fail; an interrupt waits until all are written."""
    interrupt: KeyboardInterrupt | None = None
    while pending:
        try:
            _write(modules, *pending[-1])
            pending.pop()
        except KeyboardInterrupt as caught:
            interrupt = caught
    if interrupt is not None:
        raise interrupt


@torch.no_grad()
def _write(modules: Mapping[str, nn.Module], draw: Draw, owners: Sequence[tuple[str, str]]) -> None:
    """A draw's values, into the weight and into the masked weight under all its names."""
    joined = any(isinstance(h, PruningContainer) for h in pruning_hooks(modules[draw.weight.module]))
    for path, tensor in owners:
        original: Tensor = getattr(modules[path], f"{tensor}_orig")
        if (path, tensor) == owners[0]:
            draw.write_(original.data)
        weight = modules[path].__dict__.get(tensor)
        if isinstance(weight, MaskedWeight) and not joined:
            weight.refill_(original)
        else:
            refresh(modules[path])


def stored(module: nn.Module, tensor: str) -> Tensor:
    """A weight as it is stored, detached: of a pruned tensor the original."""
    if not is_pruned_tensor(module, tensor):
        owner: Any = getattr(module, tensor)
    else:
        settle(module, tensor)
        owner = getattr(module, f"{tensor}_orig")
    return owner.detach()


def last_hook(cls: type[P], module: nn.Module, name: str) -> P:
    """The newest hook of a class on one tensor, within torch's container too.

    Raises:
        AssertionError: if the tensor was pruned without one.
    """
    for hook in reversed(module._forward_pre_hooks.values()):
        for part in reversed(hook) if isinstance(hook, PruningContainer) else (hook,):
            if isinstance(part, cls) and part._tensor_name == name:
                return part
    raise AssertionError(f"{name} was pruned, but its hook is missing")
