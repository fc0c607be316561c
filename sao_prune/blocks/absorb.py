"""Fold channel orders and memory orders of neighbouring block layers into each other.

Between two linear layers with only elementwise operations in between, activations may lie features first, where a
strided channel order is a view, and the writer's and the reader's channel orders may be taken as one. What leaves
such a stretch, residual streams above all, keeps its natural order.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from .base import BlockModule
from .conv import _BlockConv
from .linear import BlockLinear
from .order import Kind, Order

_ELEMENTWISE = (
    nn.Identity, nn.Dropout, nn.AlphaDropout, nn.Tanh, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU,
    nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid,
    nn.LogSigmoid, nn.Tanhshrink, nn.Hardshrink, nn.Softshrink, nn.Threshold,
)  # fmt: skip
_SPATIAL = (
    nn.Dropout2d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool2d, nn.ZeroPad2d,
)  # fmt: skip
_FUNCTIONS: tuple[Callable[..., Any], ...] = (
    torch.tanh, torch.relu, torch.sigmoid, F.relu, F.relu6, F.leaky_relu, F.elu, F.selu, F.gelu, F.silu, F.mish,
    F.tanh, F.sigmoid, F.softplus, F.hardswish, F.hardtanh, F.dropout, operator.neg,
)  # fmt: skip
_METHODS = ("tanh", "relu", "relu_", "sigmoid", "contiguous", "neg", "abs")
_SUMS: tuple[Callable[..., Any], ...] = (operator.add, operator.iadd, torch.add, operator.mul, torch.mul)


class _Tracer(fx.Tracer):
    """Goes into containers only; every layer is a leaf."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            return False
        return isinstance(m, BlockModule) or not m._modules or type(m).__module__.startswith("torch.nn")


def absorb(model: nn.Module) -> None:
    """Set memory orders and folded channel orders of all block layers that a trace of the model reaches.

    Where the model as a whole cannot be traced, its submodules are, one by one.
    """
    for module in model.modules():
        if isinstance(module, BlockModule):
            module.fold()
            if isinstance(module, BlockLinear):
                module.__dict__["features_first"] = None
    _absorb(model)
    for module in model.modules():
        if isinstance(module, BlockModule):
            # Worked out now, so that compilers and exporters find it done.
            _ = module.packing


def _absorb(module: nn.Module) -> None:
    if isinstance(module, BlockModule) or not any(isinstance(m, BlockModule) for m in module.modules()):
        return
    graph = _trace(module)
    if graph is None:
        for child in module.children():
            _absorb(child)
        return
    modules = dict(module.named_modules())
    calls = _Graph(graph, modules)
    for node in graph.nodes:
        layer = calls.module(node)
        if isinstance(layer, BlockLinear) and calls.called_once(node):
            # The native kernels turn rows into planes themselves, faster than planes come from distant memory.
            columns = not layer.execution.native and calls.reaches_only_linear(node)
            layer.__dict__["features_first"] = columns
    for node in graph.nodes:
        if isinstance(calls.module(node), BlockModule):
            _fold(node, calls)


def _trace(module: nn.Module) -> fx.Graph | None:
    """The module's graph, or ``None`` where its forward depends on values."""
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return None
    try:
        return _Tracer().trace(module)
    except Exception:
        # Tracing runs arbitrary forward code on symbols; whatever it raises means that it cannot be traced.
        return None


class _Graph:
    """Questions about a traced module."""

    def __init__(self, graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
        self._modules = modules
        self._calls: dict[int, int] = {}
        for node in graph.nodes:
            if (module := self.module(node)) is not None:
                self._calls[id(module)] = self._calls.get(id(module), 0) + 1

    def module(self, node: fx.Node) -> nn.Module | None:
        """The layer that a node calls."""
        return self._modules.get(str(node.target)) if node.op == "call_module" else None

    def called_once(self, node: fx.Node) -> bool:
        """Whether the node is the only call of its layer: two calls may want different orders."""
        return self._calls.get(id(self.module(node)), 0) == 1

    def is_elementwise(self, node: fx.Node, *, spatial: bool = False) -> bool:
        """Whether a node treats every channel alike and apart from the others."""
        if node.op == "call_module":
            kinds = _ELEMENTWISE + (_SPATIAL if spatial else ())
            module = self.module(node)
            return type(module) in kinds or (type(module) is nn.PReLU and module.num_parameters == 1)
        if len(node.all_input_nodes) != 1:
            return False
        if node.op == "call_method":
            return node.target in _METHODS
        return node.op == "call_function" and node.target in _FUNCTIONS

    def reaches_only_linear(self, node: fx.Node, depth: int = 0) -> bool:
        """Whether all that becomes of a node's value, elementwise operations apart, is read by linear layers."""
        if not node.users or depth > 64:
            return False
        for user in node.users:
            reader = self.module(user)
            if isinstance(reader, BlockLinear) and reader.execution.native:
                return False
            if isinstance(reader, BlockLinear) or type(reader) is nn.Linear:
                continue
            mixed = user.op == "call_function" and user.target in _SUMS
            if not (self.is_elementwise(user) or mixed) or not self.reaches_only_linear(user, depth + 1):
                return False
        return True

    def readers(self, node: fx.Node, *, spatial: bool) -> list[fx.Node] | None:
        """The block layers that read a node's value, if nothing else does."""
        found: list[fx.Node] = []
        for user in node.users:
            if isinstance(self.module(user), BlockModule):
                found.append(user)
            elif self.is_elementwise(user, spatial=spatial):
                further = self.readers(user, spatial=spatial)
                if further is None:
                    return None
                found += further
            else:
                return None
        return found or None


def _fold(node: fx.Node, calls: _Graph) -> None:
    """Leave a layer's outputs in the order of its blocks and let the readers' input orders make up for it."""
    layer = calls.module(node)
    assert isinstance(layer, BlockModule)
    outputs = layer.packing.outputs
    free = outputs.kind is Kind.IDENTITY or (
        isinstance(layer, BlockLinear) and layer.features_first and outputs.kind is Kind.STRIDED
    )
    if free or layer.execution.dense or len(outputs.index) != len(outputs.inverse) or not calls.called_once(node):
        return
    readers = calls.readers(node, spatial=isinstance(layer, _BlockConv))
    if readers is None:
        return
    consumers = [calls.module(reader) for reader in readers]
    for reader, consumer in zip(readers, consumers):
        same = isinstance(consumer, BlockLinear) == isinstance(layer, BlockLinear)
        if not same or not isinstance(consumer, BlockModule) or not calls.called_once(reader):
            return
        if consumer.execution.dense or consumer.folded[0] is not None:
            return
    layer.fold(layer.folded[0], raw=True)
    for consumer in consumers:
        assert isinstance(consumer, BlockModule)
        inputs = consumer.packing.inputs
        index, inverse = outputs.index[inputs.index].cpu(), inputs.inverse[outputs.inverse].cpu()
        consumer.fold(Order.of(index, inverse), consumer.folded[1])
