"""Which block layer alone takes another one's result, through steps that treat all channels alike: by a trace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from .._torch import tree_leaves
from .calls import record_calls
from .modules import BlockLinear, BlockModule

# Elementwise, and the same for all channels.
_STEPS: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardsigmoid, nn.Tanh,
    nn.Sigmoid, nn.Softplus, nn.Dropout, nn.Identity,
)  # fmt: skip
_SPATIAL: tuple[type[nn.Module], ...] = (nn.Dropout2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
_NORMS: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_FUNCTIONS = {F.relu, torch.relu, F.gelu, F.silu, torch.tanh, torch.sigmoid, F.dropout, F.hardswish, Tensor.contiguous}


@dataclass(frozen=True)
class Pair:
    """Two block layers, the second of which alone takes the first one's result."""

    owner: BlockModule
    then: BlockModule
    norms: tuple[nn.Module, ...]


@dataclass(eq=False)
class _Flow:
    """A tensor whose channels are a layer's outputs in their order."""

    owner: BlockModule
    norms: tuple[nn.Module, ...] = ()
    uses: int = 0
    before: _Flow | None = None

    def is_private(self) -> bool:
        """Whether nobody else takes it, or what it came from."""
        return self.uses == 1 and (self.before is None or self.before.is_private())


class _Watch(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.flows = WeakTensorKeyDictionary()
        self.found: list[tuple[_Flow, BlockModule]] = []
        self.calls: dict[int, int] = {}
        self.inside: list[nn.Module] = []

    def entered(self, module: nn.Module, args: Any) -> None:
        """A module is called; those that are understood are followed from outside."""
        self.calls[id(module)] = self.calls.get(id(module), 0) + 1
        if self.inside:
            return
        flow = self.flows.get(args[0]) if len(args) == 1 and isinstance(args[0], Tensor) else None
        if isinstance(module, BlockModule):
            self.inside.append(module)
            if flow is not None:
                flow.uses += 1
                self.found.append((flow, module))
        elif flow is not None and _keeps_channels(module, flow.owner, args[0]):
            self.inside.append(module)
            flow.uses += 1

    def left(self, module: nn.Module, args: Any, output: Any) -> None:
        """A module is done."""
        if not self.inside or self.inside[-1] is not module:
            return
        self.inside.pop()
        if not isinstance(output, Tensor):
            return
        if isinstance(module, BlockModule):
            self.flows[output] = _Flow(module)
            return
        flow = self.flows[args[0]]
        if output is args[0]:
            flow.uses -= 1  # identity, dropout and what works in place: the same tensor goes on
            return
        norms = (*flow.norms, module) if type(module) in _NORMS else flow.norms
        self.flows[output] = _Flow(flow.owner, norms, 0, flow)

    def used(self, values: Any) -> None:
        """These values were taken by somebody."""
        for value in tree_leaves(values):
            if isinstance(value, Tensor) and value in self.flows:
                self.flows[value].uses += 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.inside or _is_metadata(func):
            return func(*args, **kwargs)
        flow = self.flows.get(args[0]) if args and isinstance(args[0], Tensor) else None
        others = [v for v in tree_leaves((args[1:], kwargs)) if isinstance(v, Tensor)]
        self.used((args, kwargs))
        output = func(*args, **kwargs)
        if flow is not None and func in _FUNCTIONS and not others:
            if output is args[0]:
                flow.uses -= 1
            else:
                self.flows[output] = _Flow(flow.owner, flow.norms, 0, flow)
        return output


def _is_metadata(func: Any) -> bool:
    from .fusion import _METADATA

    return func in _METADATA


def _keeps_channels(module: nn.Module, owner: BlockModule, x: Tensor) -> bool:
    """Whether a module treats all channels of a layer's result alike, its own parameters apart."""
    if module._forward_hooks or module._forward_pre_hooks:
        return False
    if type(module) in _NORMS:
        # A batch norm takes dimension 1 for the channels, a linear layer the last.
        return x.dim() == 2 or not _is_matrix(owner)
    return type(module) in _STEPS or (type(module) in _SPATIAL and not _is_matrix(owner))


def _is_matrix(layer: BlockModule) -> bool:
    return isinstance(layer, BlockLinear)


def pairs(model: nn.Module, example_input: Any) -> list[Pair]:
    """Pairs of block layers in a run of the model in eval mode; each layer and norm is called once in it.

    Raises:
        ValueError: if the model fails on the example input.
    """
    watch = _Watch()
    everywhere = torch.nn.modules.module
    hooks = [
        everywhere.register_module_forward_pre_hook(watch.entered),
        everywhere.register_module_forward_hook(watch.left, always_call=True),
    ]
    try:
        with watch:
            watch.used(record_calls(model, [], example_input).output)
        for kept in list(watch.flows.values()):
            kept.uses += 1  # somebody has put it aside
    finally:
        for hook in hooks:
            hook.remove()
    shared = _shared(model)
    found = []
    for flow, then in watch.found:
        members = (flow.owner, then, *flow.norms)
        once = all(watch.calls[id(m)] == 1 and id(m) not in shared for m in members)
        kinds = _is_matrix(flow.owner) == _is_matrix(then)
        if once and kinds and flow.is_private():
            found.append(Pair(flow.owner, then, flow.norms))
    return found


def _shared(model: nn.Module) -> set[int]:
    """Modules that have a parameter in common with another."""
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), set()).add(id(module))
    return {owner for several in owners.values() if len(several) > 1 for owner in several}
