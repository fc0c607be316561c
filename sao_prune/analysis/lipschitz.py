"""How far outputs can move when inputs do: bounds for layers, chains of layers, and differences of logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil, factorial, prod, sqrt
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..held import Held, held_tensors
from ..nn import ECOConv2d, MaxMin, SkewConv2d
from ..prune import refresh
from ..seeds import named_generator

# Their derivative is never larger than one, in any direction.
_CONTRACTIONS = (nn.Identity, nn.Flatten, nn.Dropout, nn.ReLU, nn.Tanh, nn.Sigmoid, MaxMin)
_KNOWN = (*_CONTRACTIONS, SkewConv2d, ECOConv2d, nn.Linear, nn.Conv2d)


@runtime_checkable
class Chained(Protocol):
    """A network that says of which layers it is a chain."""

    def chain(self) -> list[nn.Module]:
        """Its layers, each applied to what the one before it gives, the classifier last."""


def operator_norm(layer: nn.Module, iterations: int | None = None) -> Tensor:
    """A bound on the Lipschitz constant (l2) of one layer in evaluation mode.

    Exact for linear layers and `ECOConv2d` on the input size that it saw last; for other convolutions by the norms of
    the reshaped kernel (Singla and Feizi, ICLR 2021, https://arxiv.org/abs/1911.10258); one for common activations.

    Args:
        layer: `torch.nn.Linear`, `torch.nn.Conv2d` with zero or circular padding, `ECOConv2d`, `SkewConv2d`, an
            activation; masked or held layers too.
        iterations: of the power method from a fixed start, which is differentiable, but may stay below the bound; of a
            held layer the gain that it is held at. ``None`` decomposes the matrices in double precision.

    Returns:
        A scalar.

    Raises:
        TypeError: for a layer of which no bound is known.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, 0.0], [0.0, 2.0]]))
        >>> round(operator_norm(layer).item(), 6)
        3.0
    """
    if not _is_of_its_kind(layer):
        raise TypeError(f"no Lipschitz bound is known for {type(layer).__name__}")
    if isinstance(layer, _CONTRACTIONS):
        return torch.ones((), dtype=torch.float32, device="cpu")
    if isinstance(layer, SkewConv2d):
        # What its series leaves out of an orthogonal map.
        return torch.tensor(1 + 1 / factorial(layer.terms[1]), dtype=torch.float32, device="cpu")
    gain = None if iterations is None else _held_gain(layer)
    if gain is not None:
        return torch.tensor(gain, dtype=torch.float32, device="cpu")
    with _as_it_is(layer, iterations):
        return torch.stack([f * _largest(matrices, iterations) for f, matrices in _matrices(layer)]).amin()


def lipschitz_bound(layers: nn.Module | list[nn.Module], iterations: int | None = None) -> Tensor:
    """A bound on the Lipschitz constant (l2) of a chain of layers: the product of theirs.

    Args:
        layers: a list, a `torch.nn.Sequential`, a network with a method ``chain``, or one layer.
        iterations: see `operator_norm`.

    Returns:
        A scalar.

    Raises:
        TypeError: for a layer of which no bound is known, with its place.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> bound = lipschitz_bound(net)
        >>> bool(torch.isclose(bound, operator_norm(net[0]) * operator_norm(net[2])))
        True
    """
    bound = torch.ones((), dtype=torch.float32, device="cpu")
    for place, layer in enumerate(layers if isinstance(layers, list) else _chain(layers)):
        try:
            norm = operator_norm(layer, iterations)
        except TypeError as error:
            raise TypeError(f"{error}, layer {place} of {type(layers).__name__}") from None
        bound = bound.to(norm) * norm
    return bound


def margin_constants(model: nn.Module, iterations: int | None = None) -> Tensor:
    """How far the difference of any two logits can move for every unit (l2) that the input moves.

    The bound on all layers but the last, times the distance of the two classes' rows in the last one: what certificates
    divide by (Tsuzuku et al., NeurIPS 2018; Leino et al., ICML 2021, https://arxiv.org/abs/2102.08452). In a network of
    orthogonal layers whose last rows are orthonormal all are the square root of 2.

    Args:
        model: a `torch.nn.Sequential`, or a network with a method ``chain``, whose last layer is linear.
        iterations: see `operator_norm`; with it the constants are differentiable.

    Returns:
        Shape ``(classes, classes)``, zero on the diagonal.

    Raises:
        TypeError: if the model is no chain of layers with known bounds that ends in a linear one.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False))
        >>> _ = net[1].weight.data.copy_(torch.eye(2))
        >>> margin_constants(net).round(decimals=3).tolist()
        [[0.0, 1.4140000343322754], [1.4140000343322754, 0.0]]
    """
    *features, head = _chain(model)
    if not isinstance(head, nn.Linear):
        raise TypeError(
            f"{type(model).__name__} is no chain of layers that ends in a linear one, as torch.nn.Sequential and "
            "sao_prune.models.LipConvNet can be"
        )
    with _as_it_is(head, iterations):
        distances = torch.linalg.vector_norm(head.weight[:, None] - head.weight[None], dim=-1)
    return distances * lipschitz_bound(features, iterations).to(distances)


def _is_of_its_kind(layer: nn.Module) -> bool:
    """Whether a layer computes what its known class does: one that is derived from it may add a skip, or scale."""
    kind = next((kind for kind in _KNOWN if isinstance(layer, kind)), None)
    steps = ("forward", "_conv_forward")
    return kind is not None and all(getattr(type(layer), s, None) is getattr(kind, s, None) for s in steps)


def _chain(model: nn.Module) -> list[nn.Module]:
    if isinstance(model, Chained):
        return model.chain()
    return list(_flat(model)) or [model]


def _flat(model: nn.Module) -> Iterator[nn.Module]:
    if not isinstance(model, nn.Sequential) or type(model).forward is not nn.Sequential.forward:
        yield model
        return
    for child in model:
        yield from _flat(child)


@contextmanager
def _as_it_is(layer: nn.Module, iterations: int | None) -> Iterator[None]:
    """Where a bound is computed exactly, a masked weight is that of now and nothing has a gradient."""
    if iterations is not None:
        yield
        return
    with torch.no_grad():
        refresh(layer)
        yield


def _held_gain(layer: nn.Module) -> float | None:
    """The singular value that a held layer keeps; none where it is not held, or mirrored."""
    for name in held_tensors(layer):
        held = layer.parametrizations[name][0]  # type: ignore[index]
        if name in ("weight", "weight_orig") and isinstance(held, Held) and not any(held.mirrors):
            return held.gain
    return None


def _matrices(layer: nn.Module) -> list[tuple[float, Tensor]]:
    """Batches of matrices ``(batch, r, c)`` with factors: the layer's norm is at most each factor times the largest."""
    if isinstance(layer, ECOConv2d):
        return [(1.0, layer.spectrum())]
    if isinstance(layer, nn.Linear):
        return [(1.0, layer.weight[None])]
    assert isinstance(layer, nn.Conv2d)
    if layer.padding_mode not in ("zeros", "circular"):
        raise TypeError(f"no Lipschitz bound is known for Conv2d with padding mode {layer.padding_mode!r}")
    kernel = layer.weight.unflatten(0, (layer.groups, -1))
    g, r, c, h, w = kernel.shape
    shapes = (
        kernel.reshape(g, r, c * h * w),
        kernel.permute(0, 1, 3, 4, 2).reshape(g, r * h * w, c),
        kernel.permute(0, 1, 3, 2, 4).reshape(g, r * h, c * w),
    )
    return [(_repeats(layer) * sqrt(h * w), matrices) for matrices in shapes]


