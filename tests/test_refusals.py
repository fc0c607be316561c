"""Every verb on layers that other tools, or other verbs, have made into more than plain parameters.

A verb does its work without changing what the model computes, or refuses before anything is changed.
"""

import copy
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, weight_norm
from torch.nn.utils import prune as torch_prune

import sao_prune
from sao_prune.plain import why_not_plain

# Not the first of the layers that a verb comes to, so that what it does too early is seen.
ODD = 3


class Half(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 0.5

    def right_inverse(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


def dense(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(5)))


def masked(seed: int = 0) -> nn.Sequential:
    model = dense(seed)
    sao_prune.apply(model, groups=4, seed=seed)
    return model


def compacted(seed: int = 0) -> nn.Sequential:
    model = masked(seed)
    sao_prune.compact(model)
    return model


def parametrized(tensor: str) -> Callable[[nn.Module], object]:
    return lambda layer: parametrize.register_parametrization(layer, tensor, Half())


def pruned(tensor: str) -> Callable[[nn.Module], object]:
    return lambda layer: torch_prune.l1_unstructured(layer, tensor, amount=0.5)


STATES = {
    "masked, held": (masked, lambda layer: sao_prune.hold(layer)),
    "masked, weight_orig parametrized": (masked, parametrized("weight_orig")),
    "masked, bias parametrized": (masked, parametrized("bias")),
    "masked, bias pruned": (masked, pruned("bias")),
    "dense, weight_norm": (dense, parametrizations.weight_norm),
    "dense, old weight_norm": (dense, weight_norm),
    "compact, held": (compacted, lambda layer: sao_prune.hold(layer)),
    "compact, blocks parametrized": (compacted, parametrized("blocks")),
    "compact, blocks pruned": (compacted, pruned("blocks")),
    "compact, blocks of old weight_norm": (compacted, lambda layer: weight_norm(layer, "blocks")),
    "compact, bias parametrized": (compacted, parametrized("bias")),
    "compact, bias pruned": (compacted, pruned("bias")),
}
VERBS = {
    "apply": lambda model, _: sao_prune.apply(model, groups=2, seed=1),
    "apply compact": lambda model, _: sao_prune.apply(model, groups=2, seed=1, form="compact"),
    "report": lambda model, _: sao_prune.report(model),
    "remove": lambda model, _: sao_prune.remove(model),
    "compact": lambda model, _: sao_prune.compact(model),
    "compact, tried": lambda model, _: sao_prune.compact(model, example_input=torch.ones(2, 8)),
    "expand": lambda model, _: sao_prune.expand(model),
    "expand masked": lambda model, _: sao_prune.expand(model, "masked"),
    "hold": lambda model, _: sao_prune.hold(model),
    "release": lambda model, _: sao_prune.release(model),
    "save": lambda model, folder: sao_prune.save(model, folder / "own.pt"),
    "load dense": lambda model, folder: sao_prune.load(model, sao_prune.save(dense(1), folder / "m.pt")),
    "load masked": lambda model, folder: sao_prune.load(model, sao_prune.save(masked(1), folder / "m.pt")),
    "load compact": lambda model, folder: sao_prune.load(model, sao_prune.save(compacted(1), folder / "m.pt")),
}
# These give a model other values; the rest leave its outputs alone.
CHANGING = ("apply", "load")
CASES = [(s, v) for s in STATES for v in VERBS]


def odd(state: str) -> nn.Sequential:
    make, act = STATES[state]
    model = make()
    act(model[ODD])
    return model


def structure(model: nn.Module) -> object:
    return {
        path: (
            type(m),
            {name: id(p) for name, p in m._parameters.items()},
            list(m._buffers),
            [type(hook) for hook in m._forward_pre_hooks.values()],
        )
        for path, m in model.named_modules()
    }


@pytest.mark.parametrize(("state", "verb"), CASES)
def test_a_verb_works_or_refuses_before_it_changes_anything(state: str, verb: str, tmp_path: Path) -> None:
    model = odd(state)
    x = torch.randn(4, 8)
    y, before, values = model(x), structure(model), copy.deepcopy(model.state_dict())
    try:
        VERBS[verb](model, tmp_path)
    except ValueError:
        assert structure(model) == before
        assert list(model.state_dict()) == list(values)
        for key, value in model.state_dict().items():
            assert torch.equal(value, values[key]), key
        assert torch.equal(model(x), y)
        return
    if not verb.startswith(CHANGING):
        torch.testing.assert_close(model(x), y)
    model(x).sum().backward()


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ("masked, held", r"its weight is held orthogonal: call sao_prune\.release"),
        ("masked, weight_orig parametrized", r"its weight_orig is parametrized: call .*\(layer, 'weight_orig'\)"),
        ("masked, bias parametrized", "its bias is parametrized"),
        ("masked, bias pruned", "its (weight|bias) is pruned"),
        ("dense, weight_norm", "its weight is parametrized"),
        ("dense, old weight_norm", "its weight is computed by weight_norm: call torch.nn.utils.remove_weight_norm"),
        ("compact, held", "its blocks are held orthogonal"),
        ("compact, blocks parametrized", "its blocks are parametrized"),
        ("compact, blocks pruned", "its blocks are pruned: call .*prune.remove"),
        ("compact, blocks of old weight_norm", "its blocks are computed by weight_norm"),
    ],
)
def test_why_a_layer_is_not_plain(state: str, said: str) -> None:
    model = odd(state)
    reason = why_not_plain(model[ODD])
    assert reason is not None
    assert re.search(said, reason)
    assert why_not_plain(dense()[ODD]) is None
    assert why_not_plain(masked()[ODD], masked=True) is None
    assert why_not_plain(compacted()[ODD]) is None
