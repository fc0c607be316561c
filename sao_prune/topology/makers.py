"""The makers of block topologies: Algorithm 1 of the thesis, and the interleaved one."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches

import torch
from torch import Tensor

from .block import BlockTopology
from .sizes import even_sizes, exact_sizes

Maker = Callable[[Tensor, Tensor, "torch.Generator | None"], BlockTopology]


def _contiguous(sizes: Tensor) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(sizes), device="cpu"), sizes)


def _strided(sizes: Tensor) -> Tensor:
    """Deal the nodes to the sets in turn: ``0, 1, .., g-1, 0, 1, ..``; a full set is passed over."""
    sets = _contiguous(sizes)
    rank = torch.arange(int(sizes.sum()), device="cpu") - (sizes.cumsum(0) - sizes)[sets]
    return sets[torch.argsort(rank * len(sizes) + sets)]


def _random(sizes: Tensor, generator: torch.Generator | None) -> Tensor:
    if generator is None:
        generator = torch.Generator().manual_seed(torch.initial_seed() % 2**63)
    return _contiguous(sizes)[torch.randperm(int(sizes.sum()), generator=generator, device="cpu")]


def ramanujan_sets(row_sizes: Tensor, col_sizes: Tensor, generator: torch.Generator | None) -> BlockTopology:
    """Strided sets on the smaller side, random sets on the larger one (thesis Algorithm 1), for given set sizes."""
    if row_sizes.sum() <= col_sizes.sum():
        return BlockTopology(_strided(row_sizes), _random(col_sizes, generator))
    return BlockTopology(_random(row_sizes, generator), _strided(col_sizes))


def interleaved_sets(row_sizes: Tensor, col_sizes: Tensor, generator: torch.Generator | None) -> BlockTopology:
    """Contiguous output sets, strided input sets, for given set sizes; draws nothing."""
    return BlockTopology(_contiguous(row_sizes), _strided(col_sizes))


MAKERS: dict[str, Maker] = {"ramanujan": ramanujan_sets, "interleaved": interleaved_sets}


def make_topology(
    kind: str,
    rows: int,
    cols: int,
    *,
    groups: int | None = None,
    nnz: int | None = None,
    generator: torch.Generator | None = None,
) -> BlockTopology:
    """A topology of a named kind with either a number of groups (even sets) or of edges (uneven sets).

    Args:
        kind: ``"ramanujan"`` or ``"interleaved"``.
        rows: outputs ``m``.
        cols: inputs ``n``.
        groups: number of blocks, ``1 .. min(m, n)``; sets differ by at most one node.
        nnz: number of edges, ``max(m, n) .. m n``; met as closely as integers allow.
        generator: where random sets come from; without one, `torch.initial_seed` decides.

    Raises:
        ValueError: for an unknown kind, for both or neither of ``groups`` and ``nnz``, or one out of range.

    Example:
        >>> make_topology("interleaved", 4, 4, groups=2).mask().int().tolist()
        [[1, 0, 1, 0], [1, 0, 1, 0], [0, 1, 0, 1], [0, 1, 0, 1]]
    """
    if kind not in MAKERS:
        near = get_close_matches(kind, MAKERS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"unknown topology {kind!r}{hint}; known: {', '.join(sorted(MAKERS))}")
    if (groups is None) == (nnz is None):
        raise ValueError(f"give exactly one of groups and nnz, got groups={groups}, nnz={nnz}")
    if groups is not None:
        sizes = even_sizes(rows, cols, groups)
    else:
        assert nnz is not None
        sizes = exact_sizes(rows, cols, nnz)
    return MAKERS[kind](*sizes, generator)


def ramanujan(rows: int, cols: int, groups: int, generator: torch.Generator | None = None) -> BlockTopology:
    """The thesis's Ramanujan construction (Algorithm 1), by one permutation; see `make_topology`.

    Its degree on the smaller side's nodes is ``max(rows, cols) / groups``.

    Example:
        >>> import torch
        >>> t = ramanujan(100, 1100, 10, torch.Generator().manual_seed(0)).crop(100, 1024)
        >>> t.shape, t.groups
        ((100, 1024), 10)
    """
    return make_topology("ramanujan", rows, cols, groups=groups, generator=generator)


def interleaved(rows: int, cols: int, groups: int) -> BlockTopology:
    """Outputs in contiguous sets, inputs dealt in turn: ``in_set(c) = c mod groups``.

    Repeated layers reach every output from every input in the fewest possible layers, and the permutation is a
    reshape. See `make_topology`.

    Example:
        >>> interleaved(4, 6, 2).col_set.tolist()
        [0, 1, 0, 1, 0, 1]
    """
    return make_topology("interleaved", rows, cols, groups=groups)
