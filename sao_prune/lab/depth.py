"""How a signal's geometry survives depth: singular values of the Jacobian from the input to every layer."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..seeds import named_generator

# More depths than this make no better curve.
MOST_DEPTHS = 16
# Convolutional networks are measured along so many directions; all of them would cost a batch of thousands of images.
SUBSPACE = 64


@dataclass(frozen=True)
class DepthSpectrum:
    """Singular values of the Jacobian from the input to the output of layer ``depth`` (activation included).

    Attributes:
        directions: dimension of the random subspace of inputs that they belong to; ``None`` for all directions.
    """

    depth: tuple[int, ...]
    mean: tuple[float, ...]
    smallest: tuple[float, ...]
    largest: tuple[float, ...]
    directions: int | None = None


def depth_spectrum(model: nn.Module, image: Tensor) -> DepthSpectrum:
    """Measure at up to `MOST_DEPTHS` depths, evenly spread, in float64, by one pass of forward-mode differentiation.

    Networks with convolutions are measured on a fixed random subspace of `SUBSPACE` dimensions, whose singular values
    lie between those of the whole. The output of layer ``k`` is taken where layer ``k + 1`` receives it, so it includes
    whatever is in between. The model is left in double precision and in evaluation mode.

    Args:
        model: linear and convolutional layers, called one after the other; nothing may mix the samples of a batch.
        image: one input, without a batch dimension.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)).requires_grad_(False)
        >>> _ = [nn.init.eye_(layer.weight) for layer in net]
        >>> depth_spectrum(net, torch.zeros(4)).mean
        (1.0, 1.0)
    """
    model = model.double().eval()
    tangents: list[Tensor] = []
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    hooks = [m.register_forward_pre_hook(lambda _, args: tangents.append(_tangent(args[0]))) for m in layers]
    directions = _directions(image, SUBSPACE if any(not isinstance(m, nn.Linear) for m in layers) else image.numel())
    try:
        # torch compiles forward-mode rules with a tool that it has itself declared out of date, and says so.
        with warnings.catch_warnings(), torch.no_grad(), forward_ad.dual_level(), _unfused_attention():
            warnings.simplefilter("ignore", FutureWarning)
            batch = image.double().expand_as(directions).contiguous()
            model(forward_ad.make_dual(batch, directions))
    finally:
        for hook in hooks:
            hook.remove()
    depths = _spread(len(tangents) - 1)
    values = [torch.linalg.svdvals(tangents[depth]) for depth in depths]
    return DepthSpectrum(
        tuple(depths),
        tuple(float(v.mean()) for v in values),
        tuple(float(v.min()) for v in values),
        tuple(float(v.max()) for v in values),
        len(directions) if len(directions) < image.numel() else None,
    )


@contextmanager
def _unfused_attention() -> Iterator[None]:
    """Attention as products and a softmax: torch's fused kernels have no forward-mode rule."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _directions(image: Tensor, count: int) -> Tensor:
    """Orthonormal directions, ``(count, *image.shape)``: all of them, or a fixed random subspace."""
    pixels = image.numel()
    if count >= pixels:
        basis = torch.eye(pixels, dtype=torch.float64)
    else:
        random = torch.randn(pixels, count, dtype=torch.float64, generator=named_generator(0, "subspace", pixels))
        basis = torch.linalg.qr(random).Q.T.contiguous()
    return basis.to(image.device).reshape(-1, *image.shape)


def _tangent(x: Tensor) -> Tensor:
    """Derivative of ``x`` along every direction, ``(directions, features)``: the transposed Jacobian."""
    tangent = forward_ad.unpack_dual(x).tangent
    return torch.zeros_like(x).flatten(1) if tangent is None else tangent.flatten(1)


def _spread(last: int) -> list[int]:
    """Whole numbers from 1 to ``last``, evenly spread, both ends among them."""
    count = min(last, MOST_DEPTHS)
    if count < 2:
        return list(range(1, last + 1))
    return [1 + round(i * (last - 1) / (count - 1)) for i in range(count)]
