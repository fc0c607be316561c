"""Compact timm models compute what their masked ones do, outputs and gradients, in training mode too."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import sao_prune
from sao_prune.blocks import Execution

from .cases import block_layers, needs_compiler

timm = pytest.importorskip("timm")

# Activations in place, concatenations, token mixing, attention, squeeze and excitation, one another's weights.
ARCHITECTURES = ["mobilenetv3_small_050", "mixer_s32_224", "vit_tiny_patch16_224", "levit_128s", "resnet18"]
MORE = ["efficientnet_b0", "ghostnet_050", "densenet121", "dla46_c", "res2net50_14w_8s", "gmlp_ti16_224",
        "resmlp_12_224", "pvt_v2_b0"]  # fmt: skip
_NAMES = [*ARCHITECTURES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]


def _masked(name: str, topology: str) -> tuple[nn.Module, int]:
    torch.manual_seed(0)
    masked = timm.create_model(name, num_classes=10)
    size = 64 if masked.default_cfg.get("pool_size") else masked.default_cfg["input_size"][-1]
    sao_prune.apply(masked, sparsity=0.875, seed=0, fit="nearest", method=sao_prune.SAO(topology=topology))
    for parameter in masked.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)  # as timm starts heads: zeros would hide everything
    return masked, size


@pytest.mark.parametrize("topology", ["interleaved", "ramanujan"])
@pytest.mark.parametrize("name", _NAMES)
def test_outputs_and_gradients_are_those_of_the_masked_model(name, topology):
    masked, size = _masked(name, topology)
    compact = copy.deepcopy(masked)
    assert sao_prune.compact(compact).compact
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    outputs, gradients = [], []
    for model in (masked.double().train(), compact.double().train()):
        torch.manual_seed(1)  # of dropout
        y = model(x)
        y.square().mean().backward()
        outputs.append(y.detach())
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*outputs, rtol=1e-8, atol=1e-10)
    common = gradients[0].keys() & gradients[1].keys()
    scale = max(float(g.abs().max()) for g in gradients[0].values())
    assert len(common) > 10
    for parameter in common:
        torch.testing.assert_close(*(g[parameter] for g in gradients), rtol=1e-6, atol=1e-9 * scale)


@needs_compiler
@pytest.mark.parametrize("fused", [pytest.param(False, id="", marks=pytest.mark.slow), pytest.param(True, id="fused")])
@pytest.mark.parametrize("topology", ["interleaved", pytest.param("ramanujan", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", _NAMES)
def test_native_kernels_are_as_exact_as_ordinary_operations(name, topology, fused):
    masked, size = _masked(name, topology)
    plain, kernels = copy.deepcopy(masked), copy.deepcopy(masked)
    sao_prune.compact(plain)
    for layer in block_layers(plain):
        layer.run_as(Execution())
    x = torch.randn(2, 3, size, size)
    report = sao_prune.compact(kernels, example_input=x, fuse=fused)
    assert any("native" in layer.execution for layer in report.compact)
    if fused and not any(m.epilogue for m in block_layers(kernels)):
        pytest.skip("nothing follows its layers that a kernel could take")
    masked.double()
    # A rectifier that turns over near the end changes all gradients before it, so that single precision is a hundred
    # times worse on one input than on another: only what is wrong on all of them is wrong.
    inputs = torch.randn(4, *x.shape)
    errors = torch.tensor([_errors(masked, plain, kernels, x) for x in inputs])
    assert errors[:, 1].min() < 4 * errors[:, 0].median() + 1e-5


def _errors(masked: nn.Module, plain: nn.Module, kernels: nn.Module, x: torch.Tensor) -> list[float]:
    """Of outputs and gradients of the plain and the native model, relative to the largest."""
    found = []
    for model, given in ((masked, x.double()), (plain, x), (kernels, x)):
        torch.manual_seed(1)
        model.zero_grad()
        y = model.train()(given)
        y.square().mean().backward()
        found.append((y.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    truth, exact = found[0]
    common = exact.keys() & found[1][1].keys()
    scale = max(float(exact[name].abs().max()) for name in common)
    errors = []
    for y, gradients in found[1:]:
        worst = max(float((gradients[name] - exact[name]).abs().max()) for name in common) / scale
        errors.append(max(worst, float((y - truth).abs().max() / truth.abs().max())))
    return errors
