"""Methods that move entries while the lab trains: budgets stay, runs go on to the same bits, the rest is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import sao_prune
from sao_prune import Rewire
from sao_prune.lab.data import load_dataset
from sao_prune.lab.errors import LabError
from sao_prune.lab.methods import check_method
from sao_prune.lab.network import initial_network
from sao_prune.lab.recipe import load_recipe
from sao_prune.lab.training import TrainSpec, train
from sao_prune.lab.trials import final_trials
from sao_prune.lab.work import Worker, Workplace

Micro = Callable[..., Path]
METHODS = "[dense, sao, rg-s, gmp-s]"
MORE = ["rewire-random", "set", "rigl-kernel", "rigl-block"]
NAMES = ["rewire", "set-kernel", "rigl", *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]


def masks(model: nn.Module) -> list[torch.Tensor]:
    return [module.weight_mask.clone() for module in model.modules() if hasattr(module, "weight_mask")]


@pytest.mark.parametrize("name", NAMES)
def test_entries_move_at_one_budget(name: str, micro: Micro, tmp_path: Path, monkeypatch) -> None:
    path = micro(
        (METHODS, f"[{name}]"),
        ("[0.1, 0.01]", "0.1"),
        ("batch_size: 256", "batch_size: 64, move_every: 1, execution: compact"),
        ("data: digits", "data: {name: digits, subset: 128, test_subset: 32}"),
        ("width: 64", "width: 32"),
    )
    configuration = next(load_recipe(path).configurations())
    check_method(initial_network("sao_mlp", configuration.options, 10, {"in_chans": 1, "img_size": 32}), configuration)
    (trial, _) = final_trials(configuration, {})
    trained = {}
    monkeypatch.setattr(
        "sao_prune.lab.work.train", lambda model, *a, **k: trained.update(net=model) or train(model, *a, **k)
    )
    worker = Worker(Workplace(tmp_path))
    start, pruned = worker.network(trial)
    result = worker.work(trial)["result"]
    assert result["status"] == "ok"
    assert result["execution"].startswith("compact" if "rewire" in name else "masked")
    before, after = masks(start), masks(trained["net"])
    assert [int(m.sum()) for m in before] == [int(m.sum()) for m in after]
    assert not all(torch.equal(a, b) for a, b in zip(before, after))
    assert pruned.nonzero == result["nonzero"]


@pytest.mark.parametrize(
    ("train_options", "message"),
    [("ema: 0.9", "masks that move have no average"), ("compile: true", "a compiled network does not tell")],
)
def test_what_cannot_move_is_refused(train_options: str, message: str, micro: Micro) -> None:
    path = micro((METHODS, "[rigl]"), ("batch_size: 256", f"batch_size: 256, {train_options}"))
    configuration = next(load_recipe(path).configurations())
    with pytest.raises(LabError, match=message):
        check_method(
            initial_network("sao_mlp", configuration.options, 10, {"in_chans": 1, "img_size": 32}), configuration
        )


def test_a_training_too_short_to_move_is_refused() -> None:
    data = load_dataset("digits")
    net = nn.Sequential(nn.Flatten(), nn.Linear(1024, 16), nn.Linear(16, 16), nn.Linear(16, 10))
    sao_prune.apply(net, groups=4, seed=0)
    with pytest.raises(LabError, match="nothing would move: the first move comes after 100 optimizer steps"):
        train(net, data, TrainSpec(epochs=1, batch_size=256), 0.1, 0, mover=Rewire())
