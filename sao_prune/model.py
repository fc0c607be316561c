"""The verbs over a whole model: plan, apply, remove, report."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.prune import remove as torch_remove
from typing_extensions import Unpack

from .allocate import Allocation, Amount, Budget, Distribution, Fit, allocate
from .methods import RG, SAO, Draw, Method, resolve
from .prune import MaskPruning, RamanujanPruning, SAOPruning, refresh, settle, unwatch_children, watch_children
from .report import LayerRecord, Report, SparsityWarning
from .seeds import Seed, base_seed
from .topology import BlockTopology
from .walk import ALREADY_PRUNED, PrunableWeight, Selection, Selector, walk

Method_ = str | Method


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


def plan(
    model: nn.Module, sparsity: Amount | None = None, *, method: Method_ = "sao", **options: Unpack[PlanOptions]
) -> Report:
    """Tell what `apply` would do, touching no weight; works on the meta device.

    Args:
        model: any module.
        sparsity: share of zeros in the pruned layers, or a mapping from glob patterns to shares.
        method: a name from `methods` or an instance with options.
        **options: ``degree`` or ``groups`` in place of ``sparsity``, numbers or mappings; ``fit`` ("nearest",
            "regular", "exact"); ``distribution`` ("uniform", "erk"); ``include`` and ``exclude``, glob patterns or a
            predicate ``(name, module) -> bool``; ``skip_first``, ``skip_last``; ``example_input`` for execution order.

    Returns:
        A `Report` with what each layer would get.

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
    _, items = _allocate(model, sparsity, options)
    records = [
        _planned(item, chosen.structured) if isinstance(item, Allocation) else _left_alone(item) for item in items
    ]
    return _report(model, records, f"plan: {chosen.name}", warn=chosen.layerwise)


