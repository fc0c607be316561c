"""The verbs `compact` and `expand`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..prune import RefreshAll, RefreshChildren, pruning_hooks, unwatch, watch
from .absorb import absorb
from .base import BlockModule
from .calls import Calls, record_calls, to_channels_last, to_contiguous
from .eligible import Ineligible, check_state, dense_class, dense_weight, layers, read_from_outside, read_topology
from .native import release_memory
from .report import CompactRecord, CompactReport
from .swap import Changes, become, block_form, dense_form, restore
from .tune import Candidate, Plan, Timings, Tune, default_plan, fused, mode_of, native_plan, plans, time_model


def compact(model: nn.Module, *, example_input: Any = None, tune: Tune = None) -> CompactReport:
    """Make every block-sparse layer of a model hold and compute only its blocks, in place.

    The topology is read from the mask, or from the zeros of a baked or loaded weight. Outputs and gradients stay what
    they were, within rounding. Make the optimizer afterwards: the parameters are new ones. Converted are stock
    linear and convolutional layers; the report says why others were left.

    Args:
        model: any module.
        example_input: a tensor, tuple or dict to run once before and once after; if the outputs differ, or a layer's
            weight turns out to be read without calling it, that is undone. Needed for ``tune``.
        tune: choose each layer's execution by timing it on the example input, for ``"train"`` (forward and backward)
            or ``"infer"``, and the memory format of convolutions by timing the whole model so, in eval mode; a layer
            that no block form makes faster is left. ``None`` uses fixed rules.

    Returns:
        A `CompactReport`; with ``tune``, measured ratios to the dense layer in it.

    Raises:
        TypeError: if the model is no module.
        ValueError: if no layer can be made compact, the model fails on the example input, or its outputs differ. The
            model is then as it was.

    Example:
        >>> import torch, sao_prune
        >>> net = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4)))
        >>> _ = sao_prune.apply(net, sparsity=0.875, seed=0)
        >>> x = torch.randn(2, 64)
        >>> y = net(x)
        >>> report = sao_prune.compact(net, example_input=x)
        >>> len(report.compact), bool(torch.allclose(net(x), y, atol=1e-5)), net[1].blocks.shape
        (2, True, torch.Size([8, 8, 8]))
    """
    _check(model, example_input, tune)
    found = list(layers(model))
    calls = None if example_input is None else record_calls(model, [m for _, m in found], example_input)
    candidates, records = _candidates(model, found, calls)
    if not candidates:
        raise ValueError(_nothing(model, records))
    plan = default_plan(candidates)
    if calls is not None and tune is not None:
        plan = _tuned(model, candidates, calls, example_input, tune)
    undo = _convert(model, candidates, plan)
    try:
        if calls is not None:
            _verify(model, example_input, calls.output)
    except BaseException:
        undo()
        raise
    if not any(True for module in model.modules() for _ in pruning_hooks(module)):
        for module in model.modules():
            unwatch(module)
    for name, choice in plan.choices.items():
        execution = "" if choice.execution is None else str(choice.execution)
        records[name] = replace(records[name], execution=execution, ratio=choice.ratio, reason=choice.reason)
    return CompactReport(tuple(records.values()), "compact")


def _convert(model: nn.Module, candidates: Sequence[Candidate], plan: Plan) -> Callable[[], None]:
    """Make the layers compact as planned; returns what undoes it. If it fails, it is undone."""
    changes: Changes = []
    formats: list[nn.Module] = []

    def undo() -> None:
        restore(changes)
        to_contiguous(formats)
        # Layers that were compact before must not go on relying on the orders of those that no longer are.
        absorb(model)

    try:
        for candidate in candidates:
            choice = plan.choices[candidate.name]
            if choice.execution is not None:
                choice.put(candidate.block)
                changes.append(become(candidate.module, candidate.block))
        if plan.channels_last:
            formats += to_channels_last(model)
        absorb(model)
    except BaseException:
        undo()
        raise
    return undo


def _tuned(
    model: nn.Module, candidates: Sequence[Candidate], calls: Calls, example_input: Any, tune: Literal["train", "infer"]
) -> Plan:
    """The fastest execution of each layer; with or without the native kernels, these with or without what follows
    each layer, and in the memory format, as the whole model runs fastest."""
    ways: list[Plan] = []
    timings: Timings = {}
    mode = mode_of(model, example_input, tune)
    for native, first in ((False, default_plan(candidates)), (True, native_plan(candidates))):
        if first is None:
            continue
        undo = _convert(model, candidates, first)
        try:
            compact_calls = record_calls(model, [c.module for c in candidates], example_input)
        finally:
            undo()
        for way in plans(model, candidates, calls, compact_calls, tune, native, timings):
            undo = _convert(model, candidates, way)
            try:
                both = way, fused(way, candidates, model, example_input)
            except ValueError:
                if way.channels_last:
                    continue  # the model makes views that this memory format does not allow
                raise
            finally:
                undo()
            for each in both:
                if each not in ways:
                    ways.append(each)
    seconds = []
    for plan in ways if len(ways) > 1 else []:
        undo = _convert(model, candidates, plan)
        try:
            seconds.append(time_model(model, example_input, mode))
        finally:
            undo()
    release_memory()
    return ways[seconds.index(min(seconds))] if seconds else ways[0]


def _check(model: nn.Module, example_input: Any, tune: Tune) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if tune not in (None, "train", "infer"):
        raise ValueError(f"tune must be 'train', 'infer' or None, got {tune!r}")
    if tune is not None and example_input is None:
        raise ValueError(f"tune={tune!r} times the layers on an input: give example_input")


def _candidates(
    model: nn.Module, found: list[tuple[str, nn.Module]], calls: Calls | None
) -> tuple[list[Candidate], dict[str, CompactRecord]]:
    """The layers that can be compact, and a record of every layer; touches nothing."""
    outside = read_from_outside(model)
    candidates, records = [], {}
    for name, module in found:
        if isinstance(module, BlockModule):
            shape, groups = module.weight_shape, module.topology.groups
            records[name] = CompactRecord(name, type(module).__name__, shape, groups, reason="compact already")
            continue
        record = CompactRecord(name, type(module).__name__, _shape(module))
        try:
            dense_class(module)
            check_state(module)
            if id(module) in outside:
                raise Ineligible(outside[id(module)])
            if calls is not None and id(module) not in calls.inputs:
                raise Ineligible("the example input does not call it, so its weight is unused or read from outside")
            topology = read_topology(module)
            candidates.append(Candidate(name, module, block_form(module, topology)))
            records[name] = replace(record, groups=topology.groups)
        except Ineligible as reason:
            records[name] = replace(record, reason=str(reason))
    return candidates, records


def _shape(module: nn.Module) -> tuple[int, ...]:
    try:
        return tuple(dense_weight(module).shape)
    except (AssertionError, RuntimeError):
        return ()


def _nothing(model: nn.Module, records: dict[str, CompactRecord]) -> str:
    name = type(model).__name__
    if not records:
        return f"{name} has no linear or convolutional layer to make compact"
    reasons = "; ".join(f"{r.name or name}: {r.reason}" for r in list(records.values())[:6])
    return f"no layer of {name} can be made compact ({reasons}{'; ..' if len(records) > 6 else ''})"


def _verify(model: nn.Module, example_input: Any, expected: Any) -> None:
    """Refuse a conversion after which the model's outputs differ by more than rounding."""
    after = record_calls(model, [], example_input).output
    for number, (new, old) in enumerate(zip(tree_leaves(after), tree_leaves(expected))):
        if not isinstance(old, Tensor) or not old.is_floating_point():
            continue
        scale = float(old.abs().max()) if old.numel() else 0.0
        tolerance = max(scale, 1.0) * 1e-3 * (1 if old.dtype in (torch.float32, torch.float64) else 30)
        if new.shape != old.shape or not torch.allclose(new, old, rtol=0, atol=tolerance, equal_nan=True):
            raise ValueError(
                f"output {number} of the compact model differs from the original's on the example input "
                f"(by up to {float((new - old).abs().max()):.3g}); the model was left as it was"
            )


