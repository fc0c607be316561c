"""What a deep network does to signals before training, from its gain alone: the limit of infinite width."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

# Even, so that no node lies on the kink of a ReLU.
_NODES = 200


@dataclass(frozen=True)
class MeanField:
    """Predictions for a chain of equal layers.

    Attributes:
        variance: mean square of the last layer's pre-activations.
        growth: mean squared singular value of the Jacobian of all layers together; 1 is isometric on average.
        correlation: of the pre-activations of two inputs. Near 1, inputs can no longer be told apart; near 0, all are
            equally far from one another.
    """

    variance: float
    growth: float
    correlation: float


def mean_field(
    activation: Callable[[Tensor], Tensor],
    gain: float = 1.0,
    depth: int = 1,
    *,
    variance: float = 1.0,
    correlation: float = 0.5,
) -> MeanField:
    """Follow two inputs through ``depth`` layers, each an activation and then an orthogonal matrix times ``gain``.

    No biases. With random orthogonal weights, sparse ones in blocks included, pre-activations of wide layers are near
    Gaussian, and only their variance and correlation matter (Poole et al., 2016, arXiv:1606.05340; Schoenholz et al.,
    2017, arXiv:1611.01232). A network cannot be trained from where ``growth`` is far from 1.

    Args:
        activation: elementwise function, such as ``torch.tanh``.
        gain: scale of the orthogonal weights.
        depth: number of layers.
        variance: mean square of the pre-activations that enter.
        correlation: of the two inputs, from -1 to 1.

    Returns:
        A `MeanField`.

    Raises:
        ValueError: if ``gain`` or ``variance`` is not positive, ``depth`` below 1 or ``correlation`` out of range.

    Example:
        >>> import torch
        >>> for gain in (1.02, 1.1):
        ...     deep = mean_field(torch.tanh, gain, depth=1000)
        ...     print(f"{deep.growth:.2g}, {deep.correlation:.2g}")
        0.049, 0.35
        4e+03, 0.0033
    """
    if gain <= 0 or variance <= 0 or depth < 1 or not -1 <= correlation <= 1:
        raise ValueError(
            "gain and variance must be positive, depth at least 1 and correlation from -1 to 1, "
            f"got {gain}, {variance}, {depth}, {correlation}"
        )
    nodes, weights = _gauss_hermite()
    growth = 1.0
    for _ in range(depth):
        first = sqrt(variance) * nodes
        spread = sqrt(max(0.0, 1 - correlation**2))
        second = sqrt(variance) * (correlation * nodes[:, None] + spread * nodes)
        outputs = activation(first)
        after = gain**2 * float(weights @ outputs**2)
        growth *= gain**2 * float(weights @ _derivative(activation, first) ** 2)
        product = gain**2 * float(weights @ (outputs[:, None] * activation(second)) @ weights)
        correlation = min(1.0, max(-1.0, product / after)) if after > 0 else 0.0
        variance = after
        if variance == 0:
            break
    return MeanField(variance, growth, correlation)


def _gauss_hermite() -> tuple[Tensor, Tensor]:
    """Nodes and weights of the mean over a standard normal variable."""
    # SciPy takes longer to import than all else here.
    from scipy.special import roots_hermitenorm

    nodes, weights, total = roots_hermitenorm(_NODES, mu=True)
    return torch.from_numpy(nodes), torch.from_numpy(weights / total)


def _derivative(activation: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    with torch.enable_grad():
        (derivative,) = torch.autograd.grad(activation(x).sum(), x)
    return derivative
