"""Singular values of layers and of whole networks: how isometric they are (thesis sections 2.5 and 4.1.2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import sqrt
from typing import Literal

import torch
from torch import Tensor, nn

from ..prune import current
from ..seeds import Seed, base_seed, named_generator
from .lanczos import Quadrature, bidiagonalise
from .masks import refuse_if_too_large
from .operators import LinearMap, frozen, jacobian_map, module_map

Method = Literal["auto", "exact", "lanczos"]

#: With "auto", Jacobians of up to this many rows or columns (whichever is fewer) are taken exactly.
EXACT_SIDE = 512


@dataclass(frozen=True)
class JacobianSpectrum:
    """Singular values of a Jacobian, or what Lanczos and Hutchinson tell of them.

    ``values`` holds all of them, descending, where ``exact``; otherwise it is ``None``, ``largest`` and ``smallest``
    are Lanczos's extreme estimates (from inside: never too large, never too small) and the moments are means over
    random probes. ``nodes`` and ``weights`` are the spectral measure either way: ``weights @ f(nodes)`` is the mean of
    ``f`` over the spectrum.
    """

    shape: tuple[int, int]
    exact: bool
    largest: float
    smallest: float
    mean: float
    variance: float
    mean_square: float
    products: int
    nodes: Tensor = field(repr=False)
    weights: Tensor = field(repr=False)
    values: Tensor | None = field(default=None, repr=False)


def singular_values(
    module: nn.Module, input_shape: tuple[int, ...] | None = None, k: int | None = None, seed: Seed = 0
) -> Tensor:
    """Singular values of a linear module's operator, descending, float64; the bias does not matter.

    A ``Linear`` has those of its weight; a stride-1 ``Conv`` with circular "same" padding those of its Fourier blocks
    (thesis section 2.5.2.2, theorem 1); any other linear module those of its dense operator on one sample.

    Args:
        module: ``Linear``, any ``Conv``, or any module that is linear but for a bias.
        input_shape: of one sample, without the batch dimension; not needed for ``Linear``.
        k: only the largest ``k``, by Lanczos on products with the module, without forming the operator. A value of
            multiplicity above one is reported once.
        seed: of the start vector for ``k``.

    Returns:
        Shape ``(min(outputs, inputs),)``, or ``(k,)`` at most.

    Raises:
        ValueError: if ``input_shape`` is missing or does not fit.
        SpectrumTooLargeError: if the dense operator needs more memory than `masks.MEMORY_LIMIT`.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(3, 3, bias=False)
        >>> _ = torch.nn.init.eye_(layer.weight)
        >>> singular_values(layer).tolist()
        [1.0, 1.0, 1.0]
    """
    with frozen(module):
        if isinstance(module, nn.Linear) and k is None:
            refuse_if_too_large(tuple(module.weight.shape), "pass k= for the largest singular values only")
            return torch.linalg.svdvals(current(module, "weight").double())
        if isinstance(module, nn.Linear):
            input_shape = (module.in_features,)
        if input_shape is None:
            raise ValueError(
                f"give input_shape, the shape of one sample without the batch dimension, for {type(module).__name__}"
            )
        if k is None and _is_circular(module):
            assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
            return _fourier_values(module, input_shape)
        op = module_map(module, tuple(input_shape))
        if k is not None:
            if not 1 <= k <= op.side:
                raise ValueError(f"k is the number of singular values, 1 .. {op.side}, got {k}")
            start = _start(op, named_generator(base_seed(seed), "start"), rademacher=False)
            return bidiagonalise(op, start, max(4 * k + 20, 40)).nodes[:k]
        refuse_if_too_large((op.outputs, op.inputs), "pass k= for the largest ones, or use analysis.jacobian_spectrum")
        return torch.linalg.svdvals(op.matrix().double())


def jacobian_spectrum(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    method: Method = "auto",
    steps: int = 30,
    probes: int = 2,
    seed: Seed = 0,
) -> JacobianSpectrum:
    """Singular values of the input-output Jacobian of a network at ``x`` (dynamical isometry, thesis section 2.5).

    Exact for small Jacobians; Lanczos from random probes otherwise: extreme values, and moments by stochastic Lanczos
    quadrature, whose mean square is Hutchinson's estimator. The model is measured in evaluation mode.

    Args:
        model: a network, or any function of one tensor.
        x: one batch; samples are independent, so the Jacobian of a batch is block-diagonal.
        method: ``"exact"``, ``"lanczos"``, or ``"auto"``: exact up to `EXACT_SIDE` rows or columns.
        steps: Lanczos steps a probe; each is two products with the Jacobian.
        probes: random start vectors.
        seed: of the probes.

    Returns:
        A `JacobianSpectrum`.

    Raises:
        SpectrumTooLargeError: if ``method="exact"`` needs more memory than `masks.MEMORY_LIMIT`.
        ValueError: for an unknown method or an input that is not floating point.

    Example:
        >>> import torch
        >>> spectrum = jacobian_spectrum(torch.nn.Tanh(), torch.zeros(1, 8))
        >>> spectrum.exact, spectrum.mean, spectrum.variance
        (True, 1.0, 0.0)
    """
    if method not in ("auto", "exact", "lanczos"):
        raise ValueError(f"method is 'auto', 'exact' or 'lanczos', got {method!r}")
    with frozen(model):
        op = jacobian_map(model, x)
        if method == "exact" or (method == "auto" and op.side <= EXACT_SIDE):
            refuse_if_too_large((op.outputs, op.inputs), 'use method="lanczos", whose memory is bounded')
            return _exact(op)
        generator = named_generator(base_seed(seed), "probes")
        runs = [bidiagonalise(op, _start(op, generator), steps) for _ in range(probes)]
    return _estimate(op, runs)


def _exact(op: LinearMap) -> JacobianSpectrum:
    values = torch.linalg.svdvals(op.matrix().double())
    weights = torch.full_like(values, 1 / len(values))
    return JacobianSpectrum(
        (op.outputs, op.inputs),
        True,
        float(values[0]),
        float(values[-1]),
        float(values.mean()),
        float(values.var(correction=0)),
        float(values.square().mean()),
        op.side,
        values,
        weights,
        values,
    )


def _estimate(op: LinearMap, runs: list[Quadrature]) -> JacobianSpectrum:
    nodes, order = torch.cat([r.nodes for r in runs]).sort(descending=True)
    weights = torch.cat([r.weights for r in runs])[order] / len(runs)
    mean, mean_square = float(weights @ nodes), float(weights @ nodes.square())
    return JacobianSpectrum(
        (op.outputs, op.inputs),
        False,
        float(nodes[0]),
        float(nodes[-1]),
        mean,
        max(mean_square - mean**2, 0.0),
        mean_square,
        2 * sum(len(r.nodes) for r in runs),
        nodes,
        weights,
    )


def _start(op: LinearMap, generator: torch.Generator, rademacher: bool = True) -> Tensor:
    if rademacher:
        start = torch.randint(0, 2, (op.side,), generator=generator, device="cpu").double() * 2 - 1
    else:
        start = torch.randn(op.side, generator=generator, dtype=torch.float64, device="cpu")
    return (start / sqrt(op.side)).to(op.device, op.dtype)


def _is_circular(module: nn.Module) -> bool:
    """Whether a stock convolution's operator is block-circulant: stride 1, circular, as many outputs as inputs."""
    if type(module).forward not in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward):
        return False
    assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    if module.padding_mode != "circular" or any(s != 1 for s in module.stride):
        return False
    if isinstance(module.padding, str):
        return module.padding == "same"
    reach = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size)]
    return all(2 * p == r for p, r in zip(module.padding, reach))


