"""Sets and values for matrices in front of their calibration data, and how well these do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ..discovery import PrunableWeight
from ..seeds import named_generator
from ..topology import BlockTopology
from ..weights import BlockFit, Blocks
from .batches import Rows
from .draw import Fidelity
from .parts import Given, Part, largest_block, mean_energy
from .sets import Sets
from .stations import Visit
from .uses import Use


class Options(Protocol):
    """What a conversion has to know of its method."""

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


@dataclass(frozen=True)
class Fitted:
    """Sets and values of matrices, with the sums that tell how well they do.

    Attributes:
        topologies: one a matrix.
        blocks: values, likewise; empty where they are kept.
        energies: of the matrices' entries.
        rows: of inputs that told.
        lost: squared error of the outputs with the values kept.
        missed: that with the values that they get.
        total: squared size of the outputs that are wanted.
        seconds: what it took.
    """

    topologies: tuple[BlockTopology, ...]
    blocks: tuple[Blocks, ...]
    energies: Sequence[Tensor]
    rows: int
    lost: float
    missed: float
    total: float
    seconds: float = 0.0

    def fidelity(self, seconds: float) -> Fidelity:
        """As the report has it."""
        energy = mean_energy(self.energies, self.topologies)
        errors = (self.lost / self.total, self.missed / self.total) if self.total > 0 else (0.0, 0.0)
        return Fidelity(energy, *errors, self.rows, seconds)


def joined(pieces: Sequence[Fitted]) -> Fitted:
    """Matrices of a stack together, with the rows of that which has fewest."""
    return Fitted(
        tuple(t for piece in pieces for t in piece.topologies),
        tuple(b for piece in pieces for b in piece.blocks),
        [energy for piece in pieces for energy in piece.energies],
        min(piece.rows for piece in pieces),
        sum(piece.lost for piece in pieces),
        sum(piece.missed for piece in pieces),
        sum(piece.total for piece in pieces),
        sum(piece.seconds for piece in pieces),
    )


class Fitter:
    """Finds sets and values as a method's options have it.

    Args:
        options: of the method.
        sets: gives topologies.
        seed: base seed.
    """

    def __init__(self, options: Options, sets: Sets, seed: int) -> None:
        self._options, self.sets, self._seed = options, sets, seed

    def fit(
        self, index: int, parts: list[Part], *, centred: bool, split: bool, damping: float = 1.0, first: int = 0
    ) -> Fitted:
        """Sets and values of some matrices of a weight.

        Args:
            index: of the weight.
            parts: the matrices.
            centred: whether a bias takes up the means.
            split: whether there is more than one block.
            damping: factor on the ridge.
            first: which of the weight's matrices the parts begin with.
        """
        for part in parts:
            part.measure(centred=centred)
        energies = [part.energy for part in parts]
        topologies = self.sets(index, energies, first)
        fits = [part.fit(topology) for part, topology in zip(parts, topologies)]
        blocks: tuple[Blocks, ...] = ()
        if self._options.values != "keep" and split:
            blocks = tuple(self._values(fit, damping * self._options.ridge) for fit in fits)
        lost = sum(fit.lost for fit in fits)
        missed = sum(fit.error(own) * fit.total for fit, own in zip(fits, blocks)) if blocks else lost
        return Fitted(topologies, blocks, energies, parts[0].count, lost, missed, sum(fit.total for fit in fits))

    def given(self, name: str, width: int, visit: Visit) -> list[Given]:
        """Rows for each of a layer's inputs, the same rows of both models.

        Raises:
            ValueError: if batches differ in the number of features.
        """
        out, conv = [], visit.uses[0].conv
        along = -1 if conv is None else -1 - len(conv["kernel"])
        for source in range(len(visit.uses[0].inputs)):
            here = [use.inputs[source] for use in visit.uses]
            widths = {x.shape[along] for x in here}
            if len(widths) > 1:
                found = " and ".join(map(str, sorted(widths)))
                raise ValueError(f"the inputs of {name} have {found} features in different calibration batches")
            there = [use.inputs[source] for use in visit.whole or ()]
            rows, whole = (
                Rows(x, self._options.rows, named_generator(self._seed, "rows", name, source), conv)
                for x in (here, there or here)
            )
            if [x.shape for x in here] != [x.shape for x in there]:
                out.append(Given(rows))
                continue
            gaps = [gap for use, other in zip(visit.uses, visit.whole or ()) for gap in _gap(use, other)]
            out.append(Given(rows, whole, gaps if len(gaps) == len(here) and rows.match(gaps, width) else ()))
        return out

    def _values(self, fit: BlockFit, ridge: float) -> Blocks:
        blocks = fit.values(ridge)
        return fit.orthogonal(blocks) if self._options.values == "orthogonal" else blocks


def few_rows(fitted: Fitted, weight: PrunableWeight) -> str:
    """Whether there were fewer rows than a block has inputs."""
    needed = largest_block(fitted.topologies, weight)
    if not fitted.blocks or fitted.rows >= needed:
        return ""
    return f"{fitted.rows} rows for blocks of {needed} inputs: the ridge settles the rest"


def _gap(use: Use, whole: Use) -> list[Tensor]:
    """What a residual stream lacks of that of the whole model, if both are known."""
    if use.stream is None or whole.stream is None or use.stream.shape != whole.stream.shape:
        return []
    return [whole.stream - use.stream]
