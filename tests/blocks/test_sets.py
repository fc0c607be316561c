"""A block layer follows its set buffers, whoever puts other ones there, and nothing that averages them harms them."""

from __future__ import annotations

import copy
import os

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

import sao_prune
from sao_prune.blocks import BlockConv2d, BlockLinear, Execution
from sao_prune.blocks.layout import layout_of_topology
from sao_prune.topology import decode_sets, encode_sets, interleaved

from ..processes import in_two_processes
from .cases import block_layers, irregular, topologies, uneven


def _net(seed: int, topology: str = "ramanujan", images: bool = False) -> nn.Sequential:
    """A compact model whose topology and values a seed decides."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8))
    if images:
        net = nn.Sequential(nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 8, 1))
    method = sao_prune.SAO(topology=topology)
    sao_prune.apply(net, groups=4, method=method, seed=seed, skip_first=False, skip_last=False)
    sao_prune.compact(net, example_input=_input(images))
    return net.eval()


def _input(images: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(*((2, 16, 5, 5) if images else (3, 16)), generator=generator)


def _state(net: nn.Module) -> dict[str, Tensor]:
    return {**dict(net.named_parameters()), **dict(net.named_buffers())}


def _close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# ---- Other buffers than the layer's own -----------------------------------------------------------------------------


@pytest.mark.parametrize("images", [False, True])
def test_functional_call_with_another_topology(images):
    one, other, x = _net(0, images=images), _net(1, images=images), _input(images)
    expected = one(x), other(x)
    _close(torch.func.functional_call(one, _state(other), x), expected[1])
    _close(one(x), expected[0])
    y = torch.func.functional_call(one, _state(other), x)
    gradients = torch.autograd.grad(y.square().sum(), list(other.parameters()))
    wanted = torch.autograd.grad(other(x).square().sum(), list(other.parameters()))
    for mine, theirs in zip(gradients, wanted):
        _close(mine, theirs)


@pytest.mark.parametrize("images", [False, True])
def test_ensembles_of_several_topologies(images):
    nets, x = [_net(seed, images=images) for seed in range(3)], _input(images)
    parameters, buffers = torch.func.stack_module_state(nets)
    base = copy.deepcopy(nets[0]).to("meta")

    def run(p: dict[str, Tensor], b: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(base, (p, b), (x,))

    _close(torch.vmap(run, (0, 0, None))(parameters, buffers, x), torch.stack([net(x) for net in nets]))


def test_broadcast_in_place_is_followed():
    """As DDP and torch.distributed broadcast buffers: into their memory, without a version."""
    one, other, x = _net(0), _net(1), _input()
    expected = other(x)
    assert not torch.allclose(one(x), expected)
    for mine, theirs in zip(_state(one).values(), _state(other).values()):
        mine.data.copy_(theirs)
    _close(one(x), expected)
    _close(one[0].weight, other[0].weight)


@pytest.mark.parametrize("topology", ["ramanujan", "interleaved"])
def test_graphs_follow_what_is_loaded_into_them(topology):
    one, other, x = _net(0, topology), _net(1, topology), _input()
    expected = other(x)
    graph = torch.fx.symbolic_trace(one)
    _close(graph(x), one(x))
    graph.load_state_dict(other.state_dict())
    _close(graph(x), expected)


CAPTURES = {
    "export": lambda net, x: torch.export.export(net, (x,)).module(),
    "strict export": lambda net, x: torch.export.export(net, (x,), strict=True).module(),
    "trace": torch.jit.trace,
}


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("how", CAPTURES)
def test_captured_programs_refuse_other_sets(how, images):
    """They hold permutations as constants."""
    one, other, x = _net(0, images=images), _net(1, images=images), _input(images)
    program = CAPTURES[how](copy.deepcopy(one), x)
    _close(program(x), one(x))
    known = program.state_dict()
    assert any(name.endswith("row_set") for name in known)
    program.load_state_dict({name: value for name, value in one.state_dict().items() if name in known})
    _close(program(x), one(x))
    program.load_state_dict({name: value for name, value in other.state_dict().items() if name in known})
    with pytest.raises(Exception, match="captured with other row_set and col_set"):
        program(x)


@pytest.mark.parametrize("images", [False, True])
def test_compiled_layers_that_run_dense_refuse_other_sets_or_follow_them(images):
    one, other, x = _net(0, images=images), _net(1, images=images), _input(images)
    for layer in block_layers(one):
        layer.epilogue = None
        layer.run_as(Execution(dense=True))
    compiled = torch.compile(one, backend="aot_eager", fullgraph=True)
    _close(compiled(x), one(x))
    for mine, theirs in zip(_state(one).values(), _state(other).values()):
        mine.data.copy_(theirs)
    with pytest.raises(RuntimeError, match="captured with other row_set and col_set"):
        compiled(x)
    one.load_state_dict(other.state_dict())
    _close(compiled(x), other(x))


@pytest.mark.parametrize("images", [False, True])
def test_graphs_are_trained(images):
    net, x = _net(0, images=images).train(), _input(images)
    graph = torch.fx.symbolic_trace(copy.deepcopy(net))
    losses = []
    for model in (net, graph):
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        losses.append(model(x).square().sum())
    _close(*losses)


def test_distributed_checkpoints_of_another_seed(tmp_path):
    one, other, x = _net(0), _net(1), _input()
    dcp.save({"model": other.state_dict()}, checkpoint_id=str(tmp_path / "saved"), no_dist=True)
    state = {"model": one.state_dict()}
    dcp.load(state, checkpoint_id=str(tmp_path / "saved"), no_dist=True)
    _close(one(x), other(x))


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("topology", ["ramanujan", "interleaved"])
def test_state_dicts_of_another_topology(topology, images):
    one, other, x = _net(0, topology, images), _net(1, topology, images), _input(images)
    one.load_state_dict(other.state_dict())
    _close(one(x), other(x))


@pytest.mark.parametrize("images", [False, True])
def test_assigning_into_a_model_on_the_meta_device(images):
    net, x = _net(1, images=images), _input(images)
    empty = copy.deepcopy(_net(0, images=images)).to("meta")
    assert all(t.is_meta for t in _state(empty).values())
    empty.load_state_dict(net.state_dict(), assign=True)
    _close(empty(x), net(x))
    again = copy.deepcopy(_net(0, images=images)).to("meta").to_empty(device="cpu")
    again.load_state_dict(net.state_dict())
    _close(again(x), net(x))


# ---- Averages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.95, 0.992, 0.999, 0.9999])
@pytest.mark.parametrize("loose", [False, True])
def test_averages_with_buffers(decay, loose):
    timm_utils = pytest.importorskip("timm.utils")
    net = nn.Sequential(BlockLinear(irregular(96, 64, 32)), nn.ReLU(), BlockLinear(interleaved(8, 96, 4)))
    if loose:
        net = nn.Sequential(BlockLinear(uneven(96, 64, 32)), nn.ReLU(), BlockConv2d(interleaved(8, 96, 4), 1))[:1]
    topologies_before = [layer.topology for layer in block_layers(net)]
    averages = [
        timm_utils.ModelEmaV2(net, decay=decay),
        timm_utils.ModelEmaV3(net, decay=decay),
        AveragedModel(net, avg_fn=get_ema_avg_fn(decay), use_buffers=True),
        AveragedModel(net, use_buffers=True),
    ]
    x = torch.randn(3, 64)
    for average in averages:
        for _ in range(5):
            average.update_parameters(net) if isinstance(average, AveragedModel) else average.update(net)
        assert [layer.topology for layer in block_layers(average.module)] == topologies_before
        _close(average.module(x), net(x))
        fresh = copy.deepcopy(net)
        fresh.load_state_dict(average.module.state_dict())
        _close(fresh(x), net(x))
        assert torch.equal(fresh[0].row_set, net[0].row_set)


@given(topologies(24), st.floats(0, 1), st.integers(1, 8))
@settings(max_examples=50, deadline=None)
def test_codes_survive_averaging(topology, decay, steps):
    for sets in (topology.row_set, topology.col_set):
        codes = encode_sets(sets)
        average = codes.clone()
        for _ in range(steps):
            average.copy_(average * decay + codes * (1 - decay))
        assert torch.equal(decode_sets(average), sets)
        assert torch.equal(decode_sets(encode_sets(decode_sets(average))), sets)


@given(topologies(24), st.sampled_from([torch.uint8, torch.int32]))
@settings(max_examples=30, deadline=None)
def test_sets_of_an_earlier_format(topology, dtype):
    layer, other = BlockLinear(topology), BlockLinear(topology)
    state = copy.deepcopy(layer.state_dict())
    for name, sets in (("row_set", topology.row_set), ("col_set", topology.col_set)):
        state[name] = torch.where(sets < 0, torch.iinfo(dtype).max, sets).to(dtype)
        assert torch.equal(decode_sets(state[name]), sets)
    other.load_state_dict(state)
    x = torch.randn(2, layer.in_features)
    assert other.topology == topology
    _close(other(x), layer(x))


# ---- Ranks ----------------------------------------------------------------------------------------------------------


def _rank(rank: int, folder: str, held: bool) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", USE_LIBUV="0")
    torch.set_num_threads(1)
    net = _net(rank)  # before there is a process group: ranks draw for themselves
    if held:
        sao_prune.hold(net)
    before = net(_input())
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    parallel = nn.parallel.DistributedDataParallel(net.train())
    y = parallel(_input())
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        parallel(_input() + rank).square().mean().backward()
        optimizer.step()
    torch.save((before, y.detach(), net.state_dict()), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("held", [False, True])
def test_ranks_of_other_topologies_agree_once_their_buffers_are_broadcast(held, tmp_path):
    in_two_processes(_rank, str(tmp_path), held)
    (before, y0, state0), (other, y1, state1) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert not torch.allclose(before, other)
    _close(y0, before)
    assert torch.equal(y0, y1)
    assert all(torch.equal(value, state1[key]) for key, value in state0.items())


def test_kernels_are_given_no_tables_of_another_device():
    layout = layout_of_topology(interleaved(8, 8, 2))
    assert layout.addresses == tuple(table.data_ptr() for table in layout.tables)
    with pytest.raises(RuntimeError, match="the sets are on meta"):
        _ = layout.to(torch.device("meta")).addresses


@pytest.mark.parametrize("kind", ["layer", "rnn.weight_hh_l0", "attention.in_proj.1", "attention.out_proj"])
@pytest.mark.parametrize("change", ["none", "empty", "elsewhere"])
def test_checkpoints_whose_sets_have_no_block(kind, change, tmp_path):
    def make():
        parts = {"layer": nn.Linear(8, 8), "rnn": nn.LSTM(8, 8), "attention": nn.MultiheadAttention(8, 2)}
        return nn.ModuleDict(parts)

    model = make()
    sao_prune.apply(model, groups=2, seed=0, form="compact", skip_first=False, skip_last=False)
    state = model.state_dict()
    sets = state[f"{kind}.row_set"]
    changes = {"none": torch.full_like(sets, 255), "empty": sets[:0], "elsewhere": sets.int() + 1000}
    state[f"{kind}.row_set"] = changes[change]
    torch.save(state, tmp_path / "state.pt")
    for target in (make(), model):
        before = copy.deepcopy(target.state_dict())
        with pytest.raises(sao_prune.CheckpointError, match=rf"{kind}: row_set and col_set .* have no block"):
            sao_prune.load(target, tmp_path / "state.pt")
        after = target.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[key], before[key]) for key in before)
