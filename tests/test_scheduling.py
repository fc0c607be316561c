"""Pruning over time: masks only shrink, budgets are met, a resumed run has the same bits, ranks agree."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import sao_prune
from sao_prune import RG, SAO, Project, Schedule

from .algorithms.cases import ALL, mlp
from .algorithms.test_untouched import same, snapshot
from .networks import masks_hold
from .patience import PATIENCE

X = torch.randn(64, 12, generator=torch.Generator().manual_seed(0))
Y = torch.arange(64) % 4
OVER = Schedule(start=2, end=8, steps=4)
METHODS = [
    "gmp",
    "lmp",
    "lrp",
    RG(),
    RG(topology="interleaved"),
    Project(inputs=X),
    Project(inputs=X, topology="ramanujan"),
]
pytestmark = pytest.mark.filterwarnings("ignore::sao_prune.SparsityWarning")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 8, 3, padding=1)
        self.deep = nn.Conv1d(8, 8, 3, padding=1, groups=2, bias=False)
        self.norm = nn.BatchNorm1d(8)
        self.one, self.two = nn.Linear(8, 24), nn.Linear(24, 24)
        self.two_too = nn.Linear(24, 24)
        self.two_too.weight = self.two.weight
        self.head = nn.Linear(24, 4)

    def forward(self, x):
        x = self.norm(self.deep(torch.relu(self.conv(x[:, None])))).relu().mean(2)
        x = torch.tanh(self.two(torch.tanh(self.one(x))))
        return self.head(torch.tanh(self.two_too(x)))


def network(seed=0):
    torch.manual_seed(seed)
    return Net()


def train(model, optimizer, pruner, steps, each=lambda: None):
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
        pruner.step(optimizer)
        each()


def masks(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith("_mask")}


def adam(model):
    return torch.optim.Adam(model.parameters(), 1e-2)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_masks_shrink_to_what_apply_would_leave_and_states_vanish_with_entries(method):
    model, seen = network(), []
    planned = sao_prune.plan(network(), sparsity=0.8, method=method)
    pruner = sao_prune.schedule(model, method, sparsity=0.8, over=OVER, seed=0)
    assert pruner.sparsity == 0
    optimizer = adam(model)

    def look():
        now = masks(model)
        assert all(bool((now[k] <= before).all()) for before in seen[-1:] for k, before in before.items())
        seen.append(now)
        assert masks_hold(model)
        for name, mask in now.items():
            parameter = model.get_parameter(name.removesuffix("_mask") + "_orig")
            for value in (parameter, *(v for v in optimizer.state[parameter].values() if v.shape == mask.shape)):
                assert not bool(value[mask == 0].any())

    train(model, optimizer, pruner, 10, look)
    assert pruner.finished
    # GMP meets its budget to within one kernel, here of three taps.
    assert abs(pruner.report.nnz - planned.nnz) <= (3 if method == "gmp" else 0)
    assert [r.nnz for r in sao_prune.report(model).pruned] == [r.nnz for r in pruner.report.pruned]
    assert model.two.weight_orig is model.two_too.weight_orig
    assert torch.equal(model.two.weight_mask, model.two_too.weight_mask)


@pytest.mark.parametrize("method", ["gmp", RG(), Project(inputs=X)], ids=str)
def test_a_resumed_run_has_the_same_bits(method, tmp_path):
    def start(model):
        pruner = sao_prune.schedule(model, method, sparsity=0.8, over=OVER, seed=3)
        return model, pruner, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)

    model, pruner, optimizer = start(network())
    train(model, optimizer, pruner, 5)
    states = {"model": model, "pruner": pruner, "optimizer": optimizer}
    torch.save({name: thing.state_dict() for name, thing in states.items()}, tmp_path / "state.pt")
    train(model, optimizer, pruner, 5)
    again, anew, optimizer = start(network(1))
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    for name, thing in (("pruner", anew), ("model", again), ("optimizer", optimizer)):
        thing.load_state_dict(saved[name])
    train(again, optimizer, anew, 5)
    assert same(dict(model.state_dict()), dict(again.state_dict()))
    assert anew.count == 10


def test_sets_split_one_two_four():
    model, groups = mlp(16, 32, 32, 16, act=nn.Tanh), []
    over = Schedule(start=1, end=5, steps=5, shape="linear")
    pruner = sao_prune.schedule(model, RG(), groups=8, over=over, seed=0, **ALL)
    for _ in range(5):
        groups.append(pruner.step().layers[0].groups)
    # 17.5, 35, 52.5, 70 and 87.5 %.
    assert groups == [1, 2, 2, 4, 8]


def test_the_final_topology_of_rg_is_that_of_apply():
    gradual, at_once = network(), network()
    pruner = sao_prune.schedule(gradual, "rg", sparsity=0.75, over=Schedule(0, 3, 3), seed=5)
    for _ in range(3):
        pruner.step()
    sao_prune.apply(at_once, sparsity=0.75, method="rg", seed=5)
    assert same(masks(gradual), masks(at_once))


@pytest.mark.parametrize("method", ["gmp", "lmp", "lrp", RG(), Project(inputs=X)], ids=str)
def test_all_at_once_is_apply(method):
    one, other = network(), network()
    pruner = sao_prune.schedule(one, method, sparsity=0.8, over=Schedule(0, shape="one-shot"), seed=0)
    sao_prune.apply(other, sparsity=0.8, method=method, seed=0)
    assert pruner.finished
    assert same(masks(one), masks(other))
    assert torch.equal(one.eval()(X), other.eval()(X))


class Experts(nn.Module):
    """Three matrices in one parameter, of different sizes."""

    def __init__(self):
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 8, 12) * torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(torch.tanh(torch.einsum("bi,eoi->bo", x, self.experts)))


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_each_matrix_of_a_stack_ends_with_what_apply_leaves_it(method):
    torch.manual_seed(0)
    gradual = Experts()
    at_once = copy.deepcopy(gradual)
    pruner = sao_prune.schedule(gradual, method, sparsity=0.75, over=Schedule(1, 3, 3), seed=0, **ALL)
    for _ in range(3):
        pruner.step()
    sao_prune.apply(at_once, sparsity=0.75, method=method, seed=0, **ALL)
    left = [model.experts_mask.sum((1, 2)).tolist() for model in (gradual, at_once)]
    assert left[0] == left[1]


@given(
    st.integers(0, 50),
    st.integers(0, 50),
    st.integers(1, 51),
    st.sampled_from(["cubic", "linear", "one-shot", "iterative"]),
    st.floats(0.01, 1),
)
@settings(max_examples=60, deadline=None)
def test_density_falls_to_what_is_asked_and_only_at_events(start, length, steps, shape, final):
    over = Schedule(start, start + length, min(steps, length + 1), shape)
    densities = [over.density(step, final) for step in range(start + length + 2)]
    assert densities == sorted(densities, reverse=True)
    assert densities[-1] == final
    assert densities[: over.events[0]] == [1.0] * over.events[0]
    changes = [s for s in range(1, len(densities)) if densities[s] != densities[s - 1]]
    assert set(changes) <= set(over.events)
    assert len(set(over.events)) == len(over.events)


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ("linear", [0.8, 0.6, 0.4, 0.2]),
        ("cubic", [0.5375, 0.3, 0.2125, 0.2]),
        ("iterative", [0.2**0.25, 0.2**0.5, 0.2**0.75, 0.2]),
        ("one-shot", [0.2, 0.2, 0.2, 0.2]),
    ],
)
def test_shapes(shape, wanted):
    over = Schedule(1, 4, 4, shape)
    assert [over.density(step, 0.2) for step in (1, 2, 3, 4)] == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": -1}, "start must be a whole number of at least 0, got -1"),
        ({"end": 2.5}, "end must be a whole number"),
        ({"steps": 0}, "steps must be a whole number of at least 1"),
        ({"start": 5, "end": 4}, "end must not be before start"),
        ({"end": 3, "steps": 5}, "5 prunings do not fit"),
        ({"shape": "cosine"}, "shape must be one of 'cubic'"),
    ],
)
def test_bad_schedules_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**options)


@pytest.mark.parametrize(
    ("method", "options", "error", "message"),
    [
        ("sao", {}, TypeError, "does not prune over time"),
        (SAO(), {}, TypeError, "does not prune over time"),
        (RG(values="normal"), {}, TypeError, "does not prune over time"),
        (RG(topology="expander"), {}, TypeError, "does not prune over time"),
        ("snip", {}, TypeError, "does not prune over time"),
        ("gmp", {"over": 5}, TypeError, "must be a sao_prune.Schedule"),
        ("gmp", {"sparsity": 2}, ValueError, "sparsity is a share"),
        (Project(), {"over": Schedule(0, shape="one-shot")}, ValueError, "needs calibration data"),
    ],
)
def test_after_an_error_the_model_is_as_it_was(method, options, error, message):
    model = network()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        sao_prune.schedule(model, method, **{"sparsity": 0.5, "over": OVER, **options})
    assert same(before, snapshot(model))


def test_a_failed_step_changes_nothing_and_can_be_made_again():
    model, batches = network(), []
    pruner = sao_prune.schedule(model, Project(inputs=batches), sparsity=0.8, over=Schedule(1, 1), seed=0)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="gave no batch"):
        pruner.step()
    assert same(dict(before), dict(model.state_dict()))
    batches.append(X)
    assert pruner.step().sparsity == pytest.approx(0.8, abs=0.02)


def test_masks_of_another_moment_are_noticed():
    model = network()
    pruner = sao_prune.schedule(model, "lmp", sparsity=0.8, over=OVER)
    for _ in range(3):
        pruner.step()
    other = sao_prune.schedule(again := network(), "lmp", sparsity=0.8, over=OVER)
    other.load_state_dict(pruner.state_dict())
    with pytest.raises(RuntimeError, match="load the state of the model as well"):
        other.step()
    again.load_state_dict(model.state_dict())
    assert other.step() is not None


def test_a_layer_that_is_masked_no_more_is_noticed():
    model = network()
    pruner = sao_prune.schedule(model, "lmp", sparsity=0.8, over=Schedule(1, 1))
    sao_prune.remove(model)
    with pytest.raises(RuntimeError, match="no masked parameter any more"):
        pruner.step()


@pytest.mark.parametrize(
    ("method", "other", "options"),
    [
        ("lmp", "gmp", {}),
        ("lmp", "lmp", {"over": Schedule(2, 9, 4)}),
        ("lmp", "lmp", {"sparsity": 0.7}),
        ("lmp", "lmp", {"exclude": ["one*"]}),
        (RG(), RG(topology="interleaved"), {}),
        (Project(inputs=X), Project(inputs=X, values="keep"), {}),
    ],
)
def test_states_of_other_runs_are_refused(method, other, options):
    common = {"sparsity": 0.8, "over": OVER, "seed": 0}
    pruner = sao_prune.schedule(network(), method, **common)
    before = pruner.state_dict()
    state = sao_prune.schedule(network(), other, **{**common, **options}).state_dict()
    with pytest.raises(ValueError, match="the state is of"):
        pruner.load_state_dict(state)
    assert pruner.state_dict() == before


@pytest.mark.parametrize(
    "change",
    [{}, {"count": None}, {"count": -1}, {"count": 2.0}, {"seed": "0"}, {"kept": {}}],
    ids=str,
)
def test_what_is_no_state_is_refused(change):
    pruner = sao_prune.schedule(network(), "lmp", sparsity=0.8, over=OVER, seed=0)
    before = pruner.state_dict()
    with pytest.raises(ValueError, match="the state is of"):
        pruner.load_state_dict({**before, **change} if change else {})
    assert pruner.state_dict() == before


def test_states_of_earlier_versions_load():
    pruner = sao_prune.schedule(network(), "lmp", sparsity=0.8, over=OVER, seed=0)
    old = {key: value for key, value in pruner.state_dict().items() if key not in ("options", "amounts")}
    pruner.load_state_dict({**old, "count": 1})
    assert pruner.count == 1


def test_several_optimizers_and_wrappers_of_them():
    """Entries that go leave no momentum in any of the optimizers that train the model, as of Muon beside Adam."""

    class Wrapper:
        def __init__(self, optimizer):
            self.optimizer = optimizer

    model = network()
    pruner = sao_prune.schedule(model, "lmp", sparsity=0.8, over=Schedule(2, 2), seed=0)
    first = [model.one.weight_orig, model.two.weight_orig]
    known = {id(p) for p in first}
    rest = [p for p in model.parameters() if id(p) not in known]
    optimizers = [torch.optim.Adam(first, 1e-2), torch.optim.SGD(rest, 1e-2, momentum=0.9)]
    for _ in range(2):
        F.cross_entropy(model(X), Y).backward()
        for optimizer in optimizers:
            optimizer.step()
        pruner.step([optimizers[0], Wrapper(Wrapper(optimizers[1]))])
    looked = 0
    for name, mask in masks(model).items():
        parameter = model.get_parameter(name.removesuffix("_mask") + "_orig")
        for state in (optimizer.state.get(parameter, {}) for optimizer in optimizers):
            for value in state.values():
                if value is not None and value.shape == mask.shape:
                    looked += 1
                    assert not bool(value[mask == 0].any())
    assert looked >= 5


@pytest.mark.parametrize("given", [5, "adam", [None], [torch.optim.SGD([torch.zeros(2)], 0.1), 5]], ids=str)
def test_what_is_no_optimizer_is_refused_before_anything_changes(given):
    model = network()
    pruner = sao_prune.schedule(model, "lmp", sparsity=0.8, over=Schedule(1, 1), seed=0)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TypeError, match="step takes a torch optimizer"):
        pruner.step(given)
    assert pruner.count == 0
    assert same(dict(before), dict(model.state_dict()))
    assert pruner.step() is not None


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_closures_and_a_history_of_all_entries(search):
    """L-BFGS steps along directions of the past: none of them leads back to an entry that went."""
    model = network().double()
    x = X.double()
    pruner = sao_prune.schedule(model, "lmp", sparsity=0.8, over=Schedule(1, 3, 3), seed=0)
    optimizer = torch.optim.LBFGS(model.parameters(), 0.2, max_iter=4, line_search_fn=search)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), Y)
        loss.backward()
        return loss

    losses = []
    for _ in range(10):
        losses.append(optimizer.step(closure).item())
        pruner.step(optimizer)
        for name, mask in masks(model).items():
            assert not bool(model.get_parameter(name.removesuffix("_mask") + "_orig")[mask == 0].any())
    assert losses[-1] < losses[3] - 0.02


def test_masks_are_put_on_copies_alone():
    model = network()
    pruner = sao_prune.schedule(model, "lmp", sparsity=0.8, over=Schedule(1, 1), seed=0)
    copied, pruned_otherwise = copy.deepcopy(model), network()
    sao_prune.apply(pruned_otherwise, sparsity=0.5, method="lmp", exclude=["two*"])
    pruner.step()
    for other in (network(), pruned_otherwise, mlp(4, 4)):
        before = snapshot(other)
        with pytest.raises(ValueError, match="is not masked there as in the pruner's model"):
            pruner.impose(other)
        assert same(before, snapshot(other))
    pruner.impose(copied)
    assert same(masks(copied), masks(model))
    assert masks_hold(copied)
    assert copied.two.weight_mask is not model.two.weight_mask


def test_masks_of_tied_weights_are_put_on_all_copies_or_none():
    model = mlp(8, 8, 8, 8, 8)
    first, second = [layer for layer in model if isinstance(layer, nn.Linear)][1:3]
    second.weight = first.weight
    pruner = sao_prune.schedule(model, "lmp", sparsity=0.75, over=Schedule(1, 1), seed=0)
    whole, torn = copy.deepcopy(model), copy.deepcopy(model)
    torn[list(model).index(second)] = nn.Linear(8, 8)
    pruner.step()
    before = snapshot(torn)
    with pytest.raises(ValueError, match="is not masked there as in the pruner's model"):
        pruner.impose(torn)
    assert same(before, snapshot(torn))
    pruner.impose(whole)
    assert same(masks(whole), masks(model))
    assert masks_hold(whole)


def test_what_is_left_can_be_removed_saved_and_made_compact(tmp_path):
    model = network()
    pruner = sao_prune.schedule(model, Project(inputs=X), sparsity=0.75, over=Schedule(1, 2, 2), exclude=["two*"])
    for _ in range(2):
        pruner.step()
    wanted = model.eval()(X)
    sao_prune.save(model, tmp_path / "m.safetensors")
    fresh = network(2)
    sao_prune.load(fresh, tmp_path / "m.safetensors")
    assert torch.equal(fresh.eval()(X), wanted)
    sao_prune.compact(fresh)
    assert torch.allclose(fresh(X), wanted, atol=1e-5)
    sao_prune.remove(model)
    assert torch.equal(model(X), wanted)


_WORKER = """
import sys, torch, torch.distributed as dist, sao_prune
from torch import nn
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
torch.manual_seed(rank)
x = torch.randn(40, 8)
for method in (sao_prune.Project(inputs=x), "gmp", "rg"):
    import copy
    model = copy.deepcopy(net)
    pruner = sao_prune.schedule(model, method, groups=4, over=sao_prune.Schedule(1, 2, 2), seed=None)
    ddp = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(ddp.parameters(), 0.1, momentum=0.9)
    for _ in range(4):
        optimizer.zero_grad()
        ddp(x).square().mean().backward()
        optimizer.step()
        pruner.step(optimizer)
    for value in model.state_dict().values():
        both = [torch.empty_like(value) for _ in range(2)]
        dist.all_gather(both, value)
        assert torch.equal(*both)
try:
    sao_prune.apply(net, groups=4, method=sao_prune.Project(inputs=[] if rank == 0 else x))
except ValueError as error:
    assert "gave no batch" in str(error)
else:
    raise SystemExit("no error")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_all_ranks_have_the_same_masks_and_values_and_errors(tmp_path):
    import subprocess
    import sys

    command = [sys.executable, "-c", _WORKER]
    runs = [subprocess.Popen([*command, str(rank), str(tmp_path / "meet")], stderr=subprocess.PIPE) for rank in (0, 1)]
    for run in runs:
        _, errors = run.communicate(timeout=PATIENCE)
        assert run.returncode == 0, errors.decode()
