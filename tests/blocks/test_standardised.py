"""Weight-standardised convolutions and transformers' transposed linear layer in their block form."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sao_prune
from sao_prune.blocks import BlockLinear, BlockStdConv2d
from sao_prune.topology import interleaved

from .composites import check_law, check_states, pruned

std_conv = pytest.importorskip("timm.layers.std_conv")
KINDS = ("StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame")


def bit_convolution():
    pytest.importorskip("transformers")
    from transformers.models.bit.modeling_bit import WeightStandardizedConv2d

    return WeightStandardizedConv2d


@st.composite
def convolutions(draw):
    kind = draw(st.sampled_from([*KINDS, "bit"]))
    build = bit_convolution() if kind == "bit" else getattr(std_conv, kind)
    inputs, outputs = draw(st.sampled_from([(8, 8), (4, 12), (10, 6)]))
    size = draw(st.sampled_from([1, 3]))
    options = {"stride": draw(st.integers(1, 2)), "groups": draw(st.integers(1, 2)), "bias": draw(st.booleans())}
    groups = 3 if outputs == 6 and options["groups"] == 1 else 2
    seed = draw(st.integers(0, 9))
    return pruned(
        build(inputs, outputs, size, **options), seed, draw(st.sampled_from(["interleaved", "apart"])), groups=groups
    )


@given(model=convolutions(), height=st.integers(5, 7))
@settings(max_examples=8, deadline=None)
def test_results_and_gradients_are_those_of_the_masked_layer(model, height):
    x = torch.randn(2, model.layer.in_channels, height, 6, dtype=torch.float64)
    compact = check_law(model, lambda model, x: model(x), [x])
    assert isinstance(compact.layer, BlockStdConv2d)


@pytest.mark.parametrize("kind", ["ScaledStdConv2d", "StdConv2dSame"])
def test_states(kind, tmp_path):
    build = getattr(std_conv, kind)
    model = pruned(build(8, 8, 3), 0, groups=2)
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    y = model(x)
    sao_prune.compact(model)
    file = sao_prune.save(model, tmp_path / "compact.safetensors")
    fresh = type(model)(build(8, 8, 3)).double()
    sao_prune.load(fresh, file)
    torch.testing.assert_close(fresh(x), y)
    baked = copy.deepcopy(model)
    sao_prune.expand(baked, "baked")
    torch.testing.assert_close(baked(x), y)
    sao_prune.compact(baked)
    torch.testing.assert_close(baked(x), y)


def test_each_way_to_run_gives_the_same():
    model = nn.Sequential(std_conv.StdConv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), std_conv.StdConv2d(16, 16, 3))
    sao_prune.apply(model, groups=2, seed=0, skip_first=False, skip_last=False)
    x = torch.randn(2, 16, 6, 6)
    model.eval()
    y = model(x)
    for tune in (None, "infer"):
        compact = copy.deepcopy(model)
        sao_prune.compact(compact, example_input=x, tune=tune)
        torch.testing.assert_close(compact(x), y, rtol=1e-4, atol=1e-4)


def test_one_that_was_never_dense_expands_to_an_ordinary_convolution():
    model = nn.Sequential(BlockStdConv2d(interleaved(8, 8, 2), 3))
    x = torch.randn(1, 8, 5, 5)
    y = model(x)
    sao_prune.expand(model)
    assert type(model[0]) is nn.Conv2d
    torch.testing.assert_close(model(x), y)


def test_layers_of_the_same_name_from_elsewhere_stay_masked():
    class StdConv2d(nn.Conv2d):
        def forward(self, x):
            weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return nn.functional.conv2d(x, weight, self.bias)

    model = nn.Sequential(nn.Linear(8, 8), StdConv2d(8, 8, 1))
    sao_prune.apply(model, groups=2, seed=0, skip_first=False, skip_last=False)
    report = sao_prune.compact(model)
    assert "in a way that is not known" in {r.name: r.reason for r in report.layers}["1"]


@pytest.mark.parametrize("topology", ["interleaved", "apart"])
def test_transposed_linear(topology, tmp_path):
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = pruned(conv1d(12, 8), 0, topology, groups=2)
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    compact = check_law(model, lambda model, x: model(x), [x])
    assert isinstance(compact.layer, BlockLinear)
    assert (compact.layer.in_features, compact.layer.out_features) == (8, 12)
    check_states(compact, lambda: type(model)(conv1d(12, 8)).double(), tmp_path)


@pytest.mark.parametrize("family", ["GPT2", "Falcon"])
def test_decoders_with_linear_layers_of_their_own_become_compact_wholly(family):
    transformers = pytest.importorskip("transformers")
    sizes = {
        "GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "n_inner": 32},
        "Falcon": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "bias": True},
    }
    config = getattr(transformers, f"{family}Config")(vocab_size=50, **sizes[family])
    model_class = {"GPT2": "GPT2LMHeadModel", "Falcon": "FalconForCausalLM"}[family]
    model = getattr(transformers, model_class)(config).eval()
    report = sao_prune.apply(model, groups=4, seed=0)
    tokens = torch.arange(6)[None]
    y = model(tokens).logits
    compact = sao_prune.compact(model, example_input=tokens)
    assert len(compact.compact) == len(report.pruned) == 8
    torch.testing.assert_close(model(tokens).logits, y, rtol=1e-4, atol=1e-5)
    sao_prune.expand(model)
    torch.testing.assert_close(model(tokens).logits, y, rtol=1e-4, atol=1e-5)
