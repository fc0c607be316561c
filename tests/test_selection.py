"""Every verb takes the layers that its user names, and no others; budgets and selections as objects."""

from collections.abc import Callable
from inspect import signature
from typing import Any

import pytest
import torch
from torch import nn

import sao_prune
from sao_prune import Budget, Selection


def dense() -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(5)))


def masked() -> nn.Sequential:
    model = dense()
    sao_prune.apply(model, groups=4, seed=0)
    return model


def compacted() -> nn.Sequential:
    model = masked()
    sao_prune.compact(model)
    return model


def held() -> nn.Sequential:
    model = masked()
    sao_prune.hold(model)
    return model


# Where a verb starts from, and whether it has been at a layer.
VERBS: dict[str, tuple[Callable[[], nn.Sequential], Callable[[nn.Module], bool]]] = {
    "apply": (dense, lambda layer: hasattr(layer, "weight_mask")),
    "remove": (masked, lambda layer: not hasattr(layer, "weight_mask")),
    "compact": (masked, lambda layer: isinstance(layer, sao_prune.blocks.BlockLinear)),
    "expand": (compacted, lambda layer: not isinstance(layer, sao_prune.blocks.BlockLinear)),
    "hold": (masked, lambda layer: hasattr(layer, "parametrizations")),
    "release": (held, lambda layer: not hasattr(layer, "parametrizations")),
}


def run(verb: str, model: nn.Module, **options: Any) -> Any:
    return getattr(sao_prune, verb)(model, **({"groups": 4, "seed": 0} if verb == "apply" else {}), **options)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    "chosen",
    [
        {"include": ["1", "3"]},
        {"include": ["1.weight", "3.*"]},
        {"exclude": ["2"]},
        {"include": ["[123]"], "exclude": lambda name, module: name == "2"},
        {"include": lambda name, module: isinstance(module, nn.Module) and name in ("1", "3")},
        {"include": lambda: (name for name in ("1", "3"))},
        {"exclude": lambda: iter(["2"])},
    ],
)
def test_a_verb_takes_the_chosen_layers_alone(verb: str, chosen: dict[str, Any]) -> None:
    start, changed = VERBS[verb]
    torch.manual_seed(0)
    model = start()
    x = torch.randn(4, 8)
    before = model(x)
    # Generators can be asked once, so each verb gets its own.
    run(verb, model, **{k: v() if callable(v) and not signature(v).parameters else v for k, v in chosen.items()})
    assert [changed(model[i]) for i in (1, 2, 3)] == [True, False, True]
    assert verb == "apply" or torch.allclose(model(x), before, atol=1e-5)
    # What was not taken can be later.
    run(verb, model, include=["2"])
    assert changed(model[2])


@pytest.mark.parametrize("verb", VERBS)
def test_patterns_that_match_nothing_are_errors(verb: str) -> None:
    start, changed = VERBS[verb]
    model = start()
    with pytest.raises(ValueError, match="'nowhere' matches none of the"):
        run(verb, model, exclude=["nowhere"])
    with pytest.raises(TypeError, match="include must be a list of glob patterns"):
        run(verb, model, include="1")
    assert not any(changed(model[i]) for i in (1, 2, 3))


def test_layers_that_are_not_chosen_are_in_the_report() -> None:
    model = masked()
    report = sao_prune.compact(model, exclude=["2"])
    assert {layer.name: layer.reason for layer in report.skipped}["2"] == "excluded"
    report = sao_prune.expand(model, include=["1"])
    assert [layer.name for layer in report.expanded] == ["1"]
    assert [layer.name for layer in report.compact] == ["3"]
    model = masked()
    report = sao_prune.remove(model, include=["1"])
    assert [layer.name for layer in report.pruned] == ["1.weight"]
    assert {layer.name: layer.reason for layer in report.skipped}["2.weight"] == "still masked"
    with pytest.raises(ValueError, match="no chosen layer is pruned"):
        sao_prune.remove(model, exclude=["*"])


def test_a_tied_weight_is_removed_under_all_its_names() -> None:
    model = dense()
    model[3].weight = model[1].weight
    sao_prune.apply(model, groups=4, seed=0)
    sao_prune.remove(model, include=["3"])
    assert model[1].weight is model[3].weight
    assert hasattr(model[2], "weight_mask")


def test_attention_expands_with_what_it_reads() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    sao_prune.apply(model, groups=2, seed=0, skip_first=False, skip_last=False)
    x = torch.randn(2, 3, 16)
    before = model(x)
    report = sao_prune.compact(model, example_input=x, exclude=["self_attn.out_proj"])
    assert {layer.name for layer in report.compact} == {"self_attn.in_proj_weight", "linear1", "linear2"}
    assert torch.allclose(model(x), before, atol=1e-5)
    sao_prune.compact(model, example_input=x)
    report = sao_prune.expand(model, include=["linear1"])
    (projections,) = [layer for layer in report.compact if layer.name == "self_attn.in_proj_weight"]
    assert (projections.shape, projections.groups) == ((48, 16), 6)
    sao_prune.expand(model, include=["self_attn"])
    assert type(model.self_attn.out_proj).__name__ == "NonDynamicallyQuantizableLinear"
    assert isinstance(model.linear2, sao_prune.blocks.BlockLinear)
    assert torch.allclose(model(x), before, atol=1e-5)


def test_a_budget_and_a_selection_are_what_their_options_are() -> None:
    budget, selection = Budget(sparsity=0.75, fit="regular"), Selection(exclude=["2"], skip_last=False)
    loose = sao_prune.plan(dense(), 0.75, fit="regular", exclude=["2"], skip_last=False)
    assert sao_prune.plan(dense(), budget=budget, selection=selection) == loose
    with pytest.raises(TypeError, match="leave out sparsity"):
        sao_prune.plan(dense(), 0.5, budget=budget)
    with pytest.raises(TypeError, match="leave out exclude"):
        sao_prune.plan(dense(), 0.5, selection=selection, exclude=["2"])
    with pytest.raises(TypeError, match=r"budget must be a sao_prune\.Budget"):
        sao_prune.plan(dense(), budget=0.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="give a Budget as budget="):
        sao_prune.plan(dense(), budget)  # type: ignore[arg-type]
    over = sao_prune.Schedule(start=0, end=2, steps=2)
    pruner = sao_prune.schedule(
        dense(), "lmp", budget=Budget(sparsity=0.5), selection=Selection(skip_first=False), over=over
    )
    assert pruner.report is not None
    assert len(pruner.report.pruned) == 4