def _repeats(layer: nn.Conv2d) -> float:
    """By how much an output longer than its input, which circular padding repeats, is longer in l2 than one turn."""
    if layer.padding_mode != "circular" or isinstance(layer.padding, str):
        return 1.0
    beyond = [2 * p - d * (k - 1) for p, d, k in zip(layer.padding, layer.dilation, layer.kernel_size)]
    # Padding is at most the input's length.
    return sqrt(prod(1 + ceil(b / p) for b, p in zip(beyond, layer.padding) if b > 0))


def _largest(matrices: Tensor, iterations: int | None) -> Tensor:
    """The largest singular value in a batch of real or complex matrices."""
    if iterations is None:
        exact = matrices.detach().cpu().to(torch.complex128 if matrices.is_complex() else torch.float64)
        if not bool(torch.isfinite(exact).all()):
            return torch.tensor(torch.nan, dtype=torch.float64, device="cpu")
        return torch.linalg.matrix_norm(exact, 2).amax()
    fixed = matrices.detach()
    generator = named_generator(0, "power method")
    start = torch.randn(fixed.shape[-1], 1, generator=generator, dtype=torch.float32, device="cpu")
    right = start.to(fixed).expand(len(fixed), -1, -1)
    for _ in range(iterations):
        left = nn.functional.normalize(fixed @ right, dim=1)
        right = nn.functional.normalize(fixed.mH @ left, dim=1)
    left = nn.functional.normalize(fixed @ right, dim=1)
    return (left.mH @ matrices @ right).real.amax()
