"""What docs/timm.md says about timm's train.py: its lines run, and each of its claims holds."""

import argparse
import copy
import logging
import os
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

import sao_prune

from .processes import in_two_processes

timm = pytest.importorskip("timm")
pytest.importorskip("timm.optim")
pytest.importorskip("timm.utils")

TEXT = (Path(__file__).parents[1] / "docs" / "timm.md").read_text()
HOOK, COMPACT, AFTER, GRADUAL, POST, PROJECT, FOLDER = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
ARGS = {"model": "test_resnet", "num_classes": 10, "seed": 42}


def created(*lines, model="test_resnet", global_seed=0, **options):
    """What create_model makes, after the lines of the documentation; seeds differ from rank to rank in train.py."""
    torch.manual_seed(global_seed)
    net = timm.create_model(model, num_classes=10, **options)
    namespace = {"model": net, "args": argparse.Namespace(**ARGS), "_logger": logging.getLogger("train")}
    for line in lines or (HOOK,):
        exec(compile(line, "docs/timm.md", "exec"), namespace)
    return net


def batch(size=32):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, size, size, generator=generator), torch.arange(4)


def optimizer_of(net, **options):
    return timm.optim.create_optimizer_v2(net, "momentum", lr=0.1, weight_decay=0.01, **options)


def step(net, optimizer, images=None, labels=None):
    images, labels = batch() if images is None else (images, labels)
    net.train()
    optimizer.zero_grad()
    loss = F.cross_entropy(net(images), labels)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def masks_hold(net):
    net(batch()[0])
    pruned = [m for m in net.modules() if hasattr(m, "weight_mask")]
    return len(pruned) == 14 and not any(bool(m.weight[m.weight_mask == 0].any()) for m in pruned)


@pytest.fixture
def net():
    return created()


def test_the_hook_is_three_lines_and_the_log_tells_what_it_did(caplog):
    assert len([line for line in HOOK.splitlines() if line.strip()]) == 3
    with caplog.at_level(logging.INFO, logger="train"):
        net = created()
    assert "14 layers pruned, 2 kept dense" in caplog.text
    assert sao_prune.report(net).sparsity == 0.875


@pytest.mark.parametrize("decay", [None, 0.75])
def test_the_optimizer_decays_and_scales_as_before(decay):
    dense, sparse = timm.create_model("test_vit", num_classes=10), created(model="test_vit")
    groups = []
    for net in (dense, sparse):
        names = {id(p): name.removesuffix("_orig") for name, p in net.named_parameters()}
        optimizer = optimizer_of(net, layer_decay=decay)
        groups.append(
            {
                names[id(p)]: (group["weight_decay"], group.get("lr_scale", 1))
                for group in optimizer.param_groups
                for p in group["params"]
            }
        )
    assert groups[0] == groups[1]


def test_weight_decay_and_momentum_leave_zeros_zero(net):
    optimizer = optimizer_of(net)
    for _ in range(3):
        step(net, optimizer)
    assert masks_hold(net)


@pytest.mark.parametrize("kind", ["ModelEmaV2", "ModelEmaV3"])
def test_ema(net, kind):
    optimizer, average = optimizer_of(net), getattr(timm.utils, kind)(net, decay=0.5)
    for _ in range(2):
        step(net, optimizer)
        average.update(net)
    assert masks_hold(average.module)
    ours, theirs = average.module.layer1[0].conv1, net.layer1[0].conv1
    assert torch.equal(ours.weight_mask, theirs.weight_mask)
    assert not torch.equal(ours.weight_orig, theirs.weight_orig)


def test_amp(net):
    optimizer = optimizer_of(net)
    with torch.autocast("cpu", torch.bfloat16):
        assert net(batch()[0]).dtype == torch.bfloat16
        first = step(net, optimizer)
    assert torch.isfinite(torch.tensor(first))
    assert masks_hold(net)


