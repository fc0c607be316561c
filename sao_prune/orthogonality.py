"""Isometry that lasts: keep the blocks of a sparse model orthogonal while it trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, nn

from .blocks import BlockModule
from .discovery import ALREADY_PRUNED, PrunableWeight, Selection, Selector, pick, walk
from .held import Held, OrthogonalMap, held_tensors, precise, put, take_off
from .layouts import CompactLayout, FrequencyLayout, Layout, MaskedFrequencyLayout, MaskedLayout, halve, mirror_of
from .naming import dotted
from .nn import ECOConv2d
from .plain import why_not_plain
from .prune import pruning_hooks, settle_all
from .replaced import warn_replaced
from .tables import Column, Line, TableReport, plain
from .topology import BlockTopology, NotBlockStructuredError

_RELEASED = "released"


@dataclass(frozen=True)
class HeldRecord:
    """One weight.

    Attributes:
        name: full parameter name.
        blocks: matrices that are kept orthogonal; for an ECO convolution one for every block and free frequency.
        gain: singular value they keep.
        moved: largest change of a value on the way to the nearest orthogonal one.
        reason: why it was skipped, or ``"released"``; ``None`` if it is held.
    """

    name: str
    blocks: int = 0
    gain: float = 0.0
    moved: float = 0.0
    reason: str | None = None


@dataclass(frozen=True)
class HoldReport(TableReport):
    """What `hold` or `release` did; prints as a table.

    Attributes:
        layers: the records, in the order in which the layers were found.
        title: heading of the table.
    """

    layers: tuple[HeldRecord, ...]
    title: str = ""

    columns: ClassVar[tuple[Column, ...]] = (
        Column("layer"),
        Column("blocks", "right"),
        Column("gain", "right"),
        Column("moved by", "right"),
        Column(""),
    )

    @property
    def held(self) -> tuple[HeldRecord, ...]:
        """The records of the layers that are held."""
        return tuple(layer for layer in self.layers if layer.reason is None)

    @property
    def released(self) -> tuple[HeldRecord, ...]:
        """The records of the layers that were held before."""
        return tuple(layer for layer in self.layers if layer.reason == _RELEASED)

    @property
    def skipped(self) -> tuple[HeldRecord, ...]:
        """The records of the layers that are as they were."""
        return tuple(layer for layer in self.layers if layer.reason not in (None, _RELEASED))

    def lines(self) -> list[Line]:
        """One line a layer."""
        return [
            Line((r.name, "-", "-", "-", r.reason), dim=True)
            if r.reason is not None
            else Line((r.name, str(r.blocks), f"{r.gain:.4g}", f"{r.moved:.1e}", "held"))
            for r in self.layers
        ]

    def rows(self) -> list[dict[str, Any]]:
        """The fields of each record."""
        return [plain(record) for record in self.layers]

    def summary(self) -> str:
        """One line of totals."""
        released = f", {len(self.released)} released" if self.released else ""
        return f"{len(self.held)} weights held orthogonal{released}, {len(self.skipped)} skipped"


@torch.inference_mode(False)  # its parameters could never be trained
def hold(
    model: nn.Module,
    *,
    include: Selector | None = None,
    exclude: Selector = (),
    orthogonal_map: OrthogonalMap = "cayley",
) -> HoldReport:
    """Keep the blocks of every block-sparse layer orthogonal through training, in place.

    Each layer's weight becomes a function of unconstrained parameters (as `torch.nn.utils.parametrizations.orthogonal`
    does it, on the batched blocks; for `nn.ECOConv2d` on its frequencies), whose cost falls with the square of the
    block size; in half precision it is computed in float32.
    Masked and compact layers without a spatial kernel are held, ECO convolutions (also under a mask of blocks), and
    mirrored (looks-linear) weights; values that are not orthogonal move to the nearest ones that are, times their mean
    singular value. Make the optimizer afterwards: the parameters are new ones. `release` undoes it; `remove`, `compact`
    or convert after that.

    Args:
        model: a model with pruned, compact or ECO layers.
        include: glob patterns on module or parameter names, or a predicate ``(name, module) -> bool``; only these
            layers.
        exclude: the same, for layers to skip.
        orthogonal_map: torch's name for the function that makes matrices orthogonal, ``"cayley"`` or
            ``"matrix_exp"``.

    Returns:
        A `HoldReport`; skipped layers are in it with the reason.

    Raises:
        TypeError: if ``model`` is no module, or a selector is neither patterns nor a predicate.
        ValueError: if no chosen layer can be held, a pattern matches nothing or the map is unknown; the model is then
            as it was.

    Warns:
        StaleOptimizerWarning: if an optimizer that was made before holds the parameters that are replaced.

    Example:
        >>> import torch, sao_prune
        >>> net = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(3)))
        >>> _ = sao_prune.apply(net, groups=4, seed=0)
        >>> hold(net).summary()
        '1 weights held orthogonal, 0 skipped'
        >>> optimizer = torch.optim.SGD(net.parameters(), 0.1)
        >>> net(torch.ones(2, 16)).square().sum().backward()
        >>> optimizer.step()
        >>> values = torch.linalg.svdvals(net[1].weight_orig)
        >>> bool((values - 1).abs().max() < 1e-5)
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if orthogonal_map not in get_args(OrthogonalMap):
        raise ValueError(f"orthogonal_map must be one of {get_args(OrthogonalMap)}, got {orthogonal_map!r}")
    settle_all(model)
    records: list[HeldRecord] = []
    ready: list[tuple[nn.Module, str, Held]] = []
    found, shared = list(_candidates(model)), _shared(model)
    for (_, module, tensor, name, layout_of), skipped in zip(found, pick(_named(found), include, exclude)):
        parameter = module._parameters.get(tensor)
        without = _META if parameter is not None and parameter.is_meta else None
        layout = skipped or shared.get(id(parameter)) or without or layout_of()
        if isinstance(layout, str):
            records.append(HeldRecord(name, reason=layout))
            continue
        try:
            held, record = _prepare(name, getattr(module, tensor).detach(), layout, orthogonal_map)
        except ValueError as error:
            records.append(HeldRecord(name, reason=str(error)))
            continue
        records.append(record)
        ready.append((module, tensor, held))
    if not ready:
        reasons = "; ".join(f"{r.name}: {r.reason}" for r in records[:6])
        raise ValueError(
            f"nothing to hold in {type(model).__name__}: it needs layers that sao_prune.apply, compact or "
            f"nn.ECOConv2d made" + (f" ({reasons})" if reasons else "")
        )
    warn_replaced([module._parameters[tensor] for module, tensor, _ in ready], "hold", 4)
    for module, tensor, held in ready:
        put(module, tensor, held)
    return HoldReport(tuple(records), "held")


