"""Where to prune: the weights of any model, in execution order, and why others are left alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .adapters import adapter_reason
from .endpoints import first_and_last
from .trace import first_use_order

Predicate = Callable[[str, nn.Module], bool]
Selector = Sequence[str] | Predicate

_GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}
_CELL_GATES = {nn.LSTMCell: 4, nn.GRUCell: 3, nn.RNNCell: 1}
_STANDARDISED = ("StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame")
_RAW = "Parameter"
ALREADY_PRUNED = "already pruned"
_COMPUTED = "its {} is computed from other parameters (parametrization, weight or spectral norm)"


@dataclass(frozen=True)
class PrunableWeight:
    """One weight tensor of a model, seen as ``parts`` matrices ``(m, n, *kernel)`` stacked along dimension 0.

    Attributes:
        module: path of the module that owns it, ``""`` for the model itself.
        tensor: name of the parameter there, ``"weight"``, ``"in_proj_weight"``, ``"weight_hh_l0"``, ..
        kind: class name of the module, or ``"Parameter"`` for a raw parameter.
        shape: shape of the tensor.
        parts: independent matrices in it: groups of a convolution, gates of an RNN, projections of attention.
        transposed: whether dimension 0 holds the inputs, as in transposed convolutions.
        aliases: other ``(module, tensor)`` names of the same parameter (tied weights).
        reason: why it is left alone; ``None`` if it can be pruned.
        last: whether it is the model's last layer.
    """

    module: str
    tensor: str
    kind: str
    shape: tuple[int, ...]
    parts: int = 1
    transposed: bool = False
    aliases: tuple[tuple[str, str], ...] = ()
    reason: str | None = None
    last: bool = False

    @property
    def name(self) -> str:
        """The parameter's full name in the model."""
        return f"{self.module}.{self.tensor}" if self.module else self.tensor

    @property
    def matrix(self) -> tuple[int, int]:
        """``(m, n)``, outputs and inputs of each part."""
        rows, cols = self.shape[0] // self.parts, self.shape[1]
        return (cols, rows) if self.transposed else (rows, cols)

    @property
    def kernel(self) -> tuple[int, ...]:
        """Kernel size, empty for a matrix."""
        return self.shape[2:]

    @property
    def numel(self) -> int:
        """Number of weights."""
        return torch.Size(self.shape).numel()

    def matrices(self, tensor: Tensor) -> Tensor:
        """A view of ``tensor`` as ``(parts, m, n, *kernel)``."""
        stacked = tensor.unflatten(0, (self.parts, -1))
        return stacked.transpose(1, 2) if self.transposed else stacked


@dataclass(frozen=True)
class Selection:
    """Which layers to take.

    Attributes:
        include: glob patterns on module or parameter names, or a predicate ``(name, module) -> bool``; ``None``
            takes every layer. A pattern that ends in the name of a parameter outside the known layers takes it as a
            matrix; one that ends in a wildcard takes layers only, and the members of parameter lists.
        exclude: the same, for layers to leave alone.
        skip_first: leave the first layer of the model dense.
        skip_last: leave the last layer (the classifier) dense.
        example_input: a tensor, tuple or dict to run once, so that layers come in the order of their execution;
            without it they come in the order of their registration.
    """

    include: Selector | None = None
    exclude: Selector = ()
    skip_first: bool = True
    skip_last: bool = True
    example_input: Any = field(default=None, repr=False)


