"""What a training step holds in memory: counted by hand, and at no cost to the training."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from sao_prune.lab.data import Dataset
from sao_prune.lab.training import TrainSpec, loop, train

Factory = Callable[..., nn.Module]

SPEC = TrainSpec(epochs=2, batch_size=8, optimizer="adam")

# Batches of 8 images of 16 pixels through three layers of 16 and a last one of 2, float32.
INPUT = ACTIVATION = 8 * 16 * 4
LAYER, LAST = 16 * 16 * 4, 16 * 2 * 4
BIASES = (3 * 16 + 2) * 4
# Of the cross-entropy: log-probabilities, labels (8 bytes each), and the sum of its weights.
LOSS = 8 * 2 * 4 + 8 * 8 + 4
SAVED = INPUT + 3 * ACTIVATION + LOSS


def moments(parameters: int, tensors: int) -> int:
    """Of Adam: two for every parameter, and a count of steps for every tensor."""
    return 2 * parameters + 4 * tensors


def test_every_byte_of_a_dense_step_is_counted_once(blobs: Dataset, network: Factory) -> None:
    parameters = 3 * LAYER + LAST + BIASES
    memory = train(network(), blobs, SPEC, 0.01, 0).memory
    assert memory == {
        "weights": parameters,
        "gradients": parameters,
        "optimizer": moments(parameters, 8),
        "saved": SAVED,
    }
    averaged = train(network(), blobs, replace(SPEC, ema=0.9), 0.01, 0).memory
    assert averaged == {**memory, "weights": 2 * parameters}


def test_masked_layers_hold_masks_and_products_and_compact_ones_their_blocks(blobs: Dataset, network: Factory) -> None:
    # The first and the last layer stay dense; a quarter is left of the two between.
    parameters = 3 * LAYER + LAST + BIASES
    masked = train(network(groups=4), blobs, replace(SPEC, execution="masked"), 0.01, 0).memory
    assert masked == {
        "weights": parameters + 2 * LAYER,
        "gradients": parameters,
        "optimizer": moments(parameters, 8),
        "saved": SAVED + 2 * LAYER,
    }
    left = 3 * LAYER // 2 + LAST + BIASES
    history = train(network(groups=4), blobs, replace(SPEC, execution="compact"), 0.01, 0)
    assert history.execution.startswith("compact: 2 of")
    assert history.memory["gradients"] == left
    assert history.memory["optimizer"] == moments(left, 8)
    # Permutations are buffers, or are saved.
    assert left <= history.memory["weights"] < left + 500
    assert SAVED <= history.memory["saved"] < SAVED + 500


@pytest.mark.parametrize("groups", [0, 4])
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_measuring_changes_no_bit(
    blobs: Dataset, network: Factory, kind: str, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = replace(SPEC, execution="compact")
    models = [network(kind, groups) for _ in range(2)]
    one = train(models[0], blobs, spec, 0.01, 0)
    monkeypatch.setattr(loop._Trainer, "_first_step", loop._Trainer._step)
    two = train(models[1], blobs, spec, 0.01, 0)
    assert one.memory
    assert not two.memory
    assert one.train_loss == two.train_loss
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters()))


def test_it_is_measured_in_the_first_step_alone_and_kept_in_checkpoints(
    blobs: Dataset, network: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []
    measure = loop.step_memory
    monkeypatch.setattr(loop, "step_memory", lambda *found: counted.append(1) or measure(*found))

    def stop(history: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(network(), blobs, SPEC, 0.01, 0, stop, tmp_path / "file")
    resumed = train(network(), blobs, SPEC, 0.01, 0, None, tmp_path / "file")
    assert counted == [1]
    assert asdict(resumed)["memory"]["saved"] == SAVED


def test_nothing_is_counted_in_a_compiled_network(
    blobs: Dataset, network: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda model: model)
    assert train(network(), blobs, replace(SPEC, compile=True), 0.01, 0).memory == {}
