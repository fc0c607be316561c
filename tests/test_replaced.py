"""Verbs that replace parameters say so to those who made an optimizer before."""

import gc
import warnings

import pytest
import torch
from torch import nn

import sao_prune
from sao_prune import StaleOptimizerWarning
from sao_prune.nn import convert_eco
from sao_prune.replaced import warn_replaced


def pruned(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    sao_prune.apply(model, groups=4, seed=seed)
    return model


def held() -> nn.Module:
    model = pruned()
    sao_prune.hold(model)
    return model


def load_compact(model: nn.Module, folder) -> None:
    other = pruned()
    sao_prune.compact(other)
    sao_prune.load(model, sao_prune.save(other, folder / "m.safetensors"))


def load_masked(model: nn.Module, folder) -> None:
    sao_prune.load(model, sao_prune.save(pruned(), folder / "m.safetensors"))


def compacted() -> nn.Module:
    model = pruned()
    sao_prune.compact(model)
    return model


VERBS = {
    "compact": (pruned, lambda model, _: sao_prune.compact(model)),
    "expand": (compacted, lambda model, _: sao_prune.expand(model)),
    "hold": (pruned, lambda model, _: sao_prune.hold(model)),
    "release": (held, lambda model, _: sao_prune.release(model)),
    "load": (lambda: nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))), load_compact),
    "convert_eco": (
        lambda: nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1, bias=False)),
        lambda model, _: convert_eco(model, torch.zeros(1, 2, 6, 6), last=1),
    ),
}
KEEPERS = {
    "remove": (pruned, lambda model, _: sao_prune.remove(model)),
    "apply": (lambda: nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))), lambda m, _: sao_prune.apply(m, groups=4)),
    "load": (pruned, load_masked),
}


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("verb", VERBS)
def test_an_optimizer_made_before_is_named(verb, make, tmp_path):
    start, act = VERBS[verb]
    model = start()
    optimizer = make(model.parameters(), lr=0.1)
    with pytest.warns(StaleOptimizerWarning, match=rf"^{verb} replaces .*\({make.__name__}, \d of its \d\)") as caught:
        act(model, tmp_path)
    assert caught[0].filename == __file__
    own = {id(p) for p in model.parameters()}
    assert not own >= {id(p) for p in optimizer.param_groups[0]["params"]}


@pytest.mark.parametrize("verb", VERBS)
def test_no_optimizer_no_warning(verb, tmp_path):
    start, act = VERBS[verb]
    model, other = start(), start()
    keep = torch.optim.SGD(other.parameters(), lr=0.1)
    gone = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(gone, 1)
    del gone, scheduler
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        act(model, tmp_path)
    assert keep


@pytest.mark.parametrize("verb", KEEPERS)
def test_verbs_that_keep_the_parameters_say_nothing(verb, tmp_path):
    start, act = KEEPERS[verb]
    model = start()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        act(model, tmp_path)
    assert {id(p) for p in model.parameters()} == {id(p) for p in optimizer.param_groups[0]["params"]}


@pytest.mark.parametrize("verb", VERBS)
def test_where_the_warning_is_an_error_nothing_is_changed(verb, tmp_path):
    start, act = VERBS[verb]
    model = start()
    before, classes = list(model.parameters()), [type(m) for m in model.modules()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", StaleOptimizerWarning)
        with pytest.raises(StaleOptimizerWarning):
            act(model, tmp_path)
    assert all(a is b for a, b in zip(before, model.parameters()))
    assert [type(m) for m in model.modules()] == classes
    assert optimizer


def test_the_lookup_keeps_nothing_alive():
    model = pruned()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(StaleOptimizerWarning):
        warn_replaced(model.parameters(), "test", 2)
    del optimizer
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_replaced(model.parameters(), "test", 2)


@pytest.mark.parametrize("category", [StaleOptimizerWarning, UserWarning])
def test_who_ignores_the_warning_pays_no_lookup(category, monkeypatch):
    model = pruned()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    looked: list[None] = []
    monkeypatch.setattr("sao_prune.replaced._optimizers_of", lambda _: looked.append(None) or [])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category)
        warn_replaced(model.parameters(), "test", 2)
        assert not looked
        # Filters that look at the text or the place, or for others, are left to Python.
        warnings.filterwarnings("ignore", "another text", category)
        warn_replaced(model.parameters(), "test", 2)
        assert len(looked) == 1
    assert optimizer
