"""Compact timm models compute what their masked ones do, outputs and gradients, in training mode too."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import sao_prune

timm = pytest.importorskip("timm")

# Activations in place, concatenations, token mixing, attention, squeeze and excitation, one another's weights.
ARCHITECTURES = [
    "mobilenetv3_small_050", "efficientnet_b0", "ghostnet_050", "densenet121", "dla46_c", "res2net50_14w_8s",
    "mixer_s32_224", "gmlp_ti16_224", "resmlp_12_224", "vit_tiny_patch16_224", "levit_128s", "pvt_v2_b0", "resnet18",
]  # fmt: skip


@pytest.mark.parametrize("topology", ["interleaved", "ramanujan"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_outputs_and_gradients_are_those_of_the_masked_model(name, topology):
    torch.manual_seed(0)
    masked = timm.create_model(name, num_classes=10)
    size = 64 if masked.default_cfg.get("pool_size") else masked.default_cfg["input_size"][-1]
    sao_prune.apply(masked, sparsity=0.875, seed=0, fit="nearest", method=sao_prune.SAO(topology=topology))
    for parameter in masked.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)  # as timm starts heads: zeros would hide everything
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
