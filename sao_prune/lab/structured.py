"""The structured baseline: whole channels go, by magnitude, until few enough multiply-adds are left."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..discovery import ALREADY_PRUNED, Selection, walk
from .errors import LabError


@dataclass(frozen=True)
class Structured:
    """What is left of a network without some of its channels.

    Attributes:
        flops: multiply-adds of one example; ``dense_flops`` before.
        parameters: of the whole network; ``dense_parameters`` before.
        widths: output channels before and after, of every layer that lost some, by its name.
        left_whole: layers whose channels the network's own code counts on, so that none could go.
    """

    flops: int
    dense_flops: int
    parameters: int
    dense_parameters: int
    widths: dict[str, tuple[int, int]]
    left_whole: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """Multiply-adds that are left, as a share of the dense network's."""
        return self.flops / self.dense_flops


def structured(
    model: nn.Module, example_input: Tensor, flops: float, scope: Literal["global", "layer"] = "global"
) -> Structured:
    """Remove whole channels, in place, until at most the share ``flops`` of the multiply-adds is left.

    Channels that depend on each other go together (Fang et al., CVPR 2023, through the package torch-pruning). They are
    ranked by the mean squared norm of their weights, relative to their layer's; ties, as between the rows of orthogonal
    weights, thin all layers alike. As few go as meet the share, and every layer keeps one. The outputs of the last
    layer stay. The model's parameters are new ones afterwards: make the optimizer then.

    Args:
        model: a dense network of convolutions and linear layers.
        example_input: what the network takes, one example or more.
        flops: share of the dense network's multiply-adds, in (0, 1].
        scope: ``"global"``, one ranking over all layers, which may leave a layer of a deep network with one channel;
            ``"layer"``, every layer loses the same share of its channels.

    Raises:
        LabError: if torch-pruning is missing, the share or the scope is not allowed, or too few channels can go to
            meet it; the model is then as it was.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> structured(net, torch.zeros(1, 8), flops=0.25).widths  # doctest: +SKIP
        {'0': (32, 8)}
    """
    pruning = _torch_pruning()
    if isinstance(flops, bool) or not isinstance(flops, int | float) or not 0 < flops <= 1:
        raise LabError(f"flops is the share of multiply-adds that stays, in (0, 1], got {flops!r}")
    if scope not in ("global", "layer"):
        raise LabError(f"scope must be 'global' or 'layer', got {scope!r}")
    work = _Network(pruning, model, tuple(example_input.shape[1:]))
    groups, fragile = work.groups()
    order = _order(groups, scope == "global")
    removed = _fewest(lambda count: work.cost_without(_chosen(groups, order[:count])), len(order), flops * work.dense)
    if removed is None:
        least = work.cost_without(_chosen(groups, order)) / work.dense
        why = f"; its code counts on the channels of {', '.join(fragile[:4])}{', ..' if len(fragile) > 4 else ''}"
        raise LabError(
            f"{type(model).__name__} cannot do with {flops:.2%} of its multiply-adds: with one channel a layer it "
            f"still needs {least:.2%}{why if fragile else ''}; ask for more"
        )
    chosen = _chosen(groups, order[:removed])
    cost = work.cost_without(chosen)
    smaller = copy.deepcopy(model)
    work.remove(smaller, chosen)
    before, after = _widths(model), _widths(smaller)
    lost = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
    result = Structured(cost, work.dense, _parameters(smaller), _parameters(model), lost, tuple(fragile))
    _adopt(model, smaller)
    return result


@dataclass(frozen=True, eq=False)
class _Group:
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


