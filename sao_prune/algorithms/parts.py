"""One matrix of a layer in front of its calibration data: what it multiplies, and what it should give."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..discovery import PrunableWeight
from ..topology import BlockTopology, kept_energy
from ..weights import BlockFit
from .batches import Rows, moments

# Correlation below which rows of the two models are taken for those of different examples.
_RELATED = 0.1


@dataclass(frozen=True)
class Given:
    """Rows of inputs of one layer.

    Attributes:
        rows: in the model that is converted.
        whole: the same rows in the model that stays whole; ``None`` where they are not known.
        gap: for every batch what the residual stream lacks of what it is in the whole model, laid out like the outputs;
            empty where there is none, or where it is not known.
    """

    rows: Rows
    whole: Rows | None = None
    gap: Sequence[Tensor] = ()


class Part:
    """One matrix ``(m, n, *kernel)`` of a weight, the inputs that it multiplies and the outputs that are wanted.

    Wanted are its outputs in the whole model, for that one's inputs, and what the residual stream they are added to
    lacks: so a layer makes up for what was lost before it. Where the inputs in the whole model are not known, or have
    nothing in common with those here, they are its outputs for the inputs that it gets.

    Args:
        given: the rows.
        number: which of the weight's matrices it is.
        place: which stretch of the channels in the rows is its own.
        weight: the matrix.
        name: of the weight.
    """

    def __init__(self, given: Given, number: int, place: int, weight: Tensor, name: str) -> None:
        self._given, self._number, self._place, self._name = given, number, place, name
        self._weight = weight[:, :, None] if weight.dim() == 2 else weight.flatten(2)
        self._centred = False
        self.mean = self._mean_whole = self._mean_gap = self.energy = torch.empty(0, device="cpu")

    @property
    def count(self) -> int:
        """Rows."""
        return self._given.rows.count

    def measure(self, *, centred: bool, paired: bool = False) -> None:
        """Means and input-weighted energies; with ``centred`` the means count for nothing, for a bias takes them up.

        With ``paired`` it is not asked whether rows of the two models belong together.

        Raises:
            ValueError: if the inputs or the energies are not finite.
        """
        self._centred = centred
        self.mean, variance, finite = moments(self._chunks(self._given.rows))
        if not finite:
            raise ValueError(f"the inputs of {self._name} are not finite on the calibration data")
        second = variance if centred else variance + self.mean.square()
        energy = (self._weight.square() * second.to(self._weight).view(1, -1, self._weight.shape[2])).sum(2)
        self.energy = energy if bool(energy.any()) else self._weight.square().sum(2)
        # With room for the sums of squares that the fit takes.
        sums = float(second.max()) * self.count
        if not bool(torch.isfinite(self.energy.sum())) or sums > torch.finfo(self._weight.dtype).max:
            raise ValueError(
                f"the energy of {self._name} is not finite: the weight holds NaN or infinite values, or its inputs are "
                "too large for squares on the calibration data"
            )
        if self._given.whole is not None:
            self._mean_whole = moments(self._chunks(self._given.whole))[0]
            if not paired and not self._related():
                self._given = Given(self._given.rows)
        if self._given.gap:
            self._mean_gap = moments(self._gaps())[0]

    def fit(self, topology: BlockTopology) -> BlockFit:
        """The moments for the blocks of a topology."""
        return BlockFit(self._weight, topology, self.pairs)

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and wanted outputs, both centred if the means are left to a bias."""
        given, matrix = self._given, self._weight.flatten(1).T
        gaps = iter(self._gaps())
        whole = None if given.whole is None else self._chunks(given.whole)
        for x in self._chunks(given.rows):
            x = x - self.mean.to(x) if self._centred else x
            if whole is None:
                wanted = x @ matrix
            else:
                source = next(whole)
                wanted = (source - self._mean_whole.to(x) if self._centred else source) @ matrix
            if given.gap:
                gap = next(gaps)
                wanted = wanted + (gap - self._mean_gap.to(gap) if self._centred else gap)
            yield x, wanted

    def shift(self, values: Tensor) -> Tensor:
        """What a bias has to add for the wanted mean, with values ``(m, n, *kernel)`` in place of the matrix."""
        mean = self.mean if self._given.whole is None else self._mean_whole
        wanted = _applied(self._weight, mean) + (self._mean_gap.to(self._weight.device) if self._given.gap else 0)
        return wanted - _applied(values, self.mean)

    def _related(self) -> bool:
        """Whether what the matrix makes of the inputs correlates with what it makes of them in the whole model."""
        assert self._given.whole is not None
        matrix, both, here, there = self._weight.flatten(1).T, 0.0, 0.0, 0.0
        for x, whole in zip(self._chunks(self._given.rows), self._chunks(self._given.whole)):
            one = ((x - self.mean.to(x)) @ matrix).double()
            other = ((whole - self._mean_whole.to(x)) @ matrix).double()
            both, here = both + float((one * other).sum()), here + float(one.square().sum())
            there += float(other.square().sum())
        return both >= _RELATED * (here * there) ** 0.5

    def _chunks(self, rows: Rows) -> Iterator[Tensor]:
        for x in rows.chunks(self._place, self._weight.shape[1]):
            yield x.to(self._weight)

    def _gaps(self) -> Iterator[Tensor]:
        m = self._weight.shape[0]
        own = slice(self._number * m, (self._number + 1) * m)
        for gap in self._given.rows.outputs(self._given.gap, own, self._weight.shape[1]):
            yield gap.to(self._weight)


def _applied(matrix: Tensor, mean: Tensor) -> Tensor:
    """What ``(m, n, *kernel)`` makes of mean inputs, in double precision."""
    return matrix.flatten(1).double() @ mean.to(matrix.device, torch.float64)


def mean_energy(energies: Sequence[Tensor], topologies: Sequence[BlockTopology]) -> float:
    """The share of all matrices' energies that their topologies keep."""
    totals = [float(e.double().sum()) for e in energies]
    kept = sum(t * kept_energy(e, topology) for t, e, topology in zip(totals, energies, topologies))
    return kept / sum(totals) if sum(totals) > 0 else 1.0


def largest_block(topologies: Sequence[BlockTopology], weight: PrunableWeight) -> int:
    """Inputs of the largest block, every tap of a kernel counted."""
    taps = torch.Size(weight.kernel).numel()
    return max(int(t.col_sizes.max()) for t in topologies) * taps
