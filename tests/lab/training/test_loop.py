"""One training: the same for everybody, the same again, and honest when it fails."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from sao_prune.lab.data import Dataset
from sao_prune.lab.training import ScheduleSpec, TrainSpec, evaluate, train

Factory = Callable[..., nn.Module]

SPEC = TrainSpec(epochs=3, batch_size=8)
ALL = replace(
    SPEC,
    optimizer="adamw",
    betas=(0.9, 0.99),
    weight_decay=1e-3,
    schedule=ScheduleSpec("cosine", final_lr=1e-6, warmup_epochs=1),
    label_smoothing=0.1,
    cutmix=0.5,
    mixup=0.2,
    clip=1.0,
    ema=0.9,
    isometry_every=1,
)


def batches_seen(model: nn.Module, data: Dataset, seed: int, spec: TrainSpec = SPEC) -> list[torch.Tensor]:
    seen: list[torch.Tensor] = []
    hook = model.register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()) if m.training else None)
    train(model, data, spec, 0.01, seed)
    hook.remove()
    return seen


@pytest.mark.parametrize("spec", [SPEC, ALL], ids=["plain", "all"])
def test_every_network_sees_the_same_batches_in_the_same_order(
    blobs: Dataset, network: Factory, spec: TrainSpec
) -> None:
    one, two = batches_seen(network(), blobs, 5, spec), batches_seen(network("dropout", groups=4), blobs, 5, spec)
    assert len(one) == len(two) == 15
    assert all(torch.equal(a, b) for a, b in zip(one, two))
    assert not torch.equal(one[0], batches_seen(network(), blobs, 6, spec)[0])


def test_every_epoch_shows_every_image_once_in_an_order_of_its_own(blobs: Dataset, network: Factory) -> None:
    seen = torch.stack([torch.cat(batches_seen(network(), blobs, 0)[5 * e : 5 * e + 5]) for e in range(3)])
    everything = sorted(blobs.standardise(blobs.train_x).flatten(1).tolist())
    for epoch in seen:
        assert sorted(epoch.flatten(1).tolist()) == everything
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("spec", [SPEC, ALL], ids=["plain", "all"])
def test_the_same_seed_gives_the_same_bits_and_leaves_the_global_generators_alone(
    blobs: Dataset, network: Factory, spec: TrainSpec
) -> None:
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    models = [network("dropout", groups=4) for _ in range(2)]
    one, two = (train(model, blobs, spec, 0.05, 1) for model in models)
    assert (one.accuracy, one.train_loss, one.test_loss) == (two.accuracy, two.train_loss, two.test_loss)
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters()))
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002


def test_it_learns_and_keeps_the_books(blobs: Dataset, network: Factory) -> None:
    history = train(network(), blobs, replace(SPEC, schedule=ScheduleSpec("multistep", milestones=(2,))), 0.05, 0)
    assert history.status == "ok"
    assert history.execution == "dense"
    assert history.accuracy[-1] == 1.0
    assert history.train_loss[-1] < history.train_loss[0]
    assert history.lr == pytest.approx([0.05, 0.05, 0.005])
    assert history.epochs == len(history.train_loss) == len(history.test_loss) == 3
    assert history.seconds > 0
    assert history.cpu_seconds > 0
    assert history.isometry == []


def test_a_loss_that_is_not_finite_ends_the_training_and_says_so(blobs: Dataset) -> None:
    model = nn.Sequential(nn.Flatten(), *(nn.Linear(16, 16) for _ in range(6)), nn.Linear(16, 2))
    history = train(model, blobs, SPEC, 1e30, 0)
    assert history.status == "diverged"
    assert history.epochs < SPEC.epochs or not math.isfinite(history.train_loss[-1])
    assert history.accuracy[-1] == evaluate(model, blobs)[0]


def test_augmentation_is_drawn_from_the_seed(blobs: Dataset, network: Factory) -> None:
    one, two, other, none = (
        train(network(), blobs, SPEC, 0.05, seed, augment=augment).train_loss
        for seed, augment in ((0, ("crop",)), (0, ("crop",)), (1, ("crop",)), (0, ()))
    )
    assert one == two
    assert one != other
    assert one != none


def test_the_network_ends_with_the_averaged_weights_that_were_evaluated(blobs: Dataset, network: Factory) -> None:
    plain, averaged = network("cnn", groups=4), network("cnn", groups=4)
    train(plain, blobs, SPEC, 0.05, 0)
    history = train(averaged, blobs, replace(SPEC, ema=0.9), 0.05, 0)
    accuracy, loss = evaluate(averaged, blobs)
    assert (accuracy, loss) == (history.accuracy[-1], pytest.approx(history.test_loss[-1], rel=1e-5))
    assert not torch.equal(plain[0].weight, averaged[0].weight)
    assert not bool(averaged[3].weight[averaged[3].weight_mask == 0].any())


def test_clipping_bounds_every_step(blobs: Dataset, network: Factory) -> None:
    spec = TrainSpec(epochs=1, batch_size=40, momentum=0.0, clip=1e-3)
    model = network()
    before = [p.detach().clone() for p in model.parameters()]
    train(model, blobs, spec, 1.0, 0)
    moved = math.sqrt(sum(float((p.detach() - b).square().sum()) for p, b in zip(model.parameters(), before)))
    assert moved == pytest.approx(1e-3, rel=1e-3)


def test_isometry_is_recorded_at_the_start_and_every_so_many_epochs(blobs: Dataset) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2, bias=False))
    nn.init.orthogonal_(model[1].weight)
    history = train(model, blobs, replace(SPEC, epochs=5, isometry_every=2), 0.05, 0)
    assert [record.step for record in history.isometry] == [0, 2, 4]
    assert history.isometry[0].mean == pytest.approx(1, abs=1e-5)
    assert history.isometry[1].mean != pytest.approx(1, abs=1e-3)


def test_bf16_computes_in_it_and_keeps_weights_in_float32(blobs: Dataset, network: Factory) -> None:
    model, seen = network("cnn", groups=4), []
    model[6].register_forward_hook(lambda m, args, out: seen.append((m.training, out.dtype)))
    history = train(model, blobs, replace(SPEC, amp="bf16"), 0.05, 0)
    assert set(seen) >= {(True, torch.bfloat16), (False, torch.float32)}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert history.accuracy[-1] > 0.9


@pytest.mark.filterwarnings("ignore::sao_prune.SparsityWarning")
@pytest.mark.parametrize("groups", [0, 3, 4])
def test_channels_last_changes_the_layout_and_not_the_result(blobs: Dataset, network: Factory, groups: int) -> None:
    models = [network("cnn", groups=groups) for _ in range(2)]
    seen: list[bool] = []
    models[1][3].register_forward_hook(
        lambda m, args, out: seen.append(out.is_contiguous(memory_format=torch.channels_last)) if m.training else None
    )
    plain = train(models[0], blobs, SPEC, 0.05, 0)
    last = train(models[1], blobs, replace(SPEC, channels_last=True), 0.05, 0)
    assert all(seen)
    assert last.train_loss == pytest.approx(plain.train_loss, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
@pytest.mark.parametrize("method", ["sao", "lmp"])
def test_a_compiled_training_is_the_same_within_rounding(
    blobs: Dataset, network: Factory, kind: str, method: str
) -> None:
    models = [network(kind, groups=4, method=method) for _ in range(2)]
    spec = replace(SPEC, execution="compact")
    plain = train(models[0], blobs, spec, 0.05, 0)
    compiled = train(models[1], blobs, replace(spec, compile=True), 0.05, 0)
    assert compiled.train_loss == pytest.approx(plain.train_loss, rel=1e-3)
