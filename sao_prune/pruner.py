"""Pruning over time: the object that shrinks masks between optimizer steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from math import log
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from .algorithms import Draw, Method, Stage, resolve
from .allocation import Allocation, Amount
from .discovery import PrunableWeight, initialise_
from .options import PlanOptions, allocate_model, asked
from .prune import MaskPruning, Snapshot, attach_all, refresh, settle_all, written
from .reporting import LayerRecord, Report, done, skipped
from .scheduling import Schedule
from .seeds import Seed, base_seed, from_rank_zero
from .topology import chain


def schedule(
    model: nn.Module,
    method: str | Method = "gmp",
    sparsity: Amount | None = None,
    *,
    over: Schedule,
    seed: Seed = None,
    **options: Unpack[PlanOptions],
) -> Pruner:
    """Prune a model while it trains, in place: masks now, all ones, and a `Pruner` that shrinks them step by step.

    Parameters stay the same objects, so the optimizer may be made before or after.

    Args:
        model: any module.
        method: a method that ranks at any time: ``"gmp"``, ``"lmp"``, ``"lrp"`` (whole kernels of convolutions),
            ``"rg"`` with its values kept, or a `Project`; the last two split their sets on the way, 1 -> 2 -> 4 ..
        sparsity: as for `apply`, what is reached at the end.
        over: when and how fast.
        seed: where the draws come from, as for `apply`.
        **options: as for `plan`.

    Returns:
        A `Pruner`, whose ``step`` is called after every optimizer step.

    Raises:
        TypeError: if the model is no module, an option has the wrong type, or the method does not prune over time.
        ValueError: as for `apply`; the model is then as it was.

    Example:
        >>> import torch, sao_prune
        >>> net = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(3)))
        >>> over = sao_prune.Schedule(start=1, end=3, steps=3, shape="linear")
        >>> pruner = sao_prune.schedule(net, "lmp", sparsity=0.75, over=over)
        >>> optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
        >>> for _ in range(3):
        ...     net(torch.ones(2, 16)).square().sum().backward()
        ...     optimizer.step()
        ...     _ = pruner.step(optimizer)
        ...     print(pruner.sparsity)
        0.25
        0.5
        0.75
    """
    chosen = resolve(method)
    if not isinstance(over, Schedule):
        raise TypeError(f"over must be a sao_prune.Schedule(start, end, steps), got {over!r}")
    if not chosen.gradual:
        raise TypeError(
            f"{chosen!r} does not prune over time: it replaces values, or its scores need a copy without masks; take "
            "'gmp', 'lmp', 'lrp', RG(values='keep') on a block topology, or Project(inputs=..)"
        )
    budget, selection = asked(sparsity, options)
    _, items = allocate_model(model, budget, selection)
    initialise_(model, selection.example_input)
    modules = dict(model.named_modules())
    pruner = Pruner(model, chosen, over, items, base_seed(seed))
    allocations = [item for item in items if isinstance(item, Allocation)]
    whole = [
        Draw(a.weight, units=torch.ones(a.weight.parts, *a.weight.matrix, dtype=torch.bool, device="cpu"))
        for a in allocations
    ]
    snapshot = Snapshot(modules.values())
    attach_all(modules, whole, MaskPruning)
    try:
        pruner._catch_up(None)
    except BaseException:
        # Nothing but masks of ones was added: without them the model is as it was.
        snapshot.restore()
        raise
    return pruner


class Pruner:
    """Shrinks the masks of one model as its schedule says; made by `schedule`.

    Call `step` after every optimizer step. When it prunes, the method sees the model as it is (`Method.revise`), masks
    change in place, entries that go become zero in the parameter, in its gradient and in the optimizer's state, and in
    a distributed run rank 0 decides for all ranks. The masks are buffers of the model; save the model, the optimizer
    and `state_dict`, load all three, and training goes on to the same bits.

    Methods that move a topology while training use the same object: `Method.revise` is handed the masks and weights of
    the moment and may answer with masks that have new entries. These start at zero, for what was outside a mask is
    zero, unless the draw brings values; the optimizer's state is zero there too. Such a method says how much it moves
    by ``stage``: its ``allocations`` have the density of the moment. Give it a `Schedule` with as many ``steps`` as it
    shall move.

    Attributes:
        count: optimizer steps so far.
        report: what the last pruning left; ``None`` before the first.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        over: Schedule,
        items: Sequence[Allocation | Any],
        seed: int,
    ) -> None:
        self._model, self._method, self._schedule, self._items, self._seed = model, method, over, items, seed
        self._final = [item for item in items if isinstance(item, Allocation)]
        self._parameters = sum(p.numel() for p in model.parameters())
        self._kept = {a.weight.name: a.weight.parts * a.weight.matrix[0] * a.weight.matrix[1] for a in self._final}
        self.count = 0
        self.report: Report | None = None

    @property
    def schedule(self) -> Schedule:
        """When it prunes and how much."""
        return self._schedule

    @property
    def finished(self) -> bool:
        """Whether the last pruning is past."""
        return self.count >= self._schedule.events[-1]

    @property
    def sparsity(self) -> float:
        """Sparsity of the masks now."""
        masks = [self._mask(a) for a in self._final]
        total = sum(m.numel() for m in masks)
        return 1 - sum(int(m.count_nonzero()) for m in masks) / total

    def step(self, optimizer: Any = None) -> Report | None:
        """Count an optimizer step, and prune if the schedule says so.

        Args:
            optimizer: a torch optimizer or a wrapper of one, whose state is zeroed where entries vanish.

        Returns:
            The `Report` of what is left if it pruned, else ``None``.

        Raises:
            RuntimeError: if the masks are not those that the last pruning left.
        """
        self.count += 1
        try:
            return self._catch_up(optimizer)
        except BaseException:
            self.count -= 1
            raise

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the model's and the optimizer's state."""
        return {
            "count": self.count,
            "seed": self._seed,
            "method": self._method.name,
            "schedule": asdict(self._schedule),
            "kept": dict(self._kept),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a saved run was; load the model's state too, which has the masks.

        Raises:
            ValueError: if the state is of another schedule, method or model.
        """
        for name, mine in (("method", self._method.name), ("schedule", asdict(self._schedule))):
            if state.get(name) != mine:
                raise ValueError(f"the state is of {name} {state.get(name)!r}, this pruner has {mine!r}")
        if set(state.get("kept", ())) != set(self._kept):
            raise ValueError("the state is of a model with other pruned layers")
        self.count, self._seed, self._kept = state["count"], state["seed"], dict(state["kept"])

    def resume(self, count: int) -> None:
        """Go on after ``count`` optimizer steps with the masks that the model has, where its state alone was kept."""
        if count != self.count:
            self.count = count
            self._kept = {a.weight.name: int(_units(a, self._mask(a)).sum()) for a in self._final}

    def _catch_up(self, optimizer: Any) -> Report | None:
        if self.count not in self._schedule.events:
            return None
        settle_all(self._model)
        originals = [_original(self._model, a.weight) for a in self._final]
        masks = [self._mask(a) for a in self._final]
        units = [_units(a, m) for a, m in zip(self._final, masks)]
        for allocation, unit in zip(self._final, units):
            if int(unit.sum()) != self._kept[allocation.weight.name]:
                raise RuntimeError(
                    f"the mask of {allocation.weight.name} is not what the last pruning left: load the state of the "
                    "model as well as that of the pruner, and change no masks in between"
                )
        stage = Stage([self._now(a) for a in self._final], self._final, units)
        with torch.no_grad():
            weights = [w.detach() * m for w, m in zip(originals, masks)]
            draws = from_rank_zero(lambda: self._method.revise(self._model, stage, weights, self._seed))
            new = [draw.mask(w.detach()) for w, draw in zip(originals, draws)]
            settlement = self._method.settle(self._model, stage.allocations, draws)
            with written(self._model, settlement.values):
                for draw, mask in zip(draws, new):
                    self._write(draw, mask, optimizer)
        self._kept = {draw.weight.name: draw.edges for draw in draws}
        self.report = self._reported(stage.allocations, draws, settlement.notes)
        return self.report

    def _now(self, final: Allocation) -> Allocation:
        """What a weight is asked for now; of blocks the nearest number, in ratio, on the way to the final one."""
        density = self._schedule.density(self.count, final.density)
        if not self._method.structured:
            return replace(final, density=density)
        groups = min(chain(final.groups), key=lambda g: abs(log(g * density)))
        if groups == final.groups or self.count >= self._schedule.events[-1]:
            return final
        return replace(final, density=density, groups=groups, nnz=None)

    def _mask(self, allocation: Allocation) -> Tensor:
        module = self._model.get_submodule(allocation.weight.module)
        mask: Tensor = getattr(module, f"{allocation.weight.tensor}_mask")
        return mask

    def _write(self, draw: Draw, mask: Tensor, optimizer: Any) -> None:
        weight = draw.weight
        original = _original(self._model, weight)
        draw.write_(original.data)
        original.data.mul_(mask)
        if original.grad is not None:
            original.grad.mul_(mask.to(original.grad.dtype))
        for value in _state_of(optimizer, original):
            value.mul_(mask.to(value.dtype))
        for path, tensor in ((weight.module, weight.tensor), *weight.aliases):
            module = self._model.get_submodule(path)
            getattr(module, f"{tensor}_mask").copy_(mask)
            refresh(module)

    def _reported(self, allocations: Sequence[Allocation], draws: Sequence[Draw], notes: Mapping[str, str]) -> Report:
        by_name = {draw.weight.name: (a, draw) for a, draw in zip(allocations, draws)}
        records: list[LayerRecord] = []
        for item in self._items:
            if isinstance(item, Allocation):
                name = item.weight.name
                records.append(done(*by_name[name], notes.get(name, "")))
            else:
                records.append(skipped(item))
        title = f"pruned: {self._method.name}, after {self.count} optimizer steps"
        return Report(tuple(records), self._parameters, title)


def _original(model: nn.Module, weight: PrunableWeight) -> nn.Parameter:
    """The parameter behind a mask.

    Raises:
        RuntimeError: if it is none any more.
    """
    parameter = model.get_submodule(weight.module)._parameters.get(f"{weight.tensor}_orig")
    if parameter is None:
        raise RuntimeError(
            f"{weight.name} is no masked parameter any more (removed, held, compact or parametrized): let the pruner "
            "finish before, or stop calling its step"
        )
    return parameter


def _units(allocation: Allocation, mask: Tensor) -> Tensor:
    """``(parts, m, n)`` booleans of a mask; a kernel is there as a whole or not at all."""
    stacked = allocation.weight.matrices(mask != 0)
    return (stacked.flatten(3).any(3) if allocation.weight.kernel else stacked).cpu()


def _state_of(optimizer: Any, parameter: nn.Parameter) -> list[Tensor]:
    """The optimizer's tensors of a parameter's own shape."""
    while not isinstance(optimizer, torch.optim.Optimizer) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    state = getattr(optimizer, "state", {}).get(parameter, {})
    return [v for v in state.values() if isinstance(v, Tensor) and v.shape == parameter.shape]
