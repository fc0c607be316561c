"""The generators of block topologies, found by name: Algorithm 1 of the thesis, the interleaved one, your own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from ..naming import nearest
from .block import BlockTopology
from .sizes import even_sizes, exact_sizes

#: From the sizes of the row sets and of the column sets, as many of one as of the other, and a source of randomness.
TopologyGenerator = Callable[[Tensor, Tensor, "torch.Generator | None"], BlockTopology]
#: From rows, columns, density, the place of the layer in its chain, and a source of randomness, to a plain mask.
SupportGenerator = Callable[[int, int, float, int, "torch.Generator | None"], Tensor]
F = TypeVar("F")
#: The generators of masks that are not made of blocks, by name; `supports` fills it.
SUPPORTS: dict[str, SupportGenerator] = {}


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


def _ramanujan_sets(row_sizes: Tensor, col_sizes: Tensor, generator: torch.Generator | None) -> BlockTopology:
    """Strided sets on the smaller side, random sets on the larger one (thesis Algorithm 1), for given set sizes."""
    if row_sizes.sum() <= col_sizes.sum():
        return BlockTopology(_strided(row_sizes), _random(col_sizes, generator))
    return BlockTopology(_random(row_sizes, generator), _strided(col_sizes))


def _interleaved_sets(row_sizes: Tensor, col_sizes: Tensor, generator: torch.Generator | None) -> BlockTopology:
    """Contiguous output sets, strided input sets, for given set sizes; draws nothing."""
    return BlockTopology(_contiguous(row_sizes), _strided(col_sizes))


GENERATORS: dict[str, TopologyGenerator] = {"ramanujan": _ramanujan_sets, "interleaved": _interleaved_sets}


def register(name: str) -> Callable[[TopologyGenerator], TopologyGenerator]:
    """Decorator: make a generator of block topologies known by a name, for `SAO`, `RG` and `make_topology`.

    The function is called as ``generate(row_sizes, col_sizes, generator)``: two 1-D tensors of set sizes, of one
    length, and a `torch.Generator` (or ``None``). It returns a `BlockTopology` in which the sets have these sizes.

    Args:
        name: what users call it.

    Returns:
        The decorator, which gives the function back.

    Raises:
        ValueError: for a name that is taken or empty.

    Example:
        >>> @register("contiguous")
        ... def contiguous(row_sizes, col_sizes, generator):
        ...     sets = torch.arange(len(row_sizes))
        ...     return BlockTopology(sets.repeat_interleave(row_sizes), sets.repeat_interleave(col_sizes))
        >>> make_topology("contiguous", 4, 4, groups=2).mask().int().tolist()
        [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
        >>> _ = GENERATORS.pop("contiguous")
    """
    return put_into(GENERATORS, name, "topology")


def put_into(table: dict[str, F], name: str, kind: str) -> Callable[[F], F]:
    """Decorator: put a function into a table under a name that no topology and no support has.

    Raises:
        ValueError: for such a name.
    """
    taken = {*GENERATORS, *SUPPORTS}
    if not isinstance(name, str) or not name or name in taken:
        raise ValueError(f"a {kind} needs a name of its own, got {name!r}; taken: {', '.join(sorted(taken))}")

    def known(function: F) -> F:
        table[name] = function
        return function

    return known


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
        kind: ``"ramanujan"``, ``"interleaved"``, or a name given to `register`.
        rows: outputs ``m``.
        cols: inputs ``n``.
        groups: number of blocks, ``1 .. min(m, n)``; sets differ by at most one node.
        nnz: number of edges, ``max(m, n) .. m n``; met as closely as integers allow.
        generator: where random sets come from; without one, `torch.initial_seed` decides.

    Returns:
        The `BlockTopology`, of shape ``(rows, cols)``.

    Raises:
        ValueError: for an unknown kind, for both or neither of ``groups`` and ``nnz``, or one out of range.

    Example:
        >>> make_topology("interleaved", 4, 4, groups=2).mask().int().tolist()
        [[1, 0, 1, 0], [1, 0, 1, 0], [0, 1, 0, 1], [0, 1, 0, 1]]
    """
    if kind not in GENERATORS:
        raise ValueError(
            f"unknown topology {kind!r}{nearest(kind, GENERATORS)}; known: {', '.join(sorted(GENERATORS))}"
        )
    if (groups is None) == (nnz is None):
        raise ValueError(f"give exactly one of groups and nnz, got groups={groups}, nnz={nnz}")
    if groups is not None:
        sizes = even_sizes(rows, cols, groups)
    else:
        assert nnz is not None
        sizes = exact_sizes(rows, cols, nnz)
    return GENERATORS[kind](*sizes, generator)


def ramanujan(rows: int, cols: int, groups: int, generator: torch.Generator | None = None) -> BlockTopology:
    """The thesis's Ramanujan construction (Algorithm 1), by one permutation; see `make_topology`.

    Its degree on the smaller side's nodes is ``max(rows, cols) / groups``.

    Args:
        rows: outputs ``m``.
        cols: inputs ``n``.
        groups: number of blocks, ``1 .. min(m, n)``.
        generator: of the permutation; without one, `torch.initial_seed` decides.

    Returns:
        The `BlockTopology`, of shape ``(rows, cols)``.

    Raises:
        ValueError: if ``groups`` is out of range.

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

    Args:
        rows: outputs ``m``.
        cols: inputs ``n``.
        groups: number of blocks, ``1 .. min(m, n)``.

    Returns:
        The `BlockTopology`, of shape ``(rows, cols)``.

    Raises:
        ValueError: if ``groups`` is out of range.

    Example:
        >>> interleaved(4, 6, 2).col_set.tolist()
        [0, 1, 0, 1, 0, 1]
    """
    return make_topology("interleaved", rows, cols, groups=groups)
