"""Whole channels of a network: which go together, what the network costs without them, and how they are removed."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..discovery import ALREADY_PRUNED, Selection, walk
from .errors import LabError

# Sizes of the tensors of a network and what its modules note of them, by path and name.
_Sizes = dict[tuple[str, str], tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Group:
    """Channels that go together: ``importance`` of each, at the outputs of the layer ``root``.

    Where channels come in equal sets (grouped convolutions, group norm), entry ``i`` stands for channel ``i`` of
    each of the ``sets``.
    """

    root: str
    importance: Tensor
    sets: int

    def channels(self, chosen: Sequence[int]) -> list[int]:
        """Output channels of the root behind some of the entries."""
        return sorted(i + s * len(self.importance) for i in chosen for s in range(self.sets))


class Network:
    """A network, what can be removed from it, and what it would cost then."""

    def __init__(self, pruning: Any, model: nn.Module, shape: tuple[int, ...]) -> None:
        self._pruning, self._model, self._shape = pruning, model, shape
        self._hollow = copy.deepcopy(model).to("meta").eval()
        self._outputs: tuple[int, ...] | None = None
        self._outputs, self.dense = self._count(self._hollow)
        # What is counted, and by how much its sizes change with every entry of a group that goes.
        self._thin, self._sizes = copy.deepcopy(self._hollow), _sizes(self._hollow)
        self._changes: dict[Group, _Sizes] = {}

    def groups(self) -> tuple[list[Group], list[str]]:
        """The groups of channels that can be thinned, and the root layers of those that cannot.

        Raises:
            LabError: if a layer has a mask already, or torch-pruning cannot trace the network.
        """
        model = copy.deepcopy(self._model)
        names = {id(module): name for name, module in model.named_modules()}
        weights = walk(model, Selection(skip_first=False, skip_last=False))
        masked = [w.name for w in weights if w.reason == ALREADY_PRUNED]
        if masked:
            raise LabError(f"{masked[0]} has a mask already: the structured baseline starts from a dense network")
        last = [model.get_submodule(w.module) for w in weights if w.last]
        graph = self._graph(model)
        found, fragile = [], []
        for group in graph.get_all_groups(ignored_layers=last, root_module_types=[nn.modules.conv._ConvNd, nn.Linear]):
            root, sets = names[id(group[0][0].target.module)], _sets(group)
            scores = self._importance(group)
            if scores is None or len(scores) % sets:
                fragile.append(root)
            elif len(scores) > sets:
                found.append(Group(root, scores.view(sets, -1).mean(0), sets))
        self._changes = self._learned(found)
        # Those of layers of one name beside each other: they work or fail together.
        alike = sorted((g for g in found if g in self._changes), key=lambda g: re.sub(r"\d+", "", g.root))
        works = set(self._thinnable(alike))
        kept = [g for g in found if g in works]
        return kept, fragile + [g.root for g in found if g not in kept]

    def _importance(self, group: Any) -> Tensor | None:
        """Of each channel, relative to the group's mean; ``None`` where the package cannot tell it."""
        try:
            scores = self._pruning.importance.GroupMagnitudeImportance(p=2)(group)
        except (IndexError, RuntimeError):
            return None
        return None if scores is None else torch.nan_to_num(scores.detach().cpu().double(), nan=1.0)

    def _learned(self, groups: Sequence[Group]) -> dict[Group, _Sizes]:
        """The changes of sizes by the first entry of each group, groups that cannot lose it left out."""
        changes: dict[Group, _Sizes] = {}
        left = list(groups)
        while left:
            # Tracing takes longest: one graph for all groups, but for those behind one that has failed halfway.
            hollow = copy.deepcopy(self._hollow)
            graph, before = self._graph(hollow), self._sizes
            while left:
                group = left.pop(0)
                try:
                    self._remove(hollow, graph, group, [0])
                except LabError:
                    break
                after = _sizes(hollow)
                changed = [key for key, size in before.items() if after.get(key, size) != size]
                changes[group] = {key: tuple(a - b for a, b in zip(after[key], before[key])) for key in changed}
                before = after
        return changes

    def _thinnable(self, groups: list[Group]) -> list[Group]:
        """Those without whose first channels the network still runs, to outputs of the same shape."""
        try:
            self._resize(dict.fromkeys(groups, 1))
            self._run(self._thin)
            return groups
        except LabError:
            half = len(groups) // 2
            return [*self._thinnable(groups[:half]), *self._thinnable(groups[half:])] if half else []

    def cost(self, counts: Mapping[Group, int]) -> int:
        """Multiply-adds of the network with so many entries less of each group, each changing sizes as its first does.

        Raises:
            LabError: if it does not run without them.
        """
        self._resize(counts)
        return self._count(self._thin)[1]

    def _resize(self, counts: Mapping[Group, int]) -> None:
        touched = {key for changes in self._changes.values() for key in changes}
        sizes = {key: list(self._sizes[key]) for key in touched}
        for group, count in counts.items():
            for key, change in self._changes[group].items():
                sizes[key] = [size + count * each for size, each in zip(sizes[key], change)]
        for (path, name), size in sizes.items():
            _set_size(self._thin.get_submodule(path), name, tuple(size))

    def cost_without(self, chosen: Sequence[tuple[Group, Sequence[int]]]) -> int:
        """Multiply-adds of the network without these channels; nothing is computed and the model stays whole.

        Raises:
            LabError: if it does not run without them.
        """
        hollow = copy.deepcopy(self._hollow)
        self.remove(hollow, chosen)
        return self._count(hollow)[1]

    def _count(self, hollow: nn.Module) -> tuple[tuple[int, ...], int]:
        """The shape of the outputs for one example, and the multiply-adds, by torch's own counter."""
        with FlopCounterMode(display=False) as counter:
            outputs = self._run(hollow)
        return outputs, counter.get_total_flops() // 2

    def _run(self, hollow: nn.Module) -> tuple[int, ...]:
        """The shape of the outputs for one example.

        Raises:
            LabError: if it does not run, or they are not those of the whole network.
        """
        try:
            with torch.no_grad():
                outputs = tuple(hollow(torch.zeros(1, *self._shape, device="meta")).shape)
        except Exception as error:
            raise LabError(f"{type(hollow).__name__} does not run on {self._shape}: {error}") from error
        if self._outputs is not None and outputs != self._outputs:
            raise LabError(f"{type(hollow).__name__} gives {outputs} without some channels, not {self._outputs}")
        return outputs

    def remove(self, model: nn.Module, chosen: Sequence[tuple[Group, Sequence[int]]]) -> None:
        """Remove channels from a copy of the network."""
        frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
        graph = self._graph(model)
        for group, entries in chosen:
            self._remove(model, graph, group, entries)
        for name in frozen:
            model.get_parameter(name).requires_grad_(False)

    def _remove(self, model: nn.Module, graph: Any, group: Group, entries: Sequence[int]) -> None:
        root = model.get_submodule(group.root)
        function = graph.get_pruner_of_module(root).prune_out_channels
        try:
            graph.get_pruning_group(root, function, group.channels(entries)).prune()
        except Exception as error:
            raise LabError(f"torch-pruning cannot thin {group.root}: {error}") from error

    def _graph(self, model: nn.Module) -> Any:
        """How the channels of a copy depend on each other; it is read from autograd's graph, so all must ask for it."""
        example = torch.zeros(1, *self._shape, device=next(model.parameters()).device)
        training = {module: module.training for module in model.modules()}
        model.eval().requires_grad_(True)
        try:
            with warnings.catch_warnings(), torch.enable_grad(), torch.random.fork_rng(devices=[]):
                warnings.simplefilter("ignore")
                return self._pruning.DependencyGraph().build_dependency(model, example_inputs=example)
        except Exception as error:
            raise LabError(f"torch-pruning cannot trace {type(model).__name__}: {error}") from error
        finally:
            for module, mode in training.items():
                module.training = mode


