"""Whole models: apply is right, atomic, and lives with everything that people do to models."""

import copy
import os
import pickle
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune as torch_prune

import sao_prune
from sao_prune import SAO


class ReadsWeights(nn.Module):
    """As attention modules of timm do: uses a child's weight without calling the child."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(16, 16, bias=False)
        self.proj = nn.Linear(16, 16)

    def forward(self, x):
        return self.proj(F.linear(x, self.qkv.weight))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.reader = ReadsWeights()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.lstm = nn.LSTM(16, 16, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = torch.tanh(self.conv(torch.tanh(self.stem(x))))
        x = self.grouped(x).flatten(2).mT
        x = self.reader(x)
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.lstm(x)[0].mean(1))


def image():
    return torch.randn(2, 3, 4, 4)


def masks_hold(model):
    for module in model.modules():
        for name in [n[:-5] for n in module._buffers if n.endswith("_mask")]:
            used, mask = getattr(module, name), getattr(module, f"{name}_mask")
            if bool((used[mask == 0] != 0).any()):
                return False
    return True


@pytest.fixture
def net():
    torch.manual_seed(0)
    model = Net()
    sao_prune.apply(model, groups=4, seed=0)
    return model


def test_report_says_what_was_done():
    model = Net()
    report = sao_prune.apply(model, sparsity=0.75, seed=0)
    kept = {layer.name: layer.reason for layer in report.skipped}
    assert kept == {"stem.weight": "first layer", "head.weight": "last layer"}
    assert len(report.pruned) == 8
    assert report.sparsity == report.requested == 0.75
    nonzero = sum(int(m.sum()) for n, m in model.named_buffers() if n.endswith("_mask"))
    assert report.nnz == nonzero
    text = str(report)
    assert "stem " in text
    assert "first layer" in text
    assert sao_prune.report(model).nnz == nonzero


def test_plan_touches_nothing_and_foretells_apply():
    model = Net()
    before = copy.deepcopy(model.state_dict())
    plan = sao_prune.plan(model, sparsity=0.75)
    assert not torch_prune.is_pruned(model)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))
    with torch.device("meta"):
        assert sao_prune.plan(Net(), sparsity=0.75).layers == plan.layers
    assert sao_prune.apply(model, sparsity=0.75).layers == plan.layers


@pytest.mark.parametrize("fit", ["nearest", "regular", "exact"])
def test_plan_and_apply_agree_for_every_fit(fit):
    def make():
        return nn.Sequential(*(nn.Linear(a, b) for a, b in [(20, 30), (30, 45), (45, 17), (17, 5)]))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sao_prune.SparsityWarning)
        assert (
            sao_prune.plan(make(), sparsity=0.7, fit=fit).layers
            == sao_prune.apply(make(), sparsity=0.7, fit=fit).layers
        )


def test_layers_off_target_are_warned_about_by_name():
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    with pytest.warns(sao_prune.SparsityWarning, match=r"1\.weight \(98\.000 % -> 87\.500 %\)"):
        sao_prune.apply(model, sparsity=0.98)


def test_two_backwards_and_steps_keep_zeros_zero(net):
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        net(image()).square().sum().backward()
        assert masks_hold(net)
        assert net.reader.qkv.weight_orig.grad is not None
        assert not bool(net.reader.qkv.weight_orig.grad[net.reader.qkv.weight_mask == 0].any())
        optimiser.step()
    net(image()).sum().backward()
    net(image()).sum().backward()
    product = net.reader.qkv.weight_orig * net.reader.qkv.weight_mask
    assert torch.equal(net.reader.qkv.weight, product)


def test_a_default_device_changes_nothing():
    plain, under = Net(), Net()
    sao_prune.apply(plain, groups=4, seed=0)
    with torch.device("meta"):
        sao_prune.apply(under, groups=4, seed=0)
    assert torch.equal(plain.conv.weight, under.conv.weight)


def test_same_seed_same_model():
    nets = [Net(), Net(), Net()]
    for model, seed in zip(nets, (1, 1, 2)):
        sao_prune.apply(model, groups=4, seed=seed)
    weights = [m.conv.weight for m in nets]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not torch.equal(nets[0].reader.qkv.weight, nets[0].reader.proj.weight)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_independent_and_equal(net, trained, twin):
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    if trained:
        net(image()).sum().backward()
        optimiser.step()
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
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(2):
        net(image()).sum().backward()
        optimiser.step()
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


def test_remove_bakes_and_outputs_stay(net):
    x = image()
    before = net(x)
    names = {n for n, _ in Net().named_parameters()}
    report = sao_prune.remove(net)
    assert report.sparsity == 0.75
    assert not torch_prune.is_pruned(net)
    assert {n for n, _ in net.named_parameters()} == names
    assert not any(m._forward_pre_hooks for m in net.modules())
    assert torch.equal(net(x), before)
    assert sao_prune.report(net).sparsity == 0.75
    with pytest.raises(ValueError, match="nothing to remove"):
        sao_prune.remove(net)


@pytest.mark.parametrize("frozen", [False, True])
def test_frozen_zeros_survive_training(net, frozen):
    sao_prune.remove(net, freeze_zeros=frozen)
    optimiser = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        optimiser.zero_grad()
        net(image()).square().sum().backward()
        optimiser.step()
    still = sao_prune.report(net).sparsity == 0.75
    assert still is frozen


def test_apply_is_atomic():
    model = Net()
    before = copy.deepcopy(model.state_dict())
    model.lstm.weight_hh_l0.data[0, 0] = float("nan")
    before["lstm.weight_hh_l0"][0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"lstm\.weight_hh_l0: the weight holds NaN"):
        sao_prune.apply(model, sparsity=0.75, method="lmp")
    _unchanged(model, before)


def test_apply_is_atomic_when_a_module_refuses(monkeypatch):
    model = Net()
    before = copy.deepcopy(model.state_dict())
    register = sao_prune.prune.MaskPruning.register.__func__

    def fails_late(cls, module, name, mask):
        if isinstance(module, nn.LSTM):
            raise RuntimeError("no")
        register(cls, module, name, mask)

    monkeypatch.setattr(sao_prune.prune.MaskPruning, "register", classmethod(fails_late))
    with pytest.raises(RuntimeError, match="no"):
        sao_prune.apply(model, groups=4, seed=0)
    _unchanged(model, before)


def _unchanged(model, before):
    assert not torch_prune.is_pruned(model)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(a, b) or a.isnan().any() for a, b in zip(model.state_dict().values(), before.values()))
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert all(isinstance(m.weight, nn.Parameter) for m in (model.conv, model.reader.qkv))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: (sao_prune.apply(m, groups=2), sao_prune.apply(m, groups=2)), ValueError, "pruned already"),
        (lambda m: sao_prune.apply(nn.ReLU(), groups=2), ValueError, "ReLU has no layer that can be pruned"),
        (lambda m: sao_prune.apply(nn.Sequential(), groups=2), ValueError, "no layer that can be pruned"),
        (lambda m: sao_prune.apply(m, groups=2, exclude=["*"]), ValueError, "is left to prune"),
        (lambda m: sao_prune.apply(m, groups=2, include=["blocks.*"]), ValueError, r"'blocks\.\*' matches none"),
        (lambda m: sao_prune.apply(m, sparsity={"blocks.*": 0.5}), ValueError, r"'blocks\.\*' matches none"),
        (lambda m: sao_prune.apply(m, groups=2, colour="red"), TypeError, "unknown option 'colour'"),
        (lambda m: sao_prune.apply(m, groups=2, form="dense"), ValueError, "form must be"),
        (lambda m: sao_prune.apply("net", groups=2), TypeError, r"torch\.nn\.Module"),
        (lambda m: sao_prune.apply(m.to("meta"), groups=2), ValueError, "meta device"),
        (lambda m: sao_prune.plan(m), ValueError, "say how sparse"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(Net())


def test_different_layers_may_get_different_methods_one_after_the_other():
    model = Net()
    sao_prune.apply(model, groups=4, include=["conv"], seed=0)
    report = sao_prune.apply(model, sparsity=0.5, method="lmp", include=["reader.*"])
    assert [layer.name for layer in report.pruned] == ["reader.qkv.weight", "reader.proj.weight"]
    assert len(sao_prune.report(model).pruned) == 3


def _ddp_worker(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(rank)
    model = Net()
    sao_prune.apply(model, groups=4, method=SAO(variant=3))
    torch.save(model.conv.weight_mask, f"{folder}/before{rank}.pt")
    parallel = nn.parallel.DistributedDataParallel(model)
    optimiser = torch.optim.SGD(parallel.parameters(), lr=0.1)
    for _ in range(2):
        optimiser.zero_grad()
        parallel(image()).square().sum().backward()
        optimiser.step()
    torch.save({k: v.clone() for k, v in model.state_dict().items()}, f"{folder}/after{rank}.pt")
    dist.destroy_process_group()


def test_ddp_ranks_draw_the_same_topology_and_stay_equal(tmp_path):
    import socket

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    mp.spawn(_ddp_worker, args=(port, str(tmp_path)), nprocs=2)
    masks = [torch.load(tmp_path / f"before{rank}.pt") for rank in (0, 1)]
    assert torch.equal(*masks)
    states = [torch.load(tmp_path / f"after{rank}.pt") for rank in (0, 1)]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


class ReadsDeeply(nn.Module):
    """Reads weights of modules that neither it nor their parent ever calls."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.block = nn.Sequential(nn.Sequential(nn.Linear(16, 16)))
        self.last = nn.Linear(16, 4)

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = F.linear(x, layer.weight, layer.bias)
        inner = self.block[0][0]
        x = inner(x) if self.training else F.linear(x, inner.weight, inner.bias)
        return self.last(inner(F.linear(x, inner.weight)))


