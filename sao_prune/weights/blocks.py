"""Values for the blocks of a topology, one ``(blocks, r, c)`` tensor for each of its buckets."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import torch
from torch import Tensor

from ..topology import BlockTopology
from .orthogonal import haar_like

Blocks = tuple[Tensor, ...]


def orthogonal_blocks(
    topologies: Sequence[BlockTopology],
    generators: Sequence[torch.Generator],
    *,
    gain: float = 1.0,
    shared: bool = False,
) -> list[Blocks]:
    """Haar-orthogonal values for many topologies at once (thesis Algorithm 2).

    Args:
        topologies: one for each matrix.
        generators: one for each matrix, so that a matrix's draw does not depend on which others are drawn.
        gain: factor on every value, so every non-zero singular value of the matrix is ``gain``.
        shared: SAO 2: all blocks of one shape in a matrix get the same values.

    Returns:
        For each topology a tuple of float32 ``(blocks, r, c)`` tensors in the order of ``topology.buckets``.

    Example:
        >>> import torch
        >>> from sao_prune.topology import interleaved
        >>> t = interleaved(6, 6, 2)
        >>> w = t.scatter(orthogonal_blocks([t], [torch.Generator().manual_seed(0)])[0])
        >>> torch.allclose(w @ w.T, torch.eye(6), atol=1e-6)
        True
    """
    gaussians: list[Tensor] = []
    for topology, generator in zip(topologies, generators):
        for bucket in topology.buckets:
            blocks, rows, cols = bucket.shape
            gaussians.append(
                torch.randn(1 if shared else blocks, rows, cols, generator=generator, dtype=torch.float32, device="cpu")
            )
    values = iter(haar_like(gaussians))
    out: list[Blocks] = []
    for topology in topologies:
        drawn = (next(values).expand(b.shape) if shared else next(values) for b in topology.buckets)
        out.append(tuple(v if gain == 1.0 else v * gain for v in drawn))
    return out


def normal_blocks(topology: BlockTopology, generator: torch.Generator, *, gain: float = 1.0, taps: int = 1) -> Blocks:
    """Normal values with the variance of the orthogonal ones, ``gain^2 / max(r, c)`` (thesis RG-N).

    With ``taps > 1`` every tap of a convolution's kernel gets its own value, in a last dimension.

    Args:
        topology: whose blocks get values.
        generator: of the values.
        gain: factor on every value.
        taps: values of each entry, the taps of a kernel.

    Returns:
        A tuple of float32 tensors in the order of ``topology.buckets``, ``(blocks, r, c)`` each, with more than one tap
        ``(blocks, r, c, taps)``.

    Example:
        >>> from sao_prune.topology import interleaved
        >>> [b.shape for b in normal_blocks(interleaved(4, 4, 2), torch.Generator().manual_seed(0), taps=9)]
        [torch.Size([2, 2, 2, 9])]
    """
    return tuple(
        _normal(_with_taps(b.shape, taps), generator).mul_(gain / sqrt(max(b.shape[1:]))) for b in topology.buckets
    )


def uniform_blocks(topology: BlockTopology, generator: torch.Generator, *, gain: float = 1.0, taps: int = 1) -> Blocks:
    """Uniform values with the variance of the orthogonal ones; otherwise as `normal_blocks` (thesis RG-U).

    Args:
        topology: whose blocks get values.
        generator: of the values.
        gain: factor on every value.
        taps: values of each entry, the taps of a kernel.

    Returns:
        A tuple of float32 tensors in the order of ``topology.buckets``, ``(blocks, r, c)`` each, with more than one tap
        ``(blocks, r, c, taps)``.

    Example:
        >>> from sao_prune.topology import interleaved
        >>> [b.shape for b in uniform_blocks(interleaved(4, 4, 2), torch.Generator().manual_seed(0), taps=9)]
        [torch.Size([2, 2, 2, 9])]
    """
    return tuple(
        torch.rand(_with_taps(b.shape, taps), generator=generator, dtype=torch.float32, device="cpu")
        .mul_(2)
        .sub_(1)
        .mul_(gain * sqrt(3 / max(b.shape[1:])))
        for b in topology.buckets
    )


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Standard normal float32 values on the CPU, whatever the default dtype and device are."""
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def _with_taps(shape: tuple[int, ...], taps: int) -> tuple[int, ...]:
    return (*shape, taps) if taps > 1 else shape


def delta_(weight: Tensor, matrix: Tensor) -> Tensor:
    """Lift a matrix to a convolution: its centre tap, zeros elsewhere (thesis section 3.4.4.1, SAO-Delta).

    Args:
        weight: shape ``(m, n, *kernel)``, written in place; any number of kernel dimensions, none for a matrix.
        matrix: shape ``(m, n)``.

    Returns:
        ``weight``.

    Example:
        >>> import torch
        >>> delta_(torch.empty(1, 1, 3), torch.tensor([[5.0]])).tolist()
        [[[0.0, 5.0, 0.0]]]
    """
    if weight.dim() == 2:
        return weight.copy_(matrix)
    weight.zero_()
    centre = weight
    for size in weight.shape[2:]:
        centre = centre.select(2, size // 2)
    centre.copy_(matrix)
    return weight