def torch_pruning_package() -> Any:
    try:
        import torch_pruning
    except ImportError as error:
        raise LabError("the structured baseline needs torch-pruning: pip install 'sao-prune[torch-pruning]'") from error
    return torch_pruning


def _sets(group: Any) -> int:
    """In how many equal sets the channels of a group come; all sets must lose the same ones."""
    sets = 1
    for dependency, _ in group:
        module = dependency.target.module
        if isinstance(module, nn.modules.conv._ConvNd) and module.groups not in (1, module.out_channels):
            sets = max(sets, module.groups)
        elif isinstance(module, nn.GroupNorm):
            sets = max(sets, module.num_groups)
    return sets


def _sizes(model: nn.Module) -> _Sizes:
    """Shapes of the tensors of every module, and the whole numbers among its attributes."""
    sizes: _Sizes = {}
    for path, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                sizes[path, name] = tuple(tensor.shape)
        for name, value in module.__dict__.items():
            if type(value) is int:
                sizes[path, name] = (value,)
            elif isinstance(value, tuple) and all(type(each) is int for each in value):
                sizes[path, name] = tuple(value)
    return sizes


def _set_size(module: nn.Module, name: str, size: tuple[int, ...]) -> None:
    """Give a tensor without values another shape, or an attribute another value."""
    if name in module._parameters:
        parameter: Any = module._parameters[name]
        empty = torch.empty(size, dtype=parameter.dtype, device="meta")
        module._parameters[name] = nn.Parameter(empty, parameter.requires_grad)
    elif name in module._buffers:
        module._buffers[name] = torch.empty(size, dtype=getattr(module, name).dtype, device="meta")
    else:
        value = module.__dict__[name]
        module.__dict__[name] = size[0] if type(value) is int else type(value)(size)
