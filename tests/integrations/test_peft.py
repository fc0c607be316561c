"""Adapters of PEFT on masked models, and masks on models with adapters."""

import pytest
import torch
from torch import nn

import sao_prune

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

KINDS = {
    "lora": {},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
}


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.a, self.b, self.head = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x):
        return self.head(torch.tanh(self.b(torch.tanh(self.a(torch.tanh(self.first(x)))))))


def adapted(model, **options):
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["a", "b"], r=2, **options))


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_adapters_are_in_the_parameter_where_the_mask_is_one(kind, safe):
    torch.manual_seed(0)
    model, x = Mlp(), torch.randn(4, 16)
    sao_prune.apply(model, groups=4, seed=0)
    wrapped = adapted(model, **KINDS[kind])
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], 0.5)
    for _ in range(3):
        optimizer.zero_grad()
        wrapped(x).square().sum().backward()
        optimizer.step()
    layer = wrapped.base_model.model.a
    effective = layer(torch.eye(16)).mT - layer.base_layer.bias[:, None]
    with pytest.warns(UserWarning, match=r"Linear\.weight is pruned: .* were dropped"):
        merged = wrapped.merge_and_unload(safe_merge=safe)
    merged(x)
    assert torch.allclose(merged.a.weight_orig * merged.a.weight_mask, effective * merged.a.weight_mask, atol=1e-5)
    assert torch.equal(merged.a.weight, merged.a.weight_orig * merged.a.weight_mask)


def test_unmerging_gives_the_weights_back():
    model, x = Mlp(), torch.randn(4, 16)
    sao_prune.apply(model, groups=4, seed=0)
    wrapped = adapted(model, init_lora_weights=False)
    before = wrapped(x)
    wrapped.merge_adapter()
    wrapped(x)
    wrapped.unmerge_adapter()
    assert torch.allclose(wrapped(x), before, atol=1e-5)


@pytest.mark.parametrize("save", [None, ["head"]])
def test_adapters_are_left_alone(save):
    model = adapted(Mlp(), modules_to_save=save)
    report = sao_prune.apply(model, groups=4, seed=0)
    assert {layer.name.removeprefix("base_model.model.") for layer in report.pruned} == {
        "a.base_layer.weight",
        "b.base_layer.weight",
    }
    reasons = {layer.name.removeprefix("base_model.model."): layer.reason for layer in report.skipped}
    assert reasons["a.lora_A.default.weight"] == "part of an adapter (lora_A)"
    assert reasons["b.lora_B.default.weight"] == "part of an adapter (lora_B)"
    model(torch.randn(2, 16)).sum().backward()