def test_channels_last(net):
    images, _ = batch()
    before = net.eval()(images)
    net.to(memory_format=torch.channels_last)
    conv = net.layer1[0].conv1
    for tensor in (conv.weight_orig, conv.weight_mask):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(net(images.to(memory_format=torch.channels_last)), before, rtol=1e-4, atol=1e-5)
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_batch_norms_may_be_converted_afterwards(net):
    from timm.layers import convert_splitbn_model, convert_sync_batchnorm

    net = convert_splitbn_model(net)
    assert masks_hold(net)
    assert sao_prune.report(convert_sync_batchnorm(created())).sparsity == 0.875


@pytest.mark.parametrize("model", ["test_vit", "test_resnet"])
def test_gradient_checkpointing_from_the_first_pass_on(model):
    plain, saving = created(model=model), created(model=model)
    images, labels = batch(160)
    saving.set_grad_checkpointing(True)
    for net in (plain, saving):
        F.cross_entropy(net(images), labels).backward()
    for ours, theirs in zip(saving.parameters(), plain.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_torchcompile():
    torch._dynamo.reset()
    plain, images = created(model="test_vit", depth=2).eval(), batch(160)[0]
    compiled = torch.compile(created(model="test_vit", depth=2).eval(), backend="aot_eager")
    torch.testing.assert_close(compiled(images), plain(images), rtol=1e-4, atol=1e-5)
    compiled(images).sum().backward()
    assert compiled._orig_mod.blocks[0].mlp.fc1.weight_orig.grad is not None


@pytest.mark.slow
def test_torchcompile_with_its_usual_backend():
    torch._dynamo.reset()
    plain, images = created().eval(), batch()[0]
    torch.testing.assert_close(torch.compile(created().eval())(images), plain(images), rtol=1e-3, atol=1e-4)


def test_torchscript_is_refused(net):
    with pytest.raises((AttributeError, RuntimeError, torch.jit.Error)):
        torch.jit.script(net)


@pytest.mark.parametrize("lines", [(HOOK,), (HOOK, COMPACT)], ids=["masked", "compact"])
def test_resume_continues_as_if_nothing_had_been(tmp_path, lines):
    first = created(*lines)
    optimizer = optimizer_of(first)
    step(first, optimizer)
    saver = timm.utils.CheckpointSaver(
        first, optimizer, args=argparse.Namespace(**ARGS), checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path)
    )
    saver.save_checkpoint(0, metric=1.0)
    again = created(*lines, global_seed=7)
    optimizer_again = optimizer_of(again)
    epoch = timm.models.resume_checkpoint(again, str(tmp_path / "last.pth.tar"), optimizer_again)
    assert epoch == 1
    assert step(again, optimizer_again) == step(first, optimizer)
    assert step(again, optimizer_again) == step(first, optimizer)


def test_compact_holds_only_the_blocks_and_computes_the_same():
    masked, compact = created(), created(HOOK, COMPACT)
    stored = sum(p.numel() for p in compact.parameters())
    assert stored == sao_prune.report(masked).remaining
    images, _ = batch()
    torch.testing.assert_close(compact.eval()(images), masked.eval()(images), rtol=1e-4, atol=1e-5)


def test_what_to_do_with_the_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net = created()
    optimizer, average = optimizer_of(net), timm.utils.ModelEmaV3(net, decay=0.5)
    step(net, optimizer)
    args = argparse.Namespace(**ARGS)
    timm.utils.CheckpointSaver(net, optimizer, args=args, model_ema=average).save_checkpoint(0, metric=1.0)
    exec(compile(AFTER, "docs/timm.md", "exec"), {"args": args})
    images, _ = batch()
    validated = timm.create_model("test_resnet", num_classes=10, checkpoint_path="baked.pth").eval()
    assert torch.equal(validated(images), net.eval()(images))
    timm.models.load_checkpoint(averaged := created(global_seed=3), "model_best.pth.tar", use_ema=True)
    assert torch.equal(averaged.eval()(images), average.module(images))