def walk(model: nn.Module, selection: Selection | None = None) -> list[PrunableWeight]:
    """Find every prunable weight of a model, and every other one of those layers with the reason it is left alone.

    Linear, convolutions of 1 to 3 dimensions (grouped and transposed too), the projections of
    `torch.nn.MultiheadAttention`, recurrent layers and cells, and raw parameters named in ``include``. Works on the
    meta device and touches no weight.

    Args:
        model: any module.
        selection: which layers to take.

    Returns:
        One record a weight, tied weights once; in execution order if ``selection.example_input`` is given.

    Raises:
        TypeError: if ``model`` is no module.
        ValueError: if a pattern matches nothing, or the example input does not run.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> [(w.name, w.reason) for w in walk(net)]
        [('0.weight', 'first layer'), ('2.weight', None), ('4.weight', 'last layer')]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    selection = selection or Selection()
    modules = dict(model.named_modules())
    known = list(_known_weights(modules))
    found = _merge_tied(modules, [*known, *_raw_parameters(model, modules, selection.include)])
    check_patterns("include", selection.include, found)
    check_patterns("exclude", selection.exclude, found)
    if selection.example_input is not None:
        found = _in_execution_order(model, modules, found, selection.example_input)
        known = [weight for weight in found if weight.kind != _RAW]
    known = [weight for weight in known if adapter_reason(modules, weight.module) is None]
    first, last = first_and_last(model, [(w.module, _image_channels(modules[w.module])) for w in known])
    return [_judge(weight, modules, selection, first, last) for weight in found]


def check_patterns(option: str, selector: Selector | Mapping[str, Any] | None, found: list[PrunableWeight]) -> None:
    """Refuse a pattern that matches no layer, naming what there is.

    Raises:
        TypeError: for a bare string or for something that is neither patterns nor a predicate.
        ValueError: for a pattern without a match.
    """
    if selector is None or callable(selector):
        return
    if isinstance(selector, str) or not isinstance(selector, Iterable):
        raise TypeError(
            f"{option} must be a list of glob patterns or a predicate (name, module) -> bool, got {selector!r}"
        )
    for pattern in selector:
        if not isinstance(pattern, str):
            raise TypeError(f"{option} patterns must be strings, got {pattern!r}")
        if not any(matches(pattern, weight) for weight in found):
            names = ", ".join(w.module or w.tensor for w in found[:8]) + (", .." if len(found) > 8 else "")
            raise ValueError(f"{option} pattern {pattern!r} matches none of the {len(found)} layers: {names}")


def matches(pattern: str, weight: PrunableWeight) -> bool:
    """Whether a glob pattern names the weight's module or the weight itself, by any of its names."""
    names = [(weight.module, weight.tensor), *weight.aliases]
    return any(
        fnmatchcase(module, pattern) or fnmatchcase(f"{module}.{tensor}" if module else tensor, pattern)
        for module, tensor in names
    )


def _selected(selector: Selector, weight: PrunableWeight, modules: Mapping[str, nn.Module]) -> bool:
    if callable(selector):
        return bool(selector(weight.module, modules[weight.module]))
    return any(matches(pattern, weight) for pattern in selector)


