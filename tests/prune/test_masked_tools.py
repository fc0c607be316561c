"""Masked models pass everywhere that models pruned with torch's own functions do."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

import sao_prune

X = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))


def masked(by):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.0), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    if by == "sao_prune":
        sao_prune.apply(model, groups=4, seed=0, skip_first=False, skip_last=False)
    else:
        for index in (0, 2, 4):
            torch_prune.l1_unstructured(model[index], "weight", amount=0.75)
    return model


def export(model, strict, dynamic):
    shapes = {"input": {0: torch.export.Dim("batch", min=1, max=64)}} if dynamic else None
    program = torch.export.export(model, (X,), strict=strict, dynamic_shapes=shapes)
    if dynamic:
        assert program.module()(X[:2]).shape == (2, 16)
    return program.module()(X)


def onnx(model, tmp_path, **options):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    path = str(tmp_path / "model.onnx")
    torch.onnx.export(model.eval(), (X,), path, **options)
    session = runtime.InferenceSession(path)
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: X.numpy()})[0])


def fake_input(model, tmp_path):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert model(mode.from_tensor(X)).shape == (3, 16)
    return model(X)


def fake_model(model, tmp_path):
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode()
    state = {name: mode.from_tensor(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    with mode:
        out = torch.func.functional_call(model, state, (mode.from_tensor(X),))
    assert out.shape == (3, 16)
    return model(X)


def meta(model, tmp_path):
    twin = copy.deepcopy(model).to("meta")
    assert twin(X.to("meta")).is_meta
    return model(X)


def flops(model, tmp_path):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        out = model(X)
    assert counter.get_total_flops() == 3 * 2 * 3 * 16 * 16
    return out


def functional(model, tmp_path):
    from torch.func import functional_call, grad, vmap

    parameters = dict(model.named_parameters())
    grad(lambda p: functional_call(model, p, (X,)).sum())(parameters)
    return vmap(lambda x: functional_call(model, parameters, (x,)))(X)


def jacobian(model, tmp_path):
    torch.func.jacrev(model)(X[0])
    return model(X)


def inference(model, tmp_path):
    with torch.inference_mode():
        return model(X).clone()


CASES = {
    "onnx": lambda model, tmp_path: onnx(model, tmp_path, dynamo=True, verbose=False),
    "onnx by tracing": lambda model, tmp_path: onnx(model, tmp_path, dynamo=False),
    "trace": lambda model, tmp_path: torch.jit.trace(model, X)(X),
    "script": lambda model, tmp_path: torch.jit.script(model)(X),
    "fx": lambda model, tmp_path: torch.fx.symbolic_trace(model)(X),
    "fake input": fake_input,
    "fake model": fake_model,
    "meta": meta,
    "flops": flops,
    "functional": functional,
    "jacobian": jacobian,
    "inference": inference,
}
for strict, gradients, train, dynamic in itertools.product((False, True), repeat=4):
    if strict and dynamic != (gradients == train):
        # Strict export is slow: every pair of options once.
        continue

    def case(model, tmp_path, strict=strict, gradients=gradients, train=train, dynamic=dynamic):
        with torch.set_grad_enabled(gradients):
            return export(model.train(train), strict, dynamic)

    CASES[f"export {strict=} {gradients=} {train=} {dynamic=}"] = case


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow) if c == "onnx" else c for c in CASES])
def test_masked_models_pass_where_torchs_own_do(case, tmp_path):
    def passes(by):
        model = masked(by)
        out = CASES[case](model, tmp_path)
        assert torch.allclose(out, masked(by)(X), atol=1e-5)
        # And the model trains on as before.
        model(X).sum().backward()
        assert all(p.grad is not None for p in model.parameters())

    try:
        passes("sao_prune")
    except Exception as error:
        try:
            passes("torch")
        except Exception as theirs:
            pytest.skip(f"fails with torch's own pruning too: {type(theirs).__name__}")
        raise AssertionError("passes with torch's own pruning") from error


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("buffers", [False, True])
def test_accelerate_offloads_masked_models(where, buffers, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = masked("sao_prune")
    expected = model(X)
    cpu = torch.device("cpu")
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device=cpu, offload_buffers=buffers)
    else:
        accelerate.disk_offload(model, tmp_path, execution_device=cpu, offload_buffers=buffers)
    for _ in range(2):
        assert torch.equal(model(X), expected)
        # Nothing of the weight stays in memory between passes.
        assert all(model[index].weight.is_meta for index in (0, 2, 4))


def test_torchao_is_told_that_a_layer_is_pruned():
    quantization = pytest.importorskip("torchao.quantization")
    model = masked("sao_prune")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    with pytest.raises(RuntimeError, match=r"Linear\.weight is pruned .* before weights are replaced or quantized"):
        model(X)
    baked = masked("sao_prune")
    expected = baked(X)
    sao_prune.remove(baked)
    quantization.quantize_(baked, quantization.Int8WeightOnlyConfig())
    assert torch.allclose(baked(X), expected, atol=0.05)
