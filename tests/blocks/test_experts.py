"""The experts of mixtures in their block form."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import sao_prune
from sao_prune.blocks import BlockExperts

from .composites import check_law, check_states, pruned

transformers = pytest.importorskip("transformers")


def experts(family: str, implementation: str = "grouped_mm") -> nn.Module:
    """Four experts of a family of models, 8 wide, with 6 hidden units."""
    common = {"hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 1}
    if family == "mixtral":
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts as Experts

        config = transformers.MixtralConfig(**common, num_local_experts=4, num_experts_per_tok=2)
    elif family == "qwen":
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts as Experts

        config = transformers.Qwen3MoeConfig(**common, moe_intermediate_size=6, num_experts=4)
    elif family == "gpt_oss":
        from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts as Experts

        config = transformers.GptOssConfig(**common, num_local_experts=4, num_experts_per_tok=2)
    else:
        from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts as Experts

        config = transformers.NemotronHConfig(hidden_size=8, moe_intermediate_size=6, n_routed_experts=4)
    config._experts_implementation = implementation
    return Experts(config)


@pytest.mark.parametrize("topology", ["interleaved", "apart"])
@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
@pytest.mark.parametrize("family", ["mixtral", "qwen", "gpt_oss", "nemotron"])
def test_results_and_gradients_are_those_of_the_masked_experts(family, implementation, topology):
    model = pruned(experts(family, implementation), 0, topology, groups=2)
    x = torch.randn(5, 8, dtype=torch.float64)
    # One expert is never chosen.
    index = torch.tensor([[0, 1], [1, 3], [0, 3], [3, 1], [1, 0]])
    shares = torch.rand(5, 2, dtype=torch.float64)

    compact = check_law(model, lambda model, x, shares: model(x, index, shares), [x, shares])
    assert isinstance(compact.layer, BlockExperts)
    assert compact(x[:0], index[:0], shares[:0]).shape == (0, 8)


def test_experts_are_exported():
    model = pruned(experts("mixtral"), 0, groups=2)
    sao_prune.compact(model)
    index = torch.tensor([[0, 1], [1, 3], [0, 3]])
    inputs = torch.randn(3, 8, dtype=torch.float64), index, torch.rand(3, 2, dtype=torch.float64)
    tokens = torch.export.Dim("tokens", min=2)
    program = torch.export.export(model, inputs, dynamic_shapes={"inputs": tuple({0: tokens} for _ in inputs)})
    again = tuple(torch.cat([t, t]) for t in inputs)
    torch.testing.assert_close(program.module()(*again), model(*again))
    mapped = torch.func.vmap(model)(*(torch.stack([t, t]) for t in inputs))
    torch.testing.assert_close(mapped[1], model(*inputs))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_states(family, tmp_path):
    model = pruned(experts(family), 1, "apart", groups=2)
    sao_prune.compact(model)
    check_states(model, lambda: type(model)(experts(family)).double(), tmp_path)


def mixtral():
    config = transformers.MixtralConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        vocab_size=50,
    )
    return transformers.MixtralForCausalLM(config).eval()


def test_mixtral_becomes_compact_wholly():
    model = mixtral()
    report = sao_prune.apply(model, groups=4, seed=0)
    masked, tokens = copy.deepcopy(model), torch.arange(6)[None]
    y = model(tokens).logits
    compact = sao_prune.compact(model, example_input=tokens)
    assert len(compact.compact) == len(report.pruned)
    torch.testing.assert_close(model(tokens).logits, y, rtol=1e-4, atol=1e-5)
    assert sao_prune.report(model).sparsity == pytest.approx(0.75)
    sao_prune.expand(model)
    assert set(model.state_dict()) == set(masked.state_dict())
    torch.testing.assert_close(model(tokens).logits, y, rtol=1e-4, atol=1e-5)


def test_experts_applied_compact():
    model, tokens = mixtral(), torch.arange(6)[None]
    masked = copy.deepcopy(model)
    sao_prune.apply(model, groups=4, seed=0, form="compact")
    sao_prune.apply(masked, groups=4, seed=0)
    torch.testing.assert_close(model(tokens).logits, masked(tokens).logits, rtol=1e-4, atol=1e-5)


def test_experts_that_compute_in_a_way_that_is_not_known_stay_masked():
    class OwnExperts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.randn(4, 8, 8))

        def forward(self, x):
            return torch.einsum("bi,eoi->bo", x, self.up)

    model = nn.Sequential(nn.Linear(8, 8), OwnExperts())
    sao_prune.apply(model, groups=2, seed=0, skip_first=False, skip_last=False)
    report = sao_prune.compact(model)
    reasons = {record.name: record.reason for record in report.layers}
    assert reasons["0"] is None
    assert "in a way that is not known" in reasons["1"]
