"""The verbs over a whole model: plan, apply, remove, report."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import remove as torch_remove
from typing_extensions import Unpack

from ._torch import as_numbers
from .algorithms import Method, ResidualRecord, resolve
from .algorithms.isometric import Isometric, values_after
from .allocation import Allocation, Amount
from .analysis.residual import with_spectra
from .blocks import BlockModule, release_memory
from .blocks.build import install
from .discovery import ALREADY_PRUNED, PrunableWeight, Selection, Selector, initialise_, pick, untouched, walk
from .held import held_tensors
from .naming import dotted
from .options import PlanOptions, allocate_model, asked
from .plain import why_not_plain
from .prune import attach_all, bake_standardising, freeze, pruning_class, pruning_hooks, settle_all, unwatch
from .prune.attachment import check_writable, written
from .reporting import LayerRecord, Report, SparsityWarning, done, packed, pruned, read_back, skipped
from .seeds import Seed, base_seed


# Topologies are drawn as numbers, whatever mode (fake tensors, for one) a model is looked at in.
@as_numbers()
def plan(
    model: nn.Module, sparsity: Amount | None = None, *, method: str | Method = "sao", **options: Unpack[PlanOptions]
) -> Report:
    """Tell what `apply` would do, touching no weight; works on the meta device and with fake tensors.

    Args:
        model: any module.
        sparsity: of the pruned layers, in [0, 1), or a mapping from glob patterns to sparsities.
        method: a name from `methods` or an instance with options.
        **options: ``degree`` or ``groups`` in place of ``sparsity``, numbers or mappings; ``fit`` ("nearest",
            "regular", "exact"); ``distribution`` ("uniform", "erk"); or all of these as one ``budget``, a `Budget`.
            ``include`` and ``exclude``, glob patterns or a predicate ``(name, module) -> bool``; ``skip_first``,
            ``skip_last``; ``example_input`` for execution order, and for the shapes of lazy layers; or all of these as
            one ``selection``, a `Selection`.

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
    budget, selection = asked(sparsity, options)
    model, items = allocate_model(model, budget, selection)
    allocations = [item for item in items if isinstance(item, Allocation)]
    bound = chosen.bind(model, selection.example_input)
    previews = iter(bound.preview(allocations))
    records = [pruned(i, *next(previews), bound.origin) if isinstance(i, Allocation) else skipped(i) for i in items]
    records += _others(model, items)
    result = _report(model, records, f"plan: {chosen.name}", bound.residuals(allocations))
    return _warn(result, layerwise=chosen.layerwise)


@as_numbers()
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

    `SAO`, the default, draws new values: what the pruned layers had learned is lost, and the model is to be trained
    afterwards. For a trained model take `Project`, which solves for values that do what the layers did, or a method
    that keeps the weight's own (``"rg"``, ``"gmp"``, ..). The report's column *values* says it of every layer.

    Either every chosen layer is pruned or, if anything fails, none: the model is then as it was.

    Args:
        model: any module.
        sparsity: of the pruned layers, in [0, 1), or a mapping from glob patterns to sparsities.
        method: a name from `methods` or an instance with options, such as ``SAO(gain=1.1)``.
        seed: where the draws come from; the global generator stays as it is. With ``None``, `torch.initial_seed`
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
    budget, selection = asked(sparsity, options)
    _, items = allocate_model(model, budget, selection)
    # Lazy layers have shown on a copy that the example input suits them.
    initialise_(model, selection.example_input)
    modules = dict(model.named_modules())
    allocations = [item for item in items if isinstance(item, Allocation)]
    weights = [_stored(modules, a.weight, meta=form == "compact") for a in allocations]
    base = base_seed(seed)
    with torch.no_grad():
        bound = chosen.bind(model, selection.example_input)
        draws = bound.draw_for(model, allocations, weights, base)
        settlement = bound.settle(model, allocations, draws)
        residuals = settlement.residuals
        if isinstance(bound, Isometric) and bound.measures(model):
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
    hook = pruning_class(chosen)
    with written(model, settlement.values):
        if form == "compact":
            install(model, draws, hook, base)
        else:
            attach_all(modules, draws, hook)
    if form == "compact":
        # What was drawn has been copied, and takes more than the blocks.
        del draws, by_name, settlement, weights, bound
        release_memory()
    return result


