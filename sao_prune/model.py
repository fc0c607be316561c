"""The verbs over a whole model: plan, apply, remove, report."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import remove as torch_remove
from torch.utils._python_dispatch import _disable_current_modes
from typing_extensions import Unpack

from .algorithms import RG, SAO, Method, ResidualRecord, resolve
from .algorithms.isometric import Isometric, values_after
from .allocation import Allocation, Amount, Budget, Distribution, Fit, allocate
from .discovery import (
    ALREADY_PRUNED,
    PrunableWeight,
    Selection,
    Selector,
    initialise_,
    initialised,
    is_block_layer,
    untouched,
    walk,
)
from .held import held_tensors
from .plain import why_not_plain
from .prune import (
    MaskPruning,
    RamanujanPruning,
    SAOPruning,
    attach_all,
    bake_standardising,
    freeze,
    pruning_hooks,
    settle_all,
    unwatch,
)
from .prune.attachment import check_writable, written
from .reporting import LayerRecord, Report, SparsityWarning, compact, done, pruned, read_back, skipped
from .seeds import Seed, base_seed


class PlanOptions(TypedDict, total=False):
    """Keyword options that `plan` and `apply` share; see `Budget` and `Selection` for what they mean."""

    degree: Amount | None
    groups: Amount | None
    fit: Fit
    distribution: Distribution
    include: Selector | None
    exclude: Selector
    skip_first: bool
    skip_last: bool
    example_input: Any


# Topologies are drawn as numbers, whatever mode (fake tensors, for one) a model is looked at in.
@_disable_current_modes()
def plan(
    model: nn.Module, sparsity: Amount | None = None, *, method: str | Method = "sao", **options: Unpack[PlanOptions]
) -> Report:
    """Tell what `apply` would do, touching no weight; works on the meta device and with fake tensors.

    Args:
        model: any module.
        sparsity: share of zeros in the pruned layers, or a mapping from glob patterns to shares.
        method: a name from `methods` or an instance with options.
        **options: ``degree`` or ``groups`` in place of ``sparsity``, numbers or mappings; ``fit`` ("nearest",
            "regular", "exact"); ``distribution`` ("uniform", "erk"); ``include`` and ``exclude``, glob patterns or a
            predicate ``(name, module) -> bool``; ``skip_first``, ``skip_last``; ``example_input`` for execution order,
            and for the shapes of lazy layers.

    Returns:
        A `Report` with what each layer would get. Parameters of two or more dimensions that are in no layer to prune
        come last, each with what it is.

    Raises:
        TypeError: if the model is no module, or an option has the wrong type.
        ValueError: if the amount is out of range, a pattern matches nothing, or no layer can be pruned.

    Example:
        >>> import torch, sao_prune
        >>> with torch.device("meta"):
        ...     net = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(4)))
        >>> [layer.groups for layer in sao_prune.plan(net, sparsity=0.96875).layers]
        [None, 32, 32, None]
    """
    chosen = resolve(method)
    model, items = allocate_model(model, sparsity, options)
    allocations = [item for item in items if isinstance(item, Allocation)]
    bound = chosen.bind(model, options.get("example_input"))
    foretold = iter(bound.foretell(allocations))
    records = [pruned(i, *next(foretold)) if isinstance(i, Allocation) else skipped(i) for i in items]
    records += _others(model, items)
    result = _report(model, records, f"plan: {chosen.name}", bound.residuals(allocations))
    return _warn(result, layerwise=chosen.layerwise)


@_disable_current_modes()
def apply(
    model: nn.Module,
    sparsity: Amount | None = None,
    *,
    method: str | Method = "sao",
    seed: Seed = None,
    form: Literal["masked", "compact"] = "masked",
    **options: Unpack[PlanOptions],
) -> Report:
    """Make a model sparse, in place: ``weight_orig`` and ``weight_mask`` as `torch.nn.utils.prune` has them.

    Either every chosen layer is pruned or, if anything fails, none: the model is then as it was.

    Args:
        model: any module.
        sparsity: share of zeros in the pruned layers, or a mapping from glob patterns to shares.
        method: a name from `methods` or an instance with options, such as ``SAO(gain=1.1)``.
        seed: where the draws come from; the global generator is left alone. With ``None``, `torch.initial_seed`
            decides, in a distributed run that of rank 0.
        form: ``"masked"``, or ``"compact"``: block layers at once, so that no dense weight, gradient or optimizer state
            exists; layers without a block form are masked. A model on the meta device is materialised so.
        **options: as for `plan`.

    Returns:
        A `Report`; its table says for each layer what was asked, what was done, or why it was skipped, and of every
        other parameter of two or more dimensions what it is. With ``SAO(residual="isometric")`` its ``residuals`` say
        the same of each residual block.

    Raises:
        TypeError: if the model is no module, or an option has the wrong type.
        ValueError: if the amount is out of range, a pattern matches nothing, no layer can be pruned, a chosen layer
            is pruned already, or weights are on the meta device or fake.

    Warns:
        SparsityWarning: if layers cannot have the requested sparsity to within a percentage point.

    Example:
        >>> import torch, sao_prune
        >>> net = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4)))
        >>> report = sao_prune.apply(net, degree=4, seed=0)
        >>> report.sparsity, net[1].weight_mask.sum(1).unique().tolist()
        (0.9375, [4.0])
    """
    chosen = resolve(method)
    if form not in ("masked", "compact"):
        raise ValueError(f"form must be 'masked' or 'compact', got {form!r}")
    _, items = allocate_model(model, sparsity, options)
    # Lazy layers have shown on a copy that the example input suits them.
    initialise_(model, options.get("example_input"))
    modules = dict(model.named_modules())
    allocations = [item for item in items if isinstance(item, Allocation)]
    weights = [_stored(modules, a.weight, meta=form == "compact") for a in allocations]
    base = base_seed(seed)
    with torch.no_grad():
        bound = chosen.bind(model, options.get("example_input"))
        draws = bound.draw_for(model, allocations, weights, base)
        settlement = bound.settle(model, allocations, draws)
        residuals = settlement.residuals
        if isinstance(bound, Isometric) and bound.measures(model):
            # Imported here because analysis is built on this module.
            from .analysis.residual import with_spectra

            after = values_after(model, draws, settlement.values)
            residuals = with_spectra(residuals, model, bound.example_input, after)
    by_name = {draw.weight.name: draw for draw in draws}
    notes = settlement.notes
    records = [
        done(i, by_name[i.weight.name], notes.get(i.weight.name, "")) if isinstance(i, Allocation) else skipped(i)
        for i in items
    ]
    records += _others(model, items)
    # Before anything is changed: a warning may be an error.
    result = _report(model, records, f"applied: {chosen.name}", residuals)
    result = _warn(result, layerwise=chosen.layerwise)
    hook = {SAO: SAOPruning, RG: RamanujanPruning}.get(type(chosen), MaskPruning)
    with written(model, settlement.values):
        if form == "compact":
            # Imported here because compact is built on everything to its left, this module's parts among it.
            from .blocks.build import install

            install(model, draws, hook, base)
        else:
            attach_all(modules, draws, hook)
    return result


def remove(model: nn.Module, *, freeze_zeros: bool = False) -> Report:
    """Make the pruning permanent, in place: plain weights again, with zeros where the masks had them.

    A layer that standardises its weight keeps doing so: its kept weights lose their mean, so that zeros stay zeros.

    Args:
        model: a pruned model; masks of `torch.nn.utils.prune` are baked too.
        freeze_zeros: keep the zeros through further training, by a hook on each layer that masks the gradient. Without
            it the next optimiser step may revive them. Make a new optimiser: the momentum of one used so far would
            revive them too. Copies and conversions of the model keep the hooks; a state dict has none.

    Returns:
        A `Report` of the baked layers.

    Raises:
        TypeError: if the model is no module.
        ValueError: if nothing in the model is pruned, or a layer is not as pruning left it; nothing is then removed.

    Example:
        >>> import torch, sao_prune
        >>> net = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3)))
        >>> _ = sao_prune.apply(net, groups=4, seed=0)
        >>> sao_prune.remove(net).sparsity, type(net[1].weight).__name__
        (0.75, 'Parameter')
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    targets = [(m, path, hook._tensor_name) for path, m in model.named_modules() for hook in pruning_hooks(m)]
    if not targets:
        raise ValueError("nothing to remove: no layer of the model is pruned")
    for module, path, name in targets:
        original = module._parameters.get(f"{name}_orig")
        if original is None or f"{name}_mask" not in module._buffers:
            why = why_not_plain(module, masked=True) or "it has lost its weight or mask"
            raise ValueError(f"{path}.{name}: {why}; nothing was removed")
        if name in module._parameters:
            raise ValueError(
                f"{path}.{name} was replaced by another parameter while it was pruned; nothing was removed: "
                f"`del model.{path}.{name}` first, and replace it after remove"
            )
        check_writable(f"{path}.{name}", original)
    settle_all(model)
    before = report(model)
    for module, _, name in targets:
        mask = getattr(module, f"{name}_mask")
        torch_remove(module, name)
        bake_standardising(module, name, mask, keep_support=freeze_zeros)
        if freeze_zeros:
            freeze(module, name, mask)
    for module in model.modules():
        unwatch(module)
    return Report(before.layers, before.parameters, "baked")


