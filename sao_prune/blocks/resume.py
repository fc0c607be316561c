"""How a loaded model runs: as the plan in its checkpoint says, where that was made on such a machine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from .confirm import confirm, without_steps
from .plan import Plan, machine, plan_of


def resume(model: nn.Module, text: str | None, example_input: Any = None) -> tuple[list[nn.Module], str, str]:
    """Run the block layers of a model by the plan of a checkpoint; on another machine, or without one, by the rule.

    Args:
        model: the loaded model.
        text: the plan as it was saved; ``None`` if there is none.
        example_input: what to run the model on.

    Returns:
        The dense layers whose memory format was changed, a title that tells how the model runs, and why layers have
        less of their epilogues than when it was saved; ``""`` if they do not.

    Raises:
        ValueError: if the model fails on the example input.
    """
    saved, title = None, "model"
    if text is not None:
        try:
            saved = Plan.from_json(text)
        except ValueError:
            title = "model; layers run by default: the plan in the checkpoint cannot be read"
    here = saved is not None and saved.machine == machine()
    if saved is not None and here:
        formats, reason = confirm(model, saved, example_input)
        title = "model; layers run as the checkpoint's plan says"
    else:
        if saved is not None:
            title = f"model; layers run by default: the plan in the checkpoint is for {saved.machine or 'no machine'}"
        if example_input is None and (saved is None or saved.choices == without_steps(saved).choices):
            return [], title, ""
        own = replace(plan_of(model), examples={} if saved is None else saved.examples)
        formats, reason = confirm(model, own, example_input, all_steps=True)
    if reason:
        reason = f"layers have less of their epilogues than in the model that was saved, which is slower: {reason}"
        title += f"; {reason}"
    return formats, title, reason
