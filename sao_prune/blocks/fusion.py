"""Which norm, activation and next linear layer may join a block layer: found once, in a run of the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from .absorbed import activation_in, is_activation, is_norm
from .calls import Calls
from .epilogue import step_names
from .following import Flow, Watch
from .modules import BlockLinear
from .plan import Steps


@dataclass(frozen=True)
class _Chain:
    """What follows a layer and nothing else sees.

    Attributes:
        owner: the layer.
        norm: the batch norm that takes its result.
        activation: the activation that takes that.
        between: dropouts before the next layer.
        then: the linear layer that takes the activation's result.
    """

    owner: nn.Module
    norm: nn.Module | None = None
    activation: nn.Module | None = None
    between: tuple[nn.Module, ...] = ()
    then: nn.Module | None = None

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
        return Steps(norm, activation, tuple(paths[id(m)] for m in self.between) if then is not None else (), then)

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
    """What follows each layer, by paths, in a run of the model in eval mode, and `Calls` of that run.

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
    # A layer that has an epilogue of its own computes itself, and one belongs to one chain only.
    taken: set[int] = set()
    for key, chain in list(found.items()):
        if chain.then is not None and (id(chain.then) in found or id(chain.then) in taken or key in taken):
            found[key] = replace(chain, then=None)
        elif chain.then is not None:
            taken.add(id(chain.then))
    paths = {id(module): path for path, module in model.named_modules()}
    return {paths[key]: chain.steps(paths) for key, chain in found.items()}, calls
