"""Exported models compute what the model does, in the form that runtimes run fast."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

import sao_prune

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
runtime = pytest.importorskip("onnxruntime")


class Tokens(nn.Module):
    """A mixer's two kinds of layers: tokens do not divide evenly, channels do."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(18, 36), nn.Linear(36, 18)
        self.wide, self.narrow = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x):
        x = x + self.down(torch.relu(self.up(x.transpose(1, 2)))).transpose(1, 2)
        return x + self.narrow(torch.relu(self.wide(x)))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.BatchNorm2d(32),
        nn.Conv2d(32, 16, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip


CASES = {"tokens": (Tokens, (2, 18, 16)), "convolutions": (convolutions, (2, 3, 9, 9))}


def compact_model(case: str, topology: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    make, shape = CASES[case]
    model, x = make(), torch.randn(shape)
    method = sao_prune.SAO(topology=topology)
    sao_prune.apply(model, groups=4, method=method, seed=0, skip_first=case != "tokens", skip_last=case != "tokens")
    sao_prune.compact(model, example_input=x)
    return model.eval(), x


@pytest.mark.parametrize("topology", ["interleaved", "ramanujan"])
@pytest.mark.parametrize("case", CASES)
def test_outputs_are_the_models_for_any_batch(case, topology, tmp_path):
    model, x = compact_model(case, topology)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = sao_prune.export_onnx(model, x[:1], tmp_path / "m.onnx")
    session = runtime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    for batch in (1, 2, 5):
        given = torch.randn(batch, *x.shape[1:])
        found = session.run(None, {session.get_inputs()[0].name: given.numpy()})[0]
        torch.testing.assert_close(torch.from_numpy(found), model(given).detach(), rtol=1e-4, atol=1e-5)
    assert report.size == (tmp_path / "m.onnx").stat().st_size
    assert report.error is not None
    assert report.error < 1e-5
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    if case == "convolutions":
        # The interleaved pair is as good as it can be.
        assert (report.norms, report.folded) == (1, int(topology == "ramanujan"))
    if topology == "interleaved":
        assert "Einsum" not in report.nodes
        assert _gathers(tmp_path / "m.onnx") == 0


@pytest.mark.parametrize("faster", [0, 1])
def test_layers_of_tokens_in_the_form_that_runs_faster(faster, tmp_path, monkeypatch):
    model, x = compact_model("tokens", ["interleaved", "ramanujan"][faster])
    forms = []

    def timed(paths, example_input):
        forms.extend(path.read_bytes() for path in paths)
        return [1.0 - (faster == 0), 1.0 - (faster == 1)]

    monkeypatch.setattr(sao_prune.exporting, "_seconds", timed)
    report = sao_prune.export_onnx(model, x, tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").read_bytes() == forms[faster] != forms[1 - faster]
    assert report.error < 1e-5
    session = runtime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    given = torch.randn(5, *x.shape[1:])
    found = session.run(None, {session.get_inputs()[0].name: given.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), model(given).detach(), rtol=1e-4, atol=1e-5)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_runtimes_by_name(tmp_path, monkeypatch):
    model, x = compact_model("tokens", "ramanujan")
    monkeypatch.setattr(sao_prune.exporting, "_replaced", None)  # the other form is not tried
    sao_prune.export_onnx(model, x, tmp_path / "m.onnx", runtime="openvino")
    assert len(sao_prune.exporting._seconds([tmp_path / "m.onnx"] * 2, x)) == 2
    with pytest.raises(ValueError, match="runtime must be one of onnxruntime, openvino, got 'tflite'"):
        sao_prune.export_onnx(model, x, tmp_path / "m.onnx", runtime="tflite")


def _gathers(path) -> int:
    """Gathers of activations, by as many indices as there are channels."""
    import onnx

    graph = onnx.load(str(path)).graph
    sizes = {i.name: tuple(i.dims) for i in graph.initializer}
    return sum(n.op_type == "Gather" and sizes.get(n.input[1], ()) not in ((), (1,)) for n in graph.node)


def test_bad_input(tmp_path, monkeypatch):
    model, x = compact_model("convolutions", "interleaved")
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        sao_prune.export_onnx("model", x, tmp_path / "m.onnx")
    for example in ([1], {"input": x}):
        with pytest.raises(TypeError, match="example_input"):
            sao_prune.export_onnx(model, example, tmp_path / "m.onnx")
    with pytest.raises(ValueError, match="is no folder"):
        sao_prune.export_onnx(model, x, tmp_path / "nowhere" / "m.onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"sao-prune\[onnx\]"):
        sao_prune.export_onnx(model, x, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_leaves_no_file(tmp_path):
    class Branches(nn.Linear):
        def forward(self, x):
            return super().forward(x) if float(x.sum()) > 0 else x

    with pytest.raises(ValueError, match="cannot export Branches"):
        sao_prune.export_onnx(Branches(4, 4), torch.ones(2, 4), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_held_models_are_exported_with_their_values_also_inside_autocast(tmp_path):
    model, x = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3))), torch.randn(2, 16)
    sao_prune.apply(model, groups=4, seed=0)
    sao_prune.hold(model)
    with torch.autocast("cpu", torch.bfloat16):
        report = sao_prune.export_onnx(model, x, tmp_path / "m.onnx", dynamic_batch=False)
    assert report.error is not None
    assert report.error < 1e-6
    assert hasattr(model[1], "parametrizations")


def test_what_cannot_be_checked_leaves_no_file(tmp_path):
    model, x = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3))).bfloat16(), torch.randn(2, 16).bfloat16()
    with pytest.raises(ValueError, match=r"ONNX Runtime cannot run the exported model, .* model\.float\(\)"):
        sao_prune.export_onnx(model, x, tmp_path / "m.onnx", dynamic_batch=False)
    assert not list(tmp_path.iterdir())
