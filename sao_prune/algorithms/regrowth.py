"""Dynamic sparse training: entries of small magnitude go, others come in their place. SET and RigL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..allocation import Allocation
from ..scheduling import check_share
from ..seeds import named_generator
from .base import Method, Stage, choice, register
from .draw import Draw
from .magnitude import keep_top

Unit = Literal["weight", "kernel", "block"]


@dataclass(frozen=True)
class _Regrowth(Method):
    """What `SET` and `RigL` share: a random mask at the start, and in every matrix as many entries come as go."""

    share: float = 0.3
    unit: Unit = "weight"
    block: int = 4

    def __post_init__(self) -> None:
        check_share("share", self.share)
        choice("unit", self.unit, ("weight", "kernel", "block"))
        if isinstance(self.block, bool) or not isinstance(self.block, int) or self.block < 1:
            raise ValueError(f"block must be a whole number of at least 1, got {self.block!r}")

    @property
    def moving(self) -> bool:
        """Entries move at a constant number of them."""
        return True

    @property
    def fine(self) -> bool:
        """Single taps of a kernel come and go."""
        return self.unit == "weight"

    def draw(self, allocations: Sequence[Allocation], weights: Sequence[Tensor], seed: int) -> list[Draw]:
        """A random mask for each weight, which keeps its values; as many weights as whole kernels would be."""
        draws = []
        for allocation in allocations:
            weight = allocation.weight
            shape = (weight.parts, *weight.matrix, *(weight.kernel if self.fine else ()))
            cells = self._cells(torch.zeros(shape, device="cpu"), len(weight.kernel) if self.fine else 0)
            generator = named_generator(seed, "random", weight.name)
            order = torch.rand(cells.shape, generator=generator, dtype=torch.float64, device="cpu")
            taps = cells[0, 0, 0].numel() if self.fine else 1
            count = round(allocation.density * cells[0].numel() / taps) * taps
            units = torch.stack([keep_top(one, count) for one in order])
            draws.append(Draw(weight, units=self._units(units, shape)))
        return draws

    def revise(self, model: nn.Module, stage: Stage, weights: Sequence[Tensor], seed: int) -> list[Draw]:
        """Let entries go and others come, matrix by matrix; those that come start at zero."""
        draws = []
        gradients = stage.gradients or [None] * len(weights)
        for allocation, units, weight, gradient in zip(stage.allocations, stage.units, weights, gradients):
            item, kernel = allocation.weight, len(allocation.weight.kernel)
            if self.hears and (gradient is None or not bool(gradient.isfinite().all())):
                draws.append(Draw(item, units=units, note="no finite gradient reached it, so nothing moved"))
                continue
            values = self._cells(item.matrices(weight), kernel)
            present = self._cells(units.to(weight.device, torch.float32), kernel if self.fine else 0) != 0
            wanted = values if gradient is None else self._cells(item.matrices(gradient), kernel).abs()
            new, moved = [], 0
            for part in range(item.parts):
                generator = named_generator(seed, self.name, item.name, part, stage.step)
                after = self._moved(values[part], present[part], wanted[part], stage.decay, generator)
                moved += int((after & ~present[part]).sum())
                new.append(after)
            note = f"{moved} of {int(present.sum())} {self.unit}s moved"
            draws.append(Draw(item, units=self._units(torch.stack(new).cpu(), units.shape), note=note))
        return draws

    def _moved(
        self, values: Tensor, present: Tensor, wanted: Tensor, decay: float, generator: torch.Generator
    ) -> Tensor:
        raise NotImplementedError

    def _cells(self, matrices: Tensor, kernel: int) -> Tensor:
        """What comes and goes as one, of ``(parts, m, n, *kernel)``: single weights with their signs, else L1 norms."""
        if self.unit == "weight":
            return matrices
        sums = matrices.abs().to(torch.promote_types(matrices.dtype, torch.float32))
        sums = sums.flatten(3).sum(3) if kernel else sums
        if self.unit == "kernel":
            return sums
        rows, cols = (-size % self.block for size in sums.shape[1:])
        padded = F.pad(sums, (0, cols, 0, rows))
        return padded.unflatten(2, (-1, self.block)).unflatten(1, (-1, self.block)).sum((2, 4))

    def _units(self, cells: Tensor, shape: Sequence[int]) -> Tensor:
        """The mask of entries from that of cells."""
        if self.unit != "block":
            return cells
        wide = cells.repeat_interleave(self.block, 1).repeat_interleave(self.block, 2)
        return wide[:, : shape[1], : shape[2]]


@register
@dataclass(frozen=True)
class SET(_Regrowth):
    """Sparse evolutionary training: the smallest weights go, random ones come (Mocanu et al., 2018).

    Every time, of the positive weights of a matrix the smallest ``share``, and of the negative ones the largest
    ``share``, are removed; as many entries that were absent, chosen at random, come at zero. Entries that go do not
    come back at once. Train with `sao_prune.schedule` and `sao_prune.Moves`; `sao_prune.apply` alone gives the random
    mask of the start.

    Attributes:
        share: of the weights that go each time.
        unit: ``"weight"``; ``"kernel"``, whole kernels of convolutions by their L1 norm; ``"block"``, tiles of
            ``block x block`` neighbouring kernels.
        block: height and width of a tile.
        decay: let the share fall by a cosine, as RigL does; the paper keeps it.

    Raises:
        ValueError: for an option out of range.

    Source: https://doi.org/10.1038/s41467-018-04316-3.

    Example:
        >>> import torch, sao_prune
        >>> net = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(3)))
        >>> over = sao_prune.Moves(steps=4, every=1)
        >>> pruner = sao_prune.schedule(net, sao_prune.SET(), sparsity=0.75, over=over, seed=0)
        >>> before = net[1].weight_mask.clone()
        >>> _ = pruner.step()
        >>> int(net[1].weight_mask.sum()), torch.equal(net[1].weight_mask, before)
        (64, False)
    """

    name: ClassVar[str] = "set"

    decay: bool = False

    def _moved(
        self, values: Tensor, present: Tensor, wanted: Tensor, decay: float, generator: torch.Generator
    ) -> Tensor:
        share = self.share * (decay if self.decay else 1.0)
        kept = torch.zeros_like(present)
        for side in (present & (values >= 0), present & (values < 0)):
            count = int(side.sum())
            stay = count - int(share * count)
            kept |= keep_top(torch.where(side, values.abs().double(), -1.0), stay) & side
        gone = int(present.sum()) - int(kept.sum())
        absent = int((~present).sum())
        if gone > absent:
            # A matrix that is nearly full: no more can go than can come.
            kept = keep_top(torch.where(present, values.abs().double(), -1.0), int(present.sum()) - absent)
            gone = absent
        noise = torch.rand(values.shape, generator=generator, dtype=torch.float64, device="cpu").to(values.device)
        return kept | (keep_top(torch.where(present, -1.0, noise), gone) & ~present)


@register
@dataclass(frozen=True)
class RigL(_Regrowth):
    """Rigging the lottery: the smallest weights go, those with the largest gradients come (Evci et al., 2020).

    Every time, of each matrix's ``n`` entries the ``share * decay * n`` of least magnitude are dropped, ``decay`` the
    half cosine of `sao_prune.Moves`; as many of those that are not kept come, by the magnitude of the gradient that
    they have as if the weight were dense. New ones start at zero; one that is dropped and wanted at once keeps its
    value, as in the authors' code. The gradient is that of the optimizer step just made. The paper moves in place of
    an optimizer step, here both happen.

    Attributes:
        share: of the weights that go at the start; the paper's alpha.
        unit: ``"weight"``; ``"kernel"``, whole kernels of convolutions by L1 norms; ``"block"``, tiles of
            ``block x block`` neighbouring kernels, without the learned permutation of PA-DST
            (https://arxiv.org/abs/2510.14812).
        block: height and width of a tile.

    Raises:
        ValueError: for an option out of range.

    Source: https://arxiv.org/abs/1911.11134.

    Example:
        >>> import torch, sao_prune
        >>> net = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(3)))
        >>> over = sao_prune.Moves(steps=4, every=1)
        >>> pruner = sao_prune.schedule(net, sao_prune.RigL(), sparsity=0.75, over=over, seed=0)
        >>> net(torch.ones(2, 16)).square().sum().backward()
        >>> pruner.step().layers[1].note.endswith("of 64 weights moved")
        True
    """

    name: ClassVar[str] = "rigl"

    @property
    def hears(self) -> bool:
        """The gradients of absent entries say which come."""
        return True

    def _moved(
        self, values: Tensor, present: Tensor, wanted: Tensor, decay: float, generator: torch.Generator
    ) -> Tensor:
        count = int(present.sum())
        gone = min(int(self.share * decay * count), present.numel() - count)
        kept = keep_top(torch.where(present, values.abs().double(), -1.0), count - gone)
        return kept | keep_top(torch.where(kept, -1.0, wanted.double()), gone)