def weight_of(module: nn.Module, tensor: str = "weight") -> PrunableWeight:
    """The record of one weight of one module, as if the module were the whole model.

    Raises:
        TypeError: if ``module`` is no module.
        ValueError: if it has no such weight, or one that cannot be pruned.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(module).__name__}")
    names = [tensor]
    found = [*_known_weights({"": module}), *_raw_parameters(module, {"": module}, names)]
    for weight in found:
        if weight.tensor == tensor:
            if weight.reason not in (None, ALREADY_PRUNED):
                raise ValueError(f"{weight.kind}.{tensor} cannot be pruned: {weight.reason}")
            return replace(weight, reason=None)
    known = ", ".join(w.tensor for w in found) or "none"
    raise ValueError(f"{type(module).__name__} has no prunable weight {tensor!r}; it has: {known}")


def _known_weights(modules: Mapping[str, nn.Module]) -> Iterator[PrunableWeight]:
    for path, module in modules.items():
        for tensor, parts in _weights_of(module):
            weight = _parameter(module, tensor)
            if weight is None:
                if parametrize.is_parametrized(module, tensor) or hasattr(module, f"{tensor}_g"):
                    reason = _COMPUTED.format(tensor)
                    yield PrunableWeight(path, tensor, type(module).__name__, (), reason=reason)
                continue
            transposed = bool(getattr(module, "transposed", False)) and isinstance(module, nn.modules.conv._ConvNd)
            lazy = isinstance(weight, nn.parameter.UninitializedParameter)
            found = PrunableWeight(
                path, tensor, type(module).__name__, () if lazy else tuple(weight.shape), parts, transposed
            )
            yield replace(found, reason=_obstacle(module, weight, found))


def _weights_of(module: nn.Module) -> Iterator[tuple[str, int]]:
    """Names of the weight tensors of a module, and of how many stacked matrices each consists."""
    if isinstance(module, nn.Linear):
        yield "weight", 1
    elif isinstance(module, nn.modules.conv._ConvNd):
        yield "weight", module.groups
    elif isinstance(module, nn.MultiheadAttention):
        yield "in_proj_weight", 3
        yield from ((f"{letter}_proj_weight", 1) for letter in "qkv")
    elif isinstance(module, nn.RNNBase):
        gates = _GATES.get(module.mode, 1)
        for name in module._flat_weights_names:
            if name.startswith("weight_"):
                yield name, 1 if name.startswith("weight_hr") else gates
    elif isinstance(module, nn.RNNCellBase):
        gates = next((g for cell, g in _CELL_GATES.items() if isinstance(module, cell)), 1)
        yield "weight_ih", gates
        yield "weight_hh", gates


def _image_channels(module: nn.Module) -> int | None:
    """Input channels of a convolution that can read an image: up to four, for colour and depth, made into more."""
    if not isinstance(module, nn.modules.conv._ConvNd) or module.groups > 1:
        return None
    return module.in_channels if module.in_channels <= 4 and module.in_channels < module.out_channels else None


def _parameter(module: nn.Module, tensor: str) -> nn.Parameter | None:
    """The parameter behind a name, also where torch's prune has put it under ``<name>_orig``."""
    own = module._parameters.get(tensor)
    return own if own is not None else module._parameters.get(f"{tensor}_orig")


def _obstacle(module: nn.Module, weight: nn.Parameter, found: PrunableWeight) -> str | None:
    if not found.shape:
        return "not initialised yet (lazy): run the model once first"
    if found.tensor not in module._parameters:
        masked = f"{found.tensor}_mask" in module._buffers
        return ALREADY_PRUNED if masked else _COMPUTED.format(found.tensor)
    if not weight.is_floating_point():
        return f"not a floating-point weight ({weight.dtype})"
    if len(found.shape) < 2 or found.shape[0] % found.parts:
        return f"not a matrix: shape {found.shape}"
    if any(c.__name__ in _STANDARDISED for c in type(module).__mro__):
        return "its forward standardises the weight, so pruned zeros would come back"
    if isinstance(module, nn.modules.conv._ConvNd) and found.parts > 1 and min(found.matrix) == 1:
        return "depthwise"
    if min(found.matrix) < 2:
        return f"too small: {found.matrix[0]} x {found.matrix[1]}"
    return None


def _raw_parameters(
    model: nn.Module, modules: Mapping[str, nn.Module], include: Selector | None
) -> Iterator[PrunableWeight]:
    if include is None or callable(include) or isinstance(include, str):
        return
    known = {id(p) for m in modules.values() for t, _ in _weights_of(m) if (p := _parameter(m, t)) is not None}
    for name, parameter in model.named_parameters():
        path, _, tensor = name.rpartition(".")
        if id(parameter) in known or not any(_names_it(p, name, modules[path]) for p in include):
            continue
        if parameter.dim() >= 2 and not isinstance(modules[path], nn.Embedding | nn.EmbeddingBag):
            found = PrunableWeight(path, tensor.removesuffix("_orig"), _RAW, tuple(parameter.shape))
            yield replace(found, reason=_obstacle(modules[path], parameter, found))


def _names_it(pattern: object, name: str, owner: nn.Module) -> bool:
    """Whether a pattern means this raw parameter: by its own name, for a wildcard there is meant for layers."""
    if not isinstance(pattern, str) or not fnmatchcase(name, pattern):
        return False
    last = pattern.rpartition(".")[2]
    return isinstance(owner, nn.ParameterList | nn.ParameterDict) or not any(c in last for c in "*?[")


