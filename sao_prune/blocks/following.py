"""Where the results of layers go in one run of a model: through which modules, and who else takes them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from .._torch import tree_leaves
from .calls import Calls, record_calls

_SEES_THROUGH = (nn.Dropout, nn.Identity, nn.Sequential)
# What is asked of a tensor without a use of its values.
_METADATA = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "layout", "requires_grad")),
    *(getattr(Tensor, name).__get__ for name in ("is_cuda", "is_meta", "is_sparse", "is_quantized", "is_mkldnn")),
    Tensor.size, Tensor.dim, Tensor.stride, Tensor.numel, Tensor.nelement, Tensor.is_contiguous,
    Tensor.is_floating_point, Tensor.is_complex, torch.is_floating_point, torch.is_complex, torch.numel,
}  # fmt: skip


@dataclass(eq=False)
class Flow:
    """A tensor that came from a layer.

    Attributes:
        owner: the layer.
        steps: modules that it went through since, in order.
        then: the layer that takes it, if this is the end.
        before: what it was before its last step.
        uses: how often it was taken.
    """

    owner: nn.Module
    steps: tuple[nn.Module, ...] = ()
    then: nn.Module | None = None
    before: Flow | None = None
    uses: int = 0

    def reach(self) -> Flow:
        """The last on the way here that has not been taken by somebody else too."""
        path = [self]
        while path[-1].before is not None:
            path.append(path[-1].before)
        return next((flow for flow in reversed(path) if flow.uses != 1), self)


Follows = Callable[[Flow, nn.Module, Tensor], bool]


class Watch(TorchFunctionMode):
    """Follows the results of layers through a run.

    Args:
        layers: the layers.
        follows: whether a module is a step on the way of a tensor; called with what the tensor was so far, the module
            and the tensor.
        functions: those that are steps too.

    Attributes:
        flows: all that was found.
        calls: how often each module was called, by its id.
    """

    def __init__(self, layers: Iterable[nn.Module], follows: Follows, functions: Collection[Any] = ()) -> None:
        super().__init__()
        self.layers = {id(layer) for layer in layers}
        self.follows, self.functions = follows, functions
        self.flows: list[Flow] = []
        self.calls: dict[int, int] = {}
        self._of = WeakTensorKeyDictionary()
        self._inside: list[nn.Module] = []

    def run(self, model: nn.Module, example_input: Any, watched: Iterable[nn.Module] = ()) -> Calls:
        """Run a model once in eval mode; returns the `Calls` of the watched modules.

        Raises:
            ValueError: if the model fails on the example input.
        """
        everywhere = torch.nn.modules.module
        hooks = [
            everywhere.register_module_forward_pre_hook(self._entered),
            everywhere.register_module_forward_hook(self._left, always_call=True),
        ]
        try:
            with self:
                calls = record_calls(model, watched, example_input)
                self._used(calls.output)
            for kept in list(self._of.values()):
                kept.uses += 1  # somebody has put it aside
        finally:
            for hook in hooks:
                hook.remove()
        return calls

    def _entered(self, module: nn.Module, args: Any) -> None:
        """A module is called; layers and steps are seen from outside, unless they are given their input by name, of
        which hooks on all modules are not told."""
        self.calls[id(module)] = self.calls.get(id(module), 0) + 1
        if self._inside or not args:
            return
        flow = self._of.get(args[0]) if len(args) == 1 and isinstance(args[0], Tensor) else None
        is_layer = id(module) in self.layers
        if is_layer or (flow is not None and self.follows(flow, module, args[0])):
            self._inside.append(module)
            self._used(args)
            if flow is not None and is_layer:
                self.flows.append(Flow(flow.owner, flow.steps, module, flow))

    def _left(self, module: nn.Module, args: Any, output: Any) -> None:
        """A module is done."""
        if not self._inside:
            if args and output is args[0] and type(module) not in _SEES_THROUGH:
                self._used(output)  # what gives back its input now, as stochastic depth does, may not always
        elif self._inside[-1] is module:
            self._inside.pop()
            if isinstance(output, Tensor):
                own = id(module) in self.layers
                self._keep(output, Flow(module) if own else self._next(self._of[args[0]], module))

    @staticmethod
    def _next(flow: Flow, *steps: nn.Module) -> Flow:
        return Flow(flow.owner, (*flow.steps, *steps), before=flow)

    def _keep(self, tensor: Tensor, flow: Flow) -> None:
        self._of[tensor] = flow
        self.flows.append(flow)

    def _used(self, values: Any) -> None:
        """These values were taken by somebody."""
        for value in tree_leaves(values):
            if isinstance(value, Tensor) and value in self._of:
                self._of[value].uses += 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._inside or func in _METADATA:
            return func(*args, **kwargs)
        self._used((args, kwargs))
        flow = None
        if args and func in self.functions and isinstance(args[0], Tensor):
            others = [v for v in tree_leaves((args[1:], kwargs)) if isinstance(v, Tensor)]
            flow = None if others else self._of.get(args[0])
        output = func(*args, **kwargs)
        if flow is not None:
            self._keep(output, self._next(flow))
        return output
