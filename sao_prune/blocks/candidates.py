"""The layers that `compact` is about to convert: their block forms, and a record of every weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import nn

from ..naming import dotted
from .autotune import Candidate, run_by_rule
from .calls import Calls
from .eligible import Eligible
from .forms import CompositeForm, Given, Ineligible, LayerForm, form_of, given_of, parameter_of
from .modules import BlockComposite, BlockModule, BlockRNNBase
from .report import CompactRecord
from .sequences import Recurrent


def called_in(found: Sequence[tuple[str, nn.Module]], calls: Calls) -> set[int]:
    """Ids of the layers that a run has called, those with one weight with a tensor."""
    several = {id(m) for _, m in found if isinstance(form_of(m), CompositeForm) and id(m) in calls.count}
    return several | set(calls.inputs)


def single_of(found: Sequence[tuple[str, nn.Module]]) -> list[nn.Module]:
    """The layers with one weight that do not run as dense ones."""
    own = [m for _, m in found if isinstance(form_of(m), LayerForm) or isinstance(m, BlockModule)]
    return [m for m in own if not (isinstance(m, BlockModule) and m.execution.dense)]


def first_of(e: Eligible) -> nn.Module:
    """The block layer that stands for a weight, or the first of those that do."""
    if isinstance(e.module, BlockComposite) and e.weight is not None:
        return e.module.layers_of(e.weight.tensor)[0]
    return e.module


def records_of(found: list[tuple[str, nn.Module]], eligible: list[Eligible]) -> dict[str, CompactRecord]:
    """A record of every weight, in the order of registration."""
    records: dict[str, CompactRecord] = {}
    by_module: dict[int, list[Eligible]] = {}
    for e in eligible:
        by_module.setdefault(id(e.module), []).append(e)
    for name, module in found:
        kind = type(module).__name__
        if isinstance(module, BlockModule):
            own = module.weight_shape, module.topology.groups
            records[name] = CompactRecord(name, kind, *own, reason="compact already")
        for e in by_module.get(id(module), ()):
            shape = _shape(module) if e.weight is None else e.weight.shape
            if isinstance(e.found, Ineligible):
                records[e.name] = CompactRecord(e.name, kind, shape, reason=str(e.found))
            else:
                records[e.name] = CompactRecord(e.name, kind, shape, sum(t.groups for t in e.found))
    return records


def _kept(e: Eligible) -> Given:
    """The values that a weight has, for its block form."""
    assert e.weight is not None
    assert not isinstance(e.found, Ineligible)
    return given_of(e.module, e.weight, e.found)


def composites_of(
    eligible: list[Eligible], given: Callable[[Eligible], Given] = _kept
) -> list[tuple[nn.Module, BlockComposite]]:
    """The layers with several weights that become compact, for weights of their own or for layers inside that they
    then call, and their block forms, not yet put in place."""
    ready = {id(e.module) for e in eligible if not isinstance(e.found, Ineligible)}
    own: dict[int, tuple[nn.Module, CompositeForm, dict[str, Given]]] = {}
    for e in eligible:
        if not isinstance(e.form, CompositeForm) or e.weight is None:
            continue
        if id(e.module) in ready or any(id(m) in ready for m in e.form.joins(e.module)):
            weights = own.setdefault(id(e.module), (e.module, e.form, {}))[2]
            if not isinstance(e.found, Ineligible):
                weights[e.weight.tensor] = given(e)
    blocks = [(module, form.block(module, weights)) for module, form, weights in own.values()]
    for _, block in blocks:
        run_by_rule(block)
    return blocks


def parts_of(
    whole: Sequence[tuple[nn.Module, BlockComposite]], calls: Calls, paths: Mapping[int, str]
) -> tuple[list[Candidate], list[Recurrent]]:
    """What is timed of layers with several weights: their block layers one by one, recurrent layers whole.

    Args:
        whole: the layers and their block forms.
        calls: what the layers are called with in the model.
        paths: of the layers, by their ids.
    """
    parts: list[Candidate] = []
    sequences: list[Recurrent] = []
    for module, block in whole:
        path, arguments = paths[id(module)], calls.arguments.get(id(module))
        if isinstance(block, BlockRNNBase):
            if arguments is not None and block.compact_weights:
                sequences.append(Recurrent(path, module, block, arguments))
        else:
            parts += [Candidate(dotted(path, m.path), m.layer, m.layer) for m in block.matrices()]
    return parts, sequences


def candidate_of(e: Eligible) -> Candidate:
    assert e.form is not None
    block = e.form.block(e.module, {"weight": _kept(e)})
    assert isinstance(block, BlockModule)
    return Candidate(e.name, e.module, block)


def _shape(module: nn.Module) -> tuple[int, ...]:
    """Of the weight of a layer that cannot be looked into."""
    weight = parameter_of(module, "weight")
    return () if weight is None or isinstance(weight, nn.parameter.UninitializedParameter) else tuple(weight.shape)