@pytest.mark.parametrize("method", ["sao", "rg"])
@pytest.mark.parametrize("twin", [lambda m: m, copy.deepcopy])
def test_masks_hold_however_a_weight_is_read(method, twin):
    model = ReadsDeeply()
    sao_prune.apply(model, groups=4, seed=0, method=method)
    model = twin(model)
    x = torch.randn(8, 16)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(3):
        optimiser.zero_grad()
        model(x).square().sum().backward()
        assert model.layers[1].weight_orig.grad is not None
        optimiser.step()
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


def test_nothing_changes_where_weights_cannot_be_written():
    with torch.inference_mode():
        frozen = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    expanded = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    expanded[2].weight = nn.Parameter(torch.zeros(1, 8).expand(8, 8))
    for model, message in ((frozen, "inference mode"), (expanded, "share memory")):
        with pytest.raises(ValueError, match=message):
            sao_prune.apply(model, groups=2, seed=0)
        assert not torch_prune.is_pruned(model)
        assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_warning_made_an_error_changes_nothing():
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    with warnings.catch_warnings():
        warnings.simplefilter("error", sao_prune.SparsityWarning)
        with pytest.raises(sao_prune.SparsityWarning):
            sao_prune.apply(model, groups=100)
    assert not torch_prune.is_pruned(model)


