"""Sets for layers that feed each other: the outputs of one and the inputs of the next get one partition."""

from __future__ import annotations

import torch
from torch import Tensor

from .assignment import balanced_assignment
from .block import BlockTopology
from .clustering import clustered


def followed(
    energy: Tensor, col_set: Tensor, sizes: tuple[Tensor, Tensor], coarse: BlockTopology | None = None
) -> BlockTopology | None:
    """The topology on given sets of columns whose rows keep most energy.

    Args:
        energy: ``(m, n)``, as for `clustered`.
        col_set: the set of every column, ``(n,)``.
        sizes: of the row and of the column sets.
        coarse: stay inside the blocks of this one.

    Returns:
        The topology, or ``None`` where the columns are in sets of other sizes, or not inside those of ``coarse``.

    Example:
        >>> import torch
        >>> one = torch.tensor([1, 1])
        >>> followed(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([0, 1]), (one, one)).mask().int().tolist()
        [[0, 1], [1, 0]]
    """
    rows, cols = sizes
    if coarse is not None and coarse.groups > 1:
        return _inside(energy, col_set, sizes, coarse)
    labels, numbers = torch.unique(col_set, return_inverse=True)
    counts = torch.bincount(numbers, minlength=len(labels))
    if sorted(counts.tolist()) != sorted(cols.tolist()):
        return None
    # The columns' sets in the order of the sizes that are asked for.
    place = torch.empty_like(counts)
    place[torch.argsort(counts, stable=True)] = torch.argsort(cols, stable=True)
    numbers = place[numbers]
    chosen = torch.nn.functional.one_hot(numbers, len(cols)).to(torch.float32)
    return BlockTopology(balanced_assignment(energy.detach().to("cpu", torch.float32) @ chosen, rows), numbers)


def _inside(
    energy: Tensor, col_set: Tensor, sizes: tuple[Tensor, Tensor], coarse: BlockTopology
) -> BlockTopology | None:
    step = len(sizes[0]) // coarse.groups
    row_set, col_numbers = coarse.row_set.clone(), coarse.col_set.clone()
    left = [(side[0], side[1]) for side in zip(sizes[0].view(-1, step), sizes[1].view(-1, step))]
    for number in range(coarse.groups):
        r, c = (torch.nonzero(s == number).flatten() for s in (coarse.row_set, coarse.col_set))
        fits = [at for at, part in enumerate(left) if (int(part[0].sum()), int(part[1].sum())) == (len(r), len(c))]
        inner = followed(energy[r][:, c], col_set[c], left.pop(fits[0])) if fits else None
        if inner is None:
            return None
        row_set[r], col_numbers[c] = inner.row_set + number * step, inner.col_set + number * step
    return BlockTopology(row_set, col_numbers)


def clustered_pair(
    energy: Tensor,
    next_energy: Tensor,
    sizes: tuple[Tensor, Tensor],
    next_rows: Tensor,
    generator: torch.Generator | None = None,
) -> BlockTopology:
    """The first of two topologies whose shared sets of hidden channels suit both weights.

    The energies of both, each as a share of its sum, are clustered as one matrix with a row for every hidden channel;
    then the columns of the first are assigned to the sets that were found.

    Args:
        energy: of the first weight, ``(hidden, n)``.
        next_energy: of the one that reads it, ``(m, hidden)``.
        sizes: of the first one's row and column sets.
        next_rows: of the second one's row sets.
        generator: as for `clustered`.

    Returns:
        The topology of the first; `followed` by its ``row_set`` gives the second.

    Example:
        >>> hidden = torch.tensor([0, 1, 0, 1])
        >>> first, then = (hidden[:, None] == torch.arange(2)).float(), (torch.arange(2)[:, None] == hidden).float()
        >>> two, one = torch.tensor([2, 2]), torch.tensor([1, 1])
        >>> clustered_pair(first, then, (two, one), one, torch.Generator().manual_seed(0)).row_set.tolist()
        [0, 1, 0, 1]
    """
    rows, cols = sizes
    both = torch.cat([_share(energy), _share(next_energy).T], 1)
    joint = clustered(both, sizes=(rows, cols + next_rows), generator=generator)
    turned = followed(energy.T, joint.row_set, (cols, rows))
    assert turned is not None
    return BlockTopology(turned.col_set, turned.row_set)


def _share(energy: Tensor) -> Tensor:
    """Energies as shares of their sum; zeros stay."""
    energy = energy.detach().to("cpu", torch.float32)
    return energy / energy.sum().clamp(min=torch.finfo(torch.float32).tiny)
