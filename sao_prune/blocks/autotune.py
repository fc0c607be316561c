"""How each block layer of a model runs: by fixed rules, or by timing the ways it can run in that model."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import groupby, zip_longest
from time import perf_counter, thread_time
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .._torch import tree_leaves, tree_map
from .backends import cpu
from .calls import Calls, run_model
from .forms import dense_form
from .modules import BlockComposite, BlockConv, BlockConv2d, BlockConvTranspose2d, BlockModule, BlockRNNBase, Execution
from .plan import Choice, Plan, Steps

Tune = Literal["train", "infer"] | None
_Mode = Literal["train", "infer"]

# Layers that may run channels last.
_OF_IMAGES = BlockConv2d, BlockConvTranspose2d
_NARROWEST = 8
# Runs of a layer and of a whole model; a run that is this much slower than the best is not repeated.
_REPEATS = 3
_HOPELESS = 1.5
# Seconds after which a layer, and a whole model, has been timed long enough.
_ENOUGH = 0.15, 1.0


@dataclass(frozen=True)
class Candidate:
    """A layer that could be compact, and its block form, not yet put in place."""

    name: str
    module: nn.Module
    block: BlockModule


def default_execution(block: BlockModule) -> Execution:
    """The rule without timing: the native kernels where there are any for it; else blocks as they are, convolutions
    with up to 8 channels a group merged, channels last."""
    channels_last = isinstance(block, _OF_IMAGES)
    if suits_native(block, channels_last):
        return Execution(native=True, channels_last=channels_last)
    merge = _merge_to(block, _NARROWEST) if isinstance(block, BlockConv) else 1
    return Execution(merge=merge, channels_last=channels_last)


def run_by_rule(block: nn.Module) -> None:
    """Make a block layer, or those of a layer with several weights, run by the rule without timing: recurrent layers
    with small steps by torch's kernel for whole sequences."""
    small = isinstance(block, BlockRNNBase) and block.has_small_steps
    for layer in (m.layer for m in block.matrices()) if isinstance(block, BlockComposite) else (block,):
        assert isinstance(layer, BlockModule)
        layer.run_as(Execution(dense=True) if small else default_execution(layer))


def suits_native(block: BlockModule, channels_last: bool = False) -> bool:
    """Whether the native kernels can run a layer, in a memory format."""
    blocks = block.blocks
    if not block.has_kernels or blocks.dtype is not torch.float32 or not blocks.is_cpu or blocks.numel() == 0:
        return False
    return (not isinstance(block, BlockConv) or block.suits_native(channels_last)) and cpu.library() is not None


def default_plan(candidates: Sequence[Candidate]) -> Plan:
    """The plan without timing."""
    choices = {c.name: Choice(default_execution(c.block)) for c in candidates}
    return Plan(choices, any(c.execution is not None and c.execution.channels_last for c in choices.values()))


def with_steps(plan: Plan, chains: Mapping[str, Steps]) -> Plan:
    """The plan, its native layers with their epilogues."""
    native = {name for name, c in plan.choices.items() if c.execution is not None and c.execution.native}
    new = dict(plan.choices)
    for name in native & chains.keys():
        steps = chains[name]
        steps = steps if steps.then in native else replace(steps, between=(), then=None)
        new[name] = replace(new[name], steps=replace(steps, rest=()))
    for name, steps in chains.items():
        for first, stack in _native_stacks(name, steps, native):
            new[first] = replace(new[first], steps=stack)
    return replace(plan, choices=new)


def _native_stacks(name: str, steps: Steps, native: Set[str]) -> Iterator[tuple[str, Steps]]:
    """What is left of a stack where some of its layers do not run natively: several, or one that begins later."""
    layers, behind = (name, *steps.rest[::2]), (steps.activation, *steps.rest[1::2])
    for is_native, run in groupby(zip_longest(layers, behind), key=lambda pair: pair[0] in native):
        (first, activation), *rest = run
        if is_native and rest:
            members = tuple(member for pair in rest for member in pair if member is not None)
            yield str(first), Steps(activation=activation, rest=members)