def _merge_tied(modules: Mapping[str, nn.Module], found: list[PrunableWeight]) -> list[PrunableWeight]:
    """Keep the first of several names of one parameter; the others become its aliases.

    A parameter that something else uses as well, an embedding say, is left alone: its mask would not hold there.
    """
    names: dict[int, list[str]] = {}
    for path, module in modules.items():
        for tensor, parameter in module._parameters.items():
            if parameter is not None:
                names.setdefault(id(parameter), []).append(f"{path}.{tensor}" if path else tensor)
    ours = {f"{w.name}{suffix}" for w in found for suffix in ("", "_orig")}
    merged = _merge_names(modules, found)
    for index, weight in enumerate(merged):
        parameter = _parameter(modules[weight.module], weight.tensor)
        others = [name for name in names.get(id(parameter), ()) if name not in ours]
        if others and weight.reason is None:
            merged[index] = replace(weight, reason=f"tied to {others[0]}, which is no layer to prune")
    return merged


def _merge_names(modules: Mapping[str, nn.Module], found: list[PrunableWeight]) -> list[PrunableWeight]:
    owner: dict[int, int] = {}
    merged: list[PrunableWeight] = []
    for weight in found:
        parameter = _parameter(modules[weight.module], weight.tensor)
        key = id(parameter if parameter is not None else object())
        if parameter is not None and key in owner:
            first = merged[owner[key]]
            alias = (weight.module, weight.tensor)
            merged[owner[key]] = replace(first, aliases=(*first.aliases, alias), reason=first.reason or weight.reason)
        else:
            if parameter is not None:
                owner[key] = len(merged)
            merged.append(weight)
    return merged


def _in_execution_order(
    model: nn.Module, modules: Mapping[str, nn.Module], found: list[PrunableWeight], example_input: Any
) -> list[PrunableWeight]:
    parameters = [_parameter(modules[w.module], w.tensor) for w in found]
    order = first_use_order(model, [p for p in parameters if p is not None], example_input)
    rank = {key: position for position, key in enumerate(order)}
    return [w for _, w in sorted(zip(parameters, found), key=lambda pair: rank.get(id(pair[0]), len(rank)))]


def _judge(
    weight: PrunableWeight,
    modules: Mapping[str, nn.Module],
    selection: Selection,
    first: frozenset[str],
    last: frozenset[str],
) -> PrunableWeight:
    names = [(modules[path], path, tensor) for path, tensor in ((weight.module, weight.tensor), *weight.aliases)]
    is_first = weight.kind != _RAW and any(path in first and _reads_input(m, t) for m, path, t in names)
    is_last = weight.kind != _RAW and any(path in last and _gives_output(m, t) for m, path, t in names)
    weight = replace(weight, last=is_last, reason=weight.reason or adapter_reason(modules, weight.module))
    if weight.reason not in (None, ALREADY_PRUNED):
        return weight
    if selection.include is not None and not _selected(selection.include, weight, modules):
        return replace(weight, reason="not included")
    if selection.exclude and _selected(selection.exclude, weight, modules):
        return replace(weight, reason="excluded")
    if selection.skip_first and is_first:
        return replace(weight, reason="first layer")
    if selection.skip_last and is_last:
        return replace(weight, reason="last layer")
    return weight


def _reads_input(module: nn.Module, tensor: str) -> bool:
    """Of a recurrent module's weights those that read its input; of others all."""
    return not isinstance(module, nn.RNNBase) or tensor.startswith("weight_ih_l0")


def _gives_output(module: nn.Module, tensor: str) -> bool:
    """Of a recurrent module's weights those of its top layer; of others all."""
    return not isinstance(module, nn.RNNBase) or tensor.removesuffix("_reverse").endswith(f"_l{module.num_layers - 1}")
