"""Which norms, activations and layers follow a layer's result, and nothing else, when a model runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from .calls import record_calls
from .linear import BlockLinear
from .steps import LINEAR, NORM, does_nothing, is_known, step


@dataclass
class _Result:
    """A tensor that came from a layer by some steps."""

    layer: nn.Module
    above: tuple[nn.Module, ...]
    entered: int
    names: tuple[str, ...] = ()
    modules: tuple[nn.Module, ...] = ()
    before: _Result | None = None
    reader: nn.Module | None = None
    uses: int = 0


@dataclass(frozen=True)
class Followers:
    """What follows a layer.

    Attributes:
        names: the steps: at most a norm and an activation, or an activation and a layer.
        modules: the modules whose hooks would see what is between them.
        reader: that layer.
    """

    names: tuple[str, ...] = ()
    modules: tuple[nn.Module, ...] = ()
    reader: nn.Module | None = None


class _Watch(TorchFunctionMode):
    """Follows the layers' results through a run."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = {id(layer) for layer in layers}
        self.results = WeakTensorKeyDictionary()
        self.all: list[_Result] = []
        self.stack: list[nn.Module] = []
        self.log: list[nn.Module] = []

    def entered(self, module: nn.Module, args: Any) -> None:
        """A module is called."""
        if type(module) is BlockLinear and id(module) in self.layers and args:
            self._read(module, args[0])
        self.stack.append(module)
        self.log.append(module)

    def _read(self, reader: nn.Module, value: Any) -> None:
        """A layer is given a value: one use of it, whatever it does with it."""
        self.used(value)
        source = self.results.get(value) if isinstance(value, Tensor) else None
        if source is None or type(source.layer) is not BlockLinear or not source.names or NORM in source.names:
            return
        names, modules = (*source.names, LINEAR), (*self._seen(source), reader)
        self.all.append(_Result(source.layer, source.above, source.entered, names, modules, source, reader))

    def left(self, module: nn.Module, args: Any, output: Any) -> None:
        """A module is done."""
        self.stack.pop()

    def came(self, layer: nn.Module, args: Any, output: Any) -> None:
        """A layer gave a result."""
        if isinstance(output, Tensor):
            self._keep(output, _Result(layer, tuple(self.stack), len(self.log)))

    def _keep(self, tensor: Tensor, result: _Result) -> None:
        self.results[tensor] = result
        self.all.append(result)

    def used(self, values: Any) -> None:
        """These values were taken by somebody."""
        for value in tree_leaves(values):
            if isinstance(value, Tensor) and value in self.results:
                self.results[value].uses += 1

    def _seen(self, source: _Result) -> tuple[nn.Module, ...]:
        """The modules that have been entered since a layer was called, or left: their hooks see what is under way."""
        left = [m for m in source.above if m not in self.stack]
        return tuple(dict.fromkeys((*left, *self.log[source.entered :])))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inside = bool(self.stack) and id(self.stack[-1]) in self.layers and type(self.stack[-1]) is BlockLinear
        if is_known(func) or inside or does_nothing(func, args, kwargs):
            return func(*args, **kwargs)
        self.used((args, kwargs))
        first = args[0] if args else None
        source = self.results.get(first) if isinstance(first, Tensor) else None
        output = func(*args, **kwargs)
        found = None if source is None else step(func, args, kwargs)
        if source is not None and found is not None and isinstance(output, Tensor):
            if found.norm is None:
                suits = source.names in ((), (NORM,))
            else:
                suits = source.names == () and found.norm.suits(output.shape[1], output[:, 0].numel())
            if suits:
                names = *source.names, found.name
                self._keep(
                    output, _Result(source.layer, source.above, source.entered, names, self._seen(source), source)
                )
        return output


def followers(model: nn.Module, layers: Iterable[nn.Module], example_input: Any) -> dict[int, Followers]:
    """What follows each layer, by the id of the module, in a run of the model in eval mode.

    Args:
        model: any module.
        layers: the layers in it.
        example_input: what to run it on.

    Raises:
        ValueError: if the model fails on the example input.
    """
    layers = list(layers)
    watch = _Watch(layers)
    everywhere = torch.nn.modules.module
    hooks = [
        everywhere.register_module_forward_pre_hook(watch.entered),
        everywhere.register_module_forward_hook(watch.left, always_call=True),
        *(layer.register_forward_hook(watch.came) for layer in layers),
    ]
    try:
        with watch:
            watch.used(record_calls(model, [], example_input).output)
        for kept in list(watch.results.values()):
            kept.uses += 1  # somebody has put it aside
    finally:
        for hook in hooks:
            hook.remove()
    found: dict[int, Followers] = {}
    ends = {id(result.before) for result in watch.all}
    for result in watch.all:
        if id(result) in ends:
            continue
        chain = [result]
        while chain[-1].before is not None:
            chain.append(chain[-1].before)
        # Up to the first that somebody else takes too.
        last = next((r for r in reversed(chain) if r.uses != 1), result)
        new = Followers(last.names, last.modules, last.reader)
        old = found.setdefault(id(result.layer), new)
        if (old.names, old.reader) != (new.names, new.reader):
            found[id(result.layer)] = Followers()
        else:
            modules = tuple(dict.fromkeys((*old.modules, *new.modules)))
            found[id(result.layer)] = Followers(new.names, modules, new.reader)
    found = {key: each for key, each in found.items() if each.names}
    # A reader that has something to compute with its own result does so instead.
    return {key: _alone(each) if id(each.reader) in found else each for key, each in found.items()}


def _alone(followers: Followers) -> Followers:
    return Followers(tuple(name for name in followers.names if name != LINEAR), followers.modules)
