"""Compact models under the tools that people run models with."""

from __future__ import annotations

import copy
import os
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn

import sao_prune
from sao_prune.blocks import BlockModule

from ..processes import in_two_processes

GROUPS = 4


def _mlp(topology: str = "ramanujan", width: int = 32) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, width), nn.Tanh(), nn.Linear(width, 30)
    )
    return _pruned(model, topology)


def _cnn(topology: str = "ramanujan") -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip
    return _pruned(model, topology)


def _pruned(model: nn.Sequential, topology: str) -> nn.Sequential:
    method = sao_prune.SAO(topology=topology)
    sao_prune.apply(model, groups=GROUPS, method=method, seed=0, skip_first=False, skip_last=False, fit="nearest")
    return model


CASES = {
    "mlp": (_mlp, (5, 32)),
    "tokens": (_mlp, (2, 3, 32)),
    "cnn": (_cnn, (3, 8, 6, 6)),
}


_VARIANTS = [("mlp", "interleaved"), ("tokens", "ramanujan"), ("cnn", "ramanujan"), ("cnn", "interleaved")]


@pytest.fixture(params=_VARIANTS, ids="-".join)
def case(request):
    kind, topology = request.param
    make, shape = CASES[kind]
    model, x = make(topology).eval(), torch.randn(shape)
    expected = model(x).detach()
    sao_prune.compact(model)
    return model, x, expected


WRITES = {
    "initialiser": lambda layer: nn.init.zeros_(layer.weight),
    "in place": lambda layer: layer.weight.mul_(2),
    "data": lambda layer: layer.weight.data.mul_(2),
    "view": lambda layer: layer.weight.detach()[:2].mul_(2),
    "new data": lambda layer: setattr(layer.weight, "data", torch.zeros(layer.weight_shape)),
    "parameter": lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(layer.weight_shape))),
    "tensor": lambda layer: setattr(layer, "weight", torch.zeros(layer.weight_shape)),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_write_to_the_weight_of_a_layer_raises(case, write):
    """It is computed for those who read it; the reader has a tensor like others."""
    model, x, expected = case
    for layer in (m for m in model.modules() if isinstance(m, BlockModule)):
        with pytest.raises((RuntimeError, AttributeError), match=r"computed from blocks|has no setter|can't set"):
            WRITES[write](layer)
        weight = layer.weight
        assert type(copy.deepcopy(weight.detach())) is type(weight + 1) is torch.Tensor
        weight.square().sum().backward()
        torch.testing.assert_close(layer.blocks.grad, 2 * layer.blocks.detach())
        weight.detach().clone().zero_()
        pickle.loads(pickle.dumps(weight.detach()))
    torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)


def test_autocast(case):
    model, x, expected = case
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(m.blocks.grad.dtype == torch.float32 for m in model.modules() if isinstance(m, BlockModule))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model.eval()(x).float(), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile(case, backend):
    model, x, expected = case
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    y = compiled(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    y.square().sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).square().sum().backward()
    for ours, parameter in zip(gradients, model.parameters()):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-4, atol=1e-4)


def test_torch_export(case):
    model, x, expected = case
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    torch.testing.assert_close(program.module()(x), expected, rtol=1e-4, atol=1e-5)
    y = program.module()(torch.cat([x, x]))
    torch.testing.assert_close(y[: len(x)], expected, rtol=1e-4, atol=1e-5)


def test_onnx(case, tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, x, expected = case
    file = tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), str(file), dynamo=True, verbose=False)
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), expected, rtol=1e-4, atol=1e-5)


def test_symbolic_trace(case):
    model, x, expected = case
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), expected, rtol=1e-4, atol=1e-5)


def test_copies_and_state_dicts(case):
    model, x, expected = case
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(x), expected, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        twin.load_state_dict(model.state_dict())
        torch.testing.assert_close(twin(x), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(twin.double()(x.double()).float(), expected, rtol=1e-4, atol=1e-5)


def test_ema(case):
    timm_utils = pytest.importorskip("timm.utils")
    model, x, _ = case
    for average in (timm_utils.ModelEmaV3(model, decay=0.5), torch.optim.swa_utils.AveragedModel(model)):
        before = average.module(x)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1)
        for _ in range(2):
            average.update(model) if hasattr(average, "update") else average.update_parameters(model)
        assert not torch.allclose(average.module(x), before)


def _train_one_rank(rank: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", USE_LIBUV="0")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.manual_seed(rank)
    model = _cnn()
    sao_prune.compact(model)
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    x = torch.randn(4, 8, 6, 6)
    for _ in range(2):
        optimizer.zero_grad()
        parallel(x).square().mean().backward()
        optimizer.step()
    torch.save(model.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_distributed_data_parallel(tmp_path):
    in_two_processes(_train_one_rank, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for key, value in first.items():
        if "running" not in key and "num_batches" not in key:
            assert torch.equal(value, second[key]), key