def time_model(model: nn.Module, example_input: Any, mode: _Mode, best: float) -> float:
    """Fewest seconds of a run of the whole model; infinite if it does not run so, as with views that a memory format
    does not allow. One that is clearly slower than ``best`` runs once."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def run() -> None:
        run_model(model, example_input, mode)

    try:
        run()
    except RuntimeError:
        return float("inf")
    seconds = [clock(run, device)]
    while (
        seconds[0] < _HOPELESS * best and (len(seconds) < _REPEATS or sum(seconds) < _ENOUGH[1]) and len(seconds) < 20
    ):
        seconds.append(clock(run, device))
    return min(seconds)


def executions(block: BlockModule) -> list[Execution]:
    """The ways a layer can run, likely good ones first."""
    layouts = [True, False] if isinstance(block, _OF_IMAGES) else [False]
    native = [Execution(native=True, channels_last=layout) for layout in layouts if suits_native(block, layout)]
    merges = [1]
    if isinstance(block, BlockConv):
        first = _merge_to(block, _NARROWEST)
        merges = [m for m in (first, first * 2, first * 4) if m <= block.topology.groups]
    found = [Execution(merge=m, channels_last=layout) for layout in layouts for m in dict.fromkeys(merges)]
    return native + found + [Execution(dense=True, channels_last=layout) for layout in layouts]


def _merge_to(block: BlockModule, width: int) -> int:
    """How many blocks to merge for ``width`` rows and columns: a power of two."""
    rows, cols = (int(sizes.max()) for sizes in (block.topology.row_sizes, block.topology.col_sizes))
    merge = 1
    while merge * min(rows, cols) < width and merge * 2 <= block.topology.groups:
        merge *= 2
    return merge


@dataclass(frozen=True)
class Timings:
    """Seconds of each execution of one layer, and of the layer as it was and dense."""

    dense: float
    current: float
    blocks: dict[Execution, float]

    def fastest(self, channels_last: bool = False) -> tuple[Execution, float]:
        """The fastest block form in a memory format, and its seconds."""
        return min(((e, s) for e, s in self.blocks.items() if e.channels_last == channels_last), key=lambda i: i[1])

    def choice(self, channels_last: bool) -> Choice:
        """The fastest in a memory format, unless the layer as it was is faster still."""
        formats = {e.channels_last for e in self.blocks}
        wanted = channels_last if len(formats) > 1 else next(iter(formats))
        execution, seconds = self.fastest(wanted)
        if seconds > self.current:
            ratio, slower = self.dense / self.current, seconds / self.current
            return Choice(None, ratio, f"faster as it is ({execution} takes {slower:.2f}x the time)")
        return Choice(execution, self.dense / seconds)

    def of_part(self) -> Choice:
        """The fastest, for a layer that cannot be left as it was: it is part of another."""
        execution, seconds = self.fastest()
        return Choice(execution, self.dense / seconds)


def layer_key(candidate: Candidate, x: Tensor) -> str:
    """What decides a layer's timings: its shape, topology, geometry and input."""
    block, layout = candidate.block, candidate.block.layout
    kinds = layout.inputs.kind.value, layout.inputs.dims, layout.outputs.kind.value, layout.outputs.dims
    names = ("stride", "padding", "output_padding", "dilation", "padding_mode", "groups")
    geometry = tuple(str(getattr(block, name, None)) for name in names)
    shape = layout.groups, layout.rows, layout.cols, layout.slots is None, block.weight_shape
    masked = "weight_mask" in candidate.module._buffers
    types = x.dtype, block.blocks.dtype, block.blocks.device.type, masked, block.bias is not None
    strides = () if isinstance(block, BlockConv) else x.stride()
    return repr((type(block).__name__, shape, kinds, geometry, tuple(x.shape), strides, *map(str, types)))


