"""Sets that a weight itself asks for: balanced co-clustering of the energy of its entries."""

from __future__ import annotations

import torch
from torch import Tensor

from .assignment import balanced_assignment
from .block import BlockTopology, NotBlockStructuredError
from .sizes import even_sizes

_TEMPERATURES = 120
_FEWER = 60
_LARGE = 2**22
_POWERS = 8
_STARTS = ((2**12, 2), (2**16, 4), (2**18, 2))
_HOT, _COLD = 1.0, 0.1
_ROUNDS = 12
_SETS_AT_ONCE = 64


def clustered(
    energy: Tensor,
    groups: int | None = None,
    *,
    sizes: tuple[Tensor, Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> BlockTopology:
    """The block topology that keeps most energy, as nearly as a few seconds of search find it.

    Rows and columns get soft set numbers, by turns, at falling temperatures, each turn a Sinkhorn scaling that holds
    the sizes of the sets; at the end both are assigned by turns until nothing changes. Energy is taken minus the means
    of its rows and columns, which no choice of equally large sets can change. A weight that is made of blocks of these
    sizes already is recognised. What is found follows its rows and columns: permuting them permutes the sets and keeps
    the energy.

    Args:
        energy: ``(m, n)``, not negative: what is lost with each entry, such as ``weight**2`` times the variance of its
            input.
        groups: number of blocks, ``1 .. min(m, n)``; set sizes differ by at most one.
        sizes: sizes of the row and of the column sets in place of ``groups``.
        generator: where the start comes from; without one, `torch.initial_seed` decides.

    Returns:
        The `BlockTopology`, of shape ``(m, n)``.

    Raises:
        ValueError: if ``energy`` is no finite matrix of numbers that are not negative, or for both or neither of
            ``groups`` and ``sizes``.

    Example:
        >>> import torch
        >>> hidden = BlockTopology(torch.tensor([0, 1, 0, 1]), torch.tensor([1, 0, 0, 1]))
        >>> clustered(hidden.mask().float() + 0.1, 2, generator=torch.Generator().manual_seed(0)) == hidden
        True
    """
    if energy.dim() != 2 or energy.numel() == 0:
        raise ValueError(f"energy must be a non-empty (m, n) matrix, got shape {tuple(energy.shape)}")
    if (groups is None) == (sizes is None):
        raise ValueError(f"give exactly one of groups and sizes, got groups={groups}, sizes={sizes}")
    rows, cols = sizes if sizes is not None else even_sizes(energy.shape[0], energy.shape[1], groups or 0)
    energy = energy.detach().to("cpu", torch.float32)
    if not bool(torch.isfinite(energy).all()) or bool((energy < 0).any()):
        raise ValueError("energy must be finite and not negative; the weight or its inputs hold NaN or infinite values")
    if len(rows) == 1:
        return BlockTopology(torch.zeros_like(energy[:, 0]).long(), torch.zeros_like(energy[0]).long())
    found = _recognised(energy, rows, cols)
    if found is not None:
        return found
    if generator is None:
        generator = torch.Generator().manual_seed(torch.initial_seed() % 2**63)
    # In an order that their own values decide, rows and columns meet the same random start however they come.
    row_rank, col_rank = (torch.argsort(energy.double().sum(side), stable=True) for side in (1, 0))
    ordered = energy[row_rank][:, col_rank]
    row_set, col_set = torch.empty_like(row_rank), torch.empty_like(col_rank)
    row_set[row_rank], col_set[col_rank] = _search(ordered, rows, cols, generator)
    return BlockTopology(row_set, col_set)


def kept_energy(energy: Tensor, topology: BlockTopology) -> float:
    """Share of the energy on a topology's edges; 1 where there is none to lose.

    Args:
        energy: ``(m, n)``, as for `clustered`.
        topology: of the same shape.

    Returns:
        A number in [0, 1].

    Example:
        >>> import torch
        >>> kept_energy(torch.ones(4, 4), BlockTopology(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 1])))
        0.5
    """
    total = float(energy.double().sum())
    kept = sum(float(values.double().sum()) for values in topology.gather(energy))
    return kept / total if total > 0 else 1.0


def coarsened(topology: BlockTopology, groups: int) -> BlockTopology:
    """Neighbouring sets joined until ``groups`` are left: the edges of ``topology`` and more.

    Args:
        topology: the topology whose sets are joined.
        groups: number of sets afterwards.

    Returns:
        The joined topology, of the same shape.

    Raises:
        ValueError: unless ``groups`` divides the number of sets.

    Example:
        >>> import torch
        >>> fine = BlockTopology(torch.tensor([0, 1, 2, 3]), torch.tensor([3, 2, 1, 0]))
        >>> coarsened(fine, 2).col_set.tolist()
        [1, 1, 0, 0]
    """
    if groups < 1 or topology.groups % groups:
        raise ValueError(f"{topology.groups} sets can be joined to a divisor of their number, got {groups}")
    step = topology.groups // groups
    sides = (torch.where(s >= 0, s // step, s) for s in (topology.row_set, topology.col_set))
    return BlockTopology(*sides)


def chain(groups: int) -> tuple[int, ...]:
    """Numbers of sets on the way from one to ``groups``, each a multiple of the one before.

    Args:
        groups: number of sets at the end.

    Returns:
        The numbers, ascending, 1 and ``groups`` among them.

    Example:
        >>> chain(32), chain(12), chain(7)
        ((1, 2, 4, 8, 16, 32), (1, 2, 4, 12), (1, 7))
    """
    steps, left, factor = [1], groups, 2
    while left > 1:
        if factor * factor > left:
            factor = left
        if left % factor:
            factor += 1
        else:
            steps.append(steps[-1] * factor)
            left //= factor
    return tuple(steps)


def split(
    energy: Tensor, coarse: BlockTopology, sizes: tuple[Tensor, Tensor], generator: torch.Generator | None = None
) -> BlockTopology:
    """Split the sets of a topology further by co-clustering inside every block: its edges and no others.

    Args:
        energy: ``(m, n)``, as for `clustered`.
        coarse: the topology to split.
        sizes: row and column sizes of the sets after the split, as many for every set of ``coarse``, together as large
            as that set in some order.
        generator: as for `clustered`.

    Returns:
        The finer topology, of the same shape.

    Raises:
        ValueError: if the sizes do not make up the sets of ``coarse``.

    Example:
        >>> import torch
        >>> coarse = BlockTopology(torch.zeros(4, dtype=torch.long), torch.zeros(4, dtype=torch.long))
        >>> sizes = torch.tensor([2, 2]), torch.tensor([2, 2])
        >>> split(torch.eye(2).repeat(2, 2), coarse, sizes, torch.Generator().manual_seed(0)).row_set.tolist()
        [0, 1, 0, 1]
    """
    rows, cols = sizes
    if len(rows) % coarse.groups:
        raise ValueError(f"{coarse.groups} sets cannot be split evenly into {len(rows)}")
    parts = _parts(rows, coarse.groups), _parts(cols, coarse.groups)
    row_set, col_set = coarse.row_set.clone(), coarse.col_set.clone()
    open_parts = list(zip(parts[0], parts[1]))
    step, energy = len(rows) // coarse.groups, energy.cpu()
    for number in range(coarse.groups):
        r, c = (torch.nonzero(s == number).flatten() for s in (coarse.row_set, coarse.col_set))
        fits = [p for p in open_parts if (int(p[0].sum()), int(p[1].sum())) == (len(r), len(c))]
        if not fits:
            raise ValueError(f"a set of {len(r)} x {len(c)} cannot be made up from the given sizes")
        part = fits[0]
        open_parts = [p for p in open_parts if p is not part]
        inner = clustered(energy[r][:, c], sizes=part, generator=generator)
        row_set[r], col_set[c] = inner.row_set + number * step, inner.col_set + number * step
    return BlockTopology(row_set, col_set)


def _parts(sizes: Tensor, groups: int) -> list[Tensor]:
    return list(sizes.view(groups, -1))


def _recognised(energy: Tensor, rows: Tensor, cols: Tensor) -> BlockTopology | None:
    """The energy's own blocks, if it consists of complete ones of just these sizes."""
    if int((energy != 0).sum()) != int((rows * cols).sum()):
        return None
    try:
        found = BlockTopology.from_mask(energy != 0)
    except NotBlockStructuredError:
        return None
    wanted = sorted(zip(rows.tolist(), cols.tolist()))
    return found if sorted(zip(found.row_sizes.tolist(), found.col_sizes.tolist())) == wanted else None


def _search(energy: Tensor, rows: Tensor, cols: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Row and column labels; for many sets first a few large ones, then each of these by itself."""
    sets = len(rows)
    steps = chain(sets)
    if sets > _SETS_AT_ONCE and len(steps) > 2:
        few = max(s for s in steps if s * s <= sets or s == steps[1])
        row_parts, col_parts = _parts(rows, few), _parts(cols, few)
        row_sums, col_sums = (torch.stack([p.sum() for p in side]) for side in (row_parts, col_parts))
        outer = _search(energy, row_sums, col_sums, generator)
        row_set, col_set = torch.empty_like(outer[0]), torch.empty_like(outer[1])
        for number, (r_sizes, c_sizes) in enumerate(zip(row_parts, col_parts)):
            r, c = (torch.nonzero(side == number).flatten() for side in outer)
            inner = _search(energy[r][:, c], r_sizes, c_sizes, generator)
            row_set[r], col_set[c] = (labels + number * (sets // few) for labels in inner)
        return row_set, col_set
    starts = next((count for size, count in _STARTS if energy.numel() <= size), 1)
    found = [_anneal(energy, rows, cols, generator) for _ in range(starts)]
    return max(found, key=lambda labels: kept_energy(energy, BlockTopology(*labels)))


def _anneal(energy: Tensor, rows: Tensor, cols: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    centred = energy - energy.mean(1, keepdim=True)
    centred -= centred.mean(0, keepdim=True)
    row_soft = centred.new_zeros(energy.shape[0], len(rows))
    row_dual, col_dual = centred.new_zeros(len(rows)), centred.new_zeros(len(cols))
    count = _TEMPERATURES if energy.numel() < _LARGE else _FEWER
    # A few rows times a large contiguous matrix is the fast form of these products.
    turned = centred.T.contiguous()
    soft, _ = _sinkhorn(_leading(centred, turned, len(cols), generator), cols, _HOT, col_dual)
    for step in range(count):
        temperature = _HOT * (_COLD / _HOT) ** (step / (count - 1))
        row_soft, row_dual = _sinkhorn((soft.T @ turned).T, rows, temperature, row_dual)
        soft, col_dual = _sinkhorn((row_soft.T @ centred).T, cols, temperature, col_dual)
    row_set = balanced_assignment((soft.T @ turned).T, rows)
    col_set = torch.zeros(0, dtype=torch.long, device="cpu")
    best = -torch.inf
    for _ in range(_ROUNDS):
        scores = _sums(centred, row_set, len(rows))
        col_set = balanced_assignment(scores, cols, col_set if len(col_set) else None)
        scores = _sums(turned, col_set, len(cols))
        row_set = balanced_assignment(scores, rows, row_set)
        total = float(scores.gather(1, row_set[:, None]).double().sum())
        if not total > best + 1e-7 * abs(best):
            break
        best = total
    return row_set, col_set


def _leading(matrix: Tensor, turned: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Right singular vectors of the largest singular values, randomly rotated among themselves: ``(n, count)``."""
    basis = torch.randn(matrix.shape[1], count, generator=generator, dtype=torch.float32, device="cpu").to(matrix)
    for _ in range(_POWERS):
        images = (torch.linalg.qr(basis).Q.T @ turned).T
        basis = (images.T @ matrix).T
    turned_by = torch.randn(count, count, generator=generator, dtype=torch.float32, device="cpu").to(matrix)
    turn = torch.linalg.qr(turned_by).Q
    return torch.linalg.qr(basis).Q @ turn


def _sinkhorn(scores: Tensor, sizes: Tensor, temperature: float, dual: Tensor) -> tuple[Tensor, Tensor]:
    """Soft labels ``(nodes, sets)`` that sum to one a node and nearly to the sizes a set, and the sets' log factors.

    Temperature is relative to the spread of the scores.
    """
    scale = scores.std().clamp(min=1e-30) * temperature
    logits = scores / scale
    wanted = sizes.to(logits).log()
    for _ in range(2):
        soft = torch.softmax(logits + dual, 1)
        dual = dual + wanted - soft.sum(0).clamp(min=1e-20).log()
    return torch.softmax(logits + dual, 1), dual


def _sums(matrix: Tensor, labels: Tensor, sets: int) -> Tensor:
    """Sums of a matrix's rows over sets of them: ``(n, sets)``."""
    return (torch.nn.functional.one_hot(labels, sets).to(matrix.dtype).T @ matrix).T
