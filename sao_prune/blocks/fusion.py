"""Which norm, activation and next linear layer may join a block layer: found once, in a run of the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from .._torch import tree_leaves
from .calls import Calls, record_calls
from .epilogue import ACTIVATIONS, Epilogue, activation_in, is_activation, is_norm

_SEES_THROUGH = (nn.Dropout, nn.Identity, nn.Sequential)
# What is asked of a tensor without a use of its values.
_METADATA = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "layout", "requires_grad")),
    *(getattr(Tensor, name).__get__ for name in ("is_cuda", "is_meta", "is_sparse", "is_quantized", "is_mkldnn")),
    Tensor.size, Tensor.dim, Tensor.stride, Tensor.numel, Tensor.nelement, Tensor.is_contiguous,
    Tensor.is_floating_point, Tensor.is_complex, torch.is_floating_point, torch.is_complex, torch.numel,
}  # fmt: skip


@dataclass(frozen=True)
class Chain:
    """What follows a layer and nothing else sees.

    Attributes:
        owner: the layer.
        norm: the batch norm that takes its result.
        activation: the activation that takes that.
        between: dropouts before the next layer.
        then: the linear layer that takes the activation's result.
    """

    owner: nn.Module
    norm: nn.Module | None = None
    activation: nn.Module | None = None
    between: tuple[nn.Module, ...] = ()
    then: nn.Module | None = None

    def epilogue(self, owner: Any, then: Any = None) -> Epilogue:
        """To be computed by ``owner``, which stands in the layer's place; ``then`` in that of the next one."""
        return Epilogue(owner, self.norm, self.activation, self.between if then is not None else (), then)

    @property
    def names(self) -> tuple[str, ...]:
        """The steps."""
        activation = next((n for kind, n in ACTIVATIONS.items() if isinstance(self.activation, kind)), None)
        norm, then = self.norm is not None, self.then is not None
        steps = "batch_norm" if norm else None, activation, "linear" if then else None
        return tuple(step for step in steps if step)


@dataclass(eq=False)
class _Result:
    """A tensor that came from a layer by the steps of a chain."""

    chain: Chain
    before: _Result | None = None
    uses: int = 0


class _Watch(TorchFunctionMode):
    """Follows the layers' results through a run."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = {id(layer) for layer in layers}
        self.results = WeakTensorKeyDictionary()
        self.all: list[_Result] = []
        self.inside: list[tuple[nn.Module, _Result]] = []
        self.calls: dict[int, int] = {}
        self.stack: list[nn.Module] = []

    def entered(self, module: nn.Module, args: Any) -> None:
        """A module is called."""
        self.stack.append(module)
        self.calls[id(module)] = self.calls.get(id(module), 0) + 1
        source = self.results.get(args[0]) if args and isinstance(args[0], Tensor) else None
        if source is None or self.inside:
            return
        if type(module) is nn.Dropout:
            source.chain = replace(source.chain, between=(*source.chain.between, module))
        elif _extends(source.chain, module, args[0]):
            source.uses += 1
            self.inside.append((module, source))
        elif id(module) in self.layers and isinstance(module, nn.Linear | _linear()) and source.chain.activation:
            source.uses += 1
            if source.chain.norm is None and isinstance(source.chain.owner, nn.Linear | _linear()):
                self.all.append(_Result(replace(source.chain, then=module), source))
            self.inside.append((module, source))

    def left(self, module: nn.Module, args: Any, output: Any) -> None:
        """A module is done."""
        self.stack.pop()
        if not self.inside and args and output is args[0] and type(module) not in _SEES_THROUGH:
            self.used(output)  # what gives back its input now, as stochastic depth does, may not always
        if self.inside and self.inside[-1][0] is module:
            _, source = self.inside.pop()
            if isinstance(output, Tensor) and id(module) not in self.layers:
                norm, act = is_norm(module), activation_in(module)
                act = None if isinstance(act, nn.Identity) else act
                chain = (
                    replace(source.chain, norm=module, activation=act)
                    if norm
                    else replace(source.chain, activation=module)
                )
                self._keep(output, _Result(chain, source))
        if id(module) in self.layers and isinstance(output, Tensor):
            self._keep(output, _Result(Chain(module)))

    def _keep(self, tensor: Tensor, result: _Result) -> None:
        self.results[tensor] = result
        self.all.append(result)

    def used(self, values: Any) -> None:
        """These values were taken by somebody."""
        for value in tree_leaves(values):
            if isinstance(value, Tensor) and value in self.results:
                self.results[value].uses += 1

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        through = bool(self.stack) and isinstance(self.stack[-1], nn.Dropout)
        if not (func in _METADATA or self.inside or through):
            self.used((args, kwargs))
        return func(*args, **(kwargs or {}))


def _linear() -> type[nn.Module]:
    from .modules import BlockLinear

    return BlockLinear


def _extends(chain: Chain, module: nn.Module, x: Tensor) -> bool:
    """Whether a module may join a chain as its next step."""
    if chain.activation is not None or chain.between:
        return False
    if is_norm(module):
        batch: Any = module
        averages = batch.running_mean is not None and isinstance(batch.momentum, float) and batch.eps > 0
        matrix = isinstance(chain.owner, nn.Linear | _linear())
        return chain.norm is None and averages and (not matrix or x.dim() == 2)
    return is_activation(module)


def chains(
    model: nn.Module, layers: Iterable[nn.Module], example_input: Any, watched: Iterable[nn.Module] = ()
) -> tuple[dict[int, Chain], Calls]:
    """What follows each layer, by the id of the module, in a run of the model in eval mode, and `Calls` of that run.

    Args:
        model: any module, without epilogues.
        layers: the layers in it.
        example_input: what to run it on.
        watched: modules whose calls are recorded.

    Raises:
        ValueError: if the model fails on the example input.
    """
    watch = _Watch(layers)
    everywhere = torch.nn.modules.module
    hooks = [
        everywhere.register_module_forward_pre_hook(watch.entered),
        everywhere.register_module_forward_hook(watch.left, always_call=True),
    ]
    try:
        with watch:
            calls = record_calls(model, watched, example_input)
            watch.used(calls.output)
        for kept in list(watch.results.values()):
            kept.uses += 1  # somebody has put it aside
    finally:
        for hook in hooks:
            hook.remove()
    once = {key for key, count in watch.calls.items() if count == 1}
    found: dict[int, Chain] = {}
    for result in watch.all:
        chain = _longest(result)
        members = [m for m in (chain.owner, chain.norm, chain.activation, chain.then) if m is not None]
        if len(members) > 1 and all(id(m) in once for m in members):
            known = found.get(id(chain.owner))
            if known is None or len(chain.names) > len(known.names):
                found[id(chain.owner)] = chain
    # A layer that has an epilogue of its own computes itself, and one belongs to one chain only.
    taken: set[int] = set()
    for key, chain in list(found.items()):
        if chain.then is not None and (id(chain.then) in found or id(chain.then) in taken or key in taken):
            found[key] = replace(chain, then=None)
        elif chain.then is not None:
            taken.add(id(chain.then))
    return found, calls


def _longest(result: _Result) -> Chain:
    """The chain up to the first result that somebody else takes too."""
    steps = [result]
    while steps[-1].before is not None:
        steps.append(steps[-1].before)
    steps.reverse()
    last = steps[0]
    for step in steps[1:]:
        if last.uses != 1:
            break
        last = step
    return replace(last.chain, between=()) if last.chain.then is None else last.chain
