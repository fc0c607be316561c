"""One training: the same for everybody, the same again, and honest when it fails."""

import math

import pytest
import timm.optim
import torch
from torch import nn

import sao_prune
from sao_prune.lab.data import Dataset
from sao_prune.lab.depth import depth_spectrum
from sao_prune.lab.errors import LabError
from sao_prune.lab.network import build_network, initial_network
from sao_prune.lab.train import ScheduleSpec, TrainSpec, evaluate, train

SPEC = TrainSpec(epochs=3, batch_size=8)


@pytest.fixture
def blobs() -> Dataset:
    """Two classes of 4 x 4 images that differ in sign."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 2
    x = torch.randn(60, 1, 4, 4, generator=generator) * 0.3 + (2 * y - 1).reshape(-1, 1, 1, 1)
    return Dataset("blobs", ("a", "b"), x[:40], y[:40], x[40:], y[40:])


def network(width: int = 8, seed: int = 0) -> nn.Module:
    return (
        initial_network("sao_mlp7", {"img_size": 4}, 2, 1.0, seed)
        if width == 8
        else nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    )


def batches_seen(model: nn.Module, data: Dataset, seed: int) -> list[torch.Tensor]:
    seen: list[torch.Tensor] = []
    hook = model.register_forward_pre_hook(lambda m, args: seen.append(args[0]) if m.training else None)
    train(model, data, SPEC, 0.01, seed)
    hook.remove()
    return seen


def test_every_network_sees_the_same_batches_in_the_same_order(blobs: Dataset) -> None:
    one, two = batches_seen(network(), blobs, 5), batches_seen(network(width=2), blobs, 5)
    assert len(one) == len(two) == 15
    assert all(torch.equal(a, b) for a, b in zip(one, two))
    assert not torch.equal(one[0], batches_seen(network(), blobs, 6)[0])


def test_every_epoch_shows_every_image_once_in_an_order_of_its_own(blobs: Dataset) -> None:
    seen = torch.stack([torch.cat(batches_seen(network(), blobs, 0)[5 * e : 5 * e + 5]) for e in range(3)])
    for epoch in seen:
        assert torch.equal(epoch.sum(0), seen[0].sum(0)) or torch.allclose(epoch.sum(0), seen[0].sum(0), atol=1e-4)
    assert not torch.equal(seen[0], seen[1])


def test_the_same_seed_gives_the_same_history_and_leaves_the_global_generator_alone(blobs: Dataset) -> None:
    state = torch.get_rng_state()
    one, two = (train(network(), blobs, SPEC, 0.05, 1) for _ in range(2))
    assert (one.accuracy, one.train_loss, one.test_loss) == (two.accuracy, two.train_loss, two.test_loss)
    assert torch.equal(torch.get_rng_state(), state)


def test_it_learns(blobs: Dataset) -> None:
    history = train(network(), blobs, SPEC, 0.05, 0)
    assert history.status == "ok"
    assert history.accuracy[-1] == 1.0
    assert history.train_loss[-1] < history.train_loss[0]


def test_a_loss_that_is_not_finite_ends_the_training_and_says_so(blobs: Dataset) -> None:
    model = initial_network("sao_mlp7", {"img_size": 4, "activation": "linear"}, 2, 1.0, 0)
    history = train(model, blobs, SPEC, 1e30, 0)
    assert history.status == "diverged"
    assert len(history.accuracy) < SPEC.epochs or not math.isfinite(history.train_loss[-1])
    assert history.accuracy[-1] == evaluate(model, blobs.test_x, blobs.test_y)[0]


def test_momentum_is_classical_and_nesterov_is_not() -> None:
    params = [nn.Parameter(torch.zeros(1))]
    made = {name: timm.optim.create_optimizer_v2(params, opt=name, lr=0.1) for name in ("momentum", "nesterov")}
    assert not made["momentum"].defaults["nesterov"]
    assert made["nesterov"].defaults["nesterov"]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (ScheduleSpec(), [1.0, 1.0, 1.0, 1.0]),
        (ScheduleSpec("multistep", milestones=(1, 3)), [1.0, 0.1, 0.1, 0.01]),
        (ScheduleSpec("cosine"), [1.0, 0.853553, 0.5, 0.146447]),
    ],
)
def test_schedules(blobs: Dataset, schedule: ScheduleSpec, expected: list[float], monkeypatch) -> None:
    rates: list[float] = []
    from sao_prune.lab.train import loop as module

    def epoch(model, data, optimizer, batch_size, order) -> float:
        rates.append(optimizer.param_groups[0]["lr"])
        return 0.0

    monkeypatch.setattr(module, "_train_epoch", epoch)
    train(network(), blobs, TrainSpec(epochs=4, batch_size=8, schedule=schedule), 1.0, 0)
    assert rates == pytest.approx(expected, abs=1e-5)


def test_initial_weights_are_orthogonal_times_gain_from_the_seed_alone() -> None:
    state = torch.get_rng_state()
    one, two, other = (initial_network("sao_mlp", {"depth": 3}, 10, 1.1, seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    for (name, a), b, c in zip(one.named_parameters(), two.parameters(), other.parameters()):
        assert torch.equal(a, b)
        if name.endswith("bias"):
            assert not a.any()
        else:
            assert not torch.equal(a, c)
            assert torch.linalg.svdvals(a.detach()).sub(1.1).abs().max() < 1e-4


def test_networks_that_cannot_be_built_are_one_sentence() -> None:
    with pytest.raises(LabError, match="timm knows no network 'sao_mpl'"):
        build_network("sao_mpl", {}, 10)
    with pytest.raises(LabError, match=r"sao_mlp: .*colour"):
        build_network("sao_mlp", {"colour": 1}, 10)


def test_the_jacobian_over_depth_is_the_product_of_the_layers() -> None:
    model = initial_network("sao_mlp7", {"img_size": 4, "activation": "linear"}, 3, 1.3, 0)
    sao_prune.apply(model, groups=4, method="rg", seed=0, skip_first=True)
    spectrum = depth_spectrum(model, torch.randn(1, 4, 4))
    assert spectrum.depth == (1, 2, 3, 4, 5, 6)
    product = torch.eye(16, dtype=torch.float64)
    for k, layer in enumerate(model.layers):
        product = layer.fc.weight.detach() @ product
        values = torch.linalg.svdvals(product)
        assert spectrum.mean[k] == pytest.approx(float(values.mean()), rel=1e-9)
        assert spectrum.largest[k] == pytest.approx(float(values.max()), rel=1e-9)
        assert spectrum.smallest[k] == pytest.approx(float(values.min()), abs=1e-12)


def test_the_jacobian_of_a_nonlinear_network_is_that_of_automatic_differentiation() -> None:
    model = initial_network("sao_mlp7", {"img_size": 4}, 3, 1.1, 0)
    image = torch.randn(1, 4, 4)
    spectrum = depth_spectrum(model, image)
    jacobian = torch.func.jacrev(model.forward_features)(image.double().unsqueeze(0)).reshape(100, 16).detach()
    assert spectrum.mean[-1] == pytest.approx(float(torch.linalg.svdvals(jacobian).mean()), rel=1e-9)
