"""The verb `compact`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ..discovery import Selector
from ..prune import pruning_hooks, settle_all, unwatch
from ..replaced import warn_replaced
from .autotune import Candidate, Tune, default_plan, with_steps
from .backends import cpu
from .calls import Calls, record_calls, to_contiguous
from .candidates import called_in, candidate_of, composites_of, first_of, parts_of, records_of, single_of
from .confirm import confirmed, difference
from .eligible import candidates, chosen_of, layers, reasons_of
from .epilogue import detach
from .example import Example, keep_example
from .forms import Ineligible, LayerForm, parameter_of
from .fusion import chains
from .modules import NORMED, BlockComposite, BlockModule
from .plan import Choice, Plan, Steps, carry_out, normed, plan_of, put_back
from .report import CompactRecord, CompactReport
from .swap import Changes, become, restore
from .tuning import of_first_rank, tuned


@torch.inference_mode(False)  # its parameters could never be trained
def compact(
    model: nn.Module,
    *,
    example_input: Any = None,
    tune: Tune = None,
    plan: Plan | None = None,
    fuse: bool = True,
    include: Selector | None = None,
    exclude: Selector = (),
) -> CompactReport:
    """Make the block-sparse layers of a model hold and compute only their blocks, in place.

    The topology is read from the mask, or from the zeros of a baked or loaded weight. Outputs and gradients stay what
    they were, within rounding. Make the optimizer afterwards: the parameters are new ones. Converted are linear and
    convolutional layers, attention, recurrent layers and the experts of mixtures; the report says why others were
    skipped.

    Args:
        model: any module.
        example_input: a tensor, tuple or dict to run once before and once after; if the outputs differ, or a layer's
            weight turns out to be read without calling it, that is undone. Needed for ``tune`` and for epilogues.
        tune: choose each layer's execution by timing it on the example input, for ``"train"`` (forward and backward)
            or ``"infer"``, and the memory format of convolutions by timing the whole model so, in eval mode; a layer
            that no block form makes faster is skipped. ``None`` uses fixed rules. Timings are kept between runs. In a
            distributed run, where all ranks must call, rank 0 chooses for all.
        plan: how the layers are to run, from the report of an earlier call; in place of ``tune``. Of its epilogues
            those are taken that a run on ``example_input`` shows, without one none: nothing else tells that the layers
            follow each other as they did.
        fuse: whether layers may compute the batch norm, activation or linear layer behind them in one kernel.
        include: glob patterns on module or parameter names, or a predicate ``(name, module) -> bool``; only these
            layers. Block layers that are there already count as chosen.
        exclude: the same, for layers that stay as they are.

    Returns:
        A `CompactReport`; with ``tune``, measured ratios to the dense layer in it. Its ``plan`` is data.

    Raises:
        TypeError: if the model is no module, or a selector is neither patterns nor a predicate.
        ValueError: if no chosen layer can be made compact, a pattern matches nothing, the model fails on the example
            input, or its outputs differ. The model is then as it was.

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
    _check(model, example_input, tune, plan)
    settle_all(model)
    before = plan_of(model)
    found = list(layers(model))
    watched = [m for _, m in found]
    try:
        detach(model)
        calls: Calls | None = None
        follow: dict[str, Steps] = {}
        if example_input is not None and fuse and cpu.library() is not None:
            follow, calls = chains(model, single_of(found), example_input, watched)
        elif example_input is not None:
            calls = record_calls(model, watched, example_input)
        called = None if calls is None else called_in(found, calls)
        eligible = candidates(model, found, called)
        reasons = reasons_of(found, eligible, include, exclude)
        eligible = chosen_of(eligible, reasons)
        first = normed(model, {n: follow[n] for n, m in found if n in follow and reasons[id(m)] is None})
        records = records_of(found, eligible)
        ready = [e for e in eligible if not isinstance(e.found, Ineligible)]
        if not ready:
            raise ValueError(_nothing(model, records))
        whole = composites_of(eligible)
        single = [candidate_of(e) for e in ready if isinstance(e.form, LayerForm)]
        warn_replaced([parameter_of(e.module, e.weight.tensor) for e in ready if e.weight is not None], "compact", 4)
        chosen = _chosen(model, whole, single, calls, example_input, tune, plan, follow, first, before)
        undo = _convert(model, whole, single, chosen)
    except BaseException:
        put_back(model, before)
        raise
    try:
        if calls is not None:
            _verify(model, example_input, calls.output)
    except BaseException:
        undo()
        put_back(model, before)
        raise
    if not any(True for module in model.modules() for _ in pruning_hooks(module)):
        for module in model.modules():
            unwatch(module)
    if example_input is not None:
        keep_example(model, Example.of(example_input))
    done = plan_of(model, chosen.machine)
    left = {name: choice for name, choice in chosen.choices.items() if choice.execution is None}
    done = replace(done, choices={**left, **done.choices})
    paths = {id(module): path for path, module in model.named_modules()}
    for e in ready:
        name = paths[id(first_of(e))]
        choice = chosen.choices.get(name, Choice(None))
        record = replace(records[e.name], ratio=choice.ratio, reason=choice.reason)
        records[e.name] = replace(record, execution="" if record.reason else _text(name, done))
    for name in (n for n, choice in done.choices.items() if choice.execution == NORMED):
        records[name] = replace(records[name], execution=_text(name, done))
    return CompactReport(tuple(records.values()), "compact", done, _note(model))


