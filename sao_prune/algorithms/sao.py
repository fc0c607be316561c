"""SAO: exactly orthogonal values on a block topology."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite
from numbers import Real
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from ..allocation import Allocation
from ..seeds import named_generator
from ..topology import GENERATORS, SUPPORTS, BlockTopology, even_sizes, exact_sizes
from ..weights import (
    Blocks,
    Mirror,
    approximate_isometry,
    eco_blocks,
    mirror_blocks,
    mirror_topology,
    orthogonal_blocks,
)
from .base import Method, SupportDrawer, TopologyDrawer, TopologySharing, choice, register
from .draw import Draw, Values
from .halves import half_budget, half_topologies
from .isometric import isometric


@register
@dataclass(frozen=True)
class SAO(Method):
    """Sparsity-aware orthogonal initialisation (thesis section 3.4).

    Attributes:
        variant: 1: every block its own values, layers of one shape share a topology; 2: as 1, and all blocks of a
            layer share their values; 3: every layer its own topology (thesis section 3.4.3.1). Of a stack of matrices,
            experts ``(experts, out, in)``, each has its own topology in every variant.
        topology_sharing: the same said plainly: ``"layer-shape"``, layers of one shape share a topology (variants 1
            and 2); ``"none"``, every layer has its own (variant 3); ``None`` leaves it to ``variant``.
        topology: ``"ramanujan"`` (Algorithm 1), ``"interleaved"`` or a name given to `sao_prune.topology.register`; or
            a support that is not made of blocks, so
            cannot be exactly orthogonal nor run compactly: ``"expander"``, ``"radix"``, ``"product"``.
        gain: every non-zero singular value of every matrix; 1.1 in the thesis's MLP-N.
        nonlinearity: ``"relu"`` mirrors the weights (looks-linear, ``[[B, -B], [-B, B]]``), with which a chain of
            layers with ReLU between them is an orthogonal linear map; for models in which every pruned layer but the
            last is followed by ReLU. It changes no gain, as the argument of that name in
            `torch.nn.init.calculate_gain` does. ``None`` gives plain values.
        conv: how a matrix becomes a convolution: ``"delta"``, its centre tap (thesis section 3.4.4.1); ``"eco"``, a
            matrix for every frequency (section 3.4.4.2). The layer keeps its padding, stride and dilation, with which
            an ECO kernel is only nearly orthogonal; `sao_prune.nn.convert_eco` makes it exact.
        residual: ``"isometric"`` starts residual blocks as orthogonal maps: ReLU after the addition on mirrored
            channels (Gadhikar and Burkholz, https://arxiv.org/abs/2210.02411, made sparse), others as rotations by 45
            degrees. Biases and scales in the blocks are set, and the dense layers before and after them. Needs
            ``example_input`` where the model's input size is not known from its configuration.
        norm: with ``residual``: ``"identity"`` sets batch norms so that they give ``example_input``, one batch, back;
            ``"keep"`` leaves them, so that blocks with norms are only nearly orthogonal.
        measure: with ``residual``: whether the report has the extreme singular values of every block and of the network
            before and after, for the first example of ``example_input``; ``None`` measures small models.
        values: ``"orthogonal"`` blocks; ``"nearly_orthogonal"``, the most isometric values on the mask that an
            optimizer finds; ``"auto"``, orthogonal where the topology allows it. They are new in any case: what a
            trained weight holds is lost, for which there is `Project`.

    Raises:
        ValueError: for an option out of range.

    Example:
        >>> import torch, sao_prune
        >>> layer = torch.nn.Sequential(torch.nn.Linear(64, 64))
        >>> report = sao_prune.apply(
        ...     layer, sparsity=0.75, method=sao_prune.SAO(gain=1.1), skip_first=False, skip_last=False
        ... )
        >>> values = torch.linalg.svdvals(layer[0].weight)
        >>> bool((values - 1.1).abs().max() < 1e-5)
        True
    """

    name: ClassVar[str] = "sao"

    variant: Literal[1, 2, 3] = 1
    topology: str = "ramanujan"
    gain: float = 1.0
    nonlinearity: Literal["relu"] | None = None
    conv: Literal["delta", "eco"] = "delta"
    values: Literal["auto", "orthogonal", "nearly_orthogonal"] = "auto"
    residual: Literal["isometric"] | None = None
    norm: Literal["identity", "keep"] = "keep"
    measure: bool | None = None
    topology_sharing: TopologySharing | None = None

    def __post_init__(self) -> None:
        choice("variant", self.variant, (1, 2, 3))
        choice("topology", self.topology, (*GENERATORS, *SUPPORTS))
        choice("nonlinearity", self.nonlinearity, (None, "relu"))
        choice("conv", self.conv, ("delta", "eco"))
        choice("values", self.values, ("auto", "orthogonal", "nearly_orthogonal"))
        choice("residual", self.residual, (None, "isometric"))
        choice("norm", self.norm, ("identity", "keep"))
        choice("topology_sharing", self.topology_sharing, (None, *get_args(TopologySharing)))
        if self.topology_sharing == ("layer-shape" if self.variant == 3 else "none" if self.variant == 2 else 0):
            raise ValueError(
                f"variant={self.variant} is topology_sharing={'none' if self.variant == 3 else 'layer-shape'!r}, got "
                f"{self.topology_sharing!r}: give one of the two"
            )
        check_gain(self.gain)
        self._check_residual()
        if self.values == "orthogonal" and not self.structured:
            raise ValueError(
                f"no values on topology={self.topology!r} are exactly orthogonal; use values='nearly_orthogonal' or a "
                f"block topology ({', '.join(GENERATORS)})"
            )
        if self._approximate and (self.variant == 2 or self.nonlinearity is not None or self.conv != "delta"):
            raise ValueError(
                "nearly orthogonal values are found for each matrix on its own: they go with variant 1 or 3, "
                "conv='delta' and nonlinearity=None"
            )

    def _check_residual(self) -> None:
        if self.residual is None:
            if self.norm != "keep" or self.measure is not None:
                raise ValueError("norm and measure say more about residual='isometric': give that, or leave them out")
        elif (
            (self.conv, self.nonlinearity, self.gain) != ("delta", None, 1)
            or self.variant == 2
            or self.values == "nearly_orthogonal"
            or not self.structured
        ):
            raise ValueError(
                "residual='isometric' goes with variant 1 or 3, a block topology, exact weights, conv='delta', gain=1 "
                "and nonlinearity=None (chains of ReLU blocks are mirrored by themselves)"
            )

    def bind(self, model: nn.Module, example_input: Any) -> Method:
        """With ``residual`` the method that knows the model's residual blocks."""
        if self.residual is None:
            return self
        plain = replace(self, residual=None, norm="keep", measure=None)
        return isometric(
            plain,
            model,
            example_input,
            kind=self.topology,
            unique=self.own_topologies,
            norm=self.norm,
            measure=self.measure,
        )

    @property
    def own_topologies(self) -> bool:
        """Whether every layer has a topology of its own."""
        return self.variant == 3 or self.topology_sharing == "none"

    @property
    def origin(self) -> Values:
        """All values are new."""
        return "drawn"

    @property
    def structured(self) -> bool:
        """Whether supports are block topologies."""
        return self.topology in GENERATORS

    @property
    def _approximate(self) -> bool:
        return self.values == "nearly_orthogonal" or not self.structured

    def preview(self, allocations: Sequence[Allocation]) -> list[tuple[int | None, int]]:
        """Mirrored weights have the edges of their halves, doubled along every mirrored side."""
        if not self.structured or self.nonlinearity is None:
            return super().preview(allocations)
        out: list[tuple[int | None, int]] = []
        for allocation, mirror in zip(allocations, _mirrors(allocations)):
            rows, cols, groups, nnz = half_budget(allocation, mirror)
            sizes = even_sizes(rows, cols, groups) if nnz is None else exact_sizes(rows, cols, nnz)
            copies = (1 + mirror.rows) * (1 + mirror.cols) if mirror else 1
            out.append((len(sizes[0]), int((sizes[0] * sizes[1]).sum()) * copies * allocation.weight.parts))
        return out

    def draw(self, allocations: Sequence[Allocation], weights: Sequence[Tensor], seed: int) -> list[Draw]:
        """One topology and one set of orthogonal blocks for every part of every weight.

        Raises:
            ValueError: with ``residual``, which concerns the whole model.
        """
        if self.residual is not None:
            raise ValueError("residual='isometric' concerns the whole model: use sao_prune.apply(model, method=..)")
        if not self.structured:
            return self._draw_irregular(allocations, seed)
        drawer = TopologyDrawer(self.topology, seed, unique=self.own_topologies)
        mirrors = _mirrors(allocations) if self.nonlinearity == "relu" else [None] * len(allocations)
        halves = [half_topologies(a, m, drawer) for a, m in zip(allocations, mirrors)]
        values = iter(self._values(allocations, halves, seed))
        draws = []
        for allocation, mirror, parts in zip(allocations, mirrors, halves):
            blocks = tuple(next(values) for _ in parts)
            if mirror is not None:
                known = {id(t): mirror_topology(t, mirror) for t in parts}
                parts = tuple(known[id(t)] for t in parts)
                blocks = tuple(mirror_blocks(b, mirror) for b in blocks)
            draws.append(Draw(allocation.weight, parts, blocks))
        return draws

    def _values(
        self, allocations: Sequence[Allocation], topologies: Sequence[tuple[BlockTopology, ...]], seed: int
    ) -> list[Blocks]:
        """Block values of every part of every weight, in their order."""
        flat = [t for parts in topologies for t in parts]
        kernels = [a.weight.kernel for a in allocations for _ in range(a.weight.parts)]
        names = [(a.weight.name, part) for a in allocations for part in range(a.weight.parts)]
        generators = [named_generator(seed, "values", *name) for name in names]
        if self._approximate:
            return [
                t.gather(approximate_isometry(t.mask(), g, gain=self.gain).matrix) for t, g in zip(flat, generators)
            ]
        shared = self.variant == 2
        if self.conv == "delta":
            return orthogonal_blocks(flat, generators, gain=self.gain, shared=shared)
        return eco_blocks(flat, kernels, generators, gain=self.gain, shared=shared)

    def _draw_irregular(self, allocations: Sequence[Allocation], seed: int) -> list[Draw]:
        """Supports that are plain masks, with the most isometric values on them."""
        drawer = SupportDrawer(self.topology, seed, unique=self.own_topologies)
        draws = []
        for place, allocation in enumerate(allocations):
            units, name = drawer(allocation, place), allocation.weight.name
            matrices = [
                approximate_isometry(mask, named_generator(seed, "values", name, part), gain=self.gain).matrix
                for part, mask in enumerate(units)
            ]
            draws.append(Draw(allocation.weight, units=units, matrices=torch.stack(matrices)))
        return draws


def check_gain(gain: float) -> None:
    """Refuse a gain that is no positive finite number.

    Raises:
        ValueError: telling what was given.
    """
    if isinstance(gain, bool) or not isinstance(gain, Real) or not isfinite(gain) or gain <= 0:
        raise ValueError(f"gain must be a positive finite number, got {gain!r}")


def _mirrors(allocations: Sequence[Allocation]) -> list[Mirror | None]:
    """The first layer takes plain inputs; the model's last layer, if it is pruned, gives plain outputs."""
    roles: list[Mirror | None] = [Mirror.INNER] * len(allocations)
    if allocations[-1].weight.last:
        roles[-1] = Mirror.EXIT
    roles[0] = None if len(allocations) == 1 and allocations[0].weight.last else Mirror.ENTRY
    for allocation, role in zip(allocations, roles):
        weight = allocation.weight
        if role is None:
            continue
        if weight.parts > 1:
            raise ValueError(
                f"{weight.name} consists of {weight.parts} separate matrices, so its channels cannot be mirrored; "
                "exclude it or use nonlinearity=None"
            )
        try:
            role.half(*weight.matrix)
        except ValueError as error:
            raise ValueError(f"{weight.name}: {error}; exclude it or use nonlinearity=None") from None
    return roles