class _Network:
    """A network, what can be removed from it, and what it would cost then."""

    def __init__(self, pruning: Any, model: nn.Module, shape: tuple[int, ...]) -> None:
        self._pruning, self._model, self._shape = pruning, model, shape
        self._hollow = copy.deepcopy(model).to("meta").eval()
        self._outputs, self.dense = self._count(self._hollow)

    def groups(self) -> tuple[list[_Group], list[str]]:
        """The groups of channels that can be thinned, and the root layers of those that cannot."""
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
                found.append(_Group(root, scores.view(sets, -1).mean(0), sets))
        kept = self._thinnable(found)
        return kept, fragile + [g.root for g in found if g not in kept]

    def _importance(self, group: Any) -> Tensor | None:
        """Of each channel, relative to the group's mean; ``None`` where the package cannot tell it."""
        try:
            scores = self._pruning.importance.GroupMagnitudeImportance(p=2)(group)
        except (IndexError, RuntimeError):
            return None
        return None if scores is None else torch.nan_to_num(scores.detach().cpu().double(), nan=1.0)

    def _thinnable(self, groups: list[_Group]) -> list[_Group]:
        """Those without whose first channels the network still runs, to outputs of the same shape."""
        try:
            self.cost_without([(g, [0]) for g in groups])
            return groups
        except LabError:
            half = len(groups) // 2
            return [*self._thinnable(groups[:half]), *self._thinnable(groups[half:])] if half else []

    def cost_without(self, chosen: Sequence[tuple[_Group, Sequence[int]]]) -> int:
        """Multiply-adds of the network without these channels; nothing is computed and the model stays whole.

        Raises:
            LabError: if it does not run without them.
        """
        hollow = copy.deepcopy(self._hollow)
        self.remove(hollow, chosen)
        outputs, cost = self._count(hollow)
        if outputs != self._outputs:
            raise LabError(f"{type(hollow).__name__} gives {outputs} without some channels, not {self._outputs}")
        return cost

    def _count(self, hollow: nn.Module) -> tuple[tuple[int, ...], int]:
        """The shape of the outputs for one example, and the multiply-adds, by torch's own counter."""
        try:
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                outputs = hollow(torch.zeros(1, *self._shape, device="meta"))
            return tuple(outputs.shape), counter.get_total_flops() // 2
        except Exception as error:
            raise LabError(f"{type(hollow).__name__} does not run on {self._shape}: {error}") from error

    def remove(self, model: nn.Module, chosen: Sequence[tuple[_Group, Sequence[int]]]) -> None:
        """Remove channels from a copy of the network."""
        frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
        graph = self._graph(model)
        for group, entries in chosen:
            root = model.get_submodule(group.root)
            function = graph.get_pruner_of_module(root).prune_out_channels
            try:
                graph.get_pruning_group(root, function, group.channels(entries)).prune()
            except Exception as error:
                raise LabError(f"torch-pruning cannot thin {group.root}: {error}") from error
        for name in frozen:
            model.get_parameter(name).requires_grad_(False)

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


def _torch_pruning() -> Any:
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


def _order(groups: Sequence[_Group], over_all: bool) -> list[tuple[int, int]]:
    """``(group, entry)`` in the order of removal; the best entry of each group is not there."""
    ranked = []
    for place, group in enumerate(groups):
        order = torch.argsort(group.importance, stable=True).tolist()
        ranked += [
            (round(float(group.importance[entry]), 4) if over_all else 0.0, position / len(order), place, entry)
            for position, entry in enumerate(order[:-1])
        ]
    return [(place, entry) for _, _, place, entry in sorted(ranked)]


def _chosen(groups: Sequence[_Group], entries: Sequence[tuple[int, int]]) -> list[tuple[_Group, list[int]]]:
    by_group: dict[int, list[int]] = {}
    for place, entry in entries:
        by_group.setdefault(place, []).append(entry)
    return [(groups[place], chosen) for place, chosen in by_group.items()]


def _fewest(cost: Any, most: int, target: float) -> int | None:
    """The least count whose cost is at most the target; ``None`` if even the highest costs more."""
    low, high = 0, most
    if cost(high) > target:
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if cost(middle) <= target else (middle + 1, high)
    return high


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _widths(model: nn.Module) -> dict[str, int]:
    layers = ((name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd))
    return {name: m.out_features if isinstance(m, nn.Linear) else m.out_channels for name, m in layers}


def _adopt(model: nn.Module, smaller: nn.Module) -> None:
    """Give every module the state of its counterpart in a pruned copy; nothing here can fail."""
    for own, other in list(zip(model.modules(), smaller.modules())):
        own.__dict__.update({k: v for k, v in other.__dict__.items() if k != "_modules" and "hook" not in k})