def _fourier_values(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, input_shape: tuple[int, ...]) -> Tensor:
    size = input_shape[1:]
    if len(input_shape) != len(module.kernel_size) + 1 or input_shape[0] != module.in_channels:
        raise ValueError(
            f"input_shape of this layer is ({module.in_channels}, {'size, ' * len(module.kernel_size)})"
            f" without the batch dimension, got {tuple(input_shape)}"
        )
    kernel = current(module, "weight").double()
    taps = torch.zeros(*kernel.shape[:2], *size, dtype=torch.float64, device=kernel.device)
    offsets = [
        torch.arange(k, device=kernel.device) * d % n for k, d, n in zip(module.kernel_size, module.dilation, size)
    ]
    grid = torch.meshgrid(*offsets, indexing="ij")
    # Taps that wrap around onto the same place add up, so accumulate instead of assigning.
    flat = sum(g * _stride(size, axis) for axis, g in enumerate(grid))
    assert isinstance(flat, Tensor)
    taps.flatten(2).index_add_(2, flat.flatten(), kernel.flatten(2))
    blocks = torch.fft.fftn(taps, dim=tuple(range(2, kernel.dim()))).flatten(2)
    groups = module.groups
    blocks = blocks.unflatten(0, (groups, -1)).permute(0, 3, 1, 2)
    return torch.linalg.svdvals(blocks).flatten().sort(descending=True).values


def _stride(size: tuple[int, ...], axis: int) -> int:
    out = 1
    for n in size[axis + 1 :]:
        out *= n
    return out
