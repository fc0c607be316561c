"""How each block layer runs: by fixed rules, or by timing the ways it can run on inputs of the model's own shapes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter, thread_time
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .base import BlockModule, Execution
from .calls import Calls, run_model
from .conv import BlockConv2d, _BlockConv
from .follow import followers
from .native import ready

Tune = Literal["train", "infer"] | None

_NARROWEST = 8
_WIDEST = 64
_REPEATS = 7
# Seconds after which a whole model has been timed long enough.
_ENOUGH = 0.3


@dataclass(frozen=True)
class Candidate:
    """A layer that could be compact, and its block form, not yet put in place."""

    name: str
    module: nn.Module
    block: BlockModule


@dataclass(frozen=True)
class Choice:
    """How a layer is to run; no execution means that it is better left as it is, for ``reason``."""

    execution: Execution | None
    ratio: float | None = None
    reason: str | None = None
    followers: tuple[nn.Module, ...] = ()

    def put(self, block: BlockModule) -> None:
        """Make a layer run so."""
        assert self.execution is not None
        block.run_as(self.execution)
        block.__dict__.update(followers=self.followers)


@dataclass(frozen=True)
class Plan:
    """How the candidate layers of a model are to run, and whether its dense convolutions run channels last."""

    choices: dict[str, Choice]
    channels_last: bool = False


def default_plan(candidates: Sequence[Candidate]) -> Plan:
    """The plan without timing."""
    return _plan({c.name: default_execution(c.block) for c in candidates})


Timings = dict[Hashable, "_Timings"]


def native_plan(candidates: Sequence[Candidate]) -> Plan | None:
    """The plan without timing that uses the native kernels wherever they can be; ``None`` if they cannot."""
    ways = {c.name: next((e for e in _executions(c.block) if e.native), None) for c in candidates}
    if not any(ways.values()):
        return None
    return _plan({c.name: ways[c.name] or default_execution(c.block) for c in candidates})


def _plan(executions: dict[str, Execution]) -> Plan:
    return Plan({n: Choice(e) for n, e in executions.items()}, any(e.channels_last for e in executions.values()))


def plans(
    model: nn.Module,
    candidates: Sequence[Candidate],
    calls: Calls,
    compact_calls: Calls,
    tune: Literal["train", "infer"],
    native: bool,
    timings: Timings,
) -> list[Plan]:
    """The ways to run the candidate layers that are worth trying; of equal layers only the first is timed.

    One, or where the model has convolutions one for each memory format, between which `time_model` decides: what the
    rest of the model gains from a format, the layers do not tell. Tokens that are made by a convolution lie as it
    leaves them, as far as the model adds to them.

    Args:
        model: the model.
        candidates: its layers.
        calls: what they are given in the model as it was.
        compact_calls: what they are given in the compact one.
        tune: forward and backward, or forward alone.
        native: whether the native kernels may be chosen.
        timings: known from earlier calls; new ones are added.
    """
    inputs = {c.name: _inputs(c, calls, compact_calls) for c in candidates}
    keys = {c.name: _key(c, *inputs[c.name]) for c in candidates}
    for candidate in candidates:
        key = keys[candidate.name]
        if key not in timings:
            timings[key] = _time_layer(candidate, *inputs[candidate.name], tune)
    formats = (False, True) if any(isinstance(m, nn.Conv2d) for m in model.modules()) else (False,)
    found = [Plan({c.name: timings[keys[c.name]].choice(last, native) for c in candidates}, last) for last in formats]
    # Where no layer gains by a block form, the model stays as it is.
    return [p for p in found if not p.channels_last or any(c.execution is not None for c in p.choices.values())]


def fused(plan: Plan, candidates: Sequence[Candidate], model: nn.Module, example_input: Any) -> Plan:
    """A plan in which native layers compute what follows them too; ``model`` runs as planned."""
    native = {c.name: c for c in candidates if (e := plan.choices[c.name].execution) is not None and e.native}
    found = followers(model, [c.module for c in native.values()], example_input)
    new = dict(plan.choices)
    for name, candidate in native.items():
        follow, choice = found.get(id(candidate.module)), new[name]
        if follow is not None and choice.execution is not None:
            execution = replace(choice.execution, fused=follow.names)
            new[name] = replace(choice, execution=execution, followers=follow.modules)
    return replace(plan, choices=new)


def mode_of(model: nn.Module, example_input: Any, tune: Literal["train", "infer"]) -> Literal["train", "infer"]:
    """What can be timed of a model: some layers have no backward in eval mode (cuDNN's recurrent ones)."""
    try:
        run_model(model, example_input, tune)
    except RuntimeError:
        return "infer"
    return tune


def time_model(model: nn.Module, example_input: Any, tune: Literal["train", "infer"]) -> float:
    """Least seconds of a run of the whole model; infinite if it does not run so.

    It may need a result that was put off in a way that fails, or views that a memory format does not allow.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        run_model(model, example_input, tune)
    except RuntimeError:
        return float("inf")
    seconds = [_clock(lambda: run_model(model, example_input, tune), device)]
    while len(seconds) < 3 or (sum(seconds) < _ENOUGH and len(seconds) < 10 * _REPEATS):
        seconds.append(_clock(lambda: run_model(model, example_input, tune), device))
    return min(seconds)


def default_execution(block: BlockModule) -> Execution:
    """The rule without timing: blocks as they are; convolutions merge up to 8 channels a group, channels last."""
    if not isinstance(block, _BlockConv):
        return Execution()
    return Execution(merge=_merge_to(block, _NARROWEST), channels_last=isinstance(block, BlockConv2d))


def _merge_to(block: BlockModule, width: int) -> int:
    """How many blocks to merge for ``width`` rows and columns: a power of two."""
    rows, cols = (int(sizes.max()) for sizes in (block.topology.row_sizes, block.topology.col_sizes))
    merge = 1
    while merge * min(rows, cols) < width and merge * 2 <= block.topology.groups:
        merge *= 2
    return merge


def _executions(block: BlockModule) -> list[Execution]:
    """The ways a layer can run, likely good ones first."""
    # Meta tensors and other types are left to the tensor library, as the kernels leave them.
    suits = ready(block.blocks) and (not isinstance(block, _BlockConv) or block.suits_native)
    layouts = [False, True] if isinstance(block, BlockConv2d) else [False]
    native = [Execution(native=True, channels_last=layout) for layout in layouts] if suits else []
    if not isinstance(block, _BlockConv):
        return [*native, Execution(), Execution(dense=True)]
    first = _merge_to(block, _NARROWEST)
    merges = [first]
    merges += [m for m in (first * 2, first * 4, first // 2, first // 4) if 1 <= m <= block.topology.groups]
    found = [Execution(merge=m, channels_last=layout) for layout in layouts for m in dict.fromkeys(merges)]
    return native + found + [Execution(dense=True, channels_last=layout) for layout in layouts]


class _Timings:
    """Seconds of each execution of one layer, and of the layer as it was."""

    def __init__(self, dense: float, current: float, blocks: dict[Execution, float]) -> None:
        self.dense, self.current, self.blocks = dense, current, blocks

    def best(self, channels_last: bool, native: bool) -> tuple[Execution, float]:
        """The fastest execution in a memory format; layers without formats take part in both."""
        formats = {e.channels_last for e in self.blocks}
        wanted = channels_last if len(formats) > 1 else next(iter(formats))
        allowed = {e: t for e, t in self.blocks.items() if e.channels_last == wanted and native >= e.native}
        return min(allowed.items(), key=lambda item: item[1])

    def choice(self, channels_last: bool, native: bool) -> Choice:
        """The fastest, unless the layer as it was is faster still."""
        execution, seconds = self.best(channels_last, native)
        if seconds > self.current:
            ratio = self.dense / self.current
            return Choice(None, ratio, f"faster as it is ({execution} takes {seconds / self.current:.2f}x the time)")
        return Choice(execution, self.dense / seconds)


def _inputs(candidate: Candidate, calls: Calls, compact_calls: Calls) -> tuple[Tensor, Tensor]:
    """What the layer is given in the model as it was, and in the compact one, where tokens may come transposed."""
    before = calls.inputs[id(candidate.module)]
    # A convolution is timed in both memory formats, whatever it was given.
    if isinstance(candidate.block, _BlockConv):
        return before, before
    return before, compact_calls.inputs.get(id(candidate.module), before)


def _key(candidate: Candidate, x: Tensor, compact_x: Tensor) -> Hashable:
    """What decides a layer's timings: its shape, topology, geometry and input."""
    block = candidate.block
    packing = block.packing
    orders = packing.inputs.kind, packing.inputs.dims, packing.outputs.kind, packing.outputs.dims
    geometry = tuple(
        str(getattr(block, name, None)) for name in ("stride", "padding", "dilation", "padding_mode", "groups")
    )
    masked = "weight_mask" in candidate.module._buffers
    shape = packing.groups, packing.rows, packing.cols, packing.slots is None, block.weight_shape
    weight = block.blocks
    strides = x.stride(), compact_x.stride()
    return type(block), shape, orders, geometry, x.shape, strides, x.dtype, weight.dtype, weight.device, masked


def _time_layer(candidate: Candidate, like: Tensor, compact_like: Tensor, tune: Literal["train", "infer"]) -> _Timings:
    """Time the layer and its block form in each execution, in turn, so that disturbances hit all alike."""
    module, block = candidate.module, candidate.block
    stock = _stock(block)
    runs: dict[object, Callable[[], object]] = {"dense": _run(stock, _input(like, block, False), tune)}
    if "weight_mask" in module._buffers:
        runs["current"] = _run(module, _input(like, block, False), tune)
    forms: dict[Execution, BlockModule] = {}
    for execution in _executions(block):
        form = block.__class__.__new__(block.__class__)
        form.__dict__.update(block.__dict__)
        form.run_as(execution)
        forms[execution] = form
        runs[execution] = _run(form, _input(compact_like, block, execution.channels_last), tune)
    seconds = _race(runs, block.blocks.device)
    return _Timings(seconds["dense"], seconds.get("current", seconds["dense"]), {e: seconds[e] for e in forms})


def _stock(block: BlockModule) -> nn.Module:
    from .swap import dense_form

    return dense_form(block, masked=False)


def _input(like: Tensor, block: BlockModule, channels_last: bool) -> Tensor:
    # As it lies in memory: tokens come to a mixing layer transposed.
    x = torch.empty_like(like, device=block.blocks.device).normal_()
    if channels_last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    return x


def _run(module: nn.Module, x: Tensor, tune: Literal["train", "infer"]) -> Callable[[], object]:
    if tune == "infer":

        def infer() -> object:
            with torch.no_grad():
                return module(x)

        return infer
    leaves = [x.requires_grad_(), *(p for p in module.parameters() if p.requires_grad)]
    with torch.no_grad():
        gradient = torch.randn_like(module(x))

    def train() -> object:
        with torch.enable_grad():
            return torch.autograd.grad(module(x), leaves, gradient)

    return train


def _race(runs: dict[object, Callable[[], object]], device: torch.device) -> dict[object, float]:
    """Least seconds of each, which other work on the machine disturbs least; the slow ones run only once."""
    seconds: dict[object, list[float]] = {}
    for key, run in runs.items():
        run()
        seconds[key] = [_clock(run, device)]
    for repeat in range(3 * _REPEATS):
        best = min(min(s) for s in seconds.values())
        kept = min(min(seconds[key]) for key in ("dense", "current") if key in seconds)
        if repeat >= _REPEATS - 1 and (best < 0.75 * kept or repeat >= _REPEATS * 2):
            break  # a close decision takes more repeats
        for key, run in runs.items():
            if (key in ("dense", "current") and len(seconds[key]) < 3) or min(seconds[key]) < 2 * best:
                seconds[key].append(_clock(run, device))
    return {key: min(values) for key, values in seconds.items()}


def _clock(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cpu" and torch.get_num_threads() == 1:
        # All the work is this thread's, so its own time is free of whatever else the machine does.
        start = thread_time()
        run()
        return thread_time() - start
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter() - start
