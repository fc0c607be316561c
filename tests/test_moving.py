"""Topologies that move: budgets stay, momentum of what moved is gone, a resumed run has the same bits, ranks agree."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sao_prune
from sao_prune import RG, SAO, SET, BlockTopology, Moves, Rewire, RigL, Schedule

from .algorithms.cases import ALL, mlp
from .algorithms.test_untouched import same, snapshot
from .patience import PATIENCE
from .test_scheduling import X, Y, adam, masks, network, train

OVER = Moves(steps=12, every=2)
METHODS = [
    Rewire(share=0.5),
    Rewire(share=0.5, random=True),
    Rewire(share=0.5, values="exchange"),
    RigL(),
    RigL(unit="kernel"),
    RigL(unit="block", block=2),
    SET(),
    SET(unit="kernel"),
]
pytestmark = pytest.mark.filterwarnings("ignore::sao_prune.SparsityWarning")


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_masks_move_at_one_budget_and_states_follow(method):
    model, counts = network(), []
    pruner = sao_prune.schedule(model, method, sparsity=0.75, over=OVER, seed=0)
    optimizer, first, before = adam(model), masks(model), []
    before.append(first)

    def look():
        now = masks(model)
        moved = any(not torch.equal(now[k], before[-1][k]) for k in now)
        assert not moved or pruner.count in OVER.events
        counts.append([int(mask.sum()) for mask in now.values()])
        for name, mask in now.items():
            parameter = model.get_parameter(name.removesuffix("_mask") + "_orig")
            new = (mask == 1) & (before[-1][name] == 0)
            states = [v for v in optimizer.state[parameter].values() if v.shape == mask.shape]
            for value in (parameter, *states):
                assert not bool(value[mask == 0].any())
            for value in states if getattr(method, "values", "") == "exchange" else (parameter, *states):
                assert not bool(value[new].any())
        before.append(now)

    train(model, optimizer, pruner, 12, look)
    assert pruner.finished
    assert all(count == counts[0] for count in counts)
    assert not same(first, masks(model))
    assert model.two.weight_orig is model.two_too.weight_orig
    assert torch.equal(model.two.weight_mask, model.two_too.weight_mask)
    assert any("moved" in layer.note for layer in pruner.report.layers)
    assert pruner.sparsity == pytest.approx(sao_prune.report(model).sparsity)
    assert pruner.sparsity == pytest.approx(0.75, abs=0.02)


@pytest.mark.parametrize("method", [METHODS[0], METHODS[1], METHODS[3], METHODS[6]], ids=str)
@pytest.mark.parametrize("at", [4, 5])
def test_a_resumed_run_has_the_same_bits(method, at, tmp_path):
    def start(model):
        pruner = sao_prune.schedule(model, method, sparsity=0.75, over=OVER, seed=3)
        return model, pruner, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)

    model, pruner, optimizer = start(network())
    train(model, optimizer, pruner, at)
    states = {"model": model, "pruner": pruner, "optimizer": optimizer}
    torch.save({name: thing.state_dict() for name, thing in states.items()}, tmp_path / "state.pt")
    train(model, optimizer, pruner, 9 - at)
    again, anew, optimizer = start(network(1))
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    for name, thing in (("pruner", anew), ("model", again), ("optimizer", optimizer)):
        thing.load_state_dict(saved[name])
    train(again, optimizer, anew, 9 - at)
    assert same(dict(model.state_dict()), dict(again.state_dict()))


def test_gradients_of_absent_entries_are_those_of_the_dense_weight():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.layer = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 4)

        def forward(self, x):
            x = self.attention(x, x, x, need_weights=False)[0]
            return F.linear(self.layer(x), self.layer.weight)

    torch.manual_seed(0)
    model, x = Reader(), torch.randn(2, 3, 4)
    pruner = sao_prune.schedule(model, RigL(), sparsity=0.5, over=Moves(4, 1), seed=0, **ALL)
    dense = Reader()
    twin = copy.deepcopy(model)
    sao_prune.remove(twin)
    dense.load_state_dict(twin.state_dict())
    for net in (model, dense):
        for scale in (1.0, 0.5):
            (scale * net(x).square().sum()).backward()
    for site in pruner._sites:
        wanted = dense.get_parameter(site.weight.name).grad
        assert torch.allclose(site.gradient, wanted, atol=1e-6)
        assert bool(wanted[~site.units().reshape(wanted.shape)].any())


def test_only_the_steps_before_a_move_are_listened_to():
    model = network()
    pruner, heard = sao_prune.schedule(model, RigL(), sparsity=0.75, over=OVER, seed=0), []
    optimizer = adam(model)
    for _ in range(6):
        F.cross_entropy(model(X), Y).backward()
        heard.append([site.gradient is not None for site in pruner._sites])
        optimizer.step()
        pruner.step(optimizer)
    assert [all(h) if any(h) else False for h in heard] == [False, True, False, True, False, True]


def test_rewire_moves_what_pays_and_leaves_the_rest():
    # Inputs 0 and 3 are in each other's place: the loss wants what the blocks do not have.
    net = nn.Sequential(nn.Linear(4, 4, bias=False))
    sao_prune.apply(net, groups=2, method=RG(topology="interleaved"), seed=0, **ALL)
    layer = net[0]
    topology = BlockTopology.from_mask(layer.weight_mask)
    inputs = [int((topology.col_set == s).nonzero()[0]) for s in (0, 1)]
    with torch.no_grad():
        layer.weight_orig.fill_(1.0)
        layer.weight_orig[:, inputs] = 0.01
    pruner = sao_prune.schedule(net, Rewire(share=0.5), over=Moves(8, 1, until=1.0), seed=0)
    wanted = layer.weight.detach().clone()
    wanted[:, inputs] = wanted[:, inputs[::-1]]
    wanted[layer.weight_mask == 0] += 1e-6
    x = torch.eye(4)
    target = torch.zeros(4, 4)
    for s, i in enumerate(inputs):
        target[topology.row_set != s, i] = 5.0
    (net(x) - target.T - (layer.weight.T - 0 * layer.weight.T).detach()).square().sum().backward()
    report = pruner.step()
    assert report.layers[0].note == "2 of 4 inputs moved"
    after = BlockTopology.from_mask(layer.weight_mask)
    moved = topology.col_set.clone()
    moved[inputs] = topology.col_set[inputs[::-1]]
    assert torch.equal(after.col_set, moved)


@pytest.mark.parametrize("values", ["zero", "exchange"])
def test_exchanged_values_keep_blocks_orthogonal(values):
    net = mlp(16, 32, 32, 16)
    pruner = sao_prune.schedule(net, Rewire(random=True, share=0.5, values=values), groups=4, over=OVER, seed=0, **ALL)
    for _ in range(2):
        pruner.step()
    deviations = [(torch.linalg.svdvals(m.weight) - 1).abs().max() for m in net if isinstance(m, nn.Linear)]
    assert bool(max(deviations) < 1e-5) is (values == "exchange")


def compact_twin(model):
    twin = copy.deepcopy(model)
    sao_prune.compact(twin)
    return twin


def cnn(act=nn.ReLU):
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Conv2d(8, 12, 3, padding=1, stride=2),
        nn.BatchNorm2d(12),
        act(),
        nn.Conv2d(12, 8, 3, padding=1, bias=False),
        nn.Flatten(),
        nn.Linear(32, 24),
        act(),
        nn.Linear(24, 4),
    )


@pytest.mark.parametrize(
    ("method", "groups", "conv"),
    [(METHODS[0], 5, nn.Conv2d), (METHODS[2], 4, nn.Conv2d), (METHODS[0], 4, nn.ConvTranspose2d)],
    ids=str,
)
def test_compact_layers_move_as_masked_ones_do(method, groups, conv):
    x, y = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double(), torch.arange(6) % 4
    masked = cnn()
    masked[4] = conv(12, 8, 3, padding=1, bias=False)
    sao_prune.apply(masked.double(), groups=groups, seed=0)
    compact = compact_twin(masked)
    pruners = []
    for net in (masked, compact):
        pruner = sao_prune.schedule(net, method, over=Moves(8, 2), seed=0)
        optimizer = torch.optim.Adam(net.parameters(), 1e-3)
        for _ in range(5):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
            pruner.step(optimizer)
        pruners.append(pruner)
        for parameter, state in optimizer.state.items():
            assert state["exp_avg"].shape == parameter.shape
    assert pruners[0].report.parameters == pruners[1].report.parameters == sum(p.numel() for p in masked.parameters())
    notes = [{r.name: r.note for r in pruner.report.pruned} for pruner in pruners]
    assert notes[0] == notes[1]
    assert len(notes[0]) == 3
    assert any(not note.startswith("0 of") for note in notes[0].values())
    tables = sao_prune.permutations(masked), sao_prune.permutations(compact)
    assert tables[0].keys() == tables[1].keys()
    for name, (one,) in tables[0].items():
        assert same(vars(one), vars(tables[1][name][0]))
    assert torch.allclose(masked.eval()(x), compact.eval()(x), atol=1e-6)
    with pytest.warns(sao_prune.StaleOptimizerWarning):
        sao_prune.expand(compact)
    assert torch.allclose(masked(x), compact(x), atol=1e-6)


def test_a_compact_model_saves_what_it_learned(tmp_path):
    model = cnn()
    sao_prune.apply(model, groups=4, seed=0)
    sao_prune.compact(model)
    pruner = sao_prune.schedule(model, Rewire(random=True, share=0.5), over=Moves(4, 1), seed=0)
    pruner.step()
    x = torch.randn(2, 3, 4, 4)
    again = cnn()
    sao_prune.apply(again, groups=4, seed=0)
    sao_prune.compact(again)
    again.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(x), again.eval()(x))


def test_masks_that_are_there_begin_to_move_and_what_is_under_them_does_not_come_back():
    model = network()
    sao_prune.apply(model, groups=4, method=RG(), seed=0, exclude=["deep"])
    pruner = sao_prune.schedule(model, Rewire(random=True, share=0.9), over=OVER, seed=0, exclude=["one"])
    before = masks(model)
    for _ in range(2):
        pruner.step()
    after = masks(model)
    assert torch.equal(before["one.weight_mask"], after["one.weight_mask"])
    assert not torch.equal(before["two.weight_mask"], after["two.weight_mask"])
    new = (after["two.weight_mask"] == 1) & (before["two.weight_mask"] == 0)
    assert not bool(model.two.weight[new].any())


@pytest.mark.parametrize(
    ("method", "options", "error", "message"),
    [
        (Rewire(), {"over": Schedule(1, 2)}, TypeError, "over must be a sao_prune.Moves"),
        ("gmp", {"over": OVER, "sparsity": 0.5}, TypeError, "over must be a sao_prune.Schedule"),
        (Rewire(), {}, ValueError, "nothing can move: no layer of Net has a block topology"),
        (RigL(), {}, ValueError, "nothing can move: no layer of Net has a mask"),
        (RigL(), {"skip_first": False}, TypeError, "skip_first= says what is drawn"),
        (RigL(), {"sparsity": 2}, ValueError, "sparsity is a share"),
        (Rewire(initial=SAO(residual="isometric")), {"groups": 2}, ValueError, "residual='isometric' concerns"),
    ],
)
def test_after_an_error_the_model_is_as_it_was(method, options, error, message):
    model = network()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        sao_prune.schedule(model, method, **{"over": OVER, **options})
    assert same(before, snapshot(model))


def test_held_layers_are_refused():
    model = mlp(8, 16, 16, 8)
    sao_prune.apply(model, groups=4, seed=0)
    sao_prune.hold(model)
    with pytest.raises(ValueError, match=r"is held: hold keeps .*release\(model\) first"):
        sao_prune.schedule(model, Rewire(), over=OVER)
    sao_prune.release(model)
    pruner = sao_prune.schedule(model, Rewire(random=True), over=Moves(4, 1))
    sao_prune.hold(model)
    with pytest.raises(RuntimeError, match="no masked parameter any more"):
        pruner.step()


def test_masks_without_blocks_are_left_and_compact_ones_too_by_others():
    model = mlp(8, 16, 16, 8, 8)
    sao_prune.apply(model, groups=4, seed=0, include=["2"])
    sao_prune.apply(model, sparsity=0.5, method="lmp", seed=0, include=["4"])
    pruner = sao_prune.schedule(model, Rewire(random=True), over=Moves(4, 1))
    reasons = {r.name: r.reason for r in pruner.step().layers}
    assert reasons == {
        "0.weight": "it has no mask",
        "2.weight": None,
        "4.weight": "its mask is not made of blocks",
        "6.weight": "it has no mask",
    }
    sao_prune.compact(model)
    with pytest.raises(RuntimeError, match="no masked parameter any more"):
        pruner.step()


def test_a_step_without_gradients_is_noticed_and_can_be_made_again():
    model = network()
    pruner = sao_prune.schedule(model, RigL(), sparsity=0.75, over=Moves(4, 1), seed=0)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        RuntimeError, match="needs the gradients of absent entries, and none was seen in optimizer step 1"
    ):
        pruner.step()
    assert same(dict(before), dict(model.state_dict()))
    F.cross_entropy(model(X), Y).backward()
    assert pruner.step() is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be a whole number of at least 1"),
        ({"every": 0}, "every must be a whole number of at least 1"),
        ({"until": 0}, "until must be a share in"),
        ({"until": 1.5}, "until must be a share in"),
        ({"every": 75}, "nothing would move"),
    ],
)
def test_bad_moves_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Moves(**{"steps": 100, "every": 10, **options})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rewire(share=2), "share must be a share"),
        (lambda: Rewire(values="one"), "values must be one of 'zero', 'exchange'"),
        (lambda: Rewire(random=1), "random must be True or False"),
        (lambda: Rewire(initial=RG(topology="expander")), "initial must be a method that draws block topologies"),
        (lambda: Rewire(initial=Rewire()), "initial must be a method that draws block topologies"),
    ],
)
def test_bad_options_of_rewire_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


_WORKER = """
import sys, copy, torch, torch.distributed as dist, sao_prune
from torch import nn
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
torch.manual_seed(rank)
x = torch.randn(40, 8)
methods = sao_prune.Rewire(share=0.5), sao_prune.Rewire(share=0.5, values="exchange"), sao_prune.RigL(), sao_prune.SET()
for method in methods:
    model = copy.deepcopy(net)
    pruner = sao_prune.schedule(model, method, sparsity=0.75, over=sao_prune.Moves(8, 2), seed=None)
    ddp = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(ddp.parameters(), 0.1, momentum=0.9)
    first = model[2].weight_mask.clone()
    for _ in range(5):
        optimizer.zero_grad()
        ddp(x).square().mean().backward()
        optimizer.step()
        pruner.step(optimizer)
    assert not torch.equal(first, model[2].weight_mask)
    for value in model.state_dict().values():
        both = [torch.empty_like(value) for _ in range(2)]
        dist.all_gather(both, value)
        assert torch.equal(*both)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_all_ranks_move_alike(tmp_path):
    import subprocess
    import sys

    command = [sys.executable, "-c", _WORKER]
    runs = [subprocess.Popen([*command, str(rank), str(tmp_path / "meet")], stderr=subprocess.PIPE) for rank in (0, 1)]
    for run in runs:
        _, errors = run.communicate(timeout=PATIENCE)
        assert run.returncode == 0, errors.decode()
