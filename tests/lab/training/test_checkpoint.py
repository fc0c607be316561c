"""A training that is cut off goes on to the same bits, and a file that does not fit is passed over."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from sao_prune import Method, Rewire, RigL
from sao_prune.lab.data import Dataset
from sao_prune.lab.training import History, ScheduleSpec, TrainSpec, checkpoint, train

Factory = Callable[..., nn.Module]

SPEC = TrainSpec(
    epochs=4,
    batch_size=8,
    weight_decay=1e-3,
    schedule=ScheduleSpec("cosine", final_lr=1e-5, warmup_epochs=1),
    label_smoothing=0.1,
    cutmix=0.5,
    clip=1.0,
    ema=0.9,
    execution="compact",
    isometry_every=2,
)


def until(epochs: int) -> Callable[[History], None]:
    """Ctrl-C after so many epochs."""

    def stop(history: History) -> None:
        if history.epochs == epochs:
            raise KeyboardInterrupt

    return stop


def cut_off(model: nn.Module, data: Dataset, spec: TrainSpec, file: Path, seed: int = 0) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(model, data, spec, 0.05, seed, until(2), file, key="this")


def same_bits(one: nn.Module, two: nn.Module) -> bool:
    a, b = one.state_dict(), two.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


SLOW = pytest.mark.slow


@pytest.mark.parametrize("kind", ["cnn", pytest.param("dropout", marks=SLOW)])
@pytest.mark.parametrize(
    "spec",
    [SPEC, replace(SPEC, optimizer="adamw", ema=0.0, execution="masked"), replace(SPEC, mixup=0.4, cutmix=0.0)],
    ids=["momentum", "adamw", "mixup"],
)
def test_resumed_is_bit_for_bit_uninterrupted(
    blobs: Dataset, network: Factory, tmp_path: Path, kind: str, spec: TrainSpec
) -> None:
    file = tmp_path / "deep" / "trial.pt"
    whole, resumed = network(kind, groups=4), network(kind, groups=4)
    expected = train(whole, blobs, spec, 0.05, 0, augment=("crop",), key="this")
    with pytest.raises(KeyboardInterrupt):
        train(network(kind, groups=4), blobs, spec, 0.05, 0, until(2), file, ("crop",), "this")
    seen: list[int] = []
    history = train(resumed, blobs, spec, 0.05, 0, lambda h: seen.append(h.epochs), file, ("crop",), "this")
    assert seen == [3, 4]
    assert same_bits(whole, resumed)
    times = {"seconds": 0.0, "cpu_seconds": 0.0}
    assert replace(history, **times) == replace(expected, **times)
    assert [record.step for record in history.isometry] == [0, 2, 4]


def test_the_time_before_the_interruption_counts(blobs: Dataset, network: Factory, tmp_path: Path) -> None:
    file = tmp_path / "trial.pt"
    cut_off(network(), blobs, SPEC, file)
    before = torch.load(file, weights_only=True)["history"]["seconds"]
    assert train(network(), blobs, SPEC, 0.05, 0, None, file, key="this").seconds > before > 0


def test_at_most_one_file_in_thirty_seconds(blobs: Dataset, network: Factory, tmp_path: Path, monkeypatch) -> None:
    file, clock, seen = tmp_path / "trial.pt", [0.0], []
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: clock[0])

    def on_epoch(history: History) -> None:
        seen.append(torch.load(file, weights_only=True)["history"]["accuracy"] if file.exists() else [])
        clock[0] += 20

    train(network(), blobs, replace(SPEC, epochs=5), 0.05, 0, on_epoch, file)
    assert [len(accuracy) for accuracy in seen] == [0, 0, 3, 3, 5]
    assert [path.name for path in tmp_path.iterdir()] == ["trial.pt"]


@pytest.mark.parametrize(
    "damage", [pytest.param("empty", marks=SLOW), "cut", pytest.param("noise", marks=SLOW), "code", "flipped"]
)
def test_a_damaged_file_is_ignored_with_a_warning(
    blobs: Dataset, network: Factory, tmp_path: Path, damage: str
) -> None:
    file = tmp_path / "trial.pt"
    cut_off(network(groups=4), blobs, SPEC, file)
    raw = file.read_bytes()
    if damage == "code":
        torch.save({"identity": "", "model": Path("x")}, file)
    else:
        bytes_ = {"empty": b"", "cut": raw[: len(raw) // 2], "noise": b"noise" * 99, "flipped": b"X" + raw[1:]}
        file.write_bytes(bytes_[damage])
    fresh, model = network(groups=4), network(groups=4)
    expected = train(fresh, blobs, SPEC, 0.05, 0, key="this")
    with pytest.warns(RuntimeWarning, match=r"trial\.pt is not used: .*training starts anew"):
        history = train(model, blobs, SPEC, 0.05, 0, None, file, key="this")
    assert history.train_loss == expected.train_loss
    assert same_bits(fresh, model)


@pytest.mark.parametrize("other", ["seed", "lr", "spec", "key", "augment", "network"])
def test_a_file_of_another_training_is_ignored(blobs: Dataset, network: Factory, tmp_path: Path, other: str) -> None:
    file = tmp_path / "trial.pt"
    cut_off(network("cnn" if other == "network" else "mlp"), blobs, SPEC, file)
    spec = replace(SPEC, clip=2.0) if other == "spec" else SPEC
    with pytest.warns(RuntimeWarning, match="it is of another"):
        train(
            network(),
            blobs,
            spec,
            0.01 if other == "lr" else 0.05,
            1 if other == "seed" else 0,
            None,
            file,
            ("crop",) if other == "augment" else (),
            "that" if other == "key" else "this",
        )


def test_a_finished_training_is_not_trained_again(blobs: Dataset, network: Factory, tmp_path: Path) -> None:
    file, done = tmp_path / "trial.pt", network(groups=4)
    with pytest.raises(KeyboardInterrupt):
        train(done, blobs, SPEC, 0.05, 0, until(4), file)
    again, seen = network(groups=4), []
    history = train(again, blobs, SPEC, 0.05, 0, seen.append, file)
    assert seen == []
    assert history.epochs == 4


def test_a_full_disk_costs_the_file_and_not_the_training(blobs: Dataset, network: Factory, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    target = tmp_path / "file" / "trial.pt"
    with pytest.warns(RuntimeWarning, match="cannot write the checkpoint"), pytest.raises(KeyboardInterrupt):
        train(network(), blobs, SPEC, 0.05, 0, until(2), target)


def test_no_file_no_warning(blobs: Dataset, network: Factory, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        train(network(), blobs, replace(SPEC, epochs=1), 0.05, 0, None, tmp_path / "trial.pt")


@pytest.mark.parametrize(
    ("mover", "form"), [pytest.param(Rewire(share=0.5), "compact", marks=SLOW), (RigL(), "masked")], ids=str
)
def test_entries_that_move_do_so_alike_when_resumed(
    blobs: Dataset, network: Factory, tmp_path: Path, mover: Method, form: str
) -> None:
    spec = replace(SPEC, ema=0.0, execution=form, move_every=3)
    options = {"key": "this", "mover": mover}
    whole, resumed, first = (network("mlp", groups=4) for _ in range(3))
    before = [module.weight_mask.clone() for module in whole.modules() if hasattr(module, "weight_mask")]
    train(whole, blobs, spec, 0.05, 0, **options)
    with pytest.raises(KeyboardInterrupt):
        train(first, blobs, spec, 0.05, 0, until(2), tmp_path / "cell.pt", **options)
    train(resumed, blobs, spec, 0.05, 0, None, tmp_path / "cell.pt", **options)
    assert same_bits(whole, resumed)
    after = [module.weight_mask for module in whole.modules() if hasattr(module, "weight_mask")]
    assert not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