def apply(
    model: nn.Module,
    sparsity: Amount | None = None,
    *,
    method: Method_ = "sao",
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
        A `Report`; its table says for each layer what was asked, what was done, or why it was left alone.

    Raises:
        TypeError: if the model is no module, or an option has the wrong type.
        ValueError: if the amount is out of range, a pattern matches nothing, no layer can be pruned, a chosen layer
            is pruned already, or weights are on the meta device.

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
    modules, items = _allocate(model, sparsity, options)
    allocations = [item for item in items if isinstance(item, Allocation)]
    weights = [_tensor(modules, a.weight, meta=form == "compact") for a in allocations]
    base = base_seed(seed)
    with torch.no_grad():
        draws = chosen.draw(allocations, weights, base)
    if form == "compact":
        # Imported here because compact is built on everything to its left, this module's parts among it.
        from .compact.build import install

        install(model, draws, _hook_class(chosen), base)
    else:
        _attach_all(modules, draws, _hook_class(chosen))
    by_name = {draw.weight.name: draw for draw in draws}
    records = [_done(i, by_name[i.weight.name]) if isinstance(i, Allocation) else _left_alone(i) for i in items]
    return _report(model, records, f"applied: {chosen.name}", warn=chosen.layerwise)


def remove(model: nn.Module, *, freeze_zeros: bool = False) -> Report:
    """Make the pruning permanent, in place: plain weights again, with zeros where the masks had them.

    Args:
        model: a pruned model; masks of `torch.nn.utils.prune` are baked too.
        freeze_zeros: keep the zeros through further training, by a gradient hook on each weight. Without it the next
            optimiser step may revive them. The hooks belong to this object: copies and loaded models lack them.

    Returns:
        A `Report` of the baked layers.

    Raises:
        ValueError: if nothing in the model is pruned.

    Example:
        >>> import torch, sao_prune
        >>> net = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3)))
        >>> _ = sao_prune.apply(net, groups=4, seed=0)
        >>> sao_prune.remove(net).sparsity, type(net[1].weight).__name__
        (0.75, 'Parameter')
    """
    targets = _pruned_tensors(model)
    if not targets:
        raise ValueError("nothing to remove: no layer of the model is pruned")
    before = report(model)
    for module, name in targets:
        mask = getattr(module, f"{name}_mask")
        torch_remove(module, name)
        if freeze_zeros:
            getattr(module, name).register_hook(lambda grad, mask=mask: grad * mask)
    for module in model.modules():
        unwatch_children(module)
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
    records = []
    for weight in walk(model, Selection(skip_first=False, skip_last=False)):
        if weight.reason not in (None, ALREADY_PRUNED):
            records.append(_left_alone(weight))
            continue
        records.append(_read_back(modules[weight.module], weight))
    records += [_compact_record(path, module) for path, module in modules.items() if hasattr(module, "weight_shape")]
    return _report(model, records, "model", warn=False)


def _allocate(
    model: nn.Module, sparsity: Amount | None, options: PlanOptions
) -> tuple[dict[str, nn.Module], list[Allocation | PrunableWeight]]:
    known = set(PlanOptions.__annotations__)
    unknown = sorted(set(options) - known)
    if unknown:
        raise TypeError(f"unknown option {unknown[0]!r}; known: {', '.join(sorted(known))}")
    budget_keys = ("degree", "groups", "fit", "distribution")
    budget = Budget(sparsity, **{k: v for k, v in options.items() if k in budget_keys})  # type: ignore[arg-type]
    selection = Selection(**{k: v for k, v in options.items() if k not in budget_keys})  # type: ignore[arg-type]
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
    return dict(model.named_modules()), items


def _nothing_to_prune(model: nn.Module, weights: Sequence[PrunableWeight]) -> str:
    if not weights:
        return (
            f"{type(model).__name__} has no layer that can be pruned: looked for linear, convolutional, recurrent and "
            "attention layers; name raw parameters with include=[...]"
        )
    reasons = "; ".join(f"{w.name}: {w.reason}" for w in weights[:6]) + ("; .." if len(weights) > 6 else "")
    return f"no layer of {type(model).__name__} is left to prune ({reasons})"


def _tensor(modules: dict[str, nn.Module], weight: PrunableWeight, meta: bool = False) -> Tensor:
    tensor = getattr(modules[weight.module], weight.tensor)
    if tensor.is_meta and not meta:
        raise ValueError(f"{weight.name} is on the meta device: plan() works there, apply() needs real weights")
    return tensor.detach()


def _hook_class(method: Method) -> type[MaskPruning]:
    return SAOPruning if isinstance(method, SAO) else RamanujanPruning if isinstance(method, RG) else MaskPruning


class Snapshot:
    """Parameters, buffers and hooks of a module, to put back after a failure."""

    _FIELDS = ("_parameters", "_buffers", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._fields = {field: dict(getattr(module, field)) for field in self._FIELDS}

    def restore(self) -> None:
        """Make the module what it was."""
        for field, items in self._fields.items():
            live = getattr(self._module, field)
            live.clear()
            live.update(items)
        for name, parameter in self._fields["_parameters"].items():
            self._module.__dict__.pop(name, None)
            setattr(self._module, name, parameter)


def _attach_all(modules: dict[str, nn.Module], draws: Sequence[Draw], hook: type[MaskPruning]) -> None:
    """Prune every drawn weight and its aliases; on any failure put everything back and raise.

    Values are written last, when nothing is left that can fail; an interrupt waits until all are written.
    """
    masks = [draw.mask(_tensor(modules, draw.weight)) for draw in draws]
    names = [((draw.weight.module, draw.weight.tensor), *draw.weight.aliases) for draw in draws]
    owned = {path for owners in names for path, _ in owners}
    snapshots = [Snapshot(modules[path]) for path in owned | {path.rpartition(".")[0] for path in owned}]
    try:
        for owners, mask in zip(names, masks):
            for path, tensor in owners:
                hook.register(modules[path], tensor, mask)
                if path:
                    watch_children(modules[path.rpartition(".")[0]])
    except BaseException:
        for snapshot in snapshots:
            snapshot.restore()
        raise
    pending = list(zip(draws, names))
    try:
        while pending:
            _fill(modules, *pending[-1])
            pending.pop()
    except KeyboardInterrupt:
        for draw, owners in pending:
            _fill(modules, draw, owners)
        raise


def _fill(modules: dict[str, nn.Module], draw: Draw, owners: Sequence[tuple[str, str]]) -> None:
    """Write a draw's values and show the masked weight under all its names."""
    draw.write_(getattr(modules[draw.weight.module], f"{draw.weight.tensor}_orig").data)
    for path, tensor in owners:
        if draw.keeps_values:
            refresh(modules[path])
        else:
            settle(modules[path], tensor)


def _pruned_tensors(model: nn.Module) -> list[tuple[nn.Module, str]]:
    return [
        (module, hook._tensor_name)
        for module in model.modules()
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, BasePruningMethod)
    ]


def _left_alone(weight: PrunableWeight) -> LayerRecord:
    total = weight.numel if weight.shape else 0
    return LayerRecord(weight.name, weight.kind, weight.shape, None, None, total, total, weight.reason)


def _planned(allocation: Allocation, structured: bool) -> LayerRecord:
    weight = allocation.weight
    rows, cols = weight.matrix
    kept = allocation.edges / (rows * cols) if structured else allocation.density
    groups = allocation.groups if structured else None
    nnz = round(kept * weight.numel)
    return LayerRecord(
        weight.name, weight.kind, weight.shape, groups, 1 - allocation.density, nnz, weight.numel, None, _note(weight)
    )


def _done(allocation: Allocation, draw: Draw) -> LayerRecord:
    weight = allocation.weight
    rows, cols = weight.matrix
    nnz = draw.edges * (weight.numel // (weight.parts * rows * cols))
    requested = 1 - allocation.density
    return LayerRecord(
        weight.name, weight.kind, weight.shape, draw.groups, requested, nnz, weight.numel, None, _note(weight)
    )


def _note(weight: PrunableWeight) -> str:
    notes = [f"{weight.parts} matrices"] if weight.parts > 1 else []
    notes += [f"tied to {path}.{tensor}" for path, tensor in weight.aliases]
    return "; ".join(notes)


def _read_back(module: nn.Module, weight: PrunableWeight) -> LayerRecord:
    masked = weight.reason == ALREADY_PRUNED
    tensor = getattr(module, f"{weight.tensor}_mask" if masked else weight.tensor).detach()
    entries = weight.matrices(tensor != 0)
    units = entries.flatten(3).any(3) if weight.kernel else entries
    # A delta-orthogonal convolution is zero off its centre tap, but its kernels are there: count whole kernels.
    nnz = int(entries.sum()) if masked else int(units.sum()) * (weight.numel // units.numel())
    record = (weight.name, weight.kind, weight.shape)
    if nnz == weight.numel and not masked:
        return LayerRecord(*record, None, None, nnz, nnz, "dense")
    return LayerRecord(*record, _groups(units), None, nnz, weight.numel, None, _note(weight))


def _compact_record(path: str, module: Any) -> LayerRecord:
    """A block layer, told by its dense weight's shape: compact is built on this module, so its classes are unknown."""
    shape, groups = module.weight_shape, module.topology.groups
    name = f"{path}.weight" if path else "weight"
    total = torch.Size(shape).numel()
    return LayerRecord(name, type(module).__name__, shape, groups, None, module.blocks.numel(), total, None, "compact")


def _groups(units: Tensor) -> int | None:
    try:
        counts = {BlockTopology.from_mask(part).groups for part in units}
    except ValueError:
        return None
    return counts.pop() if len(counts) == 1 else None


def _report(model: nn.Module, records: Sequence[LayerRecord], title: str, *, warn: bool = True) -> Report:
    total = sum(p.numel() for p in model.parameters() if not isinstance(p, nn.parameter.UninitializedParameter))
    total += sum(torch.Size(m.weight_shape).numel() - m.blocks.numel() for m in model.modules() if hasattr(m, "weight_shape"))  # type: ignore[misc, union-attr]
    result = Report(tuple(records), total, title)
    message = result.warning() if warn else None
    if message:
        warnings.warn(message, SparsityWarning, stacklevel=3)
    return result
