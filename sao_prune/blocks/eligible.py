"""Which layers of a model can be made compact, and why others cannot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, replace

from torch import nn

from .._torch import ConvNd
from ..discovery import PrunableWeight, Selector, pick
from ..topology import BlockTopology
from .forms import CompositeForm, Form, Ineligible, LayerForm, form_of, read_topologies, weights_of
from .modules import BlockComposite, BlockModule


def layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every layer of a model of a kind that has a block form, compact ones included, and other convolutions."""
    for name, module in model.named_modules():
        if isinstance(module, (BlockModule, ConvNd)) or form_of(module) is not None:
            yield name, module


def parts_of_composites(model: nn.Module) -> set[int]:
    """Ids of the block layers that are a composite layer's own."""
    return {id(m.layer) for owner in model.modules() if isinstance(owner, BlockComposite) for m in owner.matrices()}


@dataclass(frozen=True)
class Eligible:
    """One weight of a dense layer.

    Attributes:
        name: path of the layer; where it has several weights, that of the weight.
        module: the layer.
        form: its kind; ``None`` where there is none.
        weight: which weight; ``None`` where the layer cannot be looked into.
        found: its topologies, or why it has to stay as it is.
    """

    name: str
    module: nn.Module
    form: Form | None
    weight: PrunableWeight | None
    found: tuple[BlockTopology, ...] | Ineligible


def candidates(model: nn.Module, found: list[tuple[str, nn.Module]], called: Set[int] | None = None) -> list[Eligible]:
    """What can be said of each weight of the dense layers of a model; touches nothing.

    Args:
        model: any module.
        found: its `layers`.
        called: ids of the layers that were called in a run of the model, if it was run.
    """
    dense = [(name, module) for name, module in found if not isinstance(module, BlockModule)]
    outside, tied = read_from_outside(model), _tied(model)
    reasons = {id(m): Ineligible(why) for m in model.modules() if (why := outside.get(id(m)))}
    if called is not None:
        why = "the example input does not call it, so its weight is unused or read from outside"
        reasons = {**{id(m): Ineligible(why) for _, m in dense if id(m) not in called}, **reasons}
    first = [(name, m) for name, m in dense if isinstance(form_of(m), CompositeForm)]
    weights: dict[int, list[Eligible]] = {}
    for name, module in first:
        form = form_of(module)
        assert form is not None
        weights[id(module)] = own = _weights(name, module, form, reasons.get(id(module)))
        joined = [_weights("", m, f, None) for m in form.joins(module) if (f := form_of(m)) is not None]
        fits = not any(isinstance(e.found, Ineligible) and e.weight is None for e in own)
        if fits and any(not isinstance(e.found, Ineligible) for each in (own, *joined) for e in each):
            # In its block form it calls them.
            for inner in form.joins(module):
                if id(inner) not in tied:
                    reasons.pop(id(inner), None)
    for name, module in dense:
        if id(module) not in weights:
            weights[id(module)] = _weights(name, module, form_of(module), reasons.get(id(module)))
    return [e for _, module in dense for e in weights[id(module)]]


def chosen_of(
    found: list[tuple[str, nn.Module]], eligible: list[Eligible], include: Selector | None, exclude: Selector
) -> list[Eligible]:
    """The same, where those that a user does not choose are to stay as they are.

    Args:
        found: the `layers` of a model.
        eligible: its `candidates`.
        include: as for `compact`.
        exclude: as for `compact`.
    """
    own: dict[int, list[str]] = {}
    for e in eligible:
        own.setdefault(id(e.module), []).append("weight" if e.weight is None else e.weight.tensor)
    reasons = pick([(name, m, own.get(id(m), ["blocks", "weight"])) for name, m in found], include, exclude)
    by_module = {id(m): reason for (_, m), reason in zip(found, reasons)}
    out = []
    for e in eligible:
        reason = by_module[id(e.module)]
        out.append(e if reason is None or isinstance(e.found, Ineligible) else replace(e, found=Ineligible(reason)))
    return out


@dataclass(frozen=True)
class Composite:
    """A layer with several weights that becomes compact.

    Attributes:
        module: the layer.
        form: its kind.
        weights: those that become blocks, and their topologies; none where only layers inside it do, which it then
            calls.
    """

    module: nn.Module
    form: CompositeForm
    weights: dict[str, tuple[PrunableWeight, tuple[BlockTopology, ...]]]


def composites(eligible: list[Eligible]) -> dict[int, Composite]:
    """The layers with several weights that become compact, by id."""
    ready = {id(e.module) for e in eligible if not isinstance(e.found, Ineligible)}
    out: dict[int, Composite] = {}
    for e in eligible:
        if isinstance(e.form, CompositeForm) and e.weight is not None:
            inner = any(id(m) in ready for m in e.form.joins(e.module))
            if id(e.module) in ready or inner:
                own = out.setdefault(id(e.module), Composite(e.module, e.form, {}))
                if not isinstance(e.found, Ineligible):
                    own.weights[e.weight.tensor] = e.weight, e.found
    return out


def _weights(name: str, module: nn.Module, form: Form | None, reason: Ineligible | None) -> list[Eligible]:
    if form is None:
        return [Eligible(name, module, None, None, Ineligible(f"no block form of {type(module).__name__}"))]
    try:
        form.check(module)
        if reason is not None:
            raise reason
    except Ineligible as why:
        return [Eligible(name, module, form, None, why)]
    out = []
    for weight in weights_of(module):
        path = name if isinstance(form, LayerForm) else f"{name}.{weight.tensor}" if name else weight.tensor
        try:
            out.append(Eligible(path, module, form, weight, read_topologies(module, weight)))
        except Ineligible as why:
            out.append(Eligible(path, module, form, weight, why))
    return out


def read_from_outside(model: nn.Module) -> dict[int, str]:
    """Layers whose weight others read, by the id of the module, with the reason."""
    reasons: dict[int, str] = {}
    for module in model.modules():
        form = form_of(module)
        for inner in () if form is None else form.joins(module):
            reasons[id(inner)] = f"{type(module).__name__} reads its weight without calling it"
    return {**reasons, **_tied(model)}


def _tied(model: nn.Module) -> Mapping[int, str]:
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(module)
    sharing = [modules for modules in owners.values() if len(modules) > 1]
    return {id(module): "its weight is tied to another module's" for modules in sharing for module in modules}