@torch.inference_mode(False)  # its parameters could never be trained
def release(model: nn.Module, *, include: Selector | None = None, exclude: Selector = ()) -> HoldReport:
    """Undo `hold`, in place: plain parameters with the values they have now.

    Copies of the model that are held stay so. Make the optimizer afterwards: the parameters are new ones.

    Args:
        model: any module; one in which nothing is held stays as it is.
        include: glob patterns on module or parameter names, or a predicate ``(name, module) -> bool``; only these
            layers.
        exclude: the same, for layers that stay held.

    Returns:
        A `HoldReport` of all weights that were held, the released ones in its ``released``.

    Raises:
        TypeError: if the model is no module, or a selector is neither patterns nor a predicate.
        ValueError: if a pattern matches nothing, or a held weight has further parametrizations; nothing is released
            then.

    Warns:
        StaleOptimizerWarning: if an optimizer that was made before holds the parameters that are replaced.

    Example:
        >>> import torch, sao_prune
        >>> net = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(3)))
        >>> _ = sao_prune.apply(net, groups=4, seed=0)
        >>> _ = hold(net)
        >>> len(release(net).released), type(net[1].weight_orig).__name__
        (1, 'Parameter')
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    found = [(path, m, tensor) for path, m in model.named_modules() for tensor in held_tensors(m)]
    named = [(path, m, [tensor, tensor.removesuffix("_orig")]) for path, m, tensor in found]
    skipped = pick(named, include, exclude)
    targets = [each for each, reason in zip(found, skipped) if reason is None]
    for path, module, tensor in targets:
        steps = module.parametrizations[tensor]  # type: ignore[index]
        if len(steps) > 1:
            raise ValueError(
                f"{dotted(path, tensor)} is held and has a further parametrization ({type(steps[-1]).__name__}): "
                "remove that first; nothing was released"
            )
    gone = [p for _, m, tensor in targets for p in m.parametrizations[tensor].parameters()]  # type: ignore[index]
    warn_replaced(gone, "release", 4)
    for _, module, tensor in targets:
        take_off(module, tensor)
    records = [
        HeldRecord(
            dotted(path, tensor.removesuffix("_orig")), reason=_RELEASED if reason is None else f"still held: {reason}"
        )
        for (path, _, tensor), reason in zip(found, skipped)
    ]
    return HoldReport(tuple(records), "released")


Found = tuple[str, nn.Module, str, str, Callable[[], "Layout | str"]]


def _candidates(model: nn.Module) -> Iterator[Found]:
    """Path, module, tensor and name of everything that might be held, and what gives its layout or says why not."""
    modules = dict(model.named_modules())
    for path, module in modules.items():
        if isinstance(module, ECOConv2d) and "weight_mask" not in module._buffers:
            yield path, module, "weight", dotted(path, "weight"), partial(_eco_layout, module)
        elif isinstance(module, BlockModule):
            yield path, module, "blocks", dotted(path, "blocks"), partial(_compact_layout, module)
        elif reason := why_not_plain(module, masked=True):
            for hook in pruning_hooks(module):
                yield path, module, hook._tensor_name, dotted(path, hook._tensor_name), partial(str, reason)
    for weight in walk(model, Selection(skip_first=False, skip_last=False)):
        if weight.reason == ALREADY_PRUNED:
            module = modules[weight.module]
            if not why_not_plain(module, masked=True):
                layout = partial(_masked_layout, module, weight)
                yield weight.module, module, f"{weight.tensor}_orig", weight.name, layout


def _shared(model: nn.Module) -> dict[int, str]:
    """Why a parameter that several modules have cannot be held, by its id: each would get one of its own."""
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for tensor, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(dotted(path, tensor.removesuffix("_orig")))
    return {
        key: f"{' and '.join(names)} are one weight, and hold would give each its own: use one module twice instead"
        for key, names in owners.items()
        if len(names) > 1
    }


def _named(found: list[Found]) -> list[tuple[str, nn.Module, list[str]]]:
    return [(path, module, [tensor, tensor.removesuffix("_orig")]) for path, module, tensor, _, _ in found]


_SPATIAL = "a spatial kernel stays orthogonal only in nn.ECOConv2d (nn.convert_eco puts it in place)"
_META = "it is on the meta device, without values"


def _eco_layout(module: ECOConv2d) -> Layout | str:
    kernel = (module.kernel_size[0], module.kernel_size[1])
    return why_not_plain(module) or FrequencyLayout(module.topology, kernel)


def _compact_layout(module: BlockModule) -> Layout | str:
    reason = why_not_plain(module)
    if reason is not None:
        return reason
    spatial = prod(module.weight_shape[2:]) > 1
    if getattr(module, "stacked", 1) > 1:
        return "its blocks are of several gates, each orthogonal for itself: hold it in its masked form (expand)"
    return _SPATIAL if spatial else CompactLayout(module.topology, tuple(module.blocks.shape))


def _masked_layout(module: nn.Module, weight: PrunableWeight) -> Layout | str:
    if prod(weight.kernel) > 1:
        return _masked_eco_layout(module, weight) if isinstance(module, ECOConv2d) else _SPATIAL
    mask = getattr(module, f"{weight.tensor}_mask")
    try:
        parts = weight.matrices(mask).flatten(3).squeeze(3) if weight.kernel else weight.matrices(mask)
        return MaskedLayout(weight, tuple(BlockTopology.from_mask(part) for part in parts))
    except NotBlockStructuredError:
        return "its mask is not made of blocks"


def _masked_eco_layout(module: ECOConv2d, weight: PrunableWeight) -> Layout | str:
    if module.groups > 1:
        return "its mask lies on blocks of its own: build it with as many groups instead"
    kernels = getattr(module, f"{weight.tensor}_mask").flatten(2)
    if not torch.equal(kernels.any(2), kernels.all(2)):
        return "its mask splits kernels"
    try:
        topology = BlockTopology.from_mask(kernels.any(2))
    except NotBlockStructuredError:
        return "its mask is not made of blocks"
    return MaskedFrequencyLayout(topology, (module.kernel_size[0], module.kernel_size[1]))


def _prepare(name: str, weight: Tensor, layout: Layout, kind: OrthogonalMap) -> tuple[Held, HeldRecord]:
    """The parametrization of a weight, not on it yet, and what it will do to it."""
    blocks = [b.double() for b in layout.split(weight.to(precise(weight.dtype)))]
    mirrors = [mirror_of(b) for b in blocks]
    halves = [halve(b, m) for b, m in zip(blocks, mirrors)]
    factors = [torch.linalg.svd(h, full_matrices=False) for h in halves]
    values = torch.cat([s.flatten() for _, s, _ in factors])
    gain = float(values.mean())
    if not gain > 0 or not bool(torch.isfinite(values).all()):
        raise ValueError("its blocks are zero or not finite")
    if abs(gain - round(gain, 4)) < 1e-6:
        gain = round(gain, 4)
    moved = [
        0.0 if bool((s - gain).abs().max() < 1e-5 * gain) else float((gain * u @ v - h).abs().max())
        for h, (u, s, v) in zip(halves, factors)
    ]
    held = Held(layout, weight, kind, gain, mirrors)
    return held, HeldRecord(name, sum(h.shape[0] for h in halves), gain, max(moved))
