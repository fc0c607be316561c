"""Networks that are as much wider as they are sparser, and rates and scales that follow both."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import sao_prune
from sao_prune.lab.errors import LabError, RecipeError
from sao_prune.lab.recipe import load_recipe
from sao_prune.lab.training import TrainSpec
from sao_prune.lab.training.optimizer import RateSchedule, make_optimizer
from sao_prune.lab.trials import final_trials
from sao_prune.lab.width import fan_ins, groups_of, rate_factors, scale_to_density, widened
from sao_prune.lab.work import Worker, Workplace

Micro = Callable[..., Path]
METHODS = "[dense, sao, rg-s, gmp-s]"
WIDE = ("depth: 2, width: 64", "depth: 3, widen: {width: 64}")
ALL = {"skip_first": False, "skip_last": False}


@pytest.mark.parametrize("groups", [2, 4, 8, 16, 32])
def test_products_of_two_widths_cost_what_they_did(groups: int) -> None:
    wide = widened(128, groups)
    assert wide % 8 == 0
    assert wide**2 / groups == pytest.approx(128**2, rel=0.05)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"groups": 0}, "groups"),
        ({"groups": -4}, "groups"),
        ({"groups": "4"}, "groups"),
        ({"groups": float("nan")}, "groups"),
        ({"groups": float("inf")}, "groups"),
        ({"value": 0}, "value"),
        ({"value": 6.5}, "value"),
        ({"multiple": 0}, "multiple"),
    ],
)
def test_what_is_no_width_is_refused(options: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=f"{named} must be a"):
        widened(**{"value": 64, "groups": 4, **options})


def test_networks_are_as_wide_as_their_amount_says(micro: Micro, tmp_path: Path) -> None:
    configurations = list(
        load_recipe(micro((METHODS, "[dense, sao]"), ("groups: 4", "groups: [4, 16]"), WIDE)).configurations()
    )
    assert [configuration.network_options["width"] for configuration in configurations] == [64, 128, 256]
    assert [groups_of(configuration.prune) for configuration in configurations] == [1, 4, 16]
    worker = Worker(Workplace(tmp_path))
    costs = [
        worker.network(final_trials(configuration, _rate(configuration))[0])[1] for configuration in configurations
    ]
    assert {cost.dense_flops for cost in costs} == {costs[0].flops}
    # All layers but the last, which stays dense, cost what they did; the first has a fixed input, so it costs less.
    assert all(cost.flops < 1.1 * costs[0].flops for cost in costs[1:])
    assert len({final_trials(configuration, _rate(configuration))[0].key for configuration in configurations}) == 3


def _rate(configuration) -> dict:
    from sao_prune.lab.trials import selection_trials

    trials = [trial for group in selection_trials(configuration, {}).values() for trial in group]
    return {trial.key: {"result": {"status": "ok", "accuracy": 0.5, "loss": 1.0}} for trial in trials}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ((WIDE, ("groups: 4", "degree: 4")), "widen follows groups or sparsity, not degree"),
        ((WIDE, (METHODS, "[lmp-t]")), "widen makes networks for an amount"),
        ((("depth: 2, width: 64", "depth: 2, width: 8, widen: {width: 64}"),), "width is given twice"),
        ((("depth: 2, width: 64", "depth: 2, widen: {width: 0.5}"),), "width is a width: a whole number"),
        (
            (("batch_size: 256", "batch_size: 256, scaling: supar"),),
            "supar is derived for adam and adamw, got momentum",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(changes, message: str, micro: Micro) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(micro(*changes))


def networks() -> tuple[nn.Module, nn.Module]:
    def make(width: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, width, 3), nn.ReLU(), nn.Conv2d(width, width, 3), nn.Flatten(), nn.Linear(width, 4)
        )

    return make(8), make(16)


@pytest.mark.parametrize("form", ["masked", "compact"])
def test_rates_follow_width_times_density(form: str) -> None:
    base, wide = networks()
    sao_prune.apply(wide, groups=4, seed=0)
    if form == "compact":
        sao_prune.compact(wide)
    spec = TrainSpec(epochs=2, batch_size=8, optimizer="adam", weight_decay=0.1, scaling="supar")
    optimizer = make_optimizer(wide, spec, 0.08, fan_ins(base))
    RateSchedule(optimizer, spec, 0.08).step(0)
    names = {id(p): name for name, p in wide.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    decays = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    weight = "2.blocks" if form == "compact" else "2.weight_orig"
    # Twice as wide and a quarter as dense: half the fan-in. The last layer is twice as wide, the first as it was.
    assert rates[weight] == pytest.approx(0.16)
    assert rates["4.weight"] == pytest.approx(0.04)
    assert {rates[name] for name in rates if name.endswith("bias")} == {0.08}
    assert rates["0.weight"] == 0.08
    assert {name for name, decay in decays.items() if decay} == {weight, "0.weight", "4.weight"}
    assert len(optimizer.param_groups[0]["params"]) > 0
    assert optimizer.param_groups[0]["lr"] == 0.08


def test_a_base_of_other_layers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the base network has no weight '0\.weight'"):
        rate_factors(networks()[0], {})


@pytest.mark.parametrize(("name", "scaled"), [("rg-s", True), ("lmp-s", True), ("sao", False), ("rg-n", False)])
def test_drawn_for_dense_is_scaled_to_the_density(name: str, scaled: bool, micro: Micro, tmp_path: Path) -> None:
    path = micro(
        (METHODS, f"[{name}]"),
        ("[0.1, 0.01]", "0.01"),
        ("batch_size: 256", "batch_size: 256, optimizer: adam, scaling: supar"),
    )
    plain = micro(
        (METHODS, f"[{name}]"),
        ("[0.1, 0.01]", "0.01"),
        ("batch_size: 256", "batch_size: 256, optimizer: adam"),
        name="plain.yaml",
    )
    weights = []
    for recipe in (path, plain):
        (trial, _) = final_trials(next(load_recipe(recipe).configurations()), {})
        weights.append(Worker(Workplace(tmp_path)).network(trial)[0].layers[2].fc.weight.detach())
    assert torch.allclose(weights[0], (2.0 if scaled else 1.0) * weights[1])


def test_scale_to_density_leaves_dense_layers() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    before = net[0].weight.detach().clone()
    sao_prune.apply(net, sparsity=0.75, method="lmp", include=["1"], seed=0, **ALL)
    scale_to_density(net)
    assert torch.equal(net[0].weight, before)


def test_a_layer_without_a_base_is_a_lab_error(micro: Micro, tmp_path: Path) -> None:
    from sao_prune.lab.data import load_dataset
    from sao_prune.lab.training import train

    data = load_dataset("digits")
    spec = TrainSpec(epochs=1, batch_size=512, optimizer="adam", scaling="supar")
    with pytest.raises(LabError, match="scaling supar: the base network has no weight"):
        train(nn.Sequential(nn.Flatten(), nn.Linear(1024, 10)), data, spec, 0.01, 0, base={})
