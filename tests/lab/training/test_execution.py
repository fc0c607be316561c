"""Masked and compact training are the same training."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

import sao_prune
from sao_prune.blocks import BlockModule
from sao_prune.lab.data import Dataset
from sao_prune.lab.network import initial_network
from sao_prune.lab.training import TrainSpec, train
from sao_prune.lab.training.execution import execution_form

Factory = Callable[..., nn.Module]
SPEC = TrainSpec(epochs=3, batch_size=8, weight_decay=1e-3, clip=1.0)


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_both_forms_train_to_the_same_weights_within_rounding(
    blobs: Dataset, network: Factory, kind: str, optimizer: str
) -> None:
    models = {form: network(kind, groups=4) for form in ("masked", "compact")}
    keys = list(models["masked"].state_dict())
    histories = {
        form: train(model, blobs, replace(SPEC, execution=form, optimizer=optimizer), 0.01, 0)
        for form, model in models.items()
    }
    assert histories["masked"].execution == "masked"
    assert histories["compact"].execution.startswith("compact: ")
    assert histories["compact"].train_loss == pytest.approx(histories["masked"].train_loss, rel=1e-4)
    masked, compact = (model.state_dict() for model in models.values())
    assert list(compact) == keys
    for key, value in compact.items():
        # What a mask hides is zero where it was compact.
        kept = masked[key.replace("_orig", "_mask")] if key.endswith("_orig") else 1
        assert torch.allclose(value, masked[key] * kept, atol=1e-4), key


@pytest.mark.filterwarnings("error::sao_prune.StaleOptimizerWarning")
def test_it_trains_in_the_compact_form_and_gives_the_masked_one_back(blobs: Dataset, network: Factory) -> None:
    model, inside = network(groups=4), []
    history = train(
        model,
        blobs,
        replace(SPEC, execution="compact"),
        0.01,
        0,
        on_epoch=lambda _: inside.append(sum(isinstance(m, BlockModule) for m in model.modules())),
    )
    assert history.execution == "compact: 2 of 4 layers"
    assert inside == [2, 2, 2]
    assert not any(isinstance(m, BlockModule) for m in model.modules())


def test_what_ends_a_training_early_leaves_the_masked_form(blobs: Dataset, network: Factory) -> None:
    model = network(groups=4)
    keys = list(model.state_dict())

    def stop(history: object) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        train(model, blobs, replace(SPEC, execution="compact"), 0.01, 0, on_epoch=stop)
    assert list(model.state_dict()) == keys


def test_auto_is_compact_but_for_small_linear_layers(blobs: Dataset, network: Factory) -> None:
    wide = nn.Sequential(nn.Flatten(), nn.Linear(16, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 2))
    sao_prune.apply(wide, groups=8, seed=0)
    assert train(wide, blobs, SPEC, 0.01, 0).execution == "compact: 1 of 3 layers"
    assert train(network("cnn", groups=4), blobs, SPEC, 0.01, 0).execution == "compact: 1 of 3 layers"
    assert train(network(groups=4), blobs, SPEC, 0.01, 0).execution == "masked"


@pytest.mark.parametrize("execution", ["auto", "compact"])
def test_masks_without_blocks_stay_masked(blobs: Dataset, network: Factory, execution: str) -> None:
    model = network()
    sao_prune.apply(model, sparsity=0.5, method="lmp", seed=0)
    history = train(model, blobs, replace(SPEC, execution=execution), 0.01, 0)
    assert history.execution.startswith("masked")


def test_zeros_without_a_mask_are_trained(blobs: Dataset, network: Factory) -> None:
    model = network(groups=4)
    sao_prune.remove(model)
    zeros = model[3].weight == 0
    assert bool(zeros.any())
    assert train(model, blobs, replace(SPEC, execution="compact"), 0.05, 0).execution == "dense"
    assert bool((model[3].weight[zeros] != 0).any())


def test_a_compact_model_stays_compact(blobs: Dataset, network: Factory) -> None:
    model = network(groups=4)
    sao_prune.compact(model)
    assert train(model, blobs, SPEC, 0.01, 0).execution == "compact: 2 layers, as given"
    assert sum(isinstance(m, BlockModule) for m in model.modules()) == 2


def test_a_network_that_amplifies_rounding_is_compact_too():
    net = initial_network("sao_mlp", {"depth": 300}, 10, {"in_chans": 1, "img_size": 32}, gain=1.3)
    sao_prune.apply(net, groups=64, method=sao_prune.SAO(gain=1.3), seed=0, skip_first=False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    images = torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    with execution_form(net, "auto", images) as form:
        assert form.startswith("compact")
        assert all(p.dtype == torch.float32 for p in net.parameters())
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])
