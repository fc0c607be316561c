import pytest
import torch

import sao_prune
from sao_prune.lab.data import DataSpec, load_dataset
from sao_prune.lab.training.evaluation import evaluate
from sao_prune.lab.training.loop import train
from sao_prune.lab.training.spec import TrainSpec
from sao_prune.models import SaoDecoder, SaoRecurrent, sao_recurrent
from sao_prune.models.recurrent import CELLS

TOKENS = torch.randint(6, (3, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("cell", [*CELLS, "decoder"])
def test_no_step_sees_a_later_one(cell: str) -> None:
    torch.manual_seed(0)
    net = SaoDecoder(tokens=6, steps=9, depth=2, width=8) if cell == "decoder" else SaoRecurrent(cell, 2, 8, tokens=6)
    later = TOKENS.clone()
    later[:, 5:] = (later[:, 5:] + 1) % 6
    before, after = net(TOKENS), net(later)
    assert torch.equal(before[..., :5], after[..., :5])
    assert not torch.allclose(before[..., 5:], after[..., 5:])


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("reading", ["pixels", "rows"])
def test_an_image_is_read_once_and_whole(reading: str, permuted: bool) -> None:
    net = SaoRecurrent(width=4, reading=reading, permuted=permuted, in_chans=2, img_size=3)
    image = torch.arange(18.0).reshape(1, 2, 3, 3)
    steps = net.steps_of(image)[0]
    assert steps.shape == ((9, 2) if reading == "pixels" else (3, 6))
    assert sorted(steps.flatten().tolist()) == list(range(18))
    if not permuted:
        assert steps[0].tolist() == ([0.0, 9.0] if reading == "pixels" else [0.0, 1.0, 2.0, 9.0, 10.0, 11.0])


@pytest.mark.parametrize("groups", [1, 8, 32])
@pytest.mark.parametrize("compact", [False, True])
def test_a_recurrence_keeps_every_direction_over_784_steps(groups: int, compact: bool) -> None:
    """The linear part of the recurrence, and the gradient of the last state with respect to the first."""
    net = sao_recurrent(width=64, img_size=28)
    sao_prune.apply(net, groups=groups, method=sao_prune.SAO(topology="interleaved"), seed=0)
    weight = net.recurrence.weight_hh_l0.detach().double()
    values = torch.linalg.svdvals(torch.linalg.matrix_power(weight, 784))
    assert torch.allclose(values, torch.ones(64, dtype=torch.double), atol=1e-3)
    if compact and groups > 1:
        sao_prune.compact(net)
    start = torch.full((1, 1, 64), 1e-6, requires_grad=True)
    with torch.no_grad():
        for name, parameter in net.recurrence.named_parameters():
            if "bias" in name:
                parameter.zero_()
    last = net.recurrence(torch.zeros(1, 784, 1), start)[1]
    (gradient,) = torch.autograd.grad(last, start, torch.ones_like(last) / 8)
    assert float(gradient.norm()) == pytest.approx(1.0, abs=2e-3)


@pytest.mark.parametrize("method", ["sao", "lmp"])
def test_pruned_sequence_networks_train(method: str) -> None:
    data = load_dataset(DataSpec("copying", length=4, subset=64, test_subset=32))
    net = SaoDecoder(tokens=10, steps=24, depth=1, width=32, num_classes=8)
    sao_prune.apply(net, sparsity=0.75, method=method, seed=0)
    history = train(net, data, TrainSpec(epochs=2, batch_size=16, optimizer="adam"), lr=0.003, seed=0)
    assert history.status == "ok"
    assert history.test_loss[-1] < 2.3
    assert evaluate(net, data)[0] == history.accuracy[-1]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SaoRecurrent("lstn"), "unknown cell 'lstn'.*did you mean 'lstm'"),
        (lambda: SaoRecurrent(reading="columns"), "unknown reading"),
        (lambda: SaoDecoder(width=30), "width must be a multiple of heads, got 30 and 4"),
        (lambda: SaoDecoder(steps=4, tokens=6)(TOKENS), "a sequence may have 4 steps, got 9"),
        (lambda: sao_recurrent(pretrained=True), "no pretrained weights"),
    ],
)
def test_what_is_refused(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
