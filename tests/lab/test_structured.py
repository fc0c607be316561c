"""The structured baseline: few enough multiply-adds, whole channels, the same kind of outputs."""

import copy
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sao_prune.lab.errors import LabError
from sao_prune.lab.structured import _fewest, structured
from sao_prune.lab.thinning import Network

timm = pytest.importorskip("timm")
import sao_prune.models  # noqa: E402 - registers the networks


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def needs_package():
    pytest.importorskip("torch_pruning")


def counted(model, x):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x[:1])
    return counter.get_total_flops() // 2


def mlp():
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


@pytest.mark.parametrize(
    ("name", "options", "shape"),
    [
        ("sao_mlp", {"depth": 4}, (1, 32, 32)),
        ("sao_mlp", {"depth": 4, "skips": True}, (1, 32, 32)),
        ("sao_vanilla_cnn", {"depth": 4, "width": 16}, (3, 32, 32)),
        ("sao_resnet", {"depth": 8}, (3, 32, 32)),
        ("sao_vgg16", {}, (3, 36, 36)),
        ("test_resnet", {}, (3, 160, 160)),
        ("test_efficientnet", {}, (3, 160, 160)),
    ],
)
def test_networks_keep_working_at_the_share_asked_for(name, options, shape):
    needs_package()
    model, x = timm.create_model(name, **options), torch.randn(2, *shape)
    dense, outputs = counted(model.eval(), x), model(x).shape
    parameters = sum(p.numel() for p in model.parameters())
    model.train()
    record = structured(model, x, flops=0.25)
    assert all(m.training for m in model.modules())
    assert record.dense_flops == dense
    assert record.flops == counted(model.eval(), x) <= 0.25 * dense
    assert record.share > 0.2
    assert record.dense_parameters == parameters
    assert record.parameters == sum(p.numel() for p in model.parameters()) < parameters
    assert record.widths
    assert all(1 <= after < before for before, after in record.widths.values())
    assert model(x).shape == outputs
    optimiser = torch.optim.SGD(model.train().parameters(), lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    model(x).square().mean().backward()
    optimiser.step()
    assert not all(map(torch.equal, before, model.parameters()))
    assert model(x).shape == copy.deepcopy(model)(x).shape


def test_the_weakest_channels_go_and_the_strong_ones_keep_their_values():
    needs_package()
    model = mlp()
    with torch.no_grad():
        model[0].weight[::2] *= 0.01
        model[2].weight[:, ::2] *= 0.01
        model[2].weight[1::2] *= 0.01
        model[4].weight[:, 1::2] *= 0.01
    first, second, last = (model[i].weight.detach().clone() for i in (0, 2, 4))
    record = structured(model, torch.zeros(1, 8), flops=(8 * 16 + 16 * 16 + 16 * 4) / (8 * 32 + 32 * 32 + 32 * 4))
    assert record.widths == {"0": (32, 16), "2": (32, 16)}
    assert torch.equal(model[0].weight, first[1::2])
    assert torch.equal(model[2].weight, second[::2][:, 1::2])
    assert torch.equal(model[4].weight, last[:, ::2])


def test_as_few_channels_go_as_meet_the_share():
    needs_package()
    assert structured(mlp(), torch.zeros(1, 8), flops=1.0).widths == {}
    model = nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 4))
    assert structured(model, torch.zeros(1, 8), flops=0.6).widths == {"0": (32, 19)}
    calls = []
    assert _fewest(lambda count: calls.append(count) or 100 - count, 100, 37) == 63
    assert len(calls) < 10
    assert _fewest(lambda count: 100 - count, 50, 37) is None


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=300), st.integers(-1, 1001))
def test_the_fewest_are_found_of_any_falling_costs(costs, target):
    costs = sorted(costs, reverse=True)
    found = _fewest(costs.__getitem__, len(costs) - 1, target)
    assert found == next((i for i, cost in enumerate(costs) if cost <= target), None)


@pytest.mark.parametrize(
    ("name", "options", "shape"),
    [
        ("sao_resnet", {"depth": 8}, (3, 32, 32)), ("test_efficientnet", {}, (3, 64, 64)),
        ("test_vit", {"img_size": 32}, (3, 32, 32)), ("test_byobnet", {}, (3, 64, 64)),
    ],
)  # fmt: skip
def test_costs_are_those_of_the_thinned_network(name, options, shape):
    torch_pruning = pytest.importorskip("torch_pruning")
    work = Network(torch_pruning, timm.create_model(name, **options), shape)
    groups, _ = work.groups()
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        counts = {g: int(torch.randint(len(g.importance), (), generator=generator)) for g in groups}
        exact = work.cost_without([(g, range(count)) for g, count in counts.items() if count])
        assert work.cost(counts) == exact < work.dense
    assert work.cost({}) == work.dense


