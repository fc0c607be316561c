"""Topologies that move, used in other ways than meant: what is not right is said, and what is not concerned stays."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sao_prune
from sao_prune import SET, Moves, Rewire, RigL

from .algorithms.cases import mlp
from .algorithms.test_untouched import same

OVER = Moves(steps=40, every=1)
X, Y = torch.randn(32, 16, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 16
METHODS = [Rewire(share=0.9), Rewire(share=0.9, random=True), RigL(share=0.9), SET(share=0.9)]
pytestmark = pytest.mark.filterwarnings("ignore::sao_prune.SparsityWarning")


def network(method, *, compact=False):
    model = mlp(16, 32, 32, 16)
    if compact:
        sao_prune.apply(model, groups=4, seed=0, skip_first=False, skip_last=False)
        sao_prune.compact(model)
        return model, sao_prune.schedule(model, method, over=OVER, seed=0)
    return model, sao_prune.schedule(model, method, groups=4, over=OVER, seed=0, skip_first=False, skip_last=False)


def layers(model):
    return [module for module in model.modules() if list(module.parameters(recurse=False))]


def weights(layer):
    return layer.blocks if hasattr(layer, "blocks") else layer.weight_orig


def backward(model):
    model.zero_grad()
    F.cross_entropy(model(X), Y).backward()


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("together", [list, tuple, lambda made: SimpleNamespace(optimizer=made)])
def test_several_optimizers_forget_what_moved(method, together):
    model, pruner = network(method)
    first, *rest = layers(model)
    made = [
        torch.optim.SGD(first.parameters(), 0.1, momentum=0.9),
        torch.optim.Adam([p for layer in rest for p in layer.parameters()], 1e-3),
    ]
    for _ in range(2):
        backward(model)
        for optimizer in made:
            optimizer.step()
        pruner.step(together(made))
    for layer in layers(model):
        state = next(optimizer.state[layer.weight_orig] for optimizer in made if layer.weight_orig in optimizer.state)
        tensors = [v for v in state.values() if v.shape == layer.weight_mask.shape]
        assert tensors
        assert not any(bool(v[layer.weight_mask == 0].any()) for v in tensors)


@pytest.mark.parametrize("compact", [False, True])
def test_an_optimizer_that_is_given_twice_moves_its_state_once(compact):
    states = []
    for times in (1, 2):
        torch.manual_seed(0)
        model, pruner = network(Rewire(share=0.9), compact=compact)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        for _ in range(3):
            backward(model)
            optimizer.step()
            pruner.step([optimizer, SimpleNamespace(optimizer=optimizer)][:times])
        states.append([state["momentum_buffer"] for state in optimizer.state.values()])
    assert all(torch.equal(once, twice) for once, twice in zip(*states))


@pytest.mark.parametrize("optimizer", [3, "sgd", [3], {"lr": 1}, torch.optim.SGD])
def test_what_is_no_optimizer_is_refused_and_nothing_has_moved(optimizer):
    model, pruner = network(Rewire(random=True))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TypeError, match="step takes a torch optimizer, a wrapper of one, or several"):
        pruner.step(optimizer)
    assert pruner.count == 0
    assert same(dict(before), dict(model.state_dict()))
    assert pruner.step() is not None


@pytest.mark.parametrize(
    ("method", "compact"), [*((m, False) for m in METHODS), *((m, True) for m in METHODS if isinstance(m, Rewire))]
)
def test_frozen_layers_do_not_move(method, compact):
    model, pruner = network(method, compact=compact)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    first, second, *_ = layers(model)
    weights(second).requires_grad_(False)
    before = [{name: t.clone() for name, t in layer.state_dict().items()} for layer in (first, second)]
    for _ in range(2):
        backward(model)
        optimizer.step()
        report = pruner.step(optimizer)
    notes = [layer.note for layer in report.pruned]
    assert notes[1] == "it is frozen, so nothing moved"
    assert "frozen" not in notes[0]
    assert "frozen" not in notes[2]
    after = second.state_dict()
    assert all(torch.equal(after[name], before[1][name]) for name in before[1] if name != "bias")
    moved = [name for name, t in before[0].items() if "mask" in name or "col_set" in name]
    assert not all(torch.equal(first.state_dict()[name], before[0][name]) for name in moved)
    # Once it trains again it moves again.
    weights(second).requires_grad_(True)
    backward(model)
    assert "frozen" not in pruner.step(optimizer).pruned[1].note


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_model_that_is_frozen_as_a_whole_stays(method):
    model, pruner = network(method)
    model.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    report = pruner.step()
    assert {layer.note for layer in report.pruned} == {"it is frozen, so nothing moved"}
    assert same(dict(before), dict(model.state_dict()))


@pytest.mark.parametrize("verb", [sao_prune.expand, sao_prune.hold])
def test_a_compact_layer_that_is_none_any_more_trains_on_and_is_named(verb):
    model, pruner = network(Rewire(), compact=True)
    verb(model)
    backward(model)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with pytest.raises(RuntimeError, match=r"no compact layer any more|is held"):
        pruner.step()


@pytest.mark.parametrize(
    "change",
    [
        {"count": -1},
        {"count": 1.5},
        {"count": "1"},
        {"count": True},
        {"seed": None},
        {"kept": {}},
        {"kept": None},
        {"kept": 3},
        {"kept": ["0.weight", "2.weight", "4.weight"]},
        {"options": {"share": 0.1}},
        {"method": "rigl"},
    ],
)
def test_states_that_do_not_fit_are_refused(change):
    _, pruner = network(Rewire(share=0.9))
    state, before = pruner.state_dict(), pruner.state_dict()
    with pytest.raises(ValueError, match="the state"):
        pruner.load_state_dict({**state, **change})
    assert pruner.state_dict() == before
    pruner.load_state_dict(state)


@pytest.mark.parametrize("state", [3, None, {}, {"count": 1}, nn.Linear(1, 1).state_dict()])
def test_what_is_no_state_of_a_pruner_is_refused(state):
    _, pruner = network(Rewire())
    with pytest.raises(ValueError, match="the state"):
        pruner.load_state_dict(state)


def test_states_of_before_options_were_kept_are_read():
    _, pruner = network(Rewire())
    state = pruner.state_dict()
    del state["options"]
    pruner.load_state_dict(state)