def _text(name: str, plan: Plan) -> str:
    choice = plan.choices.get(name)
    if choice is None or choice.execution is None:
        return ""
    if choice.execution.dense and choice.execution != NORMED:
        return "dense: faster than its blocks"
    steps = choice.steps
    activation = None if steps.activation is None else "activation"
    last = f"{len(steps.rest[::2])} layers" if steps.rest else "linear" if steps.then else None
    fused = [s for s in ("norm" if steps.norm else None, activation, last) if s]
    return "".join([str(choice.execution), *(f" + {step}" for step in fused)])


def _note(model: nn.Module) -> str:
    """Why there are no native kernels, where they would have served; warns once in a process."""
    global _warned
    blocks = [m.blocks for m in model.modules() if isinstance(m, BlockModule)]
    serves = any(b.is_cpu and b.dtype is torch.float32 for b in blocks)
    reason = cpu.why_unavailable() if serves else None
    if reason is None:
        return ""
    note = f"no native kernels ({reason}), so layers run by torch's products"
    if not _warned and not cpu.is_switched_off():
        _warned = True
        warnings.warn(f"sao_prune: {note}", RuntimeWarning, stacklevel=4)
    return note


_warned = False


def _chosen(
    model: nn.Module,
    whole: Sequence[tuple[nn.Module, BlockComposite]],
    candidates: Sequence[Candidate],
    calls: Calls | None,
    example_input: Any,
    tune: Tune,
    plan: Plan | None,
    follow: dict[str, Steps],
    first: dict[str, Choice],
    before: Plan,
) -> Plan:
    """The plan to carry out, of new block layers and of those that were there."""
    kept = {name: Choice(choice.execution) for name, choice in before.choices.items()}
    if plan is not None:
        known = default_plan(candidates)
        # That its layers follow each other as they did where it was made, only a run tells.
        own = {n: c for n, c in confirmed(plan, follow).items() if c.execution != NORMED or n in first}
        return replace(plan, choices={**kept, **known.choices, **own})

    def complete(own: Plan) -> Plan:
        last = own.channels_last or before.channels_last
        return with_steps(replace(own, choices={**first, **kept, **own.choices}, channels_last=last), follow)

    if calls is None or tune is None or not (candidates or whole):
        return complete(default_plan(candidates))

    def convert(own: Plan) -> Callable[[], None]:
        return _convert(model, whole, candidates, complete(own))

    parts, sequences = parts_of(whole, calls, {id(module): path for path, module in model.named_modules()})
    how = partial(tuned, model, candidates, parts, sequences, calls, example_input, tune, convert)
    return complete(of_first_rank(how))


def _convert(
    model: nn.Module,
    whole: Sequence[tuple[nn.Module, BlockComposite]],
    candidates: Sequence[Candidate],
    plan: Plan,
) -> Callable[[], None]:
    """Make the layers compact as planned; returns what undoes it. If it fails, it is undone."""
    changes: Changes = []
    formats: list[nn.Module] = []

    def undo() -> None:
        detach(model)
        restore(changes)
        to_contiguous(formats)

    try:
        for module, form in whole:
            changes.append(become(module, form))
        for candidate in candidates:
            if plan.choices[candidate.name].execution is not None:
                changes.append(become(candidate.module, candidate.block))
        formats += carry_out(model, plan)
    except BaseException:
        undo()
        raise
    return undo


def _check(model: nn.Module, example_input: Any, tune: Tune, plan: Plan | None) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if tune not in (None, "train", "infer"):
        raise ValueError(f"tune must be 'train', 'infer' or None, got {tune!r}")
    if tune is not None and example_input is None:
        raise ValueError(f"tune={tune!r} times the layers on an input: give example_input")
    if plan is not None and not isinstance(plan, Plan):
        raise TypeError(f"plan must be the plan of a CompactReport, got {type(plan).__name__}")
    if plan is not None and tune is not None:
        raise ValueError("give either tune, which makes a plan, or a plan")
    names = {name for name, _ in model.named_modules()}
    # Those of a layer with several weights stand below it, one or two names further.
    named = {name.rsplit(".", up)[0] for name in (plan.choices if plan is not None else ()) for up in (0, 1, 2)}
    if plan is not None and plan.choices and not names & named:
        missing = ", ".join(list(plan.choices)[:4])
        raise ValueError(f"the plan is of another model: {type(model).__name__} has none of its layers ({missing}, ..)")


def _nothing(model: nn.Module, records: dict[str, CompactRecord]) -> str:
    name = type(model).__name__
    if not records:
        return f"{name} has no linear or convolutional layer to make compact"
    reasons = "; ".join(f"{r.name or name}: {r.reason}" for r in list(records.values())[:6])
    return f"no layer of {name} can be made compact ({reasons}{'; ..' if len(records) > 6 else ''})"


def _verify(model: nn.Module, example_input: Any, expected: Any) -> None:
    """Refuse a conversion after which the model's outputs differ by more than rounding, relative to their size."""
    differs = difference(record_calls(model, [], example_input).output, expected)
    if differs:
        raise ValueError(
            f"the compact model's {differs} differs from the original's on the example input; the model was left as "
            "it was"
        )
