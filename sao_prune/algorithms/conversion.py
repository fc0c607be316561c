"""The work of `Project`: one pass of the calibration data through a copy of the model, layers converted on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Protocol

import torch
from torch import Tensor, nn

from .._torch import BatchNorm, ConvTransposeNd
from ..allocation import Allocation
from ..discovery import PrunableWeight
from ..seeds import named_generator
from ..topology import BlockTopology, clustered, coarsened, even_sizes, exact_sizes, kept_energy, make_topology, split
from ..weights import BlockFit, Blocks
from .base import Stage
from .batches import Rows, moments, read_batches
from .draw import Draw, Fidelity
from .rehearsal import evaluated, progress_bar, trial
from .saliency import floats_as, seeded
from .stations import Use, run

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
    batches = read_batches(model, options.inputs, options.samples)
    copied = evaluated(model)
    dtype = next((p.dtype for p in copied.parameters() if p.is_floating_point()), torch.float32)
    batches = [floats_as(batch, dtype) for batch in batches]
    work = _Conversion(options, copied, allocations, seed, stage)
    with torch.no_grad(), seeded(list(work.parameters.values()), seed, name="project"):
        fed = trial(copied, batches[0], work.watched)
        with progress_bar(len(allocations)) as advance:
            if options.correct:
                run(copied, batches, frozenset(work.keys), work.note_means)
            run(copied, batches, work.watched, partial(work.stop, fed, advance))
    return work.draws()


class _Conversion:
    """What is known of the model's copy while it is converted."""

    def __init__(
        self,
        options: Options,
        model: nn.Module,
        allocations: Sequence[Allocation],
        seed: int,
        stage: Stage | None,
    ) -> None:
        self._options, self._model, self._allocations, self._seed = options, model, allocations, seed
        self.parameters = {
            a.weight.name: getattr(model.get_submodule(a.weight.module), a.weight.tensor) for a in allocations
        }
        self._by_key = {id(self.parameters[a.weight.name]): i for i, a in enumerate(allocations)}
        self._stage = stage
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._norms: dict[int, str] = {}
        if options.correct:
            self._norms = {
                id(m.running_mean): path
                for path, m in model.named_modules()
                if isinstance(m, BatchNorm) and m.running_mean is not None
            }
        self._means: dict[int, list[Tensor]] = {}
        self._draws: dict[int, Draw] = {}
        self._last: int | None = None

    @property
    def keys(self) -> frozenset[int]:
        """Keys of the weights."""
        return frozenset(self._by_key)

    @property
    def watched(self) -> frozenset[int]:
        """Keys of the weights and of the batch norms."""
        return self.keys | frozenset(self._norms)

    def note_means(self, use: Use, inputs: list[tuple[Tensor, ...]]) -> None:
        """The mean inputs of a layer while all are as they were: activations of less spread have other means."""
        if use.bias is not None and id(use.bias) in self._names:
            weight = self._allocations[self._by_key[use.key]].weight
            width = weight.matrix[1]
            rows = self._rows(weight, use, inputs)
            self._means[use.key] = [moments(each.chunks(part, width))[0] for each, part in rows]

    def stop(self, fed: set[int], advance: Callable[[], None], use: Use, inputs: list[tuple[Tensor, ...]]) -> None:
        """Convert what is about to be used."""
        if use.key in self._norms:
            self._renew(use, [x for (x,) in inputs])
        else:
            self._convert(use, inputs, centred=use.key in fed)
            advance()

    def draws(self) -> list[Draw]:
        """One draw a weight, in the order of the allocations; what no data reached keeps its values."""
        for index, allocation in enumerate(self._allocations):
            if index not in self._draws:
                self._draws[index] = self._blind(index, allocation)
        return [self._draws[index] for index in range(len(self._allocations))]

    def _renew(self, use: Use, inputs: list[Tensor]) -> None:
        """New statistics for a batch norm that comes after a converted layer."""
        if self._last is None:
            return
        path, count = self._norms[use.key], sum(x.numel() // x.shape[1] for x in inputs)
        mean, variance, finite = moments(x.movedim(1, -1).reshape(-1, x.shape[1]) for x in inputs)
        if not finite:
            raise ValueError(f"the inputs of {path} are not finite on the calibration data")
        module = self._model.get_submodule(path)
        statistics = {"running_mean": mean, "running_var": variance * (count / max(count - 1, 1))}
        for name, value in statistics.items():
            buffer: Tensor = getattr(module, name)
            buffer.copy_(value)
            self._also(self._last, f"{path}.{name}" if path else name, buffer)

    def _also(self, index: int, name: str, value: Tensor) -> None:
        draw = self._draws[index]
        self._draws[index] = replace(draw, also={**draw.also, name: value.detach().cpu().clone()})

    def _convert(self, use: Use, inputs: list[tuple[Tensor, ...]], *, centred: bool) -> None:
        start, index = perf_counter(), self._by_key[use.key]
        allocation = self._allocations[index]
        weight, parameter = allocation.weight, self.parameters[allocation.weight.name]
        biased = self._options.correct and use.bias is not None and id(use.bias) in self._names
        before = _stacked(weight, parameter).clone()
        parts = [
            _Part(rows, part, before[number], weight.name)
            for number, (rows, part) in enumerate(self._rows(weight, use, inputs))
        ]
        for part in parts:
            part.measure(centred=biased or (centred and self._options.correct))
        topologies = self._topologies(index, [part.energy for part in parts])
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
        energy = _mean_energy([part.energy for part in parts], topologies)
        rows, needed = parts[0].rows.count, _largest_block(topologies, weight)
        note = ""
        if blocks and rows < needed:
            note = f"{rows} rows for blocks of {needed} inputs: the ridge settles the rest"
        shares = (kept / total, after / total) if total > 0 else (0.0, 0.0)
        fidelity = Fidelity(energy, *shares, rows, perf_counter() - start)
        self._draws[index], self._last = replace(draw, fidelity=fidelity, note=note), index
        if biased:
            assert use.bias is not None
            # As the whole model had it, with its inputs of then, so that no drift adds up from layer to layer.
            now = _stacked(weight, parameter)
            shift = torch.cat(
                [
                    _applied(before[n], self._means[use.key][n]) - _applied(now[n], part.mean)
                    for n, part in enumerate(parts)
                ]
            )
            use.bias[use.bias_at : use.bias_at + len(shift)] += shift.to(use.bias)
            self._also(index, self._names[id(use.bias)], use.bias)

    def _rows(self, weight: PrunableWeight, use: Use, inputs: list[tuple[Tensor, ...]]) -> list[tuple[Rows, int]]:
        """For each part its rows, and which stretch of the channels in them is its own."""
        made = []
        for source in range(len(use.inputs)):
            generator = named_generator(self._seed, "rows", weight.name, source)
            made.append(Rows([one[source] for one in inputs], self._options.rows, generator, use.conv))
        if len(made) == weight.parts:
            return [(rows, 0) for rows in made]
        return [(made[0], part) for part in range(weight.parts)]

    def _topologies(self, index: int, energies: list[Tensor]) -> tuple[BlockTopology, ...]:
        allocation, kind, stage = self._allocations[index], self._options.topology, self._stage
        (rows, cols), name = allocation.weight.matrix, allocation.weight.name
        final = allocation if stage is None else stage.final[index]
        if kind != "clustered":
            # Layers of one shape share their sets, as everywhere in the library.
            key = (kind, rows, cols, final.groups, final.nnz)
            generator = named_generator(self._seed, "topology", *key)
            groups = None if final.nnz is not None else final.groups
            made = make_topology(kind, rows, cols, groups=groups, nnz=final.nnz, generator=generator)
            return (coarsened(made, allocation.groups),) * len(energies)
        exact = final.nnz is not None
        sizes = exact_sizes(rows, cols, final.nnz or 0) if exact else even_sizes(rows, cols, final.groups)
        row_sizes, col_sizes = (side.view(allocation.groups, -1).sum(1) for side in sizes)
        out = []
        for part, energy in enumerate(energies):
            generator = named_generator(self._seed, "clusters", name, part, allocation.groups)
            if stage is None:
                out.append(clustered(energy, sizes=(row_sizes, col_sizes), generator=generator))
            else:
                now = BlockTopology.from_mask(stage.units[index][part])
                out.append(split(energy, now, (row_sizes, col_sizes), generator))
        return tuple(out)

    def _values(self, fit: BlockFit) -> Blocks:
        blocks = fit.values(self._options.ridge)
        return fit.orthogonal(blocks) if self._options.values == "orthogonal" else blocks

    def _blind(self, index: int, allocation: Allocation) -> Draw:
        """Sets by the energy of the weight alone, values kept."""
        start, weight = perf_counter(), allocation.weight
        matrices = _stacked(weight, self.parameters[weight.name])
        energies = [matrix[..., None].flatten(2).square().sum(2) for matrix in matrices]
        topologies = self._topologies(index, energies)
        module = self._model.get_submodule(weight.module)
        if isinstance(module, _RECURRENT):
            note = "recurrent: its inputs are not seen step by step, so its values are kept"
        elif isinstance(module, ConvTransposeNd):
            note = "transposed convolution: its values are kept"
        else:
            note = _UNREACHED
        fidelity = Fidelity(_mean_energy(energies, topologies), None, None, 0, perf_counter() - start)
        return Draw(weight, topologies, fidelity=fidelity, note=note)


class _Part:
    """One matrix of a weight, ``(m, n, *kernel)``, and the rows that it multiplies."""

    def __init__(self, rows: Rows, place: int, weight: Tensor, name: str) -> None:
        self.rows, self._place, self._name = rows, place, name
        self._weight = weight[:, :, None] if weight.dim() == 2 else weight.flatten(2)
        self.mean = self._centre = self.energy = torch.empty(0)

    def measure(self, *, centred: bool) -> None:
        """Means and input-weighted energies; with ``centred`` the means count for nothing, for a bias takes them up."""
        self.mean, variance, finite = moments(self._chunks())
        if not finite:
            raise ValueError(f"the inputs of {self._name} are not finite on the calibration data")
        self._centre = self.mean if centred else torch.zeros_like(self.mean)
        second = variance if centred else variance + self.mean.square()
        energy = (self._weight.square() * second.to(self._weight).view(1, -1, self._weight.shape[2])).sum(2)
        self.energy = energy if bool(energy.any()) else self._weight.square().sum(2)

    def fit(self, topology: BlockTopology) -> BlockFit:
        """The moments for the blocks of a topology."""
        centre = self._centre
        return BlockFit(self._weight, topology, lambda: (x - centre.to(x) for x in self._chunks()))

    def _chunks(self) -> Iterator[Tensor]:
        for x in self.rows.chunks(self._place, self._weight.shape[1]):
            yield x.to(self._weight)


def _stacked(weight: PrunableWeight, parameter: Tensor) -> Tensor:
    """``(parts, m, n, *kernel)``, detached."""
    return weight.matrices(parameter.detach())


def _applied(matrix: Tensor, mean: Tensor) -> Tensor:
    """What ``(m, n, *kernel)`` makes of mean inputs, in double precision."""
    return matrix.flatten(1).double() @ mean.to(matrix.device, torch.float64)


def _mean_energy(energies: Sequence[Tensor], topologies: Sequence[BlockTopology]) -> float:
    totals = [float(e.double().sum()) for e in energies]
    kept = sum(t * kept_energy(e, topology) for t, e, topology in zip(totals, energies, topologies))
    return kept / sum(totals) if sum(totals) > 0 else 1.0


def _largest_block(topologies: Sequence[BlockTopology], weight: PrunableWeight) -> int:
    taps = torch.Size(weight.kernel).numel()
    return max(int(t.col_sizes.max()) for t in topologies) * taps