def report(model: nn.Module) -> Report:
    """Read back what is pruned in a model: from its masks, or from the zeros that `remove` left.

    Returns:
        A `Report`; ``groups`` is given where the support consists of complete blocks. Requested sparsity is unknown.

    Raises:
        TypeError: if the model is no module.

    Example:
        >>> import torch, sao_prune
        >>> net = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3)))
        >>> _ = sao_prune.apply(net, groups=4, seed=0)
        >>> [layer.groups for layer in sao_prune.report(net).layers]
        [None, 4, None]
    """
    modules = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
    weights = walk(model, Selection(skip_first=False, skip_last=False))
    records = [
        read_back(modules[weight.module], weight) if weight.reason in (None, ALREADY_PRUNED) else skipped(weight)
        for weight in weights
    ]
    records += [compact(path, module) for path, module in modules.items() if is_block_layer(module)]
    records += _others(model, weights)
    return _report(model, records, "model")


def allocate_model(
    model: nn.Module, sparsity: Amount | None, options: PlanOptions
) -> tuple[nn.Module, list[Allocation | PrunableWeight]]:
    """The model, or a copy whose lazy layers have their shapes, and what each of its weights is asked for.

    Raises:
        TypeError: for an unknown option.
        ValueError: as `apply` has it.
    """
    known = set(PlanOptions.__annotations__)
    unknown = sorted(set(options) - known)
    if unknown:
        raise TypeError(f"unknown option {unknown[0]!r}; known: {', '.join(sorted(known))}")
    budget_keys = ("degree", "groups", "fit", "distribution")
    budget = Budget(sparsity, **{k: v for k, v in options.items() if k in budget_keys})  # type: ignore[arg-type]
    selection = Selection(**{k: v for k, v in options.items() if k not in budget_keys})  # type: ignore[arg-type]
    if isinstance(model, nn.Module):
        model = initialised(model, selection.example_input)
    weights = walk(model, selection)
    pruned = [w.name for w in weights if w.reason == ALREADY_PRUNED]
    if pruned:
        raise ValueError(
            f"{len(pruned)} of the chosen layers are pruned already ({', '.join(pruned[:4])}"
            f"{', ..' if len(pruned) > 4 else ''}): call sao_prune.remove(model) first, or exclude them"
        )
    items = allocate(weights, budget)
    if not any(isinstance(item, Allocation) for item in items):
        raise ValueError(_nothing_to_prune(model, [i for i in items if isinstance(i, PrunableWeight)]))
    return model, items


