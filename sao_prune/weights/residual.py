"""ReLU residual blocks that are orthogonal maps at initialisation: values of their branches, from topologies alone.

A block ``x <- relu(x + W_L relu(.. relu(W_1 x)))`` whose channels are mirrored signals, ``x = [relu(h), relu(-h)]``, is
the map ``h -> Q h`` if all layers but the last *carry* channels unchanged (a ReLU commutes with a permutation) and the
last writes ``Q h`` and takes away what the shortcut adds. The idea for dense networks: Gadhikar and Burkholz,
"Dynamical isometry for residual networks" (https://arxiv.org/abs/2210.02411).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from ..topology import BlockTopology
from .blocks import Blocks, orthogonal_blocks
from .mirrored import Mirror, mirror_topology
from .orthogonal import haar

_HALF = sqrt(0.5)


def carriers(topology: BlockTopology, turn: int = 0) -> Tensor:
    """For every output the input that it carries: within each block the ``i``-th output the ``i``-th input.

    Args:
        topology: shape ``(m, n)``. A block with fewer outputs than inputs carries some of the inputs, one with more
            carries them over and over.
        turn: which inputs a block with too few outputs starts at, in steps of as many as it has.

    Returns:
        Integers, shape ``(m,)``; -1 for an output that nothing is joined to.

    Example:
        >>> from sao_prune.topology import interleaved
        >>> carriers(interleaved(4, 4, 2)).tolist(), carriers(interleaved(2, 4, 2), turn=1).tolist()
        ([0, 2, 1, 3], [2, 3])
    """
    out = torch.full((topology.shape[0],), -1, device="cpu")
    for bucket in topology.buckets:
        _, rows, cols = bucket.shape
        out[bucket.rows] = bucket.cols[:, (torch.arange(rows, device="cpu") + turn * rows) % cols]
    return out


def copies(topology: BlockTopology) -> Tensor:
    """For every output how many before it in its block carry the same input; shape ``(m,)``.

    Example:
        >>> from sao_prune.topology import interleaved
        >>> copies(interleaved(4, 2, 2)).tolist()
        [0, 1, 0, 1]
    """
    out = torch.zeros(topology.shape[0], dtype=torch.long, device="cpu")
    for bucket in topology.buckets:
        out[bucket.rows] = torch.arange(bucket.shape[1], device="cpu") // bucket.shape[2]
    return out


def deal(row_sizes: Tensor, carried_sizes: Tensor, carried: Tensor, order: Tensor) -> Tensor:
    """Split channels into sets so that each has a given number of them, and of carried ones among them.

    Args:
        row_sizes: channels of each set, shape ``(g,)``.
        carried_sizes: carried channels of each set, shape ``(g,)``, no more than there are channels.
        carried: the channels that are carried.
        order: all channels, in the order in which they are dealt.

    Returns:
        The set of every channel, shape ``(k,)``.

    Example:
        >>> two = torch.tensor([2, 2])
        >>> deal(two, torch.tensor([1, 1]), torch.tensor([0, 1]), torch.arange(4)).tolist()
        [0, 1, 0, 1]
    """
    is_carried = torch.zeros(len(order), dtype=torch.bool, device="cpu")
    is_carried[carried] = True
    sets = torch.empty(len(order), dtype=torch.long, device="cpu")
    number = torch.arange(len(row_sizes), device="cpu")
    sets[order[is_carried[order]]] = number.repeat_interleave(carried_sizes)
    sets[order[~is_carried[order]]] = number.repeat_interleave(row_sizes - carried_sizes)
    return sets


def closing_topology(row_set: Tensor, carried: Tensor) -> BlockTopology:
    """The topology of a block's last layer: a hidden unit feeds the set of the channel that it carries.

    It holds the permutation that takes the shortcut away, whatever the topologies of the layers before.

    Args:
        row_set: set of every channel, shape ``(k,)``.
        carried: channel that each hidden unit carries, shape ``(m,)``.
    """
    return BlockTopology(row_set, row_set[carried])


def _carry_matrix(carried: Tensor, cols: int) -> Tensor:
    """The ``(m, cols)`` matrix of zeros with a one where an output carries an input.

    Example:
        >>> _carry_matrix(torch.tensor([1, 0]), 2).tolist()
        [[0.0, 1.0], [1.0, 0.0]]
    """
    out = torch.zeros(len(carried), cols, dtype=torch.float32, device="cpu")
    rows = (carried >= 0).nonzero().flatten()
    out[rows, carried[rows]] = 1
    return out


def closing_matrices(row_set: Tensor, carried: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """What a block's last layer writes and what it takes away, for one half of the mirrored channels.

    Args:
        row_set: set of every channel, shape ``(k,)``.
        carried: channel that each hidden unit carries, shape ``(m,)``.
        generator: of the orthogonal values.

    Returns:
        ``(V, K)``, each ``(k, m)``: with ``z = h[carried]``, ``K z`` is ``h`` on the carried channels and 0 on others,
        and ``V z`` is ``Q h`` there, ``Q`` orthogonal with blocks between channels of one set. So ``h + V z - K z`` is
        an orthogonal map of ``h``.

    Example:
        >>> carried = torch.tensor([2, 0, 1])
        >>> v, k = closing_matrices(torch.tensor([0, 0, 1, 1]), carried, torch.Generator().manual_seed(0))
        >>> block = torch.eye(4) + (v - k) @ torch.eye(4)[carried]
        >>> torch.allclose(block @ block.T, torch.eye(4), atol=1e-6)
        True
        >>> w1, w2 = mirrored_matrix(torch.eye(4)[carried], torch.zeros(3, 4)), mirrored_matrix(v - k, -v)
        >>> h = torch.randn(4, generator=torch.Generator().manual_seed(1))
        >>> x = torch.cat([h, -h]).relu()
        >>> y = (x + w2 @ (w1 @ x).relu()).relu()
        >>> torch.allclose(y, torch.cat([block @ h, -block @ h]).relu(), atol=1e-6)
        True
    """
    count = torch.bincount(carried, minlength=len(row_set))
    sets = torch.where(count > 0, row_set, -1)
    square = BlockTopology(sets, sets)
    q = square.scatter(orthogonal_blocks([square], [generator])[0])
    share = (1 / count[carried]).float()
    return q[:, carried] * share, _carry_matrix(carried, len(row_set)).T * share


def mirrored_matrix(direct: Tensor, crossed: Tensor) -> Tensor:
    """``[[direct, crossed], [crossed, direct]]``; with both equal but for the sign the looks-linear weight."""
    return torch.cat([torch.cat([direct, crossed], 1), torch.cat([crossed, direct], 1)])


def values_on(topology: BlockTopology, matrix: Tensor) -> Blocks:
    """The block values of a matrix ``(m, n)``, or of one with a value a tap, ``(m, n, taps)``.

    Raises:
        ValueError: if the matrix has non-zeros outside the topology.
    """
    taps = matrix.shape[2:]
    flat = matrix.reshape(matrix.shape[0] * matrix.shape[1], *taps)
    blocks = tuple(flat[i].view(*bucket.shape, *taps) for i, bucket in zip(topology.flat_index, topology.buckets))
    if sum(int(b.count_nonzero()) for b in blocks) != int(matrix.count_nonzero()):
        raise ValueError("the values have entries outside the topology's blocks")
    return blocks


@dataclass(frozen=True)
class Relay:
    """A layer of a branch that carries channels unchanged, between the halves of mirrored channels.

    Attributes:
        topology: of the half, ``(m, n)``.
        picked: input that each output carries, shape ``(m,)``.
        tap: flat kernel position at which it reads it, shape ``(m,)``.
        taps: kernel positions in all.
        corner: the kernel position that reads the input of the same place.
    """

    topology: BlockTopology
    picked: Tensor
    tap: Tensor
    taps: int
    corner: int

    @property
    def whole(self) -> BlockTopology:
        """The topology of the mirrored layer."""
        return mirror_topology(self.topology, Mirror.INNER)

    def matrix(self) -> Tensor:
        """``diag(P, P)``, shape ``(2 m, 2 n)``, or ``(2 m, 2 n, taps)`` where it reads anywhere but one position."""
        rows, cols = self.topology.shape
        out = torch.zeros(2 * rows, 2 * cols, self.taps, dtype=torch.float32, device="cpu")
        for half in range(2):
            out[half * rows + torch.arange(rows, device="cpu"), half * cols + self.picked, self.tap] = 1
        return out


def relay(
    topology: BlockTopology, taps: Sequence[int] = (0,), kernel: int = 1, turn: int = 0, corner: int = 0
) -> Relay:
    """A layer that carries as many different inputs, at as many of the given kernel positions, as its shape allows.

    Args:
        topology: of the half, ``(m, n)``.
        taps: flat kernel positions to read; the second copy of an input reads the second one, and so on.
        kernel: kernel positions in all.
        turn: see `carriers`.
        corner: the kernel position that reads the input of the same place.
    """
    at = torch.tensor(taps, device="cpu")[copies(topology) % len(taps)]
    return Relay(topology, carriers(topology, turn), at, kernel, corner)


def projection_block(
    closing: BlockTopology, shortcut: BlockTopology, fresh: Tensor, twice: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The last layer of a branch and the layer on its shortcut, together as orthogonal as their shapes allow.

    Both write into the same sets of outputs, onto orthonormal directions as long as there are any: the shortcut's
    inputs first, then what the branch carries. What both bring in gets half the energy from each.

    Args:
        closing: topology of the branch's last layer, ``(k, m)``.
        shortcut: of the shortcut's layer, ``(k, n)``, with the row sets of ``closing``.
        fresh: hidden units that carry what the shortcut does not, shape ``(a,)``.
        twice: for hidden units that carry what the shortcut carries too its input there, else -1, shape ``(m,)``.
        generator: of the directions.

    Returns:
        The matrices of both, ``(k, m)`` and ``(k, n)``.

    Raises:
        ValueError: if the row sets differ.
    """
    if not torch.equal(closing.row_set, shortcut.row_set):
        raise ValueError("the branch and the shortcut must have the same sets of outputs")
    last, beside = (
        torch.zeros(closing.shape, dtype=torch.float32, device="cpu"),
        torch.zeros(shortcut.shape, dtype=torch.float32, device="cpu"),
    )
    shared = []
    is_fresh = torch.zeros(closing.shape[1], dtype=torch.bool, device="cpu")
    is_fresh[fresh] = True
    for index in range(closing.groups):
        rows = (closing.row_set == index).nonzero().flatten()
        inputs = (shortcut.col_set == index).nonzero().flatten()
        hidden = (closing.col_set == index).nonzero().flatten()
        order = torch.cat([hidden[is_fresh[hidden]], hidden[~is_fresh[hidden] & (twice[hidden] >= 0)]])
        used = order[: max(len(rows) - len(inputs), 0)]
        gaussian = torch.randn(
            1, len(rows), len(inputs) + len(used), generator=generator, dtype=torch.float32, device="cpu"
        )
        directions = haar(gaussian)[0]
        beside[rows[:, None], inputs] = directions[:, : len(inputs)]
        last[rows[:, None], used] = directions[:, len(inputs) :]
        both = used[~is_fresh[used]]
        last[rows[:, None], both] *= _HALF
        shared.append(twice[both])
    # The shortcut may bring an input into another set than the branch: its column is complete only now.
    beside[:, torch.cat(shared)] *= _HALF
    return last, beside


