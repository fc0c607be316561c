"""Certified robustness by Lipschitz constants, and the worst of several attacks, which may try to prove it wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from ..seeds import Seed, base_seed, named_generator
from .attacks import pgd, random_search, undisturbed
from .operators import frozen
from .threat import Threat, margins, norms

#: The radius at which certified accuracies are customarily reported, for images in [0, 1].
RADIUS = 36 / 255


@dataclass(frozen=True)
class Certificate:
    """Accuracy, certified accuracy at a radius, and which samples are certified."""

    accuracy: float
    certified_accuracy: float
    radius: float
    certified: Tensor


def certified_radii(logits: Tensor, labels: Tensor, lipschitz: float | Tensor = 1.0) -> Tensor:
    """How far (l2) each input can move before its prediction may change; 0 where it is wrong, or a logit not finite.

    ``margin / (sqrt(2) L)``: the difference of two outputs of an ``L``-Lipschitz function is ``sqrt(2) L``-Lipschitz
    (Tsuzuku et al., NeurIPS 2018; Singla and Feizi, ICML 2021). Where the constants of the differences themselves are
    known, the smallest quotient of a difference and its constant, which is never less.

    Args:
        logits: shape ``(batch, classes)``.
        labels: shape ``(batch,)``.
        lipschitz: Lipschitz constant of inputs to logits, or of the difference of every two logits, shape
            ``(classes, classes)`` (`margin_constants`); times ``1 / std`` if inputs are divided by ``std`` on the way.

    Returns:
        Radii in the units of the inputs, shape ``(batch,)``.

    Raises:
        ValueError: if a constant is not positive, of differences if one is negative, or if those are not one for every
            two classes.

    Example:
        >>> import torch
        >>> certified_radii(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0])).tolist()
        [1.4142135381698608, 0.0]
    """
    finite = logits.isfinite().all(1)
    if not isinstance(lipschitz, Tensor) or not lipschitz.dim():
        if not lipschitz > 0:
            raise ValueError(f"lipschitz must be positive, got {float(lipschitz)}")
        lipschitz = lipschitz.to(logits) if isinstance(lipschitz, Tensor) else lipschitz
        return torch.where(finite, margins(logits, labels).clamp(min=0) / (sqrt(2) * lipschitz), 0.0)
    classes = logits.shape[1]
    if lipschitz.shape != (classes, classes):
        raise ValueError(f"lipschitz must be a number or {classes} x {classes}, got shape {tuple(lipschitz.shape)}")
    if bool((lipschitz < 0).any()):
        raise ValueError(f"lipschitz must not be negative, got {float(lipschitz.min())} among its entries")
    differences = logits.gather(1, labels[:, None]) - logits
    # A logit's difference to itself has no constant.
    constants = lipschitz[labels].scatter(1, labels[:, None], 1.0)
    quotients = torch.where(differences > 0, differences / constants, 0.0)
    return torch.where(finite, quotients.scatter(1, labels[:, None], torch.inf).amin(1), 0.0)


def certified_accuracy(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    labels: Tensor,
    radius: float = RADIUS,
    lipschitz: float | Tensor = 1.0,
) -> Certificate:
    """Share of samples that are right and stay right however they are moved by up to ``radius`` (l2).

    The certificate is only as good as ``lipschitz``: it holds for networks of orthogonal layers that are kept so, such
    as `sao_prune.models.LipConvNet`.

    Args:
        model: a network; measured in evaluation mode.
        x: inputs, one batch.
        labels: shape ``(batch,)``.
        radius: in the units of ``x``; 36/255 is customary for images in [0, 1].
        lipschitz: as in `certified_radii`.

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
    generator = named_generator(base_seed(seed), "pgd")
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float32, device="cpu").to(x)
    delta = noise * (0.5 * radius / norms(noise))
    worst, least = x.clone(), torch.full((len(x),), torch.inf, device=x.device)
    with frozen(model):
        for _ in range(steps + 1):
            delta.requires_grad_(True)
            logits = model(x + delta)
            margin = margins(logits, labels)
            (gradient,) = torch.autograd.grad(margin.sum(), delta)
            with torch.no_grad():
                better = margin < least
                least = torch.where(better, margin, least)
                worst[better] = (x + delta)[better]
                step = delta - gradient * (2.5 * radius / steps / norms(gradient).clamp(min=1e-12))
                delta = step * (radius / norms(step)).clamp(max=1)
    return worst.detach()


@dataclass(frozen=True)
class WorstCase:
    """What is left of a classifier under several attacks.

    Attributes:
        clean: share of samples that are right as they are.
        after: by attack, the share that is right under it and under all attacks before it.
        right: whether a sample is right whatever was tried, shape ``(batch,)``.
    """

    clean: float
    after: Mapping[str, float]
    right: Tensor

    @property
    def worst(self) -> float:
        """Share of samples that are right whatever was tried."""
        return float(self.right.double().mean())


def worst_case(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    labels: Tensor,
    threat: Threat,
    *,
    steps: int = 20,
    restarts: int = 1,
    queries: int = 200,
    seed: Seed = 0,
) -> WorstCase:
    """Accuracy under the strongest of several attacks: a sample counts if all of them fail.

    In the manner of AutoAttack (Croce and Hein, ICML 2020, https://arxiv.org/abs/2003.01690): `pgd` on the
    cross-entropy, `pgd` on the margin, `random_search`, each on the samples that are left. What it gives is an upper
    bound on what a stronger attacker leaves.

    Args:
        model: a network; attacked in evaluation mode.
        x: images ``(batch, channels, height, width)`` in the threat's range, one batch.
        labels: shape ``(batch,)``.
        threat: what is allowed.
        steps: of `pgd`.
        restarts: of `pgd`.
        queries: of `random_search`; 0 leaves it and the margin out.
        seed: of everything random.

    Returns:
        A `WorstCase`.

    Raises:
        ValueError: for counts below one, or images outside the threat's range.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
        >>> x, labels = torch.rand(4, 1, 2, 2), torch.tensor([0, 1, 0, 1])
        >>> found = worst_case(net, x, labels, Threat("l2", 0.5), queries=5)
        >>> list(found.after), found.worst <= found.clean
        (['pgd', 'margin', 'search'], True)
    """
    threat.check(x)
    attacks: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "pgd": lambda a, y: pgd(model, a, y, threat, steps=steps, restarts=restarts, seed=seed),
        "margin": lambda a, y: pgd(model, a, y, threat, steps=steps, restarts=restarts, loss="margin", seed=seed),
        "search": lambda a, y: random_search(model, a, y, threat, queries=queries, seed=seed),
    }
    right = _right(model, x, labels)
    clean, after = float(right.double().mean()), {}
    for name, attack in attacks.items():
        if name != "pgd" and not queries:
            break
        left = right.nonzero().flatten()
        if len(left):
            right[left] = _right(model, attack(x[left], labels[left]), labels[left])
        after[name] = float(right.double().mean())
    return WorstCase(clean, after, right)


def _right(model: Callable[[Tensor], Tensor], x: Tensor, labels: Tensor) -> Tensor:
    """Whether every answer is right; a tie is not."""
    with undisturbed(model), torch.no_grad():
        return margins(model(x), labels) > 0