def expand(model: nn.Module, form: Literal["masked", "baked"] | None = None) -> CompactReport:
    """Turn every block layer back into its dense one, in place.

    Args:
        model: any module.
        form: ``"masked"`` puts ``weight_orig`` and ``weight_mask`` back, so that training keeps the zeros;
            ``"baked"`` plain weights; ``None`` what each layer was before.

    Returns:
        A `CompactReport` that lists the expanded layers as left.

    Raises:
        ValueError: if no layer is compact, or for an unknown form.

    Example:
        >>> import torch, sao_prune
        >>> net = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3)))
        >>> _ = sao_prune.apply(net, groups=4, seed=0)
        >>> _ = sao_prune.compact(net)
        >>> _ = sao_prune.expand(net)
        >>> type(net[1]).__name__, sorted(net[1].state_dict())
        ('Linear', ['bias', 'weight_mask', 'weight_orig'])
    """
    if form not in (None, "masked", "baked"):
        raise ValueError(f"form must be 'masked', 'baked' or None, got {form!r}")
    targets = [(name, m) for name, m in layers(model) if isinstance(m, BlockModule)]
    if not targets:
        raise ValueError("nothing to expand: no layer of the model is compact")
    records = []
    for name, module in targets:
        dense = dense_form(module, None if form is None else form == "masked")
        records.append(
            CompactRecord(name, type(dense).__name__, module.weight_shape, module.topology.groups, reason="expanded")
        )
        become(module, dense)
        if any(True for _ in pruning_hooks(module)):
            watch(model, RefreshAll)
            if name:
                watch(model.get_submodule(name.rpartition(".")[0]), RefreshChildren)
    to_contiguous(model.modules())
    return CompactReport(tuple(records), "expanded")
