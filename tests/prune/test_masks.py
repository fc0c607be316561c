"""Masks hold, and pruned models live with everything that people do to models."""

import copy
import os
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import prune as torch_prune

import sao_prune
from sao_prune import SAO

from ..networks import Net, ReadsDeeply, image, masks_hold
from ..processes import in_two_processes


@pytest.fixture
def net():
    torch.manual_seed(0)
    model = Net()
    sao_prune.apply(model, groups=4, seed=0)
    return model


def test_two_backwards_and_steps_keep_zeros_zero(net):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        net(image()).square().sum().backward()
        assert masks_hold(net)
        assert net.reader.qkv.weight_orig.grad is not None
        assert not bool(net.reader.qkv.weight_orig.grad[net.reader.qkv.weight_mask == 0].any())
        optimizer.step()
    net(image()).sum().backward()
    net(image()).sum().backward()
    product = net.reader.qkv.weight_orig * net.reader.qkv.weight_mask
    assert torch.equal(net.reader.qkv.weight, product)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_independent_and_equal(net, trained, twin):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    if trained:
        net(image()).sum().backward()
        optimizer.step()
    x = image()
    other = twin(net)
    assert torch.equal(other(x), net(x))
    other(x).sum().backward()
    with torch.no_grad():
        other.conv.weight_orig.add_(1)
    assert not torch.equal(other(x), net(x))
    assert masks_hold(other)


def test_state_dict_round_trip(net):
    other = Net()
    sao_prune.apply(other, groups=4, seed=9)
    other.load_state_dict(net.state_dict())
    x = image()
    assert torch.equal(other(x), net(x))


def test_model_ema(net):
    utils = pytest.importorskip("timm.utils")
    ema = utils.ModelEmaV3(net, decay=0.5)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(2):
        net(image()).sum().backward()
        optimizer.step()
        ema.update(net)
    assert masks_hold(ema.module)
    assert ema.module(image()).isfinite().all()
    utils.ModelEmaV3(net)


def test_autocast(net):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = net(image()).float().square().sum()
    loss.backward()
    assert net.conv.weight_orig.grad.dtype == torch.float32
    assert masks_hold(net)


def test_compile(net):
    x = image()
    expected = net(x)
    compiled = torch.compile(net, backend="eager")
    for _ in range(2):
        assert torch.allclose(compiled(x), expected, atol=1e-6)
        compiled(x).sum().backward()


def test_checkpointing_recomputes_the_same(net):
    from torch.utils.checkpoint import checkpoint

    x = torch.randn(2, 3, 16, requires_grad=True)
    for _ in range(2):
        plain = torch.autograd.grad(net.reader(x).sum(), net.reader.qkv.weight_orig)[0]
        saved = torch.autograd.grad(checkpoint(net.reader, x, use_reentrant=False).sum(), net.reader.qkv.weight_orig)[0]
        assert torch.allclose(plain, saved)


def test_device_and_dtype_moves(net):
    net.double()
    assert net(image().double()).dtype == torch.float64
    net.to(torch.float32)
    assert net(image()).dtype == torch.float32


def test_tied_weights_are_masked_under_every_name():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    model[2].weight = model[1].weight
    report = sao_prune.apply(model, groups=4, seed=0)
    assert len(report.pruned) == 1
    assert model[1].weight_orig is model[2].weight_orig
    model(torch.randn(2, 8)).sum().backward()
    assert torch.equal(model[1].weight, model[2].weight)
    sao_prune.remove(model)
    assert model[1].weight is model[2].weight
    assert int((model[1].weight != 0).sum()) == 16


@pytest.mark.parametrize("frozen", [False, True])
def test_frozen_zeros_survive_training(net, frozen):
    sao_prune.remove(net, freeze_zeros=frozen)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        net(image()).square().sum().backward()
        optimizer.step()
    still = sao_prune.report(net).sparsity == 0.75
    assert still is frozen


def prune_again(model, how, tmp_path):
    if how == "load":
        other = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
        sao_prune.apply(other, groups=2, seed=1)
        sao_prune.load(model, sao_prune.save(other, tmp_path / "m.pt"))
    elif how == "functional":
        sao_prune.prune.sao(model[1], groups=2, seed=1)
    else:
        sao_prune.apply(model, groups=2, method=how, seed=1)