def padded_block(
    topology: BlockTopology, fresh: Tensor, unit: Tensor, before: int, generator: torch.Generator
) -> Tensor:
    """The last layer of a branch beside a shortcut that pads channels with zeros, all of it as orthogonal as it can be.

    The shortcut puts the two halves of a signal on outputs that are no pair of one another. The layer takes both away
    and writes what its hidden units carry, the signal among it, onto orthonormal directions.

    Args:
        topology: of the half, ``(k, m)``; a unit that carries a signal is in one set with the outputs it must clear.
        fresh: hidden units that carry what the shortcut does not bring.
        unit: for every signal of the shortcut the hidden unit that carries it, shape ``(n,)``.
        before: zero channels that the shortcut puts before its input.

    Returns:
        Shape ``(2 k, 2 m)``.
    """
    rows, hidden = topology.shape
    last = torch.zeros(rows, hidden, dtype=torch.float32, device="cpu")
    carrying = torch.cat([unit, fresh])
    for index in range(topology.groups):
        outputs = (topology.row_set == index).nonzero().flatten()
        used = carrying[topology.col_set[carrying] == index][: len(outputs)]
        last[outputs[:, None], used] = haar(
            torch.randn(1, len(outputs), len(used), generator=generator, dtype=torch.float32, device="cpu")
        )[0]
    matrix = mirrored_matrix(last, -last)
    for half in range(2):
        matrix[before + half * len(unit) + torch.arange(len(unit), device="cpu"), half * hidden + unit] -= 1
    return matrix