def time_layer(candidate: Candidate, like: Tensor, tune: _Mode) -> Timings:
    """Time the layer and its block form in each execution, in turn, so that disturbances hit all alike."""
    module, block = candidate.module, candidate.block
    stock = dense_form(block, masked=False)
    runs: dict[Hashable, Callable[[], object]] = {}
    forms: list[Execution] = []
    for execution in executions(block):
        form = block.__class__.__new__(block.__class__)
        form.__dict__.update(block.__dict__)
        form.run_as(execution)
        forms.append(execution)
        runs[execution] = runner(form, (_input(like, block, execution.channels_last),), {}, tune)
    runs["dense"] = runner(stock, (_input(like, block, False),), {}, tune)
    if "weight_mask" in module._buffers:
        runs["current"] = runner(module, (_input(like, block, False),), {}, tune)
    seconds = race(runs, block.blocks.device)
    return Timings(seconds["dense"], seconds.get("current", seconds["dense"]), {e: seconds[e] for e in forms})


def _input(like: Tensor, block: BlockModule, channels_last: bool) -> Tensor:
    # As it lies in memory: tokens come to a mixing layer transposed.
    x = torch.empty_like(like, device=block.blocks.device).normal_()
    if channels_last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    return x


def runner(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], tune: _Mode) -> Callable[[], object]:
    """A call of a module, to be timed; with ``"train"`` backwards too, to its parameters and the tensors given."""

    def infer() -> object:
        with torch.no_grad():
            return module(*args, **named)

    if tune == "infer":
        return infer
    args = tuple(a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
    leaves = [t for t in (*args, *module.parameters()) if isinstance(t, Tensor) and t.requires_grad]
    gradients = [torch.randn_like(t) for t in tensors_in(infer()) if t.is_floating_point()]

    def train() -> object:
        with torch.enable_grad():
            results = [t for t in tensors_in(module(*args, **named)) if t.is_floating_point()]
            return torch.autograd.grad(results, leaves, gradients, allow_unused=True)

    return train if leaves else infer


def tensors_in(values: Any) -> list[Tensor]:
    """The tensors in nested values, those of packed sequences too."""
    plain = tree_map(lambda v: v.data if isinstance(v, PackedSequence) else v, values)
    return [t for t in tree_leaves(plain) if isinstance(t, Tensor)]


def race(runs: dict[Hashable, Callable[[], object]], device: torch.device) -> dict[Hashable, float]:
    """Fewest seconds of each, which other work on the machine disturbs least; the slow ones run only once or twice."""
    seconds: dict[Hashable, float] = {}
    spent: dict[Hashable, float] = {}
    for key, run in runs.items():
        first = clock(run, device)
        best = min(seconds.values(), default=first)
        seconds[key] = first if first > 4 * best else clock(run, device)
        spent[key] = first
    for _ in range(4 * _REPEATS):
        best = min(seconds.values())
        close = [k for k in runs if seconds[k] < _HOPELESS * best and spent[k] < _ENOUGH[0]]
        if not close:
            break
        for key in close:
            taken = clock(runs[key], device)
            seconds[key], spent[key] = min(seconds[key], taken), spent[key] + taken
    return seconds


def clock(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one run."""
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


def inputs_of(candidates: Sequence[Candidate], before: Calls, compact: Calls) -> dict[str, Tensor]:
    """What each layer is given: convolutions in the model as it was, others in the compact one, where tokens may come
    transposed."""
    found = {}
    for c in candidates:
        # A layer that was read and not called is called by the block form of the layer that it is in.
        own, later = before.inputs.get(id(c.module)), compact.inputs.get(id(c.module))
        like = own if later is None or (own is not None and isinstance(c.block, BlockConv)) else later
        assert like is not None
        found[c.name] = like
    return found
