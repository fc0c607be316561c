"""The structured baseline: whole channels go, by magnitude, until few enough multiply-adds are left."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .errors import LabError
from .thinning import Group, Network, torch_pruning_package


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
    pruning = torch_pruning_package()
    if isinstance(flops, bool) or not isinstance(flops, int | float) or not 0 < flops <= 1:
        raise LabError(f"flops is the share of multiply-adds that stays, in (0, 1], got {flops!r}")
    if scope not in ("global", "layer"):
        raise LabError(f"scope must be 'global' or 'layer', got {scope!r}")
    work = Network(pruning, model, tuple(example_input.shape[1:]))
    groups, fragile = work.groups()
    order = _order(groups, scope == "global")
    removed, cost = _search(work, groups, order, flops * work.dense)
    if removed is None:
        least = cost / work.dense
        why = f"; its code counts on the channels of {', '.join(fragile[:4])}{', ..' if len(fragile) > 4 else ''}"
        raise LabError(
            f"{type(model).__name__} cannot do with {flops:.2%} of its multiply-adds: with one channel a layer it "
            f"still needs {least:.2%}{why if fragile else ''}; ask for more"
        )
    chosen = _chosen(groups, order[:removed])
    smaller = copy.deepcopy(model)
    work.remove(smaller, chosen)
    before, after = _widths(model), _widths(smaller)
    lost = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
    result = Structured(cost, work.dense, _parameters(smaller), _parameters(model), lost, tuple(fragile))
    _adopt(model, smaller)
    return result


def _search(
    work: Network, groups: Sequence[Group], order: Sequence[tuple[int, int]], target: float
) -> tuple[int | None, int]:
    """How many entries have to go at least, ``None`` if all are too few, and the multiply-adds without so many."""

    def estimated(count: int) -> int:
        return work.cost({group: len(entries) for group, entries in _chosen(groups, order[:count])})

    def exact(count: int) -> int:
        return work.cost_without(_chosen(groups, order[:count]))

    try:
        removed = _fewest(estimated, len(order), target)
        count = len(order) if removed is None else removed
        cost = exact(count)
        if cost == estimated(count):
            return removed, cost
    except LabError:
        pass
    # Entries of a group change sizes otherwise than its first one.
    removed = _fewest(exact, len(order), target)
    return removed, exact(len(order) if removed is None else removed)


def _order(groups: Sequence[Group], over_all: bool) -> list[tuple[int, int]]:
    """``(group, entry)`` in the order of removal; the best entry of each group is not there."""
    ranked = []
    for place, group in enumerate(groups):
        order = torch.argsort(group.importance, stable=True).tolist()
        ranked += [
            (round(float(group.importance[entry]), 4) if over_all else 0.0, position / len(order), place, entry)
            for position, entry in enumerate(order[:-1])
        ]
    return [(place, entry) for _, _, place, entry in sorted(ranked)]


def _chosen(groups: Sequence[Group], entries: Sequence[tuple[int, int]]) -> list[tuple[Group, list[int]]]:
    by_group: dict[int, list[int]] = {}
    for place, entry in entries:
        by_group.setdefault(place, []).append(entry)
    return [(groups[place], chosen) for place, chosen in by_group.items()]


def _fewest(cost: Callable[[int], int], most: int, target: float) -> int | None:
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
