"""How alike two singular value distributions are (thesis table 4.1)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class KSResult:
    """The two-sample Kolmogorov-Smirnov statistic (largest distance of the distributions) and its p-value."""

    statistic: float
    pvalue: float


def ks_test(a: Tensor, b: Tensor, resolution: float = 1e-4) -> KSResult:
    """Two-sample Kolmogorov-Smirnov test between two sets of singular values (thesis section 4.1.2).

    Rounding noise around equal values would look like a difference to a test of ranks, so values are first rounded to
    multiples of ``resolution``.

    Args:
        a: singular values, any shape.
        b: singular values, any shape.
        resolution: values closer than about this count as equal.

    Returns:
        A `KSResult`.

    Raises:
        ValueError: if either is empty or holds values that are not finite, or ``resolution`` is not positive.

    Example:
        >>> import torch
        >>> ks_test(torch.ones(64), torch.ones(64) + 1e-7).pvalue
        1.0
    """
    # Imported here because scipy's statistics alone take longer to import than all of this library.
    from scipy.stats import ks_2samp

    if resolution <= 0:
        raise ValueError(f"resolution must be positive, got {resolution}")
    samples = []
    for name, values in (("a", a), ("b", b)):
        if values.numel() == 0 or not bool(torch.isfinite(values).all()):
            raise ValueError(f"{name} must hold finite singular values, at least one; got {values.numel()} values")
        samples.append((values.detach().double().cpu().flatten() / resolution).round().numpy())
    with warnings.catch_warnings():
        # Where the exact sum of probabilities underflows, scipy says so and takes the asymptotic one.
        warnings.simplefilter("ignore", RuntimeWarning)
        result = ks_2samp(*samples)
    return KSResult(float(result.statistic), float(result.pvalue))
