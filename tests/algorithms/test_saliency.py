"""SNIP, GraSP and what all three saliency methods share: the right entries stay, bad data gets a clear error."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sao_prune
from sao_prune import SNIP, GraSP, SynFlow

from .cases import ALL, digits, mlp, pruned

X, Y = torch.ones(6, 3, 4, 4), torch.arange(6) % 4


def one_layer():
    net = nn.Sequential(nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 2.0], [3.0, -1.0]]))
    return net


def test_snip_by_hand():
    """Gradient ``t x^T = [[3, 6], [1, 2]]``, so ``g w = [[3, 12], [3, -2]]``; of the two threes the first stays."""
    method = SNIP(
        inputs=torch.tensor([[1.0, 2.0]]), targets=torch.tensor([[3.0, 1.0]]), loss=lambda out, t: (out * t).sum()
    )
    assert pruned(one_layer(), method)[0].tolist() == [[1, 1], [0, 0]]


def test_grasp_by_hand():
    """``L = |W x - t|^2 / 2``, ``r = W x - t = (-5, 1)``: ``w (H g) = W * |x|^2 r x^T = [[-25, -100], [15, -10]]``."""
    method = GraSP(
        inputs=torch.tensor([[1.0, 2.0]]),
        targets=torch.tensor([[10.0, 0.0]]),
        loss=lambda out, t: (out - t).square().sum() / 2,
        temperature=1.0,
    )
    assert pruned(one_layer(), method)[0].tolist() == [[0, 0], [1, 1]]


def small_cnn():
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 3)).double()
    return net, torch.randn(7, 2, 6, 6, dtype=torch.float64), torch.arange(7) % 3


def change_by_kernel(net, measure, step=1e-4):
    """Central differences of a measure of the network when one kernel of its convolutions is scaled."""
    changes = []
    for name in ("0", "2"):
        for index in range(getattr(net, name).weight[..., 0, 0].numel()):
            ends = []
            for factor in (1 + step, 1 - step):
                twin = copy.deepcopy(net)
                with torch.no_grad():
                    getattr(twin, name).weight.flatten(0, 1)[index] *= factor
                ends.append(measure(twin))
            changes.append((ends[0] - ends[1]) / (2 * step))
    return torch.stack(changes).detach()


def top_kernels(masks, scores, share=0.5):
    """Whether masks are of whole kernels, and of those with the highest scores."""
    assert all(bool((m == m[:, :, :1, :1]).all()) for m in masks)
    count = round(share * len(scores))
    kept = torch.cat([m[..., 0, 0].flatten() for m in masks]).bool()
    return torch.equal(kept, scores > scores.sort().values[-count - 1])


def test_snip_is_the_sensitivity_to_whole_kernels():
    net, x, y = small_cnn()
    scores = change_by_kernel(net, lambda twin: F.cross_entropy(twin(x), y)).abs()
    assert top_kernels(pruned(net, SNIP(inputs=x, targets=y, batch_size=3), skip_last=True), scores)


def test_grasp_keeps_the_kernels_that_the_squared_gradient_would_miss_most():
    def squared_gradient(twin):
        weights = [m.weight for m in twin if hasattr(m, "weight")]
        return sum(g.square().sum() for g in torch.autograd.grad(F.cross_entropy(twin(x) / 200, y), weights))

    net, x, y = small_cnn()
    scores = change_by_kernel(net, squared_gradient)
    assert top_kernels(pruned(net, GraSP(inputs=x, targets=y, batch_size=4), skip_last=True), scores)


@pytest.mark.parametrize("method", [SNIP, GraSP])
def test_chunks_make_no_difference(method):
    torch.manual_seed(0)
    net, (x, y) = mlp(6, 16, 16, 4, act=nn.Tanh), digits()
    whole = pruned(net, method(inputs=x, targets=y), 0.8)
    for size in (1, 5, 23):
        assert all(map(torch.equal, pruned(net, method(inputs=x, targets=y, batch_size=size), 0.8), whole))


def test_a_single_example_is_never_left_over_for_batch_norm():
    net, (x, y) = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 4)), digits(25)
    for method in (SNIP, GraSP):
        pruned(net, method(inputs=x, targets=y, batch_size=8))


def test_dropout_follows_the_seed():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 32), nn.Dropout(0.5), nn.Linear(32, 32), nn.Dropout(0.5), nn.Linear(32, 4))
    x, y = digits()
    for method in (SNIP(inputs=x, targets=y), GraSP(inputs=x, targets=y)):
        state = torch.get_rng_state()
        first, again, other = (pruned(net, method, 0.9, seed=seed) for seed in (1, 1, 2))
        assert torch.equal(torch.get_rng_state(), state)
        assert all(map(torch.equal, first, again))
        assert not all(map(torch.equal, first, other))


@pytest.mark.filterwarnings("ignore::sao_prune.SparsityWarning")
@pytest.mark.parametrize("method", [SNIP, GraSP, SynFlow])
def test_the_budget_is_met(method):
    torch.manual_seed(0)
    x, y = digits(8, 2 * 64)
    x = x.view(8, 2, 8, 8)
    options = {"inputs": x} if method is SynFlow else {"inputs": x, "targets": y}
    net = nn.Sequential(nn.Conv2d(2, 8, 3), nn.Tanh(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 4))
    equal = pruned(net, method(**options), 0.7, skip_last=True)
    assert sum(int(m.sum()) for m in equal) == round(0.3 * 80) * 9
    mixed = pruned(net, method(**options), 0.7)
    assert 0 <= round(0.3 * (80 * 9 + 512)) - sum(int(m.sum()) for m in mixed) < 9


@pytest.mark.parametrize("name", ["snip", "grasp", "synflow"])
def test_plans_on_the_meta_device_need_no_data(name):
    with torch.device("meta"):
        net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 4, 3))
    plan = sao_prune.plan(net, sparsity=0.75, method=name)
    assert plan.sparsity == pytest.approx(0.75, abs=0.001)
    assert name in sao_prune.methods()
    with pytest.raises(ValueError, match="on the meta device"):
        sao_prune.apply(net, sparsity=0.75, method=name)


def test_layers_that_no_gradient_reaches_are_named():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.unused, self.head = (nn.Linear(6, 6) for _ in range(4))
            self.scale = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return self.head(self.a(x) + self.scale * self.b(x))

    x, y = digits()
    for method in (SNIP(inputs=x, targets=y), GraSP(inputs=x, targets=y), SynFlow(inputs=x)):
        with pytest.raises(ValueError, match=r"no gradient reaches b\.weight, unused\.weight, so"):
            sao_prune.apply(Branches(), sparsity=0.5, method=method)
        sao_prune.apply(Branches(), sparsity=0.5, method=method, exclude=["b", "unused"], skip_first=False)


def test_scores_that_are_no_numbers_are_refused():
    net, (x, y) = mlp(6, 6, 6, 4), digits()
    with torch.no_grad():
        net[2].weight[0, 0] = float("inf")
    for method in (SNIP(inputs=x, targets=y), SynFlow()):
        with pytest.raises(ValueError, match=r"not finite|the loss is|leaves the range"):
            sao_prune.apply(net, sparsity=0.5, method=method, **ALL)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SNIP(inputs=X), ValueError, "takes inputs and targets together"),
        (lambda: SNIP(inputs=X, targets=Y[:3]), ValueError, "inputs hold 6 examples, targets 3"),
        (lambda: GraSP(inputs=X[:0], targets=Y[:0]), ValueError, "at least one"),
        (lambda: SNIP(inputs=[[1.0]], targets=Y), TypeError, "inputs must be a tensor"),
        (lambda: SNIP(inputs=(X, X[:2]), targets=Y), ValueError, "equally many examples"),
        (lambda: SNIP(inputs=X, targets=Y, batch_size=0), ValueError, "batch_size must be a positive"),
        (lambda: SNIP(inputs=X, targets=Y, loss="mse"), TypeError, "loss must be a function"),
        (lambda: GraSP(inputs=X, targets=Y, temperature=0), ValueError, "temperature must be a positive"),
        (lambda: SynFlow(rounds=0), ValueError, "rounds must be a positive"),
        (lambda: SynFlow(inputs=(3, 32, 32)), TypeError, "inputs must be a tensor"),
        (lambda: sao_prune.prune.sao(nn.Linear(4, 4), groups=2, method=SynFlow()), TypeError, "needs the whole model"),
    ],
)
def test_bad_options(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_methods_with_data_are_equal_to_themselves_alone():
    a, b = SNIP(inputs=X, targets=Y), SNIP(inputs=X, targets=Y)
    assert a == a
    assert a != b
    assert len({a, b}) == 2
    assert "tensor" not in repr(a)


@pytest.mark.parametrize("shape", [{"x": "tensor"}, "tuple"])
def test_inputs_may_be_tuples_or_mappings(shape):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp(6, 8, 8, 4)

        def forward(self, x, scale):
            return self.net(x * scale)

    x, y = digits()
    scale = torch.ones(len(x), 1)
    inputs = (x, scale) if shape == "tuple" else {"x": x, "scale": scale}
    model = Two()
    plain = pruned(model.net, SNIP(inputs=x, targets=y))
    assert all(map(torch.equal, pruned(model, SNIP(inputs=inputs, targets=y)), plain))
    pruned(model, SynFlow(3, inputs=inputs))


@pytest.mark.parametrize("method", [SNIP, GraSP, SynFlow])
def test_half_precision_models_are_scored_in_single(method):
    torch.manual_seed(0)
    net = mlp(6, 16, 16, 4, act=nn.Tanh).to(torch.bfloat16)
    x, y = digits()
    options = {"inputs": x.bfloat16()} if method is SynFlow else {"inputs": x.bfloat16(), "targets": y}
    found = pruned(net, method(**options), 0.8)
    single = pruned(copy.deepcopy(net).float(), method(**{**options, "inputs": x.bfloat16().float()}), 0.8)
    assert all(torch.equal(a.float(), b) for a, b in zip(found, single))
    assert net[0].weight.dtype == torch.bfloat16