@pytest.mark.parametrize("fault", [lambda self, counts: self.dense, lambda self, counts: 1, None])
def test_costs_that_are_no_good_are_not_relied_on(fault, monkeypatch):
    needs_package()

    def fails(self, counts):
        raise LabError("does not run")

    torch.manual_seed(0)
    wanted = structured(mlp(), torch.zeros(1, 8), flops=0.3).widths
    torch.manual_seed(0)
    monkeypatch.setattr(Network, "cost", fault or fails)
    assert structured(mlp(), torch.zeros(1, 8), flops=0.3).widths == wanted


def test_orthogonal_layers_are_thinned_alike():
    """All rows have one norm: global ranking must not empty the first layer because rounding made it smaller."""
    needs_package()
    model = nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(32, 32), nn.Tanh())), nn.Linear(32, 4))
    for module in model[:-1]:
        if isinstance(module, nn.Linear):
            nn.init.orthogonal_(module.weight)
    with torch.no_grad():
        model[-1].weight.copy_(torch.ones(4, 32))
    left = [after for _, after in structured(model, torch.zeros(1, 32), flops=0.25).widths.values()]
    assert len(left) == 4
    assert max(left) - min(left) <= 1


def masked_mlp():
    model = mlp()
    sao_prune.apply(model, groups=2, skip_first=False, seed=0)
    return model


def test_frozen_parameters_are_thinned_and_stay_frozen():
    needs_package()
    model = mlp()
    model[0].weight.requires_grad_(False)
    assert set(structured(model, torch.zeros(1, 8), flops=0.5).widths) == {"0", "2"}
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["0.weight"]


def test_layers_may_all_lose_the_same_share():
    needs_package()
    model = mlp()
    with torch.no_grad():
        model[0].weight[:8] *= 10
    record = structured(model, torch.zeros(1, 8), flops=0.5, scope="layer")
    (_, first), (_, second) = record.widths.values()
    assert abs(first - second) <= 1
    with pytest.raises(LabError, match="scope must be"):
        structured(model, torch.zeros(1, 8), flops=0.5, scope="local")


def snapshot(model):
    state = {k: v.clone() for k, v in model.state_dict().items()}
    return state, [id(p) for p in model.parameters()], [m.training for m in model.modules()]


def test_what_cannot_be_met_is_refused_and_nothing_changes():
    needs_package()
    model, masked = mlp(), masked_mlp()
    model[1].eval()
    state, *rest = snapshot(model)
    random = torch.get_rng_state()
    with pytest.raises(LabError, match=r"cannot do with 0\.10% of its multiply-adds: with one channel a layer"):
        structured(model, torch.zeros(1, 8), flops=0.001)
    for flops in (0, 1.5, True, "0.5"):
        with pytest.raises(LabError, match="share of multiply-adds"):
            structured(model, torch.zeros(1, 8), flops=flops)
    with pytest.raises(LabError, match="does not run on"):
        structured(model, torch.zeros(1, 9), flops=0.5)
    with pytest.raises(LabError, match=r"0\.weight has a mask already"):
        structured(masked, torch.zeros(1, 8), flops=0.5)
    after, *same = snapshot(model)
    assert all(torch.equal(state[k], after[k]) for k in state)
    assert rest == same
    assert torch.equal(random, torch.get_rng_state())


def test_layers_that_the_code_counts_on_are_left_whole():
    needs_package()

    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.free, self.fixed, self.head = nn.Linear(8, 24), nn.Linear(24, 16), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(torch.relu(self.fixed(torch.relu(self.free(x)))).view(-1, 4, 4).mean(1))

    model = Fixed()
    record = structured(model, torch.zeros(1, 8), flops=0.5)
    assert record.left_whole == ("fixed",)
    assert list(record.widths) == ["free"]


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(LabError, match=r"pip install 'sao-prune\[torch-pruning\]'"):
        structured(mlp(), torch.zeros(1, 8), flops=0.5)
