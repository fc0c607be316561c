"""A plan: how the block layers of a model run, as data that is printed, saved with a checkpoint and loaded again."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeGuard

import torch
from torch import nn

from .absorbed import activation_name
from .backends import cpu
from .calls import to_channels_last
from .epilogue import Epilogue, Homes, attach, detach, homes_of
from .example import Example, examples_in
from .modules import NORMED, BlockLinear, BlockModule, Execution, NormedConv2d
from .stacks import ACTIVATIONS, MOST

_VERSION = 1


@dataclass(frozen=True)
class Steps:
    """Paths of the modules that a layer computes along with itself; see `Epilogue`."""

    norm: str | None = None
    activation: str | None = None
    between: tuple[str, ...] = ()
    then: str | None = None
    rest: tuple[str, ...] = ()


@dataclass(frozen=True)
class Choice:
    """How a layer is to run; no execution means that it is better left as it is, for ``reason``."""

    execution: Execution | None
    ratio: float | None = None
    reason: str | None = None
    steps: Steps = field(default_factory=Steps)


@dataclass(frozen=True)
class Plan:
    """How the layers of a model are to run, by path, and whether its dense convolutions run channels last.

    Attributes:
        choices: one a layer.
        channels_last: memory format of the dense convolutions.
        machine: where it was timed; ``""`` if it was not.
        examples: what the model was run on when it was found which modules follow which layers, or a module in it, by
            path; shapes, types and ranges, no values.
    """

    choices: Mapping[str, Choice]
    channels_last: bool = False
    machine: str = ""
    examples: Mapping[str, Example] = field(default_factory=dict)

    def to_json(self) -> str:
        """The plan as text.

        Example:
            >>> plan = Plan({"fc": Choice(Execution(native=True))})
            >>> Plan.from_json(plan.to_json()) == plan
            True
        """
        layers = {name: asdict(choice) for name, choice in self.choices.items()}
        examples = {path: example.data for path, example in self.examples.items()}
        whole = {"version": _VERSION, "machine": self.machine, "channels_last": self.channels_last}
        return json.dumps({**whole, "examples": examples, "layers": layers})

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan back.

        Raises:
            ValueError: if it is none.
        """
        try:
            whole = json.loads(text)
            if whole["version"] != _VERSION:
                raise ValueError(f"version {whole['version']!r} is not {_VERSION}")
            choices = {str(name): _choice(entry) for name, entry in whole["layers"].items()}
            examples = {str(path): Example.from_data(data) for path, data in whole.get("examples", {}).items()}
            return cls(choices, bool(whole["channels_last"]), str(whole["machine"]), examples)
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
            raise ValueError(f"not a plan of block layers: {error}") from None


def _choice(entry: dict[str, Any]) -> Choice:
    run, steps = entry["execution"], entry["steps"]
    rest = steps.get("rest", ())
    names = [steps["norm"], steps["activation"], steps["then"], *steps["between"], *rest]
    if not all(name is None or isinstance(name, str) for name in names):
        raise ValueError("names of modules are text")
    execution = None
    if run is not None:
        execution = Execution(bool(run["dense"]), int(run["merge"]), bool(run["channels_last"]), bool(run["native"]))
        if not 1 <= execution.merge <= 1 << 16:
            raise ValueError(f"merge={execution.merge}")
    ratio, reason = entry["ratio"], entry["reason"]
    if not isinstance(ratio, float | int | None) or not isinstance(reason, str | None):
        raise ValueError(f"ratio={ratio!r}, reason={reason!r}")
    read = Steps(steps["norm"], steps["activation"], tuple(steps["between"]), steps["then"], tuple(rest))
    return Choice(execution, ratio, reason, read)


def plan_of(model: nn.Module, machine: str = "") -> Plan:
    """How the block layers of a model run now."""
    paths = {id(module): path for path, module in model.named_modules()}
    choices: dict[str, Choice] = {}
    channels_last = False
    for path, module in model.named_modules():
        if isinstance(module, BlockModule):
            channels_last |= module.execution.channels_last
            choices[path] = Choice(module.execution, steps=_steps(module.epilogue, paths))
        elif isinstance(module, NormedConv2d):
            choices[path] = Choice(NORMED, steps=_steps(module.epilogue, paths))
    return Plan(choices, channels_last, machine, examples_in(model))


