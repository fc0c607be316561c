"""The work of `Project`: one pass of the calibration data through a copy of the model, layers converted on the way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Protocol

import torch
from torch import Tensor, nn

from .._torch import BatchNorm, ConvTransposeNd
from ..allocation import Allocation
from ..discovery import PrunableWeight
from ..naming import dotted
from ..seeds import named_generator
from ..weights import BlockFit, Blocks, refitted
from .base import Stage
from .batches import Rows, moments, read_batches
from .draw import Draw, Fidelity
from .parts import Given, Part, largest_block, mean_energy
from .rehearsal import consumers, evaluated, progress_bar, trial
from .saliency import floats_as, seeded
from .sets import Sets
from .stations import Use, Visit, run
from .streams import Sink
from .tracer import Tracer

_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_UNREACHED = "the calibration data never reach it, so its values are kept"


class Options(Protocol):
    """What `convert` has to know of the method."""

    @property
    def inputs(self) -> object: ...
    @property
    def topology(self) -> str: ...
    @property
    def values(self) -> str: ...
    @property
    def ridge(self) -> float: ...
    @property
    def samples(self) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def correct(self) -> bool: ...
    @property
    def readout(self) -> bool: ...
    @property
    def shared_sets(self) -> bool: ...


def convert(
    options: Options,
    model: nn.Module,
    allocations: Sequence[Allocation],
    seed: int,
    stage: Stage | None = None,
) -> list[Draw]:
    """Decide for all weights, on a copy of the model.

    Args:
        options: the method.
        model: stays as it is.
        allocations: what each weight is asked for.
        seed: base seed.
        stage: of a schedule: sets are split inside those that there are.

    Raises:
        ValueError: without data, and as `Project.draw_for` has it.
    """
    if options.inputs is None:
        raise ValueError("Project needs calibration data: method=sao_prune.Project(inputs=loader), without labels")
    for allocation in allocations:
        if getattr(model.get_submodule(allocation.weight.module), allocation.weight.tensor).is_meta:
            raise ValueError(f"{allocation.weight.name} is on the meta device: plan() works there, values need data")
    with torch.random.fork_rng(devices=[]):
        # A loader that shuffles draws its order from the global generator.
        batches = read_batches(model, options.inputs, options.samples)
    copied, whole = evaluated(model), evaluated(model)
    dtype = next((p.dtype for p in copied.parameters() if p.is_floating_point()), torch.float32)
    batches = [floats_as(batch, dtype) for batch in batches]
    own = {name for name, _ in model.named_parameters()}
    consumed = consumers(copied, batches[0], allocations) if options.shared_sets else {}
    work = _Conversion(
        options, copied, allocations, Sets(options.topology, allocations, seed, stage, consumed), seed, own
    )
    with torch.no_grad(), seeded(list(work.parameters.values()), seed, name="project"):
        tracer = trial(copied, batches[0], work.weights)
        watched = work.watched(whole, tracer)
        with progress_bar(len(allocations)) as advance:
            run((copied, whole), watched, batches, partial(work.stop, advance), tracer.sinks)
    return work.draws()


class _Conversion:
    """What is known of the model's copy while it is converted."""

    def __init__(
        self,
        options: Options,
        model: nn.Module,
        allocations: Sequence[Allocation],
        sets: Sets,
        seed: int,
        own: Collection[str],
    ) -> None:
        self._options, self._model, self._allocations, self._seed = options, model, allocations, seed
        self.parameters = {
            a.weight.name: getattr(model.get_submodule(a.weight.module), a.weight.tensor) for a in allocations
        }
        self._by_key = {id(self.parameters[a.weight.name]): i for i, a in enumerate(allocations)}
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._norms: dict[int, str] = {}
        if options.correct:
            self._norms = {
                id(m.running_mean): path
                for path, m in model.named_modules()
                if isinstance(m, BatchNorm) and m.running_mean is not None
            }
        names = list(model.named_parameters(remove_duplicate=False))
        times = Counter(id(p) for _, p in names)
        # Biases and linear layers that stand in the model once, and in the original under the same name.
        self._single = {id(p): name for name, p in names if times[id(p)] == 1 and name in own and p.dim() <= 2}
        self._sets = sets
        self._sinks: Mapping[int, Sink] = {}
        self._readout: int | None = None
        self._draws: dict[int, Draw] = {}
        self._last: int | None = None

    @property
    def weights(self) -> frozenset[int]:
        """Ids of the weights."""
        return frozenset(self._by_key)

    def watched(self, whole: nn.Module, tracer: Tracer) -> tuple[dict[int, int], dict[int, int]]:
        """Where to stop in the model that is converted, and in the whole one; keys are the ids of the former."""
        self._sinks = tracer.sinks
        twins = {
            id(getattr(whole.get_submodule(a.weight.module), a.weight.tensor)): id(self.parameters[a.weight.name])
            for a in self._allocations
        }
        self._readout = tracer.last if self._options.readout and tracer.last in self._single else None
        if self._readout in self._by_key:
            self._readout = None
        if self._readout is not None:
            twins[id(whole.get_parameter(self._single[self._readout]))] = self._readout
        return {key: key for key in (*twins.values(), *self._norms)}, twins

    def stop(self, advance: Callable[[], None], visit: Visit) -> None:
        """Convert what is about to be used."""
        key = visit.uses[0].key
        if key in self._norms:
            self._renew(key, [x for use in visit.uses for x in use.inputs])
        elif key == self._readout:
            self._refit(visit)
        else:
            self._convert(visit)
            advance()

    def draws(self) -> list[Draw]:
        """One draw a weight, in the order of the allocations; what no data reached keeps its values."""
        for index, allocation in enumerate(self._allocations):
            if index not in self._draws:
                self._draws[index] = self._blind(index, allocation)
        return [self._draws[index] for index in range(len(self._allocations))]

    def _renew(self, key: int, inputs: list[Tensor]) -> None:
        """New statistics for a batch norm that comes after a converted layer."""
        if self._last is None:
            return
        path, count = self._norms[key], sum(x.numel() // x.shape[1] for x in inputs)
        mean, variance, finite = moments(x.movedim(1, -1).reshape(-1, x.shape[1]) for x in inputs)
        if not finite:
            raise ValueError(f"the inputs of {path} are not finite on the calibration data")
        module = self._model.get_submodule(path)
        statistics = {"running_mean": mean, "running_var": variance * (count / max(count - 1, 1))}
        for name, value in statistics.items():
            buffer: Tensor = getattr(module, name)
            buffer.copy_(value)
            self._also(self._last, dotted(path, name), buffer)

    def _refit(self, visit: Visit) -> None:
        """The last layer, which stays dense, reads converted features: it learns to say what it said before."""
        if self._last is None or visit.whole is None:
            return
        use, name = visit.uses[0], self._single[visit.uses[0].key]
        weight = self._model.get_parameter(name)
        before = weight.detach().clone()
        biased = self._options.correct and use.bias is not None and id(use.bias) in self._single
        part = Part(self._given(name, len(weight), visit)[0], 0, 0, before, name)
        # Cross-validation tells whether rows have anything to say, however poor the features became.
        part.measure(centred=biased, paired=True)
        weight.copy_(refitted(before, part.pairs(), centred=biased))
        self._also(self._last, name, weight)
        draw = self._draws[self._last]
        self._draws[self._last] = replace(draw, note="; ".join(filter(None, (draw.note, f"{name} is fitted anew"))))
        if biased and use.bias is not None:
            use.bias.add_(part.shift(weight.detach()).to(use.bias))
            self._also(self._last, self._single[id(use.bias)], use.bias)

    def _also(self, index: int, name: str, value: Tensor) -> None:
        draw = self._draws[index]
        self._draws[index] = replace(draw, also={**draw.also, name: value.detach().cpu().clone()})

    def _convert(self, visit: Visit) -> None:
        start, use = perf_counter(), visit.uses[0]
        index = self._by_key[use.key]
        allocation = self._allocations[index]
        weight, parameter = allocation.weight, self.parameters[allocation.weight.name]
        biased = self._options.correct and use.bias is not None and id(use.bias) in self._names
        normed = self._options.correct and self._sinks.get(use.key, Sink()).norm is not None
        before = _stacked(weight, parameter).clone()
        given = self._given(weight.name, weight.parts * weight.matrix[0], visit)
        shared = len(given) < weight.parts
        parts = [
            Part(given[0 if shared else n], n, n if shared else 0, before[n], weight.name) for n in range(weight.parts)
        ]
        for part in parts:
            part.measure(centred=biased or normed)
        topologies = self._sets(index, [part.energy for part in parts])
        fits = [part.fit(topology) for part, topology in zip(parts, topologies)]
        blocks = tuple(self._values(fit) for fit in fits) if self._options.values != "keep" else ()
        if allocation.groups == 1:
            blocks = ()
        draw = Draw(weight, topologies, blocks, solved=True)
        draw.write_(parameter)
        parameter.mul_(draw.mask(parameter))
        kept, after, total = 0.0, 0.0, 0.0
        for number, fit in enumerate(fits):
            kept += fit.lost
            after += fit.error(blocks[number]) * fit.total if blocks else fit.lost
            total += fit.total
        energy = mean_energy([part.energy for part in parts], topologies)
        rows, needed = parts[0].count, largest_block(topologies, weight)
        note = ""
        if blocks and rows < needed:
            note = f"{rows} rows for blocks of {needed} inputs: the ridge settles the rest"
        shares = (kept / total, after / total) if total > 0 else (0.0, 0.0)
        fidelity = Fidelity(energy, *shares, rows, perf_counter() - start)
        if index in self._sets.taken_over:
            note = "; ".join(filter(None, (note, "its input sets are the output sets of the layer before it")))
        self._draws[index], self._last = replace(draw, fidelity=fidelity, note=note), index
        if biased:
            assert use.bias is not None
            now = _stacked(weight, parameter)
            shift = torch.cat([part.shift(now[n]) for n, part in enumerate(parts)])
            use.bias[use.bias_at : use.bias_at + len(shift)] += shift.to(use.bias)
            self._also(index, self._names[id(use.bias)], use.bias)

    def _given(self, name: str, width: int, visit: Visit) -> list[Given]:
        """Rows for each of a layer's inputs, the same rows of both models."""
        out = []
        for source in range(len(visit.uses[0].inputs)):
            here = [use.inputs[source] for use in visit.uses]
            there = [use.inputs[source] for use in visit.whole or ()]
            rows, whole = (
                Rows(x, self._options.rows, named_generator(self._seed, "rows", name, source), visit.uses[0].conv)
                for x in (here, there or here)
            )
            if [x.shape for x in here] != [x.shape for x in there]:
                out.append(Given(rows))
                continue
            gaps = [gap for use, other in zip(visit.uses, visit.whole or ()) for gap in _gap(use, other)]
            out.append(Given(rows, whole, gaps if len(gaps) == len(here) and rows.match(gaps, width) else ()))
        return out

    def _values(self, fit: BlockFit) -> Blocks:
        blocks = fit.values(self._options.ridge)
        return fit.orthogonal(blocks) if self._options.values == "orthogonal" else blocks

    def _blind(self, index: int, allocation: Allocation) -> Draw:
        """Sets by the energy of the weight alone, values kept."""
        start, weight = perf_counter(), allocation.weight
        matrices = _stacked(weight, self.parameters[weight.name])
        energies = [matrix[..., None].flatten(2).square().sum(2) for matrix in matrices]
        topologies = self._sets(index, energies)
        module = self._model.get_submodule(weight.module)
        if isinstance(module, _RECURRENT):
            note = "recurrent: its inputs are not seen step by step, so its values are kept"
        elif isinstance(module, ConvTransposeNd):
            note = "transposed convolution: its values are kept"
        else:
            note = _UNREACHED
        fidelity = Fidelity(mean_energy(energies, topologies), None, None, 0, perf_counter() - start)
        return Draw(weight, topologies, fidelity=fidelity, note=note)


def _gap(use: Use, whole: Use) -> list[Tensor]:
    """What a residual stream lacks of that of the whole model, if both are known."""
    if use.stream is None or whole.stream is None or use.stream.shape != whole.stream.shape:
        return []
    return [whole.stream - use.stream]


def _stacked(weight: PrunableWeight, parameter: Tensor) -> Tensor:
    """``(parts, m, n, *kernel)``, detached."""
    return weight.matrices(parameter.detach())
