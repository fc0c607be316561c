"""A training that prunes step by step, and one that listens to a teacher."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import sao_prune
from sao_prune.lab.data import Dataset
from sao_prune.lab.errors import LabError
from sao_prune.lab.training import DistillSpec, History, TrainSpec, checkpoint, train

Factory = Callable[..., nn.Module]

SPEC = TrainSpec(epochs=4, batch_size=8, ema=0.9)
OVER = sao_prune.Schedule(start=0, end=15, steps=8)


def scheduled(model: nn.Module) -> tuple[nn.Module, sao_prune.Pruner]:
    return model, sao_prune.schedule(model, "lmp", 0.75, over=OVER, seed=0)


def test_masks_shrink_while_it_trains_and_averages_have_them(
    blobs: Dataset, network: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "SECONDS_BETWEEN", 0)
    sparsities: list[float] = []
    model, pruner = scheduled(network())
    train(model, blobs, SPEC, 0.05, 0, lambda _: sparsities.append(pruner.sparsity), pruner=pruner)
    assert sparsities == sorted(sparsities)
    assert sparsities[-1] == sao_prune.report(model).sparsity == 0.75
    masks = [m.weight_mask for m in model.modules() if hasattr(m, "weight_mask")]
    assert {value for mask in masks for value in mask.unique().tolist()} == {0, 1}

    def stop(history: History) -> None:
        if history.epochs == 2:
            raise KeyboardInterrupt

    for resumed in (False, True):
        again, second = scheduled(network())
        file = tmp_path / "trial.pt"
        if resumed:
            train(again, blobs, SPEC, 0.05, 0, checkpoint=file, pruner=second)
        else:
            with pytest.raises(KeyboardInterrupt):
                train(again, blobs, SPEC, 0.05, 0, stop, file, pruner=second)
    first, last = model.state_dict(), again.state_dict()
    assert all(torch.equal(first[key], last[key]) for key in first)
    # A file of a training that does not prune is not gone on from.
    with pytest.warns(RuntimeWarning, match="prunes in another way"):
        train(masked(network()), blobs, SPEC, 0.05, 0, checkpoint=file)


def test_masks_that_shrink_are_not_made_compact(blobs: Dataset, network: Factory) -> None:
    model, pruner = scheduled(network())
    spec = replace(SPEC, epochs=1, execution="compact")
    assert train(model, blobs, spec, 0.05, 0, pruner=pruner).execution == "masked"


def masked(model: nn.Module) -> nn.Module:
    sao_prune.apply(model, 0.75, method="lmp", seed=0)
    return model


def test_a_teacher_is_listened_to_and_left_alone(blobs: Dataset, network: Factory) -> None:
    teacher = network()
    train(teacher, blobs, replace(SPEC, epochs=2), 0.05, 0)
    before = copy.deepcopy(teacher.state_dict())
    spec = replace(SPEC, ema=0.0, execution="masked", distill=DistillSpec(0.0, blocks=("1",), block_weight=0.0))

    def weights(spec: TrainSpec, teacher: nn.Module | None) -> torch.Tensor:
        model = network(groups=2)
        train(model, blobs, spec, 0.01, 0, teacher=teacher)
        assert not any(m._forward_hooks for m in model.modules())
        return model.state_dict()["3.weight_orig"]

    plain = weights(replace(spec, distill=None), teacher)
    assert torch.equal(weights(spec, None), plain)
    # The whole loss is the task's: only the order of its sums is another.
    torch.testing.assert_close(weights(spec, teacher), plain)
    for distill in (DistillSpec(0.9), DistillSpec(0.0, blocks=("1", "3"))):
        taught = weights(replace(spec, distill=distill), teacher)
        assert float((taught - plain).abs().max()) > 1e-4
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())
    with pytest.raises(LabError, match="distill: blocks: the student has no module 'layers'"):
        weights(replace(spec, distill=DistillSpec(blocks=("layers",))), teacher)


def test_from_its_own_outputs_a_network_learns_nothing(blobs: Dataset, network: Factory) -> None:
    spec = replace(SPEC, ema=0.0, distill=DistillSpec(1.0, blocks=("*",)))
    model = network()
    before = copy.deepcopy(model.state_dict())
    train(model, blobs, spec, 0.05, 0, teacher=copy.deepcopy(model))
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], atol=1e-5, rtol=0)
