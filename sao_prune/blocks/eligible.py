"""Which layers of a model can be made compact, and why others cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, replace
from functools import partial

from torch import nn

from .._torch import ConvNd
from ..discovery import PrunableWeight, Selector, pick
from ..naming import dotted
from ..topology import BlockTopology
from .forms import CompositeForm, Form, Ineligible, LayerForm, form_of, read_topologies, weights_of
from .modules import BlockModule

# The topologies that a weight of a layer is to have in its block form; raises `Ineligible` if it has none.
Topologies = Callable[[nn.Module, PrunableWeight], tuple[BlockTopology, ...]]


def layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every layer of a model of a kind that has a block form, compact ones included, and other convolutions."""
    for name, module in model.named_modules():
        if isinstance(module, (BlockModule, ConvNd)) or form_of(module) is not None:
            yield name, module


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


def candidates(
    model: nn.Module,
    found: list[tuple[str, nn.Module]],
    called: Set[int] | None = None,
    *,
    topologies: Topologies = read_topologies,
    meta: bool = False,
) -> list[Eligible]:
    """What can be said of each weight of the dense layers of a model; touches nothing.

    Args:
        model: any module.
        found: its `layers`.
        called: ids of the layers that were called in a run of the model, if it was run.
        topologies: of a weight; by default those of its mask or its zeros.
        meta: whether weights may be on the meta device.
    """
    dense = [(name, module) for name, module in found if not isinstance(module, BlockModule)]
    outside, shared = _read_from_outside(model), tied(model)
    look = partial(_weights, topologies=topologies, meta=meta)
    reasons = {id(m): Ineligible(why) for m in model.modules() if (why := outside.get(id(m)))}
    if called is not None:
        why = "the example input does not call it, so its weight is unused or read from outside"
        reasons = {**{id(m): Ineligible(why) for _, m in dense if id(m) not in called}, **reasons}
    first = [(name, m) for name, m in dense if isinstance(form_of(m), CompositeForm)]
    weights: dict[int, list[Eligible]] = {}
    for name, module in first:
        form = form_of(module)
        assert form is not None
        weights[id(module)] = own = look(name, module, form, reasons.get(id(module)))
        joined = [look("", m, f, None) for m in form.joins(module) if (f := form_of(m)) is not None]
        fits = not any(isinstance(e.found, Ineligible) and e.weight is None for e in own)
        if fits and any(not isinstance(e.found, Ineligible) for each in (own, *joined) for e in each):
            # In its block form it calls them.
            for inner in form.joins(module):
                if id(inner) not in shared:
                    reasons.pop(id(inner), None)
    for name, module in dense:
        if id(module) not in weights:
            weights[id(module)] = look(name, module, form_of(module), reasons.get(id(module)))
    return [e for _, module in dense for e in weights[id(module)]]


def reasons_of(
    found: list[tuple[str, nn.Module]], eligible: list[Eligible], include: Selector | None, exclude: Selector
) -> dict[int, str | None]:
    """Why a user does not choose each layer, ``None`` for those that are chosen, by the id of the module.

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
    return {id(m): reason for (_, m), reason in zip(found, reasons)}


def chosen_of(eligible: list[Eligible], reasons: Mapping[int, str | None]) -> list[Eligible]:
    """The same, where those that a user does not choose are to stay as they are."""
    out = []
    for e in eligible:
        reason = reasons[id(e.module)]
        out.append(e if reason is None or isinstance(e.found, Ineligible) else replace(e, found=Ineligible(reason)))
    return out


def _weights(
    name: str, module: nn.Module, form: Form | None, reason: Ineligible | None, *, topologies: Topologies, meta: bool
) -> list[Eligible]:
    if form is None:
        return [Eligible(name, module, None, None, Ineligible(f"no block form of {type(module).__name__}"))]
    try:
        form.check(module, meta=meta)
        if reason is not None:
            raise reason
    except Ineligible as why:
        return [Eligible(name, module, form, None, _bare(why))]
    out = []
    for weight in weights_of(module):
        path = name if isinstance(form, LayerForm) else dotted(name, weight.tensor)
        try:
            found = topologies(module, weight)
            if isinstance(form, CompositeForm) and form.apart and not all(t.groups for t in found):
                raise Ineligible("nothing is left in one of its matrices")
            out.append(Eligible(path, module, form, weight, found))
        except Ineligible as why:
            out.append(Eligible(path, module, form, weight, _bare(why)))
    return out


def _bare(why: Ineligible) -> Ineligible:
    """Without tracebacks, whose frames would keep whole models' weights until a cycle is collected."""
    why.__context__ = why.__cause__ = None
    return why.with_traceback(None)


def _read_from_outside(model: nn.Module) -> dict[int, str]:
    """Layers whose weight others read, by the id of the module, with the reason."""
    reasons: dict[int, str] = {}
    for module in model.modules():
        form = form_of(module)
        for inner in () if form is None else form.joins(module):
            reasons[id(inner)] = f"{type(module).__name__} reads its weight without calling it"
    return {**reasons, **dict.fromkeys(tied(model), "its weight is tied to another module's")}


def tied(model: nn.Module) -> set[int]:
    """Ids of the modules that have a parameter in common with another."""
    owners: dict[int, list[int]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(id(module))
    return {owner for several in owners.values() if len(several) > 1 for owner in several}
