"""The search for a plan: each distinct layer is timed once, then the whole model in each memory format."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from .autotune import Candidate, Timings, default_plan, inputs_of, layer_key, time_layer, time_model
from .backends import cpu
from .calls import Calls, record_calls
from .modules import Execution
from .plan import Plan, machine
from .sequences import Recurrent
from .tuning_cache import TuningCache

Convert = Callable[[Plan], Callable[[], None]]


def of_first_rank(make: Callable[[], Plan]) -> Plan:
    """A plan; in a distributed run that of rank 0, so that all ranks are alike. Global generators are not touched."""
    together = dist.is_available() and dist.is_initialized()
    plan: Plan | None = None
    if not together or dist.get_rank() == 0:
        with torch.random.fork_rng(devices=[]):
            plan = make()
    if together:
        told = [None if plan is None else plan.to_json()]
        dist.broadcast_object_list(told, src=0)
        plan = Plan.from_json(str(told[0]))
    assert plan is not None
    return plan


def tuned(
    model: nn.Module,
    candidates: Sequence[Candidate],
    parts: Sequence[Candidate],
    sequences: Sequence[Recurrent],
    calls: Calls,
    example_input: Any,
    tune: Literal["train", "infer"],
    convert: Convert,
) -> Plan:
    """The plan that runs a model fastest.

    Args:
        model: as it was.
        candidates: its layers.
        parts: block layers of attention and experts; they are called by those in the compact model only.
        sequences: its recurrent layers.
        calls: what they are given in it.
        example_input: what to run it on.
        tune: forward and backward, or forward alone.
        convert: makes the model compact by a plan and returns what undoes it.
    """
    here = machine()
    cache = TuningCache(f"{here}, {cpu.version()}")
    undo = convert(default_plan(candidates))
    try:
        compact_calls = record_calls(model, [c.module for c in (*candidates, *parts)], example_input)
    finally:
        undo()
    parts = [c for c in parts if id(c.module) in compact_calls.inputs]
    inputs = inputs_of([*candidates, *parts], calls, compact_calls)
    keys = {c.name: f"{tune}: {layer_key(c, inputs[c.name])}" for c in (*candidates, *parts)}
    # Those that are alike are timed once.
    todo: dict[str, Callable[[], Timings]] = {
        keys[c.name]: partial(time_layer, c, inputs[c.name], tune) for c in (*candidates, *parts)
    }
    todo |= {f"{tune}: {s.key}": partial(s.time, tune) for s in sequences}
    timings: dict[str, Timings] = {}
    with _progress("timing layers", len(todo)) as advance:
        for key, time in todo.items():
            timings[key] = _known(cache.get(key)) or time()
            cache.put(key, _kept(timings[key]))
            advance()
    fixed = {c.name: timings[keys[c.name]].of_part() for c in parts}
    fixed |= {name: timings[f"{tune}: {s.key}"].of_part() for s in sequences for name in s.names()}
    formats = (True, False) if any(isinstance(m, nn.Conv2d) for m in model.modules()) else (False,)
    plans = [
        Plan({**fixed, **{c.name: timings[keys[c.name]].choice(last) for c in candidates}}, last, here)
        for last in formats
    ]
    # Where no layer gains by a block form, the model stays as it is.
    plans = [p for p in plans if not p.channels_last or any(c.execution is not None for c in p.choices.values())]
    best = 0
    if len(plans) > 1:
        whole = repr((tune, type(model).__name__, len(list(model.modules())), sorted(keys.items())))
        known = cache.get(whole)
        best = (
            known
            if isinstance(known, int) and 0 <= known < len(plans)
            else _fastest(model, plans, example_input, tune, convert)
        )
        cache.put(whole, best)
    cache.save()
    cpu.release_memory()
    return plans[best]


def _fastest(
    model: nn.Module, plans: Sequence[Plan], example_input: Any, tune: Literal["train", "infer"], convert: Convert
) -> int:
    """The plan with which the whole model is fastest: what its other parts gain from a format, layers do not tell."""
    seconds: list[float] = []
    with _progress("timing the model", len(plans)) as advance:
        for plan in plans:
            undo = convert(plan)
            try:
                seconds.append(time_model(model, example_input, tune, min(seconds, default=float("inf"))))
            finally:
                undo()
            advance()
    if tune == "train" and min(seconds) == float("inf"):
        # Some layers have no backward in eval mode (cuDNN's recurrent ones).
        return _fastest(model, plans, example_input, "infer", convert)
    return seconds.index(min(seconds))


def _kept(timings: Timings) -> dict[str, Any]:
    blocks = [[asdict(execution), seconds] for execution, seconds in timings.blocks.items()]
    return {"dense": timings.dense, "current": timings.current, "blocks": blocks}


def _known(entry: Any) -> Timings | None:
    try:
        blocks = {Execution(**execution): float(seconds) for execution, seconds in entry["blocks"]}
        return Timings(float(entry["dense"]), float(entry["current"]), blocks)
    except (TypeError, KeyError, ValueError):
        return None


@contextmanager
def _progress(text: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar on the terminal, where there is one."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(text, total=total)
        yield lambda: bar.advance(task)
