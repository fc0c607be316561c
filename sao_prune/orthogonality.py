"""Isometry that lasts: keep the blocks of a sparse model orthogonal while it trains."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from typing import get_args

import torch
from torch import Tensor, nn

from .blocks import BlockModule
from .discovery import ALREADY_PRUNED, PrunableWeight, Selection, Selector, walk
from .held import Held, OrthogonalMap, held_tensors, precise, put, take_off
from .layouts import CompactLayout, FrequencyLayout, Layout, MaskedLayout, halve, mirror_of
from .nn import ECOConv2d
from .plain import why_not_plain
from .prune import pruning_hooks, settle_all
from .replaced import warn_replaced
from .topology import BlockTopology, NotBlockStructuredError


@dataclass(frozen=True)
class HeldRecord:
    """One weight.

    Attributes:
        name: full parameter name.
        blocks: matrices that are kept orthogonal; for an ECO convolution one for every block and free frequency.
        gain: singular value they keep.
        moved: largest change of a value on the way to the nearest orthogonal one.
        reason: why it was left alone; ``None`` if it is held.
    """

    name: str
    blocks: int = 0
    gain: float = 0.0
    moved: float = 0.0
    reason: str | None = None


@dataclass(frozen=True)
class HoldReport:
    """What `hold` did; prints one line a layer."""

    layers: tuple[HeldRecord, ...]

    @property
    def held(self) -> tuple[HeldRecord, ...]:
        """The records of the layers that are held."""
        return tuple(layer for layer in self.layers if layer.reason is None)

    def __str__(self) -> str:
        return "\n".join(
            f"{r.name}: {r.reason}"
            if r.reason
            else f"{r.name}: {r.blocks} blocks held at gain {r.gain:.4g} (moved by {r.moved:.1e})"
            for r in self.layers
        )


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
    Masked and compact layers without a spatial kernel are held, ECO convolutions, and mirrored (looks-linear) weights;
    values that are not orthogonal move to the nearest ones that are, times their mean singular value. Make the
    optimizer afterwards: the parameters are new ones. `release` undoes it; save, bake, compact or convert after that.

    Args:
        model: a model with pruned, compact or ECO layers.
        include: glob patterns or a predicate; only these layers.
        exclude: layers to leave alone.
        orthogonal_map: torch's name for the function that makes matrices orthogonal, ``"cayley"`` or
            ``"matrix_exp"``.

    Returns:
        A `HoldReport`; layers left alone are in it with the reason.

    Raises:
        TypeError: if ``model`` is no module.
        ValueError: if no layer can be held or the map is unknown; the model is then as it was.

    Warns:
        StaleOptimizerWarning: if an optimizer that was made before holds the parameters that are replaced.

    Example:
        >>> import torch, sao_prune
        >>> net = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(3)))
        >>> _ = sao_prune.apply(net, groups=4, seed=0)
        >>> print(hold(net))
        1.weight: 4 blocks held at gain 1 (moved by 0.0e+00)
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
    for module, tensor, name, layout in _candidates(model, include, exclude):
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
    warn_replaced([module._parameters[tensor] for module, tensor, _ in ready], "hold")
    for module, tensor, held in ready:
        put(module, tensor, held)
    return HoldReport(tuple(records))


def release(model: nn.Module) -> int:
    """Undo `hold`, in place: plain parameters with the values they have now.

    Copies of the model that are held stay so. Make the optimizer afterwards: the parameters are new ones.

    Returns:
        How many weights were released.

    Raises:
        TypeError: if the model is no module.
        ValueError: if a held weight has further parametrizations; nothing is released then.

    Warns:
        StaleOptimizerWarning: if an optimizer that was made before holds the parameters that are replaced.

    Example:
        >>> import torch, sao_prune
        >>> net = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(3)))
        >>> _ = sao_prune.apply(net, groups=4, seed=0)
        >>> _ = hold(net)
        >>> release(net), type(net[1].weight_orig).__name__
        (1, 'Parameter')
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    targets = [(path, m, tensor) for path, m in model.named_modules() for tensor in held_tensors(m)]
    for path, module, tensor in targets:
        steps = module.parametrizations[tensor]  # type: ignore[index]
        if len(steps) > 1:
            raise ValueError(
                f"{_join(path, tensor)} is held and has a further parametrization ({type(steps[-1]).__name__}): remove "
                "that first; nothing was released"
            )
    warn_replaced((p for _, m, tensor in targets for p in m.parametrizations[tensor].parameters()), "release")  # type: ignore[index]
    for _, module, tensor in targets:
        take_off(module, tensor)
    return len(targets)


def _candidates(
    model: nn.Module, include: Selector | None, exclude: Selector
) -> Iterator[tuple[nn.Module, str, str, Layout | str]]:
    """Module, tensor, name and layout (or why not) of everything that might be held."""
    modules = dict(model.named_modules())
    chosen = {path: m for path, m in modules.items() if _picked(path, m, include, exclude)}
    for path, module in chosen.items():
        if isinstance(module, ECOConv2d) and "weight_mask" not in module._buffers:
            kernel = (module.kernel_size[0], module.kernel_size[1])
            layout = why_not_plain(module) or FrequencyLayout(module.topology, kernel)
            yield module, "weight", _join(path, "weight"), layout
        elif isinstance(module, BlockModule):
            yield module, "blocks", _join(path, "blocks"), why_not_plain(module) or _compact_layout(module)
        elif reason := why_not_plain(module, masked=True):
            for hook in pruning_hooks(module):
                yield module, hook._tensor_name, _join(path, hook._tensor_name), reason
    for weight in walk(model, Selection(skip_first=False, skip_last=False)):
        if weight.reason == ALREADY_PRUNED and weight.module in chosen:
            module = modules[weight.module]
            if not why_not_plain(module, masked=True):
                yield module, f"{weight.tensor}_orig", weight.name, _masked_layout(module, weight)


_SPATIAL = "a spatial kernel stays orthogonal only in nn.ECOConv2d (nn.convert_eco puts it in place)"


def _compact_layout(module: BlockModule) -> Layout | str:
    spatial = prod(module.weight_shape[2:]) > 1
    if getattr(module, "stacked", 1) > 1:
        return "its blocks are of several gates, each orthogonal for itself: hold it in its masked form (expand)"
    return _SPATIAL if spatial else CompactLayout(module.topology, tuple(module.blocks.shape))


def _masked_layout(module: nn.Module, weight: PrunableWeight) -> Layout | str:
    if prod(weight.kernel) > 1:
        return _SPATIAL
    mask = getattr(module, f"{weight.tensor}_mask")
    try:
        parts = weight.matrices(mask).flatten(3).squeeze(3) if weight.kernel else weight.matrices(mask)
        return MaskedLayout(weight, tuple(BlockTopology.from_mask(part) for part in parts))
    except NotBlockStructuredError:
        return "its mask is not made of blocks"


def _picked(path: str, module: nn.Module, include: Selector | None, exclude: Selector) -> bool:
    def among(selector: Selector) -> bool:
        return selector(path, module) if callable(selector) else any(fnmatchcase(path, p) for p in selector)

    return (include is None or among(include)) and not (exclude and among(exclude))


def _join(path: str, tensor: str) -> str:
    return f"{path}.{tensor}" if path else tensor


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
