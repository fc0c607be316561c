"""Residual blocks that are rotations at initialisation: no ReLU after the addition.

A block ``x <- x + W_2 f(W_1 x)`` is the rotation ``(I + S) / sqrt(2)``, ``S`` skew-symmetric and orthogonal, if
``W_2 f(W_1 x) = ((I + S) / sqrt(2) - I) x``: the factor that would have to stand at the addition is in the branch.
"""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor

from ..topology import BlockTopology
from .blocks import orthogonal_blocks
from .mirrored import Mirror, mirror_topology

_COS = _SIN = sqrt(0.5)


def rotation_less_identity(sets: Tensor, generator: torch.Generator) -> Tensor:
    """``(I + S) / sqrt(2) - I`` with ``S`` skew-symmetric and orthogonal, with blocks between nodes of one set.

    In a set of odd size ``S`` leaves one direction out, in which the result is zero.

    Args:
        sets: set of every node, shape ``(n,)``.
        generator: of the random directions.

    Returns:
        Shape ``(n, n)``; the identity plus it is orthogonal.

    Example:
        >>> r = torch.eye(5) + rotation_less_identity(torch.tensor([0, 0, 1, 1, 1]), torch.Generator().manual_seed(0))
        >>> torch.allclose(r @ r.T, torch.eye(5), atol=1e-6)
        True
    """
    square = BlockTopology(sets, sets)
    blocks = []
    for directions in orthogonal_blocks([square], [generator])[0]:
        half = directions.shape[-1] // 2
        first, second = directions[..., :half], directions[..., half : 2 * half]
        plane = first @ first.mT + second @ second.mT
        skew = second @ first.mT - first @ second.mT
        blocks.append((_COS - 1) * plane + _SIN * skew)
    return square.scatter(tuple(blocks))


def plain_branch(
    topology: BlockTopology, generator: torch.Generator, *, paired: float | None = None
) -> tuple[tuple[BlockTopology, BlockTopology], tuple[Tensor, Tensor]]:
    """The two layers of a branch ``W_2 f(W_1 x)`` with which ``x + W_2 f(W_1 x)`` is a rotation by 45 degrees.

    ``W_1`` is ``V``, semi-orthogonal, and ``W_2`` is ``R V^T`` or ``V^T R``, block by block, ``R`` from
    `rotation_less_identity` on the shorter side. So the second layer has the first one's topology, transposed.

    Args:
        topology: of the first layer, ``(m, n)``; of its half, ``(m / 2, n)``, where ``paired``.
        generator: of the values.
        paired: ``c`` of an activation with ``f(u) - f(-u) = c u``: the hidden units then come in pairs ``u, -u``, and
            the block is a rotation for every input. ``None`` for an odd activation of derivative 1 at 0, with which
            it is one near 0.

    Returns:
        The topologies and the matrices of both layers.

    Example:
        >>> from sao_prune.topology import interleaved
        >>> _, (w1, w2) = plain_branch(interleaved(8, 4, 2), torch.Generator().manual_seed(0), paired=1.0)
        >>> x = torch.randn(4, generator=torch.Generator().manual_seed(1))
        >>> y = x + w2 @ torch.nn.functional.gelu(w1 @ x)
        >>> torch.allclose(y.norm(), x.norm())
        True
    """
    v = topology.scatter(orthogonal_blocks([topology], [generator])[0])
    back = topology.transpose()
    # Of a block with no fewer outputs than inputs the inputs are turned, of another the outputs; -1 is the last entry.
    tall = torch.cat([topology.row_sizes >= topology.col_sizes, torch.tensor([False], device="cpu")])
    inputs = torch.where(tall[topology.col_set], topology.col_set, -1)
    outputs = torch.where(tall[topology.row_set], -1, topology.row_set)
    second = rotation_less_identity(inputs, generator) @ v.T + v.T @ rotation_less_identity(outputs, generator)
    if paired is None:
        return (topology, back), (v, second)
    return (
        (mirror_topology(topology, Mirror.ENTRY), mirror_topology(back, Mirror.EXIT)),
        (torch.cat([v, -v]), torch.cat([second, -second], 1) / paired),
    )