@pytest.mark.parametrize("how", ["sao", "rg", "load", "functional"])
def test_what_is_pruned_anew_trains_where_its_new_mask_is(how, tmp_path):
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    sao_prune.apply(model, groups=4, seed=0)
    sao_prune.remove(model, freeze_zeros=True)
    prune_again(model, how, tmp_path)
    for _ in range(2):
        model(torch.randn(9, 8)).square().sum().backward()
    assert torch.equal(model[1].weight_orig.grad != 0, model[1].weight_mask != 0)
    sao_prune.remove(model, include=["1"])
    model.zero_grad()
    model(torch.randn(9, 8)).square().sum().backward()
    assert bool((model[1].weight.grad != 0).all())


@pytest.mark.parametrize("same", [False, True])
def test_what_is_loaded_trains_unless_it_has_the_zeros_that_are_frozen(same, tmp_path):
    model, other = (nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))) for _ in range(2))
    sao_prune.apply(model, groups=4, seed=0)
    sao_prune.remove(model, freeze_zeros=True)
    source = copy.deepcopy(model) if same else other
    sao_prune.load(model, sao_prune.save(source, tmp_path / "m.pt"))
    for _ in range(2):
        model(torch.randn(9, 8)).square().sum().backward()
    assert torch.equal(model[1].weight.grad != 0, model[1].weight != 0)


def test_zeros_stay_frozen_where_pruning_anew_fails(monkeypatch):
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    sao_prune.apply(model, groups=4, seed=0)
    sao_prune.remove(model, freeze_zeros=True)
    support = model[1].weight != 0
    monkeypatch.setattr("sao_prune.prune.attachment.watch", lambda module, hook: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sao_prune.apply(model, groups=2, seed=1)
    monkeypatch.undo()
    for _ in range(2):
        model(torch.randn(9, 8)).square().sum().backward()
    assert torch.equal(model[1].weight.grad != 0, support)


def _ddp_worker(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(rank)
    model = Net()
    sao_prune.apply(model, groups=4, method=SAO(variant=3))
    torch.save(model.conv.weight_mask, f"{folder}/before{rank}.pt")
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        parallel(image()).square().sum().backward()
        optimizer.step()
    torch.save({k: v.clone() for k, v in model.state_dict().items()}, f"{folder}/after{rank}.pt")
    dist.destroy_process_group()


def test_ddp_ranks_draw_the_same_topology_and_stay_equal(tmp_path):
    import socket

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    in_two_processes(_ddp_worker, port, str(tmp_path))
    masks = [torch.load(tmp_path / f"before{rank}.pt") for rank in (0, 1)]
    assert torch.equal(*masks)
    states = [torch.load(tmp_path / f"after{rank}.pt") for rank in (0, 1)]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


@pytest.mark.parametrize("method", ["sao", "rg"])
@pytest.mark.parametrize("twin", [lambda m: m, copy.deepcopy])
def test_masks_hold_however_a_weight_is_read(method, twin):
    model = ReadsDeeply()
    sao_prune.apply(model, groups=4, seed=0, method=method)
    model = twin(model)
    x = torch.randn(8, 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        assert model.layers[1].weight_orig.grad is not None
        optimizer.step()
        assert masks_hold(model)
    with torch.no_grad():
        trained = model(x)
        assert torch.allclose(model.eval()(x), trained, atol=1e-6)
        sao_prune.remove(model)
        assert torch.allclose(model(x), trained, atol=1e-6)


def test_a_weight_tied_to_an_embedding_is_left_alone():
    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(64, 32)
            self.body = nn.Linear(32, 32)
            self.head = nn.Linear(32, 64, bias=False)
            self.head.weight = self.embed.weight
            self.value = nn.Linear(64, 2)

    model = Language()
    before = model.embed.weight.detach().clone()
    report = sao_prune.apply(model, groups=4, seed=0, skip_first=False)
    assert {layer.name: layer.reason for layer in report.skipped}["head.weight"].startswith("tied to embed.weight")
    assert torch.equal(model.embed.weight, before)


@pytest.mark.parametrize("stacked", ["ours", "torchs"])
def test_copies_after_compiling_and_stacking(stacked):
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))
    sao_prune.apply(model, groups=4, seed=0)
    if stacked == "torchs":
        torch_prune.l1_unstructured(model[1], "weight", amount=0.1)
    else:
        sao_prune.prune.kernel_l1(model[1], amount=0.1)
    model(torch.randn(2, 16)).sum().backward()
    copy.deepcopy(model)
    torch.compile(model, backend="eager")(torch.randn(2, 16)).sum().backward()
    twin = copy.deepcopy(model)
    assert masks_hold(twin)


def test_trace(net):
    x = image()
    net(x)  # The first pass finds out which weights are read without a call.
    traced = torch.jit.trace(net, x)
    assert torch.allclose(traced(x), net(x), atol=1e-6)
