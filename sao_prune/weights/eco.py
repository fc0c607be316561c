"""Explicitly constructed orthogonal convolutions: orthogonal blocks for every frequency of a kernel.

A kernel whose discrete Fourier transform is an orthogonal matrix at every frequency is an orthogonal convolution when
it is dilated so that it just fills its (circular) input (thesis sections 2.5.2.3 and 3.4.4.2; Yu et al., ICLR 2022).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..topology import BlockTopology
from .blocks import Blocks, orthogonal_blocks


def free_frequencies(kernel: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Which frequencies of a kernel are free when real matrices must give a real kernel, ``P[p] = P[-p mod k]``.

    Returns:
        The free frequencies, flat, shape ``(L,)``; and for every frequency which free one it equals, shape
        ``(taps,)``. For a square kernel ``L`` is ``(k^2 + 1) / 2`` if ``k`` is odd and ``(k^2 + 4) / 2`` if even.

    Example:
        >>> [len(free_frequencies((k, k))[0]) for k in (1, 2, 3, 4, 5)]
        [1, 4, 5, 10, 13]
    """
    if not kernel:
        only = torch.zeros(1, dtype=torch.long, device="cpu")
        return only, only.clone()
    index = torch.arange(prod(kernel), device="cpu").view(kernel)
    dims = tuple(range(len(kernel)))
    partner = index.flip(dims).roll((1,) * len(kernel), dims)
    return torch.unique(torch.minimum(index, partner).flatten(), return_inverse=True)


def kernel_from_frequencies(frequencies: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """The kernel whose Fourier transform is given at its free frequencies, tap 0 first (the inverse DFT).

    Args:
        frequencies: shape ``(L, ...)``, real, in the order of `free_frequencies`.
        kernel: kernel size.

    Returns:
        Shape ``(..., taps)``.

    Example:
        >>> import torch
        >>> kernel_from_frequencies(torch.ones(2), (3,)).tolist()
        [1.0, 0.0, 0.0]
    """
    _, equals = free_frequencies(kernel)
    spectrum = frequencies.movedim(0, -1)[..., equals.to(frequencies.device)]
    with _exactly(spectrum):
        return spectrum @ _cosines(kernel).to(spectrum)


def frequencies_from_kernel(taps: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """The free frequencies of a kernel, of its part that is even about tap 0; inverse of `kernel_from_frequencies`.

    Args:
        taps: shape ``(..., taps)``.
        kernel: kernel size.

    Returns:
        Shape ``(L, ...)``.

    Example:
        >>> frequencies_from_kernel(torch.tensor([1.0, 0.0, 0.0]), (3,)).tolist()
        [1.0, 1.0]
    """
    free, _ = free_frequencies(kernel)
    with _exactly(taps):
        spectrum = taps @ (_cosines(kernel).to(taps) * prod(kernel)).T
    return spectrum[..., free.to(taps.device)].movedim(-1, 0)


def eco_blocks(
    topologies: Sequence[BlockTopology],
    kernels: Sequence[tuple[int, ...]],
    generators: Sequence[torch.Generator],
    *,
    gain: float = 1.0,
    shared: bool = False,
) -> list[Blocks]:
    """Block values of ECO kernels on shared topologies (thesis section 3.4.4.2, SAO-ECO).

    Args:
        topologies: one for each convolution, between its channels; all its frequencies share it.
        kernels: kernel size of each convolution; any number of dimensions, none for a plain matrix.
        generators: one for each convolution.
        gain: every singular value of each convolution.
        shared: all blocks of one shape in a convolution get the same values (SAO 2).

    Returns:
        For each topology a tuple of ``(blocks, r, c, taps)`` tensors in the order of ``topology.buckets``.

    Example:
        >>> import torch
        >>> from sao_prune.topology import interleaved
        >>> t = interleaved(4, 4, 2)
        >>> [b.shape for b in eco_blocks([t], [(3, 3)], [torch.Generator().manual_seed(0)])[0]]
        [torch.Size([2, 2, 2, 9])]
    """
    counts = [len(free_frequencies(kernel)[0]) for kernel in kernels]
    drawn = iter(
        orthogonal_blocks(
            [t for t, count in zip(topologies, counts) for _ in range(count)],
            [g for g, count in zip(generators, counts) for _ in range(count)],
            gain=gain,
            shared=shared,
        )
    )
    out: list[Blocks] = []
    for kernel, count in zip(kernels, counts):
        matrices = [next(drawn) for _ in range(count)]
        out.append(tuple(kernel_from_frequencies(torch.stack(bucket), kernel) for bucket in zip(*matrices)))
    return out


def _exactly(tensor: Tensor) -> AbstractContextManager[Any]:
    """Without autocast, which the meta device does not know."""
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


def _cosines(kernel: tuple[int, ...]) -> Tensor:
    """``(taps, taps)``: row ``p`` is the inverse transform of a unit at frequency ``p``.

    Only cosines: the sines cancel between ``p`` and ``-p``.
    """
    phase = torch.zeros(1, 1, dtype=torch.float64, device="cpu")
    for k in kernel:
        along = torch.arange(k, dtype=torch.float64, device="cpu")
        angle = along[:, None] * along / k
        phase = (phase[:, None, :, None] + angle[None, :, None, :]).flatten(2).flatten(0, 1)
    return (2 * torch.pi * phase).cos() / prod(kernel)