def remove(
    model: nn.Module, *, include: Selector | None = None, exclude: Selector = (), freeze_zeros: bool = False
) -> Report:
    """Make the pruning permanent, in place: plain weights again, with zeros where the masks had them.

    A layer that standardises its weight keeps doing so: its kept weights lose their mean, so that zeros stay zeros.

    Args:
        model: a pruned model; masks of `torch.nn.utils.prune` are made permanent too.
        include: glob patterns on module or parameter names, or a predicate ``(name, module) -> bool``; only these
            layers. A tied weight is taken by any of its names.
        exclude: the same, for layers that stay masked.
        freeze_zeros: keep the zeros through further training, by a hook on each layer that masks the gradient. Without
            it the next optimizer step may revive them. Make a new optimizer: the momentum of one used so far would
            revive them too. Copies and conversions of the model keep the hooks; a state dict has none. A layer that is
            pruned anew trains where its new mask is.

    Returns:
        A `Report` of the model as it was, the layers that stay masked or dense in it as skipped.

    Raises:
        TypeError: if the model is no module, or a selector is neither patterns nor a predicate.
        ValueError: if nothing that is chosen is pruned, a pattern matches nothing, or a layer is not as pruning left
            it; nothing is then removed.

    Example:
        >>> import torch, sao_prune
        >>> net = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(4)))
        >>> _ = sao_prune.apply(net, groups=4, seed=0)
        >>> sao_prune.remove(net, include=["1"]).sparsity, type(net[1].weight).__name__, sorted(net[2].state_dict())
        (0.75, 'Parameter', ['bias', 'weight_mask', 'weight_orig'])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    targets, left = _to_remove(model, include, exclude)
    if not targets:
        raise ValueError(f"nothing to remove: {'no chosen layer' if left else 'no layer of the model'} is pruned")
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
    for module in model.modules() if not left else ():
        unwatch(module)
    masked = {dotted(path, name) for path, name in left}
    layers = [
        replace(layer, groups=None, nnz=layer.total, reason="still masked") if layer.name in masked else layer
        for layer in before.layers
    ]
    return Report(tuple(layers), before.parameters, "baked")


def _to_remove(
    model: nn.Module, include: Selector | None, exclude: Selector
) -> tuple[list[tuple[nn.Module, str, str]], list[tuple[str, str]]]:
    """Module, path and tensor of every mask to make permanent, and path and tensor of the others."""
    found = [(m, path, hook._tensor_name) for path, m in model.named_modules() for hook in pruning_hooks(m)]
    taken = pick([(path, module, [name]) for module, path, name in found], include, exclude)
    # A tied weight is masked under all of its names or under none.
    tied = {id(m._parameters.get(f"{name}_orig")) for (m, _, name), reason in zip(found, taken) if reason is None}
    tied.discard(id(None))
    chosen = [
        reason is None or id(m._parameters.get(f"{name}_orig")) in tied for (m, _, name), reason in zip(found, taken)
    ]
    return (
        [target for target, yes in zip(found, chosen) if yes],
        [(path, name) for (_, path, name), yes in zip(found, chosen) if not yes],
    )


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
    records += [packed(path, module) for path, module in modules.items() if isinstance(module, BlockModule)]
    records += _others(model, weights)
    return _report(model, records, "model")


def _others(model: nn.Module, items: Sequence[Allocation | PrunableWeight]) -> list[LayerRecord]:
    """Records of the parameters of two or more dimensions that are none of the items."""
    known = [item.weight if isinstance(item, Allocation) else item for item in items]
    return [skipped(weight, other=True) for weight in untouched(model, known)]


def _stored(modules: dict[str, nn.Module], weight: PrunableWeight, *, meta: bool) -> Tensor:
    tensor = getattr(modules[weight.module], weight.tensor)
    if not (meta and tensor.is_meta):
        check_writable(weight.name, tensor)
    return tensor.detach()


def _report(
    model: nn.Module, records: Sequence[LayerRecord], title: str, residuals: tuple[ResidualRecord, ...] = ()
) -> Report:
    return Report(tuple(records), dense_size(model), title, residuals)


def dense_size(model: nn.Module) -> int:
    """How many parameters a model would have were its compact and held layers dense ones."""
    total = sum(p.numel() for p in model.parameters() if not isinstance(p, nn.parameter.UninitializedParameter))
    for module in model.modules():
        if isinstance(module, BlockModule):
            held = packed("", module)
            total += held.total - held.nnz
        for tensor in held_tensors(module):
            if tensor.endswith("_orig"):
                chains: Any = module.parametrizations
                free = sum(p.numel() for p in chains[tensor].parameters())
                total += getattr(module, f"{tensor.removesuffix('_orig')}_mask").numel() - free
    return total


def _warn(result: Report, *, layerwise: bool) -> Report:
    message = result.warning(layerwise=layerwise)
    if message:
        warnings.warn(message, SparsityWarning, stacklevel=4)
    return result
