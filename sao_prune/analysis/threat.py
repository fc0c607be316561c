"""What an attacker may do to the input of a classifier, and what shows whether it worked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Norm = Literal["linf", "l2"]


@dataclass(frozen=True)
class Threat:
    """What an attacker may do: move every input by ``eps`` at most, inside the range of inputs.

    Attributes:
        norm: by which the distance is measured, ``"linf"`` or ``"l2"``, over a whole sample.
        eps: in the units of the inputs.
        low, high: the range.

    Raises:
        ValueError: for another norm, a negative ``eps`` or an empty range.

    Example:
        >>> threat = Threat("linf", 0.25)
        >>> threat.project(torch.tensor([[0.9, 0.5]]), torch.tensor([[1.4, 0.0]])).tolist()
        [[1.0, 0.25]]
    """

    norm: Norm = "linf"
    eps: float = 8 / 255
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if self.norm not in get_args(Norm):
            raise ValueError(f"norm must be one of {get_args(Norm)}, got {self.norm!r}")
        if not (self.eps >= 0 and self.low < self.high):
            raise ValueError(f"eps must not be negative and low below high, got {self.eps}, {self.low}, {self.high}")

    def check(self, x: Tensor) -> None:
        """Refuse inputs outside the range, which an attack would move there, further than ``eps``, and NaN.

        Raises:
            ValueError: with the range that they have.
        """
        if not x.numel():
            return
        least, most = (float(end) for end in x.detach().aminmax())
        slack = 1e-6 * (self.high - self.low)
        if not (least >= self.low - slack and most <= self.high + slack):
            raise ValueError(
                f"inputs must lie in [{self.low:g}, {self.high:g}], got {least:g} to {most:g}: standardise them inside "
                "the model, or give the range that they have, Threat(low=.., high=..)"
            )

    def project(self, x: Tensor, moved: Tensor) -> Tensor:
        """The allowed inputs nearest to the moved ones (in l2: nearly, where the range counts too)."""
        delta = moved - x
        if self.norm == "linf":
            delta = delta.clamp(-self.eps, self.eps)
        else:
            delta = delta * (self.eps / norms(delta).clamp(min=1e-12)).clamp(max=1)
        return (x + delta).clamp(self.low, self.high)

    def start(self, x: Tensor, noise: Tensor) -> Tensor:
        """A place in the ball, in l2 not at its edge, that noise of the shape of ``x``, uniform in [0, 1), chooses."""
        delta = self.eps * (2 * noise.to(x) - 1)
        if self.norm == "l2":
            delta = delta / x[0].numel() ** 0.5
        return self.project(x, x + delta)

    def step(self, x: Tensor, moved: Tensor, gradient: Tensor, size: float) -> Tensor:
        """A step of this length up the gradient: along its sign, or its direction."""
        if self.norm == "linf":
            along = gradient.sign()
        else:
            along = gradient / norms(gradient).clamp(min=1e-12)
        return self.project(x, moved + size * along)


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """Logit of the label less the largest other one: positive where the answer is right.

    Args:
        logits: shape ``(batch, classes)``.
        labels: shape ``(batch,)``.

    Returns:
        Shape ``(batch,)``.

    Example:
        >>> margins(torch.tensor([[2.0, 0.5, 1.0]]), torch.tensor([0])).tolist()
        [1.0]
    """
    own = logits.gather(1, labels[:, None]).squeeze(1)
    return own - logits.scatter(1, labels[:, None], -torch.inf).amax(1)


def norms(x: Tensor) -> Tensor:
    """Euclidean norm of every sample, shaped to divide by.

    Example:
        >>> norms(torch.tensor([[3.0, 4.0]])).tolist()
        [[5.0]]
    """
    return x.flatten(1).norm(dim=1).view(-1, *(1,) * (x.dim() - 1))
