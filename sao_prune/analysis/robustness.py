"""Certified robustness of 1-Lipschitz networks, and an attack that tries to prove the certificate wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from ..seeds import Seed, base_seed, named_generator
from .operators import frozen

#: The radius at which certified accuracies are customarily reported, for images in [0, 1].
RADIUS = 36 / 255


@dataclass(frozen=True)
class Certificate:
    """Accuracy, certified accuracy at a radius, and which samples are certified."""

    accuracy: float
    certified_accuracy: float
    radius: float
    certified: Tensor


def certified_radii(logits: Tensor, labels: Tensor, lipschitz: float = 1.0) -> Tensor:
    """How far (l2) each input can move before its prediction may change; 0 where it is wrong already.

    ``margin / (sqrt(2) L)``: the difference of two outputs of an ``L``-Lipschitz function is ``sqrt(2) L``-Lipschitz
    (Tsuzuku et al., NeurIPS 2018; Singla and Feizi, ICML 2021).

    Args:
        logits: shape ``(batch, classes)``.
        labels: shape ``(batch,)``.
        lipschitz: Lipschitz constant of inputs to logits; ``1 / std`` if inputs are divided by ``std`` on the way.

    Returns:
        Radii in the units of the inputs, shape ``(batch,)``.

    Raises:
        ValueError: if ``lipschitz`` is not positive.

    Example:
        >>> import torch
        >>> certified_radii(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0])).tolist()
        [1.4142135381698608, 0.0]
    """
    if lipschitz <= 0:
        raise ValueError(f"lipschitz must be positive, got {lipschitz}")
    own = logits.gather(1, labels[:, None]).squeeze(1)
    others = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    return (own - others).clamp(min=0) / (sqrt(2) * lipschitz)


def certified_accuracy(
    model: Callable[[Tensor], Tensor], x: Tensor, labels: Tensor, radius: float = RADIUS, lipschitz: float = 1.0
) -> Certificate:
    """Share of samples that are right and stay right however they are moved by up to ``radius`` (l2).

    The certificate is only as good as ``lipschitz``: it holds for networks of orthogonal layers that are kept so, such
    as `sao_prune.models.LipConvNet`.

    Args:
        model: a network; measured in evaluation mode.
        x: inputs, one batch.
        labels: shape ``(batch,)``.
        radius: in the units of ``x``; 36/255 is customary for images in [0, 1].
        lipschitz: Lipschitz constant of the model.

    Returns:
        A `Certificate`.

    Raises:
        ValueError: if ``radius`` is negative or ``lipschitz`` not positive.

    Example:
        >>> import torch
        >>> x = torch.eye(2)
        >>> certified_accuracy(torch.nn.Identity(), x, torch.tensor([0, 1]), radius=0.5).certified_accuracy
        1.0
    """
    if radius < 0:
        raise ValueError(f"radius must not be negative, got {radius}")
    with frozen(model), torch.no_grad():
        logits = model(x)
    radii = certified_radii(logits, labels, lipschitz)
    certified = radii > radius
    right = logits.argmax(1) == labels
    return Certificate(float(right.double().mean()), float(certified.double().mean()), radius, certified)


def pgd_l2(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    labels: Tensor,
    radius: float = RADIUS,
    steps: int = 40,
    seed: Seed = 0,
) -> Tensor:
    """Projected gradient descent: inputs within ``radius`` (l2) of ``x`` that make the margin as small as it finds.

    Steps are ``2.5 radius / steps`` along the normalised gradient of the margin, from a random start inside the ball
    (Madry et al., ICLR 2018). Inputs are not clipped to a range, which only makes the attack stronger.

    Args:
        model: a network; attacked in evaluation mode.
        x: inputs, one batch.
        labels: shape ``(batch,)``.
        radius: of the ball, in the units of ``x``.
        steps: of the descent.
        seed: of the start.

    Returns:
        Shape of ``x``; the worst point met on the way.

    Example:
        >>> import torch
        >>> x = torch.zeros(1, 2)
        >>> moved = pgd_l2(torch.nn.Identity(), x, torch.tensor([0]), radius=1.0)
        >>> moved.norm().item() <= 1.0001
        True
    """
    noise = torch.randn(x.shape, generator=named_generator(base_seed(seed), "pgd")).to(x)
    delta = noise * (0.5 * radius / _norms(noise))
    worst, least = x.clone(), torch.full((len(x),), torch.inf, device=x.device)
    with frozen(model):
        for _ in range(steps + 1):
            delta.requires_grad_(True)
            logits = model(x + delta)
            own = logits.gather(1, labels[:, None]).squeeze(1)
            margin = own - logits.scatter(1, labels[:, None], -torch.inf).amax(1)
            (gradient,) = torch.autograd.grad(margin.sum(), delta)
            with torch.no_grad():
                better = margin < least
                least = torch.where(better, margin, least)
                worst[better] = (x + delta)[better]
                step = delta - gradient * (2.5 * radius / steps / _norms(gradient).clamp(min=1e-12))
                delta = step * (radius / _norms(step)).clamp(max=1)
    return worst.detach()


def _norms(x: Tensor) -> Tensor:
    """Norm of every sample, shaped to divide by."""
    return x.flatten(1).norm(dim=1).view(-1, *(1,) * (x.dim() - 1))