def _others(model: nn.Module, items: Sequence[Allocation | PrunableWeight]) -> list[LayerRecord]:
    """Records of the parameters of two or more dimensions that are none of the items."""
    known = [item.weight if isinstance(item, Allocation) else item for item in items]
    return [skipped(weight, other=True) for weight in untouched(model, known)]


def _nothing_to_prune(model: nn.Module, weights: Sequence[PrunableWeight]) -> str:
    if not weights:
        return (
            f"{type(model).__name__} has no layer that can be pruned: looked for linear, convolutional, recurrent and "
            "attention layers; name raw parameters with include=[...]"
        )
    reasons = "; ".join(f"{w.name}: {w.reason}" for w in weights[:6]) + ("; .." if len(weights) > 6 else "")
    return f"no layer of {type(model).__name__} is left to prune ({reasons})"


def _stored(modules: dict[str, nn.Module], weight: PrunableWeight, *, meta: bool) -> Tensor:
    tensor = getattr(modules[weight.module], weight.tensor)
    if not (meta and tensor.is_meta):
        check_writable(weight.name, tensor)
    return tensor.detach()


def _report(
    model: nn.Module, records: Sequence[LayerRecord], title: str, residuals: tuple[ResidualRecord, ...] = ()
) -> Report:
    total = sum(p.numel() for p in model.parameters() if not isinstance(p, nn.parameter.UninitializedParameter))
    for module in model.modules():
        if is_block_layer(module):
            held = compact("", module)
            total += held.total - held.nnz
        for tensor in held_tensors(module):
            if tensor.endswith("_orig"):
                chains: Any = module.parametrizations
                free = sum(p.numel() for p in chains[tensor].parameters())
                total += getattr(module, f"{tensor.removesuffix('_orig')}_mask").numel() - free
    return Report(tuple(records), total, title, residuals)


def _warn(result: Report, *, layerwise: bool) -> Report:
    message = result.warning(layerwise=layerwise)
    if message:
        warnings.warn(message, SparsityWarning, stacklevel=4)
    return result
