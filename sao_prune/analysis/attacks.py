"""Attacks on classifiers: small changes of the input that are to change the answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import parametrize

from ..seeds import Seed, base_seed, named_generator
from .operators import frozen
from .threat import Threat, margins, norms

Loss = Literal["cross-entropy", "margin"]

# Share of the pixels that a window of the random search covers first, and when it is halved (as Square Attack has it).
_WINDOW, _HALVINGS = 0.3, (0.02, 0.1, 0.2, 0.4, 0.6, 0.8)


def perturb(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    objective: Callable[[Tensor], Tensor],
    threat: Threat,
    steps: int,
    noise: Tensor,
    step_size: float | None = None,
) -> Tensor:
    """Projected gradient ascent from a random start, for adversarial training (Madry et al., ICLR 2018).

    Args:
        model: a network; in evaluation mode meanwhile, and its parameters get no gradient.
        x: inputs, one batch, in the threat's range.
        objective: what is to become large, from logits; a scalar, or one value a sample.
        threat: what is allowed.
        steps: of the ascent.
        noise: chooses the start, uniform in [0, 1), of the shape of ``x``.
        step_size: 2.5 eps / steps if left out.

    Returns:
        Where it ends, shape of ``x``.

    Example:
        >>> x, threat = torch.full((1, 2), 0.5), Threat("linf", 0.25)
        >>> perturb(torch.nn.Identity(), x, lambda y: (y[:, 1] - y[:, 0]).sum(), threat, 4, torch.rand(1, 2)).tolist()
        [[0.25, 0.75]]
    """
    size = 2.5 * threat.eps / steps if step_size is None else step_size
    with undisturbed(model):
        moved = threat.start(x, noise)
        for _ in range(steps):
            moved = moved.detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad(objective(model(moved)).sum(), moved)
            moved = threat.step(x, moved.detach(), gradient, size)
    return moved.detach()


def pgd(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    labels: Tensor,
    threat: Threat,
    *,
    steps: int = 20,
    restarts: int = 1,
    loss: Loss = "cross-entropy",
    seed: Seed = 0,
) -> Tensor:
    """Projected gradient descent on the margin of the answer, or ascent of the loss: the worst points that it meets.

    Args:
        model: a network; attacked in evaluation mode.
        x: inputs, one batch, in the threat's range.
        labels: shape ``(batch,)``.
        threat: what is allowed.
        steps: of every restart, ``2.5 eps / steps`` long.
        restarts: random starts.
        loss: ``"cross-entropy"``; or ``"margin"``, whose gradient does not vanish where the network is sure (Carlini
            and Wagner, 2017, https://arxiv.org/abs/1608.04644).
        seed: of the starts.

    Returns:
        Shape of ``x``; of every sample the point with the smallest margin.

    Raises:
        ValueError: for another loss, counts below one, or inputs outside the threat's range.

    Example:
        >>> x, label = torch.tensor([[0.6, 0.4]]), torch.tensor([0])
        >>> moved = pgd(torch.nn.Identity(), x, label, Threat("linf", 0.25))
        >>> margins(moved, label).item() < 0
        True
    """
    if loss not in get_args(Loss):
        raise ValueError(f"loss must be one of {get_args(Loss)}, got {loss!r}")
    if min(steps, restarts) < 1:
        raise ValueError(f"steps and restarts must be at least 1, got {steps} and {restarts}")
    threat.check(x)
    generator = named_generator(base_seed(seed), "pgd", loss)
    worst = _Worst(x)
    with undisturbed(model):
        for _ in range(restarts):
            moved = threat.start(x, torch.rand(x.shape, generator=generator, dtype=torch.float32, device="cpu"))
            for step in range(steps + 1):
                moved = moved.detach().requires_grad_(True)
                logits = model(moved)
                margin = margins(logits, labels)
                worst.keep(moved.detach(), margin.detach())
                if step < steps:
                    goal = -margin if loss == "margin" else F.cross_entropy(logits, labels, reduction="none")
                    (gradient,) = torch.autograd.grad(goal.sum(), moved)
                    moved = threat.step(x, moved.detach(), gradient, 2.5 * threat.eps / steps)
    return worst.points


def random_search(
    model: Callable[[Tensor], Tensor], x: Tensor, labels: Tensor, threat: Threat, *, queries: int = 200, seed: Seed = 0
) -> Tensor:
    """Windows of random colours, kept where they make the margin smaller; needs no gradient.

    After Square Attack (Andriushchenko et al., ECCV 2020, https://arxiv.org/abs/1912.00049), whose windows shrink as
    here; in l2 the window gets noise and the whole perturbation its full length, which is simpler than theirs.

    Args:
        model: a network; attacked in evaluation mode.
        x: images ``(batch, channels, height, width)`` in the threat's range.
        labels: shape ``(batch,)``.
        threat: what is allowed.
        queries: how many windows are tried.
        seed: of the windows.

    Returns:
        Shape of ``x``; of every sample the point with the smallest margin.

    Raises:
        ValueError: if ``x`` is no batch of images, or outside the threat's range.

    Example:
        >>> x, label = torch.full((1, 1, 2, 2), 0.5), torch.tensor([0])
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
        >>> random_search(net, x, label, Threat("linf", 0.25), queries=5).shape
        torch.Size([1, 1, 2, 2])
    """
    if x.dim() != 4:
        raise ValueError(f"random_search needs images (batch, channels, height, width), got shape {tuple(x.shape)}")
    threat.check(x)
    generator = named_generator(base_seed(seed), "random search")
    worst = _Worst(x)
    with undisturbed(model), torch.no_grad():
        worst.keep(x, margins(model(x), labels))
        for query in range(queries):
            covered = _WINDOW / 2 ** sum(query >= share * queries for share in _HALVINGS)
            tried = _window(x, worst.points, threat, covered, generator)
            worst.keep(tried, margins(model(tried), labels))
    return worst.points


class _Worst:
    """The point with the smallest margin of every sample."""

    def __init__(self, x: Tensor) -> None:
        self.points = x.clone()
        self._margins = torch.full((len(x),), torch.inf, device=x.device)

    def keep(self, points: Tensor, margin: Tensor) -> None:
        """Take over the points with smaller margins."""
        better = margin < self._margins
        self._margins = torch.where(better, margin, self._margins)
        self.points[better] = points[better]


def _window(x: Tensor, moved: Tensor, threat: Threat, covered: float, generator: torch.Generator) -> Tensor:
    """The moved images with other colours in one window of each, which covers that share of it."""
    batch, channels, height, width = x.shape
    tall, wide = (max(1, min(n, round(n * covered**0.5))) for n in (height, width))

    def inside(size: int, length: int) -> Tensor:
        share = torch.rand(batch, 1, generator=generator, dtype=torch.float32, device="cpu")
        first = (share * (length - size + 1)).long()
        at = torch.arange(length, device="cpu")
        return ((at >= first) & (at < first + size)).to(x.device)

    rows, cols = inside(tall, height), inside(wide, width)
    window = rows[:, None, :, None] & cols[:, None, None, :]
    if threat.norm == "linf":
        sign = torch.rand(batch, channels, 1, 1, generator=generator, dtype=torch.float32, device="cpu").to(x) - 0.5
        return threat.project(x, torch.where(window, x + threat.eps * sign.sign(), moved))
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float32, device="cpu").to(x)
    delta = moved - x + torch.where(window, noise * threat.eps / (tall * wide * channels) ** 0.5, 0.0)
    return threat.project(x, x + delta * (threat.eps / norms(delta).clamp(min=1e-12)))


@contextmanager
def undisturbed(model: object) -> Iterator[None]:
    """Evaluation mode, no gradients of parameters, and weights that are functions of others computed once."""
    with frozen(model), parametrize.cached():
        yield
