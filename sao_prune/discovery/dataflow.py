"""The tensor functions of one forward pass as a graph that can be run again with other parameter values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .._torch import tree_leaves, tree_map
from .trace import copied, looking, run

Values = Mapping[str, Tensor]
Override = Callable[["Node", tuple[Any, ...], Values], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Ref:
    """A tensor that a node gave: its ``item``-th one."""

    node: int
    item: int = 0


@dataclass(frozen=True)
class Held:
    """A parameter or buffer of the model, by its full name."""

    name: str


@dataclass(frozen=True)
class Node:
    """One call of a tensor function; node 0 and those before the first call are the model's inputs.

    Attributes:
        index: its place in the order of execution.
        op: the function's name without underscores, ``"conv2d"``, ``"add"``; ``"input"`` for inputs.
        function: the function.
        args: its arguments, with `Ref` and `Held` in place of tensors that are known.
        kwargs: its keyword arguments, likewise.
        shape: shape of the first tensor that it gave.
    """

    index: int
    op: str
    function: Callable[..., Any] | None = field(repr=False)
    args: tuple[Any, ...] = field(repr=False)
    kwargs: Mapping[str, Any] = field(repr=False)
    shape: tuple[int, ...]

    @cached_property
    def sources(self) -> tuple[int, ...]:
        """The nodes that it reads, in the order of its arguments."""
        return tuple(leaf.node for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Ref))

    @cached_property
    def held(self) -> tuple[str, ...]:
        """The parameters and buffers that it reads, in the order of its arguments."""
        return tuple(leaf.name for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Held))

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument of the call, however it was given."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)


@dataclass(frozen=True)
class Graph:
    """What one forward pass did, without its tensors but the inputs; ``shapes`` are those of parameters and buffers."""

    nodes: tuple[Node, ...]
    inputs: tuple[Tensor, ...] = field(repr=False)
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)

    @cached_property
    def consumers(self) -> tuple[tuple[int, ...], ...]:
        """For every node those that read it."""
        out: list[list[int]] = [[] for _ in self.nodes]
        for node in self.nodes:
            for source in dict.fromkeys(node.sources):
                out[source].append(node.index)
        return tuple(map(tuple, out))

    @cached_property
    def ancestors(self) -> tuple[frozenset[int], ...]:
        """For every node itself and all nodes that it depends on."""
        out: list[frozenset[int]] = []
        for node in self.nodes:
            out.append(frozenset((node.index,)).union(*(out[s] for s in node.sources)))
        return tuple(out)

    def run(
        self,
        values: Values,
        start: Mapping[int, Tensor] | None = None,
        stop: int | None = None,
        override: Override | None = None,
    ) -> Iterator[tuple[Node, Any]]:
        """Run it again, node by node.

        Args:
            values: parameters and buffers by name.
            start: outputs of nodes that are given; without it the recorded inputs. Only what depends on them is run.
            stop: the last node to run; by default all.
            override: told of each node, its tensors and ``values`` before it runs; gives values to use in it instead.

        Yields:
            Each node that was run with its output.
        """
        given = dict(enumerate(self.inputs)) if start is None else dict(start)
        known: dict[int, Any] = dict(given)
        for node in self.nodes[: len(self.nodes) if stop is None else stop + 1]:
            if node.index in given:
                yield node, given[node.index]
            elif node.function is not None and node.sources and all(s in known for s in node.sources):
                known[node.index] = out = _rerun(node, known, values, override)
                yield node, out


def _rerun(node: Node, known: Mapping[int, Any], values: Values, override: Override | None) -> Any:
    def lookup(leaf: Any, held: Values) -> Any:
        if isinstance(leaf, Ref):
            given = known[leaf.node]
            return given if isinstance(given, Tensor) else tree_leaves(given)[leaf.item]
        return held[leaf.name] if isinstance(leaf, Held) else leaf

    if override is not None:
        tensors = tuple(lookup(leaf, values) for leaf in tree_leaves(node.args) if isinstance(leaf, Ref))
        values = {**{name: values[name] for name in node.held}, **override(node, tensors, values)}
    args, kwargs = tree_map(lambda leaf: lookup(leaf, values), (node.args, dict(node.kwargs)))
    assert node.function is not None
    if _in_place(node):
        # The tensor may be a leaf, or be read again by a later node of the replay.
        args = (args[0].clone(), *args[1:])
    return node.function(*args, **kwargs)


def _in_place(node: Node) -> bool:
    name = getattr(node.function, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or name.startswith("__i")


class _Recorder(TorchFunctionMode):
    """Writes down every torch function that is given a tensor made from the inputs."""

    def __init__(self, inputs: tuple[Tensor, ...], names: Mapping[int, str]) -> None:
        super().__init__()
        self._names = names
        self._made = {id(t): Ref(index) for index, t in enumerate(inputs)}
        # Identities are only good while the tensors live.
        self._alive: list[Any] = list(inputs)
        self.nodes = [Node(i, "input", None, (), {}, tuple(t.shape)) for i, t in enumerate(inputs)]

    def _mark(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) in self._made:
            return self._made[id(leaf)]
        return Held(self._names[id(leaf)]) if id(leaf) in self._names else leaf

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        marked_args, marked_kwargs = tree_map(self._mark, (tuple(args), dict(kwargs)))
        out = func(*args, **kwargs)
        tensors = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        reads = any(isinstance(leaf, Ref) for leaf in tree_leaves((marked_args, marked_kwargs)))
        op = getattr(func, "__name__", "").strip("_")
        if tensors and reads and not (op == "to" and out is args[0]):
            index = len(self.nodes)
            self.nodes.append(Node(index, op, func, marked_args, marked_kwargs, tuple(tensors[0].shape)))
            leaves = tree_leaves(out)
            self._made.update({id(t): Ref(index, item) for item, t in enumerate(leaves) if isinstance(t, Tensor)})
            self._alive.append((args, kwargs, out))
        return out


def record(model: nn.Module, example_input: Any) -> Graph:
    """The graph of one forward pass in evaluation mode, without gradients; modes and buffers are restored.

    Args:
        model: any module; on the meta device shapes are followed and nothing is computed.
        example_input: a tensor, a tuple or a dict, as `call` takes it.

    Raises:
        ValueError: if the model fails on the example input.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> graph = record(net, torch.zeros(1, 2))
        >>> [(node.op, node.sources, node.held) for node in graph.nodes]
        [('input', (), ()), ('linear', (0,), ('0.weight', '0.bias')), ('relu', (1,), ())]
    """
    device = next((t.device for t in model.parameters()), torch.device("cpu"))
    moved = tree_map(lambda t: t.detach().to(device) if isinstance(t, Tensor) else t, copied(example_input))
    inputs = tuple(t for t in tree_leaves(moved) if isinstance(t, Tensor))
    held = [*model.named_buffers(), *model.named_parameters()]
    names = {id(t): name for name, t in held}
    recorder = _Recorder(inputs, names)
    with looking(model), recorder:
        run(model, moved)
    return Graph(tuple(recorder.nodes), inputs, {name: tuple(t.shape) for name, t in held})