def _one_rank(rank, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", USE_LIBUV="0")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    net = created(global_seed=ARGS["seed"] + rank)
    torch.save(net.layer1[0].conv1.weight_mask.clone(), f"{folder}/mask{rank}.pt")
    parallel = nn.parallel.DistributedDataParallel(net)
    optimizer = optimizer_of(net)
    images, labels = batch()
    for _ in range(2):
        step(parallel, optimizer, images + rank, labels)
    torch.save({k: v for k, v in net.state_dict().items() if "_orig" in k or "_mask" in k}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def gradual(global_seed=0):
    """A model that is pruned while it trains, after six steps of it, and its optimizer and pruner."""
    torch.manual_seed(global_seed)
    net = timm.create_model("test_resnet", num_classes=10)
    names = {"model": net, "args": argparse.Namespace(**ARGS)}
    exec(GRADUAL.replace("start=500, end=5000, steps=50", "start=2, end=6, steps=3"), names)
    names["optimizer"] = optimizer_of(net)
    exec(POST, names)
    return net, names["optimizer"], names["pruner"]


def test_pruning_while_it_trains():
    net, optimizer, pruner = gradual()
    shares = [pruner.sparsity]
    for _ in range(6):
        step(net, optimizer)
        shares.append(pruner.sparsity)
    assert shares == sorted(shares)
    assert shares[:2] == [0, 0]
    assert shares[-1] == pytest.approx(0.875, abs=1e-3)
    assert masks_hold(net)
    for module in net.modules():
        if hasattr(module, "weight_mask"):
            assert not bool(optimizer.state[module.weight_orig]["momentum_buffer"][module.weight_mask == 0].any())


@pytest.mark.parametrize("kind", ["ModelEmaV2", "ModelEmaV3"])
def test_pruning_while_it_trains_with_an_average(kind):
    net, optimizer, pruner = gradual()
    average = getattr(timm.utils, kind)(net, decay=0.5)
    for _ in range(12):
        step(net, optimizer)
        average.update(net)
    masks = {name: mask for name, mask in net.named_buffers() if name.endswith("_mask")}
    assert any(not torch.equal(average.module.get_buffer(name), mask) for name, mask in masks.items())
    pruner.impose(average.module)
    assert masks_hold(average.module)
    assert all(torch.equal(average.module.get_buffer(name), mask) for name, mask in masks.items())
    for name, mask in masks.items():
        assert not bool(average.module.get_parameter(f"{name[:-5]}_orig")[mask == 0].any())
    assert sao_prune.report(average.module).sparsity == pytest.approx(pruner.sparsity)


def test_pruning_while_it_trains_resumes():
    net, optimizer, _ = gradual()
    for _ in range(4):
        step(net, optimizer)
    again, other, pruner = gradual(1)
    again.load_state_dict(net.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    pruner.resume(4)
    for _ in range(2):
        step(net, optimizer)
        step(again, other)
    assert pruner.finished
    for name, value in net.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])


def test_from_a_trained_model_to_blocks():
    net = timm.create_model("test_resnet", num_classes=10)
    optimizer = optimizer_of(net)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*batch()), batch_size=2)
    names = {"sao_prune": sao_prune, "model": net, "loader_eval": loader, "args": argparse.Namespace(**ARGS)}
    exec(PROJECT, names)
    assert names["report"].sparsity == 0.75
    assert all(r.fidelity.error <= r.fidelity.error_kept + 1e-6 for r in names["report"].pruned)
    step(net, optimizer)
    assert masks_hold(net)


def test_every_rank_has_the_same_zeros(tmp_path):
    in_two_processes(_one_rank, str(tmp_path))
    masks = [torch.load(tmp_path / f"mask{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert torch.equal(*masks)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first
    assert all(torch.equal(value, second[key]) for key, value in first.items())
