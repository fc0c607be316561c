"""Carry out a plan in another model: a layer computes others only where a run shows that they follow it there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import eagerly, tree_leaves
from ..discovery.trace import keeping_buffers
from ..naming import dotted
from .autotune import with_steps
from .calls import record_calls, to_contiguous
from .eligible import layers
from .example import Example, keep_example
from .forms import LayerForm, form_of
from .fusion import chains
from .modules import BlockModule
from .plan import Choice, Plan, Steps, carry_out, normed

_SMALL = 1e-30


def confirm(
    model: nn.Module, plan: Plan, example_input: Any = None, *, all_steps: bool = False
) -> tuple[list[nn.Module], str]:
    """Carry out a plan, steps that layers compute along with themselves where they are on their way in this model.

    A plan's steps are taken over as far as a run of the model shows them, and left out altogether if the outputs with
    them differ from those without. The run is on the example input, else on random values in place of those that the
    plan was made with; its effects on buffers are undone.

    Args:
        model: with block layers in it.
        plan: how its layers are to run.
        example_input: what to run the model on.
        all_steps: take all steps that a run shows, not those of the plan alone.

    Returns:
        The dense layers whose memory format was changed, and why steps are left out; ``""`` if none are.

    Raises:
        ValueError: if the model fails on the example input.
    """
    bare = without_steps(plan)
    formats = carry_out(model, bare)
    if not all_steps and plan.choices == bare.choices:
        return formats, ""
    modules = dict(model.named_modules())
    examples: Mapping[str, Example | None] = {path: each for path, each in plan.examples.items() if path in modules}
    if example_input is not None:
        inputs, examples = {"": example_input}, {"": Example.of(example_input)}
    else:
        reason = _why_not_run(model) if examples else "nothing tells what the model takes; give example_input"
        if reason:
            return formats, reason
        inputs = {path: each.draw() for path, each in plan.examples.items() if path in modules}
    try:
        with eagerly(), keeping_buffers(model):
            reason = _fuse(model, bare, None if all_steps else plan, inputs)
    except Exception as error:
        carry_out(model, bare)
        if example_input is not None:
            to_contiguous(formats)
            raise
        return formats, f"the model does not run on what the plan says that it takes ({error})"
    for path, example in examples.items():
        keep_example(modules[path], example)
    return formats, reason


def without_steps(plan: Plan) -> Plan:
    """A plan by which every layer computes itself alone."""
    return replace(plan, choices={name: replace(choice, steps=Steps()) for name, choice in plan.choices.items()})


def confirmed(plan: Plan, follow: Mapping[str, Steps]) -> dict[str, Choice]:
    """The choices of a plan, of their steps those that were found to follow the layers."""
    found = with_steps(without_steps(plan), follow).choices
    return {name: replace(c, steps=_common(c.steps, found[name].steps)) for name, c in plan.choices.items()}


def _common(steps: Steps, others: Steps) -> Steps:
    """As much of the steps, from the first on, as the others have too."""
    if steps.norm != others.norm:
        return Steps()
    if steps.activation != others.activation or steps.activation is None:
        return Steps(steps.norm)
    found = Steps(steps.norm, steps.activation)
    if (steps.then, steps.between) == (others.then, others.between):
        found = replace(found, then=steps.then, between=steps.between)
    same = [a == b for a, b in zip(steps.rest, others.rest)]
    return replace(found, rest=steps.rest[: (*same, False).index(False)])


def difference(new: Any, old: Any) -> str | None:
    """How outputs of a model differ from earlier ones by more than rounding, relative to their size."""
    found, wanted = list(_tensors(new)), list(_tensors(old))
    if len(found) != len(wanted):
        return f"number of outputs ({len(found)}, not {len(wanted)})"
    for number, (after, before) in enumerate(zip(found, wanted)):
        if not (before.is_floating_point() or before.is_complex()):
            continue
        tolerance = 1e-3 * (30 if before.dtype in (torch.float16, torch.bfloat16) else 1)
        error = _relative_error(after, before)
        if not error <= tolerance:
            return f"output {number} (by {error:.3g} of its norm, {tolerance:.0e} is allowed)"
    return None


def _tensors(output: Any, depth: int = 4) -> Iterator[Tensor]:
    """The tensors in a model's output, those in attributes of objects too."""
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            yield leaf
        elif depth and isinstance(getattr(leaf, "__dict__", None), dict) and not isinstance(leaf, type | nn.Module):
            yield from _tensors(vars(leaf), depth - 1)


def _why_not_run(model: nn.Module) -> str:
    if any(p.is_meta for p in model.parameters()):
        return "the model is on the meta device"
    spread = torch.distributed.is_available() and torch.distributed.is_initialized()
    if spread and torch.distributed.get_world_size() > 1:
        return "of several processes none runs the model by itself; give example_input in all of them"
    return ""


def _fuse(model: nn.Module, bare: Plan, within: Plan | None, inputs: Mapping[str, Any]) -> str:
    """Add the steps that a run shows, those of a plan alone if one is given; why not all of its."""
    follow: dict[str, Steps] = {}
    outputs: dict[str, Any] = {}
    for path, x in inputs.items():
        module = model.get_submodule(path)
        # Those that run as dense layers too, as when the plan was made.
        single = [m for _, m in layers(module) if isinstance(m, BlockModule) or isinstance(form_of(m), LayerForm)]
        found, calls = chains(module, single, x)
        follow |= {dotted(path, name): _below(path, steps) for name, steps in found.items()}
        outputs[path] = calls.output
    if within is None:
        fused = with_steps(replace(bare, choices={**normed(model, follow), **bare.choices}), follow)
    else:
        fused = replace(within, choices=confirmed(within, follow))
    carry_out(model, fused)
    for path, x in inputs.items():
        differs = difference(record_calls(model.get_submodule(path), [], x).output, outputs[path])
        if differs:
            carry_out(model, bare)
            return f"with it {differs} is another"
    lost = within is not None and fused.choices != within.choices
    return "the model calls other modules behind some layers than the one that the plan is of" if lost else ""


def _below(path: str, steps: Steps) -> Steps:
    def named(name: str | None) -> str | None:
        return None if name is None else dotted(path, name)

    between, rest = (tuple(dotted(path, name) for name in names) for names in (steps.between, steps.rest))
    return Steps(named(steps.norm), named(steps.activation), between, named(steps.then), rest)


def _relative_error(new: Tensor, old: Tensor) -> float:
    """Norm of the difference over that of ``old``; NaN must stand where it stood, and infinities too."""
    if new.shape != old.shape:
        return float("inf")
    new, old = (t.to_dense() if t.layout is not torch.strided else t for t in (new, old))
    finite = torch.isfinite(old)
    if not torch.equal(finite, torch.isfinite(new)):
        return float("inf")
    kind = torch.complex128 if old.is_complex() else torch.float64
    reference = torch.where(finite, old, 0).to(kind)
    difference = torch.where(finite, new, 0).to(kind) - reference
    scale = float(reference.norm())
    return float(difference.norm()) / max(scale, _SMALL)