def test_remove_is_atomic():
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(5)))
    sao_prune.apply(model, groups=4, seed=0)
    del model[2]._buffers["weight_mask"]
    with pytest.raises(ValueError, match=r"2\.weight has lost its weight or mask; nothing was removed"):
        sao_prune.remove(model)
    assert torch_prune.is_pruned(model[1])


def test_a_dense_model_is_reported_dense():
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))
    with torch.no_grad():
        model[0].weight.zero_()
        model[1].weight[0, 0] = 0
    assert sao_prune.report(model).pruned == ()


@pytest.mark.parametrize("method", ["sao", "rg", "lmp", "lrp", SAO(nonlinearity="relu")])
def test_plan_foretells_every_method(method):
    def make():
        return nn.Sequential(nn.Conv2d(4, 34, 3), nn.Conv2d(34, 34, 3), nn.Conv2d(34, 34, 1), nn.Conv2d(34, 4, 3))

    planned = sao_prune.plan(make(), sparsity=0.83, method=method)
    assert planned.layers == sao_prune.apply(make(), sparsity=0.83, method=method).layers


def test_layers_that_keep_nothing_are_warned_about():
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))
    with pytest.warns(sao_prune.SparsityWarning, match=r"keep no weight at all: 1\.weight"):
        sao_prune.apply(model, sparsity=0.999, method="lmp")


def test_default_dtype_changes_nothing():
    plain, under = (nn.Sequential(*(nn.Linear(16, 16) for _ in range(3))) for _ in range(2))
    sao_prune.apply(plain, groups=4, seed=0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        sao_prune.apply(under, groups=4, seed=0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(plain[1].weight, under[1].weight)


def test_trace(net):
    x = image()
    net(x)  # The first pass finds out which weights are read without a call.
    traced = torch.jit.trace(net, x)
    assert torch.allclose(traced(x), net(x), atol=1e-6)
