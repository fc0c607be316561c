"""Which norm, activation and next linear layers may join a block layer: found once, in a run of the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from .absorbed import activation_in, activation_name, is_activation, is_norm
from .calls import Calls
from .epilogue import step_names
from .following import Flow, Watch
from .modules import BlockLinear
from .plan import Steps
from .stacks import ACTIVATIONS, MOST


@dataclass(frozen=True)
class _Chain:
    """The modules that may join a layer: its epilogue, which nothing else sees.

    Attributes:
        owner: the layer.
        norm: the batch norm that takes its result.
        activation: the activation that takes that.
        between: dropouts before the next layer.
        then: the linear layer that takes the activation's result.
        rest: in place of that one, several linear layers and the activations behind them.
    """

    owner: nn.Module
    norm: nn.Module | None = None
    activation: nn.Module | None = None
    between: tuple[nn.Module, ...] = ()
    then: nn.Module | None = None
    rest: tuple[nn.Module, ...] = ()

    @classmethod
    def of(cls, flow: Flow) -> _Chain:
        """The steps on the way of a tensor, those of which `_follows` says that they can be computed by the layer."""
        chain = cls(flow.owner)
        for step in flow.steps:
            if is_norm(step):
                chain = replace(chain, norm=step, activation=activation_in(step))
            elif is_activation(step):
                chain = replace(chain, activation=step)
            elif type(step) is nn.Dropout:
                chain = replace(chain, between=(*chain.between, step))
        joins = chain.norm is None and chain.activation is not None
        if joins and _is_matrix(flow.owner) and _is_matrix(flow.then):
            return replace(chain, then=flow.then)
        return chain

    def steps(self, paths: Mapping[int, str]) -> Steps:
        """The same by paths."""
        norm, activation, then = (None if m is None else paths[id(m)] for m in (self.norm, self.activation, self.then))
        between = tuple(paths[id(m)] for m in self.between) if then is not None else ()
        return Steps(norm, activation, between, then, tuple(paths[id(m)] for m in self.rest))

    @property
    def names(self) -> tuple[str, ...]:
        """The steps."""
        return step_names(self.norm, self.activation, self.then)


def _is_matrix(layer: nn.Module | None) -> bool:
    return isinstance(layer, nn.Linear | BlockLinear)


def _follows(flow: Flow, module: nn.Module, x: Tensor) -> bool:
    """Whether a module may join a chain as its next step."""
    if type(module) in (nn.Dropout, nn.Identity):
        return True
    chain = _Chain.of(flow)
    if chain.activation is not None or chain.between:
        return False
    if is_norm(module):
        batch: Any = module
        averages = batch.running_mean is not None and isinstance(batch.momentum, float) and batch.eps > 0
        return chain.norm is None and averages and (not _is_matrix(flow.owner) or x.dim() == 2)
    return is_activation(module)


def chains(
    model: nn.Module, layers: Iterable[nn.Module], example_input: Any, watched: Iterable[nn.Module] = ()
) -> tuple[dict[str, Steps], Calls]:
    """The epilogue that each layer may have, by paths, found in a run in eval mode, and `Calls` of that run.

    Args:
        model: any module, without epilogues.
        layers: the layers in it.
        example_input: what to run it on.
        watched: modules whose calls are recorded.

    Raises:
        ValueError: if the model fails on the example input.
    """
    watch = Watch(layers, _follows)
    calls = watch.run(model, example_input, watched)
    found: dict[int, _Chain] = {}
    for flow in watch.flows:
        chain = _Chain.of(flow.reach())
        members = [m for m in (chain.owner, chain.norm, chain.activation, chain.then) if m is not None]
        if len(members) > 1 and all(watch.calls.get(id(m)) == 1 for m in members):
            known = found.get(id(chain.owner))
            if known is None or len(chain.names) > len(known.names):
                found[id(chain.owner)] = chain
    stacks = _stacks(found)
    # Others that have an epilogue of their own compute themselves, and one belongs to one chain only.
    taken: set[int] = set()
    for key, chain in list(found.items()):
        if chain.then is not None and (id(chain.then) in found or id(chain.then) in taken or key in taken):
            found[key] = replace(chain, then=None)
        elif chain.then is not None:
            taken.add(id(chain.then))
    found |= {key: replace(found[key], rest=rest) for key, rest in stacks.items()}
    paths = {id(module): path for path, module in model.named_modules()}
    return {paths[key]: chain.steps(paths) for key, chain in found.items()}, calls


def _stacks(found: Mapping[int, _Chain]) -> dict[int, tuple[nn.Module, ...]]:
    """The rest of the stack that each of some layers begins: linear layers one behind the other, with activations that
    a stack can have."""
    links = {key: c for key, c in found.items() if c.norm is None and not c.between and _is_matrix(c.owner)}
    links = {key: c for key, c in links.items() if activation_name(c.activation) in ACTIVATIONS}
    behind = {id(c.then) for c in links.values() if c.then is not None}
    stacks: dict[int, tuple[nn.Module, ...]] = {}
    for first in links.keys() - behind:
        run = [links[first]]
        while run[-1].then is not None and id(run[-1].then) in links:
            run.append(links[id(run[-1].then)])
        for start in range(0, len(run), MOST):
            rest = [m for c in run[start + 1 : start + MOST] for m in (c.owner, c.activation) if m is not None]
            last = run[-1].then
            if rest and last is not None and id(last) not in found and start + len(rest) // 2 + 1 == len(run):
                rest += [last] if len(rest) // 2 + 2 <= MOST else []
            if rest:
                stacks[id(run[start].owner)] = tuple(rest)
    return stacks