def _steps(epilogue: Epilogue | None, paths: dict[int, str]) -> Steps:
    if epilogue is None:
        return Steps()
    _, norm, activation, then, *others = (None if m is None else paths.get(id(m)) for m in epilogue.members())
    known = tuple(path for path in others if path is not None)
    return Steps(norm, activation, () if epilogue.is_stack else known, then, known if epilogue.is_stack else ())


def carry_out(model: nn.Module, plan: Plan) -> list[nn.Module]:
    """Make the block layers of a model run as planned; returns the dense layers whose memory format was changed.

    Layers that the plan does not name, or names otherwise than they are, keep running as they do.
    """
    detach(model)
    modules = dict(model.named_modules())
    for path, choice in plan.choices.items():
        layer = modules.get(path)
        if isinstance(layer, BlockModule) and choice.execution is not None and fits(layer, choice.execution):
            layer.run_as(choice.execution)
    taken: set[int] = set()
    homes = homes_of(model)
    # Stacks first: of a layer in one, its own steps are only what it does where there is none.
    for path, choice in sorted(plan.choices.items(), key=lambda item: not item[1].steps.rest):
        layer = modules.get(path)
        if isinstance(layer, BlockModule) and layer.execution.native and choice.execution == layer.execution:
            _join(layer, choice.steps, modules, homes, taken)
        elif _is_normed(layer, choice) and _join(layer, choice.steps, modules, homes, taken):
            NormedConv2d.become(layer)
    return to_channels_last(model) if plan.channels_last else []


def put_back(model: nn.Module, plan: Plan) -> None:
    """Make a model run as it did by its `plan_of`, after an error; all memory formats stay."""
    carry_out(model, replace(plan, channels_last=False))


def _is_normed(layer: nn.Module | None, choice: Choice) -> TypeGuard[nn.Module]:
    suits = layer is not None and NormedConv2d.suits(layer)
    return suits and choice.execution == NORMED and choice.steps.norm is not None


def normed(model: nn.Module, follow: Mapping[str, Steps]) -> dict[str, Choice]:
    """The dense convolutions of a model that can compute the norm behind them.

    Args:
        model: without epilogues.
        follow: what a run has shown to follow its layers.
    """
    modules = dict(model.named_modules())
    names = [name for name, steps in follow.items() if steps.norm is not None and NormedConv2d.suits(modules[name])]
    return {name: Choice(NORMED) for name in names}


def fits(layer: BlockModule, execution: Execution) -> bool:
    """Whether a layer can run so."""
    native = execution.native and (execution.dense or not layer.has_kernels)
    return execution.merge <= max(1, layer.topology.groups) and not native


def _join(layer: nn.Module, steps: Steps, modules: Mapping[str, nn.Module], homes: Homes, taken: set[int]) -> bool:
    """Make a layer compute these steps; whether it does."""
    own = steps.norm, steps.activation, steps.then, *steps.between, *steps.rest
    names = [n for n in own if n is not None]
    if steps == Steps() or any(n not in modules or id(modules[n]) in taken for n in names):
        return False
    norm, activation, then = (None if n is None else modules[n] for n in (steps.norm, steps.activation, steps.then))
    if then is not None and not (isinstance(then, BlockLinear) and then.execution.native):
        then = None
    if not Epilogue.can_absorb(norm, activation):
        return False
    rest = tuple(modules[n] for n in steps.rest)
    if rest and not (norm is None and then is None and _are_stacked(activation, rest)):
        rest = ()
        names = [n for n in names if n not in steps.rest]
    between = tuple(modules[n] for n in steps.between) if then is not None else ()
    taken.update(id(modules[n]) for n in names)
    attach(Epilogue(layer, norm, activation, between, then, rest), homes)
    return True


def _are_stacked(activation: nn.Module | None, rest: Sequence[nn.Module]) -> bool:
    """Whether a layer with such an activation can begin a stack of these."""
    layers, behind = rest[::2], (activation, *rest[1::2])
    native = all(isinstance(m, BlockLinear) and m.copies == 1 and m.execution.native for m in layers)
    return native and len(layers) < MOST and all(m and activation_name(m) in ACTIVATIONS for m in behind)


def machine() -> str:
    """What the timings of a plan depend on besides the model: processor, threads and versions."""
    kernels = "native" if cpu.library() is not None else "no kernels"
    parts = (platform.machine(), cpu.processor(), f"{torch.get_num_threads()} threads", torch.__version__, kernels)
    return ", ".join(parts)
