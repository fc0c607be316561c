"""Pruning over time: the object that shrinks masks between optimizer steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from math import log
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import Unpack

from ._torch import without_autocast
from .algorithms import Draw, Method, Stage, resolve
from .allocation import Allocation, Amount
from .discovery import initialise_
from .model import dense_size
from .moving import begin
from .optimizers import forget_curvature, optimizers_of
from .options import PlanOptions, allocate_model, asked
from .prune import MaskPruning, Snapshot, attach_all, settle_all, written
from .reporting import LayerRecord, Report, done, skipped
from .scheduling import Moves, Schedule
from .seeds import Seed, base_seed, from_rank_zero
from .sites import MaskedSite, Site, site_of
from .topology import BlockTopology, chain


def schedule(
    model: nn.Module,
    method: str | Method = "gmp",
    sparsity: Amount | None = None,
    *,
    over: Schedule | Moves,
    seed: Seed = None,
    **options: Unpack[PlanOptions],
) -> Pruner:
    """Prune a model while it trains, in place: masks now, all ones, and a `Pruner` that shrinks them step by step.

    With a method that moves its topology, `Rewire`, `RigL` or `SET`, and `Moves` in place of a `Schedule`, the number
    of entries stays: an amount draws masks now, as `apply` does; without one those that the model has begin to move,
    `Rewire`'s in compact layers as well.

    Parameters stay the same objects, so the optimizer may be made before or after.

    Args:
        model: any module.
        method: a method that ranks at any time: ``"gmp"``, ``"lmp"``, ``"lrp"`` (whole kernels of convolutions),
            ``"rg"`` with its values kept, or a `Project`; the last two split their sets on the way, 1 -> 2 -> 4 ..; or
            one that moves.
        sparsity: as for `apply`, what is reached at the end; for a method that moves, from the start.
        over: when and how fast.
        seed: where the draws come from, as for `apply`.
        **options: as for `plan`; ``include`` and ``exclude`` alone where masks that are there begin to move.

    Returns:
        A `Pruner`, whose ``step`` is called after every optimizer step.

    Raises:
        TypeError: if the model is no module, an option has the wrong type, the method does not prune over time, or
            its kind is not that of ``over``.
        ValueError: as for `apply`, or if nothing is there that could move; the model is then as it was.

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
    kind = "Moves(steps, every)" if chosen.moving else "Schedule(start, end, steps)"
    if not isinstance(over, Moves if chosen.moving else Schedule):
        raise TypeError(f"over must be a sao_prune.{kind} for {chosen.name!r}, got {over!r}")
    if chosen.moving:
        base = base_seed(seed)
        items, report = begin(model, chosen, sparsity, base, options)
        pruner = Pruner(model, chosen, over, items, base)
        pruner.report = report
        return pruner
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
        pruner._catch_up(())
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

    Methods that move a topology while training use the same object with `Moves`: `Method.revise` is handed the masks
    and weights of the moment, and the gradients of entries that are not there where the method asks for them, summed
    over the passes of the last optimizer step; it answers with masks that have new entries. These start at zero,
    unless the draw brings values, and with no momentum.

    Attributes:
        count: optimizer steps so far.
        report: what the last pruning left; ``None`` before the first.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        over: Schedule | Moves,
        items: Sequence[Allocation | Any],
        seed: int,
    ) -> None:
        self._model, self._method, self._schedule, self._items, self._seed = model, method, over, items, seed
        self._final = [item for item in items if isinstance(item, Allocation)]
        self._parameters = dense_size(model)
        self._sites = [site_of(model, a.weight, method.fine) for a in self._final]
        self._kept = {a.weight.name: a.weight.parts * a.weight.matrix[0] * a.weight.matrix[1] for a in self._final}
        self.count = 0
        self.report: Report | None = None
        if method.moving:
            for site in self._sites:
                if isinstance(site, MaskedSite):
                    site.settle()
            self._kept = self._counted()
            self._listen()

    @property
    def schedule(self) -> Schedule | Moves:
        """When it prunes and how much, or when it moves."""
        return self._schedule

    @property
    def finished(self) -> bool:
        """Whether the last pruning is past."""
        return self.count >= self._schedule.events[-1]

    @property
    def sparsity(self) -> float:
        """Sparsity of the masks now."""
        masks = [site.units() for site in self._sites]
        taps = [a.weight.numel // m.numel() for a, m in zip(self._final, masks)]
        total = sum(a.weight.numel for a in self._final)
        return 1 - sum(int(m.count_nonzero()) * t for m, t in zip(masks, taps)) / total

    def step(self, optimizer: Any = None) -> Report | None:
        """Count an optimizer step, and prune if the schedule says so.

        Args:
            optimizer: a torch optimizer, a wrapper of one, or a list of those that train the model, whose states are
                zeroed where entries vanish. L-BFGS, whose history is of all entries at once, begins anew.

        Returns:
            The `Report` of what is left if it pruned, else ``None``.

        Raises:
            TypeError: if it is no optimizer.
            RuntimeError: if the masks are not those that the last pruning left, or no gradient was seen that the method
                needs.
        """
        optimizers = optimizers_of(optimizer)
        self.count += 1
        try:
            report = self._catch_up(optimizers)
        except BaseException:
            self.count -= 1
            raise
        self._listen()
        return report

    def impose(self, average: nn.Module) -> None:
        """Put the masks of now on a copy of the model, in place: on a moving average, whose masks are averages too.

        Args:
            average: a model with the same masked layers, as ``ModelEmaV3(model).module`` of timm.

        Raises:
            TypeError: if the pruner works on compact layers, whose sets move along with their buffers.
            ValueError: if a layer there is not masked as here; nothing is changed then.

        Example:
            >>> import copy, torch, sao_prune
            >>> net = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3)))
            >>> pruner = sao_prune.schedule(net, "lmp", sparsity=0.75, over=sao_prune.Schedule(1, 1))
            >>> average = copy.deepcopy(net)
            >>> _ = pruner.step()
            >>> pruner.impose(average)
            >>> torch.equal(average[1].weight_mask, net[1].weight_mask)
            True
        """
        others: list[tuple[MaskedSite, MaskedSite]] = []
        for site in self._sites:
            if not isinstance(site, MaskedSite):
                raise TypeError(f"{site.weight.module} is compact: masks are put on masked layers")
            other = MaskedSite(average, site.weight, self._method.fine)
            if not other.masked_like(site):
                raise ValueError(f"{site.weight.name} is not masked there as in the pruner's model: take its copy")
            others.append((other, site))
        for other, site in others:
            other.follow(site)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the model's and the optimizer's state."""
        return {
            "count": self.count,
            "seed": self._seed,
            **self._asked(),
            "kept": dict(self._kept),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a saved run was; load the model's state too, which has the masks.

        Raises:
            ValueError: if the state is of another schedule, method, amount or model, or of something else; the pruner
                is then as it was.
        """
        if not isinstance(state, Mapping):
            raise ValueError(f"the state must be what Pruner.state_dict gave, got {state!r}")
        for name, mine in self._asked().items():
            # States of earlier versions do not tell options and amounts.
            given = state.get(name, mine if name in ("options", "amounts") else None)
            if given != mine:
                raise ValueError(f"the state is of {name} {given!r}, this pruner has {mine!r}")
        kept = state.get("kept")
        if not isinstance(kept, Mapping) or set(kept) != set(self._kept):
            raise ValueError("the state is of a model with other pruned layers")
        for name in ("count", "seed"):
            value = state.get(name)
            if isinstance(value, bool) or not isinstance(value, int) or (name == "count" and value < 0):
                raise ValueError(f"the state is of no pruner: its {name} is {value!r}")
        self.count, self._seed, self._kept = state["count"], state["seed"], dict(kept)
        self._listen()

    def _asked(self) -> dict[str, Any]:
        """What stays the same from begin to end, in plain data."""
        known = fields(self._method) if is_dataclass(self._method) else ()
        options = [(f.name, getattr(self._method, f.name)) for f in known if f.repr]
        return {
            "method": self._method.name,
            "options": {name: value for name, value in options if isinstance(value, str | int | float | None)},
            "schedule": asdict(self._schedule),
            "amounts": {} if self._method.moving else {a.weight.name: [a.groups, a.density] for a in self._final},
        }

    def resume(self, count: int) -> None:
        """Go on after ``count`` optimizer steps with the masks that the model has, where its state alone was kept."""
        if count != self.count:
            self.count = count
            self._kept = self._counted()
            self._listen()

    def _counted(self) -> dict[str, int]:
        """How many units every mask has now."""
        return {site.weight.name: int(site.units().sum()) for site in self._sites}

    def _listen(self) -> None:
        """Write dense gradients down if the next optimizer step is one after which the method needs them."""
        wanted = self._method.hears and self.count + 1 in self._schedule.events
        for site in self._sites:
            site.stop()
            if wanted:
                site.listen()

    @without_autocast()
    def _catch_up(self, optimizers: Sequence[torch.optim.Optimizer]) -> Report | None:
        if self.count not in self._schedule.events:
            return None
        settle_all(self._model)
        trained = [site.parameter.requires_grad for site in self._sites]
        units = [site.units() for site in self._sites]
        for allocation, unit in zip(self._final, units):
            if int(unit.sum()) != self._kept[allocation.weight.name]:
                raise RuntimeError(
                    f"the mask of {allocation.weight.name} is not what the last pruning left: load the state of the "
                    "model as well as that of the pruner, and change no masks in between"
                )
        # What is frozen is not trained, so that nothing says where its entries should be; it can be pruned.
        live = [index for index, one in enumerate(trained) if one or not self._method.moving]
        sites = [self._sites[index] for index in live]
        with torch.no_grad():
            stage = self._stage(live, units)
            weights = [site.values() for site in sites]
            drawn = from_rank_zero(lambda: self._method.revise(self._model, stage, weights, self._seed)) if live else []
            new = [site.prepare(draw) for site, draw in zip(sites, drawn)]
            settlement = self._method.settle(self._model, stage.allocations, drawn)
            with written(self._model, settlement.values):
                for site, draw, prepared in zip(sites, drawn, new):
                    site.write(draw, prepared, optimizers)
        forget_curvature(optimizers)
        moved = dict(zip(live, zip(stage.allocations, drawn)))
        frozen = {
            index: (self._final[index], self._unmoved(site, units[index]))
            for index, site in enumerate(self._sites)
            if index not in moved
        }
        asked_for, draws = zip(*({**moved, **frozen}[index] for index in range(len(units))))
        notes = {draw.weight.name: "it is frozen, so nothing moved" for _, draw in frozen.values()}
        self._kept = {draw.weight.name: draw.nnz if self._method.fine else draw.edges for draw in draws}
        self.report = self._reported(asked_for, draws, {**notes, **settlement.notes})
        return self.report

    def _unmoved(self, site: Site, units: Tensor) -> Draw:
        """A draw that leaves a site as it is."""
        if not self._method.structured:
            return Draw(site.weight, units=units)
        return Draw(site.weight, site.topologies() or tuple(BlockTopology.from_mask(part) for part in units))

    def _stage(self, live: Sequence[int], units: Sequence[Tensor]) -> Stage:
        over, final = self._schedule, [self._final[index] for index in live]
        units = [units[index] for index in live]
        if isinstance(over, Schedule):
            return Stage([self._now(a, over) for a in final], final, units, self.count)
        sites = [self._sites[index] for index in live]
        gradients = self._gradients(sites) if self._method.hears and sites else ()
        topologies = [site.topologies() for site in sites]
        return Stage(final, final, units, self.count, over.decay(self.count), gradients, topologies)

    def _gradients(self, sites: Sequence[Site]) -> list[Tensor | None]:
        """The dense gradients of the last optimizer step, the mean over all ranks.

        Raises:
            RuntimeError: if there are none at all.
        """
        gradients = [site.gradient for site in sites]
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            for index, site in enumerate(sites):
                held = gradients[index]
                some = torch.tensor(float(held is not None), device=site.parameter.device)
                total = site.values().zero_() if held is None else held.contiguous()
                dist.all_reduce(some)
                dist.all_reduce(total)
                gradients[index] = total / dist.get_world_size() if float(some) else None
        if all(gradient is None for gradient in gradients):
            raise RuntimeError(
                f"{self._method.name!r} needs the gradients of absent entries, and none was seen in optimizer step "
                f"{self.count}: call step after every optimizer step, and train the model that the pruner was made "
                "for, not compiled by torch.compile"
            )
        return gradients

    def _now(self, final: Allocation, over: Schedule) -> Allocation:
        """What a weight is asked for now; of blocks the nearest number, in ratio, on the way to the final one."""
        density = over.density(self.count, final.density)
        if not self._method.structured:
            return replace(final, density=density)
        groups = min(chain(final.groups), key=lambda g: abs(log(g * density)))
        if groups == final.groups or self.count >= over.events[-1]:
            return final
        return replace(final, density=density, groups=groups, nnz=None)

    def _reported(self, allocations: Sequence[Allocation], draws: Sequence[Draw], notes: Mapping[str, str]) -> Report:
        by_name = {draw.weight.name: (a, draw) for a, draw in zip(allocations, draws)}
        records: list[LayerRecord] = []
        for item in self._items:
            if isinstance(item, Allocation):
                name = item.weight.name
                records.append(done(*by_name[name], notes.get(name, "")))
            else:
                records.append(skipped(item))
        done_ = "moved" if self._method.moving else "pruned"
        title = f"{done_}: {self._method.name}, after {self.count} optimizer steps"
        return Report(tuple(records), self._parameters, title)
