"""The work of `Project`: one pass of the calibration data through a copy of the model, layers converted on the way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from time import perf_counter

import torch
from torch import Tensor, nn

from .._torch import BatchNorm, ConvTransposeNd
from ..allocation import Allocation
from ..discovery import PrunableWeight
from ..naming import dotted
from ..weights import kept_blocks, refitted
from .base import Stage
from .batches import moments, read_batches
from .draw import Draw, Fidelity
from .fitted import Fitted, Fitter, Options, few_rows, joined
from .parts import Part, mean_energy
from .rehearsal import consumers, evaluated, one_by_one, progress_bar, trial
from .saliency import floats_as, seeded
from .sets import Sets
from .stations import Visit, Watched, run
from .streams import Sink
from .tracer import Tracer
from .uses import Stack, Use

_UNREACHED = "the calibration data never reach it, so its values are kept"


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
    copied, whole = one_by_one(evaluated(model)), one_by_one(evaluated(model))
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
        self._options, self._model, self._allocations = options, model, allocations
        self.parameters = {
            a.weight.name: getattr(model.get_submodule(a.weight.module), a.weight.tensor) for a in allocations
        }
        self._index = {id(self.parameters[a.weight.name]): i for i, a in enumerate(allocations)}
        # Matrices of stacks have keys of their own, which are no ids.
        places = [(i, n) for i, a in enumerate(allocations) if a.weight.stacked for n in range(a.weight.parts)]
        self._matrices = {-2 - key: place for key, place in enumerate(places)}
        self._pieces: dict[int, dict[int, Fitted]] = {}
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
        self._fitter = Fitter(options, sets, seed)
        self._sinks: Mapping[int, Sink] = {}
        self._readout: int | None = None
        self._draws: dict[int, Draw] = {}
        self._last: int | None = None

    @property
    def weights(self) -> frozenset[int]:
        """Ids of the weights."""
        return frozenset(self._index)

    def watched(self, whole: nn.Module, tracer: Tracer) -> tuple[Watched, Watched]:
        """Where to stop in the model that is converted, and in the whole one; keys are the ids of the former."""
        self._sinks = tracer.sinks
        weights = [a.weight for a in self._allocations]
        twins = {
            id(getattr(whole.get_submodule(w.module), w.tensor)): id(self.parameters[w.name])
            for w in weights
            if not w.stacked
        }
        self._readout = tracer.last if self._options.readout and tracer.last in self._single else None
        if self._readout in self._index:
            self._readout = None
        if self._readout is not None:
            twins[id(whole.get_parameter(self._single[self._readout]))] = self._readout
        stacks = {
            id(self.parameters[w.name]): Stack([k for k, (i, _) in self._matrices.items() if i == index], w.transposed)
            for index, w in enumerate(weights)
            if w.stacked
        }
        keys = {key: key for key in (*twins.values(), *self._norms)}
        return Watched(keys, stacks), Watched(twins)

    def stop(self, advance: Callable[[], None], visit: Visit) -> None:
        """Convert what is about to be used."""
        key = visit.uses[0].key
        if key in self._norms:
            self._renew(key, [x for use in visit.uses for x in use.inputs])
        elif key == self._readout:
            self._refit(visit)
        elif key in self._index and not self._followed(key, visit.uses[0]):
            if self._index[key] not in self._pieces:
                self._keep(self._index[key])
                advance()
        elif key in self._matrices:
            index, number = self._matrices[key]
            if index not in self._pieces:
                advance()
            self._convert_one(visit, index, number)
        else:
            self._convert(visit, self._index[key])
            advance()

    def draws(self) -> list[Draw]:
        """One draw a weight, in the order of the allocations; what no data reached keeps its values."""
        for index, allocation in enumerate(self._allocations):
            if index in self._pieces:
                self._draws[index] = self._joined(index, allocation, self._pieces[index])
            elif index not in self._draws:
                self._draws[index] = self._blind(index)
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
        part = Part(self._fitter.given(name, len(weight), visit)[0], 0, 0, before, name)
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

    def _convert(self, visit: Visit, index: int) -> None:
        start, use = perf_counter(), visit.uses[0]
        allocation = self._allocations[index]
        weight, parameter = allocation.weight, self.parameters[allocation.weight.name]
        biased = self._options.correct and use.bias is not None and id(use.bias) in self._names
        normed = self._options.correct and self._sinks.get(use.key, Sink()).norm is not None
        before = _stacked(weight, parameter).clone()
        given = self._fitter.given(weight.name, weight.parts * weight.matrix[0], visit)
        shared = len(given) < weight.parts
        parts = [
            Part(given[0 if shared else n], n, n if shared else 0, before[n], weight.name) for n in range(weight.parts)
        ]
        fitted = self._fitter.fit(
            index, parts, centred=biased or normed, split=allocation.groups > 1, damping=use.damping
        )
        draw = Draw(weight, fitted.topologies, fitted.blocks, solved=True)
        draw.write_(parameter)
        parameter.mul_(draw.mask(parameter))
        note = few_rows(fitted, weight)
        if index in self._fitter.sets.taken_over:
            note = "; ".join(filter(None, (note, "its input sets are the output sets of the layer before it")))
        fidelity = fitted.fidelity(perf_counter() - start)
        self._draws[index], self._last = replace(draw, fidelity=fidelity, note=note), index
        if biased:
            assert use.bias is not None
            now = _stacked(weight, parameter)
            shift = torch.cat([part.shift(now[n]) for n, part in enumerate(parts)])
            use.bias[use.bias_at : use.bias_at + len(shift)] += shift.to(use.bias)
            self._also(index, self._names[id(use.bias)], use.bias)

    def _convert_one(self, visit: Visit, index: int, number: int) -> None:
        """One matrix of a stack. Which examples come to it depends on others, so it stands for itself."""
        start, allocation = perf_counter(), self._allocations[index]
        weight = allocation.weight
        stack = self.parameters[weight.name].view(weight.parts, *weight.shape[-2:])
        one = replace(weight, shape=weight.shape[-2:], parts=1, stacked=False)
        before = one.matrices(stack[number])[0].clone()
        given = self._fitter.given(f"{weight.name}.{number}", weight.matrix[0], Visit(visit.uses, None))
        part = Part(given[0], 0, 0, before, weight.name)
        fitted = self._fitter.fit(index, [part], centred=False, split=allocation.groups > 1, first=number)
        draw = Draw(one, fitted.topologies, fitted.blocks)
        draw.write_(stack[number])
        stack[number].mul_(draw.mask(stack[number]))
        self._pieces.setdefault(index, {})[number] = replace(fitted, seconds=perf_counter() - start)
        # What comes after it on the way, as statistics of norms, is put beside it.
        self._draws.setdefault(index, Draw(weight))
        self._last = index

    def _joined(self, index: int, allocation: Allocation, pieces: Mapping[int, Fitted]) -> Draw:
        """A stack of which some matrices were converted; the others keep their values."""
        start, weight = perf_counter(), allocation.weight
        matrices = _stacked(weight, self.parameters[weight.name])
        whole = [pieces[n] if n in pieces else self._unreached(index, n, one) for n, one in enumerate(matrices)]
        told = joined(list(pieces.values()))
        seconds = perf_counter() - start + told.seconds
        note, absent = few_rows(told, weight), len(whole) - len(pieces)
        if absent:
            kept = f"the calibration data never reach {absent} of {len(whole)} matrices, so their values are kept"
            note = "; ".join(filter(None, (note, kept)))
        so_far, all_of_it = self._draws[index], joined(whole)
        draw = Draw(weight, all_of_it.topologies, all_of_it.blocks, also=so_far.also, solved=True)
        return replace(draw, fidelity=told.fidelity(seconds), note="; ".join(filter(None, (note, so_far.note))))

    def _unreached(self, index: int, number: int, matrix: Tensor) -> Fitted:
        """A matrix of a stack that no data reach, on sets by the energy of its own."""
        energy = matrix.square()
        topologies = self._fitter.sets(index, [energy], number)
        solved = self._options.values != "keep" and self._allocations[index].groups > 1
        blocks = (kept_blocks(matrix, topologies[0]),) if solved else ()
        return Fitted(topologies, blocks, [energy], 0, 0.0, 0.0, 0.0)

    def _followed(self, key: int, use: Use) -> bool:
        """Whether a use of a weight tells its inputs, and which side of it they are on."""
        transposed = self._allocations[self._index[key]].weight.transposed
        return bool(use.inputs) and use.inputs_first in (None, transposed)

    def _keep(self, index: int) -> None:
        """A weight that is used in a way that is not told apart: from here on the copy has only the part that stays."""
        weight = self._allocations[index].weight
        module = self._model.get_submodule(weight.module)
        if isinstance(module, nn.RNNCellBase):
            why = "recurrent cell: its inputs are not seen step by step"
        elif isinstance(module, ConvTransposeNd):
            why = "transposed convolution"
        elif weight.standardised:
            why = "it standardises its weight"
        else:
            why = "what it multiplies is not seen"
        draw = self._blind(index, f"{why}, so its values are kept")
        parameter = self.parameters[weight.name]
        parameter.mul_(draw.mask(parameter))
        self._draws[index], self._last = draw, index

    def _blind(self, index: int, note: str = _UNREACHED) -> Draw:
        """Sets by the energy of the weight alone, values kept."""
        start, weight = perf_counter(), self._allocations[index].weight
        matrices = _stacked(weight, self.parameters[weight.name])
        energies = [matrix[..., None].flatten(2).square().sum(2) for matrix in matrices]
        topologies = self._fitter.sets(index, energies)
        fidelity = Fidelity(mean_energy(energies, topologies), None, None, 0, perf_counter() - start)
        return Draw(weight, topologies, fidelity=fidelity, note=note)


def _stacked(weight: PrunableWeight, parameter: Tensor) -> Tensor:
    """``(parts, m, n, *kernel)``, detached."""
    return weight.matrices(parameter.detach())
