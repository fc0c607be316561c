"""Supports that are plain masks, not blocks, found by name: expander, radix, product."""

from __future__ import annotations

from collections.abc import Callable
from math import gcd, log2

import torch
from torch import Tensor

from ..naming import nearest
from .expanders import expander
from .generators import SUPPORTS, SupportGenerator, put_into
from .mixed_radix import radix
from .products import max_halvings, product


def _expander(rows: int, cols: int, density: float, place: int, generator: torch.Generator | None) -> Tensor:
    return expander(rows, cols, round(density * rows * cols), generator)


def _radix(rows: int, cols: int, density: float, place: int, generator: torch.Generator | None) -> Tensor:
    size = gcd(rows, cols)
    return radix(rows, cols, min(max(round(density * size), 1), size), place)


def _product(rows: int, cols: int, density: float, place: int, generator: torch.Generator | None) -> Tensor:
    wanted = round(-log2(density))
    most = max_halvings(rows, cols)
    if wanted > 0 and most == 0:
        raise ValueError(
            f"a product support halves both sides, but {rows} x {cols} has an odd one; "
            "leave the layer out or choose another topology"
        )
    return product(rows, cols, min(wanted, most), generator)


SUPPORTS.update(expander=_expander, radix=_radix, product=_product)


def register_support(name: str) -> Callable[[SupportGenerator], SupportGenerator]:
    """Decorator: make a generator of plain masks known by a name, for `SAO`, `RG` and `make_support`.

    The function is called as ``generate(rows, cols, density, place, generator)`` and returns a boolean mask of shape
    ``(rows, cols)``. For blocks take `sao_prune.topology.register`: they can be exactly orthogonal and run compactly.

    Args:
        name: what users call it.

    Returns:
        The decorator, which gives the function back.

    Raises:
        ValueError: for a name that is taken, by a block topology too, or empty.

    Example:
        >>> @register_support("band")
        ... def band(rows, cols, density, place, generator):
        ...     return torch.eye(rows, cols, dtype=torch.bool)
        >>> make_support("band", 2, 2, 0.5).tolist()
        [[True, False], [False, True]]
        >>> _ = SUPPORTS.pop("band")
    """
    return put_into(SUPPORTS, name, "support")


def make_support(
    kind: str,
    rows: int,
    cols: int,
    density: float,
    *,
    place: int = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A support of a named kind, as near to a density as the kind allows.

    Args:
        kind: ``"expander"`` (any density that can be connected), ``"radix"`` (multiples of ``1 / gcd(m, n)``) or
            ``"product"`` (powers of a half).
        rows: outputs ``m``.
        cols: inputs ``n``.
        density: share of edges, in (0, 1].
        place: number of the layer in its chain; only RadiX-Net minds.
        generator: where random supports come from; without one, `torch.initial_seed` decides.

    Returns:
        Boolean mask, shape ``(rows, cols)``.

    Raises:
        ValueError: for an unknown kind, or a density out of range or out of the kind's reach.

    Example:
        >>> make_support("radix", 8, 8, 0.25).sum().item()
        16
    """
    if kind not in SUPPORTS:
        raise ValueError(f"unknown support {kind!r}{nearest(kind, SUPPORTS)}; known: {', '.join(sorted(SUPPORTS))}")
    if not 0 < density <= 1:
        raise ValueError(f"density is a share in (0, 1], got {density}")
    return SUPPORTS[kind](rows, cols, density, place, generator)
