"""Attention in its block form, and the transformer layers of torch that use it."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sao_prune
from sao_prune.blocks import BlockAttention, BlockLinear

from .composites import check_law, check_states, pruned


@st.composite
def calls(draw):
    """An attention layer, whether it attends to itself, and the options of a call."""
    alone = draw(st.booleans())
    options = {
        "bias": draw(st.booleans()),
        "add_bias_kv": draw(st.booleans()),
        "add_zero_attn": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
    }
    if not alone and draw(st.booleans()):
        options |= {"kdim": 6, "vdim": 10}
    layer = nn.MultiheadAttention(8, draw(st.sampled_from([1, 2])), **options)
    masks = {
        "padding": draw(st.sampled_from([None, "bool", "float"])),
        "attention": draw(st.sampled_from([None, "bool", "float", "heads"])),
        "causal": draw(st.booleans()),
    }
    weights = {"need_weights": draw(st.booleans()), "average_attn_weights": draw(st.booleans())}
    topology = draw(st.sampled_from(["interleaved", "apart"]))
    return pruned(layer, draw(st.integers(0, 9)), topology, groups=2), alone, masks, weights, draw(st.booleans())


@given(case=calls())
@settings(max_examples=10, deadline=None)
def test_results_weights_and_gradients_are_those_of_the_masked_layer(case):
    model, alone, masks, weights, batched = case
    layer, batch, queries, keys = model.layer, 2, 3, 3 if alone else 4
    generator = torch.Generator().manual_seed(0)

    def tokens(length, size):
        shape = (length, size) if not batched else (batch, length, size) if layer.batch_first else (length, batch, size)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs = [tokens(queries, 8)] + ([] if alone else [tokens(keys, layer.kdim), tokens(keys, layer.vdim)])
    options = dict(weights)
    if masks["padding"]:
        hidden = torch.zeros((batch, keys) if batched else (keys,), dtype=torch.bool)
        hidden[..., -1] = True
        options["key_padding_mask"] = hidden if masks["padding"] == "bool" else hidden.double() * -2
    if masks["attention"]:
        shape = (batch if batched else 1) * layer.num_heads if masks["attention"] == "heads" else 1
        upper = torch.ones(shape, queries, keys, dtype=torch.bool).triu(1)
        upper = upper if masks["attention"] == "heads" else upper[0]
        # Both masks of one type, as torch asks for.
        as_bool = masks["padding"] == "bool" or (masks["padding"] is None and masks["attention"] == "bool")
        options["attn_mask"] = upper if as_bool else torch.zeros_like(upper, dtype=torch.float64).masked_fill(upper, -3)
        options["is_causal"] = masks["causal"] and masks["attention"] == "bool" and as_bool and queries == keys

    def run(model, query, *others):
        key, value = others or (query, query)
        found = model(query, key, value, **options)
        assert (found[1] is None) is not options["need_weights"]
        return found

    check_law(model, run, inputs)


def layers(kind, **options):
    return kind(16, 2, 32, dropout=0.0, **options).double()


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_transformers_become_compact_wholly(norm_first, batch_first, training):
    options = {"norm_first": norm_first, "batch_first": batch_first}
    layer = layers(nn.TransformerEncoderLayer, **options)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)
    decoder = nn.TransformerDecoder(layers(nn.TransformerDecoderLayer, **options), 1)
    model = nn.ModuleDict({"encoder": encoder, "decoder": decoder})
    sao_prune.apply(model, groups=4, seed=0, skip_first=False, skip_last=False)
    model.train(training)
    masked = copy.deepcopy(model)
    report = sao_prune.compact(model)
    assert not report.skipped
    x = torch.randn(3, 3, 16, dtype=torch.float64)
    padding = torch.tensor([[False, False, True]] * 3)
    mask = nn.Transformer.generate_square_subsequent_mask(3).double()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            results = []
            for each in (masked, model):
                memory = each["encoder"](x, src_key_padding_mask=padding)
                causal = each["encoder"](x, mask=mask, is_causal=True)
                y = each["decoder"](x, memory, tgt_mask=mask, memory_key_padding_mask=padding)
                # Dense layers on torch's fused path leave zeros where the padding is.
                kept = ~padding if batch_first else ~padding.T
                results.append([memory[kept], causal, y if not grad else y.clone()])
            (memory, causal, _), (own_memory, own_causal, _) = results
            torch.testing.assert_close(own_memory, memory)
            torch.testing.assert_close(own_causal, causal)
    sao_prune.expand(model)
    torch.testing.assert_close(model["encoder"](x), masked["encoder"](x))


def test_only_attention_pruned():
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    sao_prune.apply(model, groups=4, seed=0, include=["self_attn*"], skip_first=False, skip_last=False)
    x = torch.randn(2, 3, 16)
    with torch.no_grad():
        y = model(x)
        report = sao_prune.compact(model, example_input=x)
        assert [record.name for record in report.compact] == ["self_attn.in_proj_weight", "self_attn.out_proj"]
        torch.testing.assert_close(model(x), y)


@pytest.mark.parametrize("tensor", ["in_proj_weight", "out_proj.weight"])
def test_one_of_the_two_pruned(tensor, tmp_path):
    def fresh():
        return nn.Sequential(nn.MultiheadAttention(8, 2)).double()

    model = fresh()
    sao_prune.apply(model, groups=2, seed=0, include=[f"*{tensor}"], skip_first=False, skip_last=False)
    x = torch.randn(3, 2, 8, dtype=torch.float64)
    expected, key = model[0](x, x, x)[0], torch.randn(5, 2, 8, dtype=torch.float64)
    crossed = model[0](x, key, key)[0]
    sao_prune.compact(model)
    assert isinstance(model[0], BlockAttention)
    assert isinstance(model[0].out_proj, BlockLinear) == (tensor != "in_proj_weight")
    torch.testing.assert_close(model[0](x, x, x)[0], expected)
    torch.testing.assert_close(model[0](x, key, key)[0], crossed)
    check_states(model, fresh, tmp_path)


@pytest.mark.parametrize("options", [{}, {"kdim": 6, "vdim": 10}])
def test_states(options, tmp_path):
    model = pruned(nn.MultiheadAttention(8, 2, **options), 1, "apart", groups=2)
    sao_prune.compact(model)
    assert {"layer.out_proj.blocks", "layer.out_proj.row_set", "layer.in_proj_bias"} <= set(model.state_dict())
    check_states(model, lambda: type(model)(nn.MultiheadAttention(8, 2, **options)).double(), tmp_path)


@pytest.mark.parametrize("tune", [None, "train", "infer"])
def test_tuned_and_planned_again(tune):
    model = nn.Sequential(nn.Linear(16, 16), nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True))
    sao_prune.apply(model, groups=4, seed=0, skip_first=False, skip_last=False)
    again, x = copy.deepcopy(model), torch.randn(2, 3, 16)
    y = model(x)
    report = sao_prune.compact(model, example_input=x, tune=tune)
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)
    assert report.plan is not None
    sao_prune.compact(again, example_input=x, plan=report.plan)
    torch.testing.assert_close(again(x), y, rtol=1e-4, atol=1e-5)


def test_applied_compact_is_applied_masked_and_made_compact():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True))
    models = []
    for form in ("masked", "compact"):
        models.append(copy.deepcopy(dense))
        sao_prune.apply(models[-1], groups=4, seed=3, form=form, skip_first=False, skip_last=False)
    x = torch.randn(2, 3, 16)
    torch.testing.assert_close(models[1](x), models[0](x))
    sao_prune.compact(models[0])
    assert {k: v.tolist() for k, v in models[0].state_dict().items()} == {
        k: v.tolist() for k, v in models[1].state_dict().items()
    }


def test_subclasses_with_a_forward_of_their_own_stay_as_they_are():
    class Own(nn.MultiheadAttention):
        def forward(self, *inputs, **options):
            return super().forward(*inputs, **options)

    model = nn.Sequential(nn.Linear(8, 8), Own(8, 2))
    sao_prune.apply(model, groups=2, seed=0, skip_first=False, skip_last=False)
    report = sao_prune.compact(model)
    assert {r.name: "forward of its own" in (r.reason or "") for r in report.layers}["1"]
    assert "Own reads its weight" in {r.name: r.reason for r in report.layers}["1.out_proj"]


def test_a_projection_of_which_nothing_is_left():
    model = pruned(nn.MultiheadAttention(8, 2), groups=2)
    model.layer.in_proj_weight_mask[:8] = 0
    x = torch.randn(3, 2, 8, dtype=torch.float64)
    y = model(x, x, x)
    report = sao_prune.compact(model, example_input=(x, x, x))
    assert {r.name: r.reason for r in report.layers} == {
        "layer.in_proj_weight": "nothing is left in one of its matrices",
        "layer.out_proj": None,
    }
    torch.testing.assert_close(model(x, x, x), y)


def test_refusals():
    model = pruned(nn.MultiheadAttention(8, 2), groups=2)
    sao_prune.compact(model)
    x = torch.randn(3, 2, 8, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="Need attn_mask"):
        model(x, x, x, is_causal=True)
    with pytest.raises(RuntimeError, match="do not fit each other"):
        model(x, x, x[:2])
    nested = torch.nested.nested_tensor([x[0], x[1]])
    with pytest.raises(RuntimeError, match="nested"):
        model(nested, nested, nested)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("extra", [{}, {"add_bias_kv": True}, {"kdim": 6, "vdim": 10}])
def test_what_torch_refuses_is_refused_and_nothing_is_spread_over_a_batch(batch_first, extra):
    model = pruned(nn.MultiheadAttention(8, 2, batch_first=batch_first, **extra), groups=2).eval()
    masked = copy.deepcopy(model)
    sao_prune.compact(model)

    def inputs(batch=3, keys=4):
        sizes = (3, 5, 8), (batch, keys, model.layer.kdim), (batch, keys, model.layer.vdim)
        found = [torch.randn(size, dtype=torch.float64) for size in sizes]
        return found if batch_first else [x.transpose(0, 1) for x in found]

    shapes = [(5, 4), (6, 5, 4), (1, 4), (5, 1), (4,), (1, 1, 5, 4), (3, 5, 4), (1, 5, 4), (6, 1, 4), (4, 5), (5, 5)]
    calls = [(inputs(), {"attn_mask": torch.zeros(shape, dtype=torch.bool)}) for shape in shapes]
    shapes = [(3, 4), (1, 4), (3, 1), (4,), (3, 5), (4, 3), (1, 3, 4)]
    calls += [(inputs(), {"key_padding_mask": torch.zeros(shape, dtype=torch.bool)}) for shape in shapes]
    calls += [(inputs(batch), {}) for batch in (1, 2, 3, 6)]
    taken = 0
    for tensors, options in calls:
        for options["need_weights"] in (True, False):
            try:
                wanted = masked(*tensors, **options)
            except (RuntimeError, AssertionError):
                with pytest.raises(RuntimeError, match=r"do not fit each other|_mask of shape"):
                    model(*tensors, **options)
            else:
                taken += 1
                torch.testing.assert_close(model(*tensors, **options), wanted)
    assert taken == 8


@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True, "add_zero_attn": True}, {"kdim": 6, "vdim": 10}])
def test_programs_for_batches_of_any_size(options):
    model = pruned(nn.MultiheadAttention(8, 2, batch_first=True, **options), groups=2).eval()
    sao_prune.compact(model)

    def inputs(batch):
        sizes = (5, 8), (4, model.layer.kdim), (4, model.layer.vdim)
        masks = torch.rand(batch, 4) > 0.9, True, torch.rand(2 * batch, 5, 4) > 0.9
        return *(torch.randn(batch, *size, dtype=torch.float64) for size in sizes), *masks

    batch = torch.export.Dim("batch", min=2)
    shapes = *({0: batch},) * 4, None, {0: 2 * batch}
    program = torch.export.export(model.layer, inputs(3), dynamic_shapes=shapes, strict=False)
    tensors = inputs(5)
    torch.testing.assert_close(program.module()(*tensors), model(*tensors), equal_nan=True)


def test_submodules_are_found_by_their_names():
    model = pruned(nn.MultiheadAttention(8, 2), groups=2)
    sao_prune.compact(model)
    for name, module in model.named_modules():
        assert model.get_submodule(name) is module
    x = torch.randn(3, 2, 8, dtype=torch.float64)
    found = torch.func.functional_call(model, dict(model.named_parameters()), (x, x, x))
    torch.testing.assert_close(found, model(x, x, x))
    program = torch.export.export(model.eval(), (x, x, x))
    torch.testing.assert_close(program.module()(x, x, x), model(x, x, x))


def test_held_projections_compute_the_same():
    model = pruned(nn.MultiheadAttention(8, 2), groups=2)
    sao_prune.compact(model)
    sao_prune.hold(model)
    x = torch.randn(3, 2, 8, dtype=torch.float64)
    y = model(x, x, x)
    sao_prune.release(model)
    torch.testing.assert_close(model(x, x, x), y)
