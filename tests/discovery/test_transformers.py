"""Language models of the transformers library, in small."""

import pytest
import torch

import sao_prune

from .test_others import mentioned

transformers = pytest.importorskip("transformers", minversion="5.0")

_SIZES = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_WIDE = {**_SIZES, "intermediate_size": 96}
_GQA = {**_WIDE, "num_key_value_heads": 2}
_EXPERTS = {**_GQA, "num_local_experts": 4}
TOKENS = torch.arange(8).view(1, 8)


def small(family):
    """One model of a family, in eval mode, and an input for it."""
    t = transformers
    torch.manual_seed(0)
    inputs = {"input_ids": TOKENS}
    if family == "gpt2":
        ids = {"bos_token_id": 0, "eos_token_id": 1}
        model = t.GPT2LMHeadModel(t.GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=32, **ids))
    elif family == "bert":
        model = t.BertForSequenceClassification(t.BertConfig(**_WIDE, max_position_embeddings=32))
    elif family == "llama":
        model = t.LlamaForCausalLM(t.LlamaConfig(**_GQA))
    elif family == "t5":
        sizes = {"vocab_size": 96, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
        model = t.T5ForConditionalGeneration(t.T5Config(**sizes, decoder_start_token_id=0))
        inputs["decoder_input_ids"] = TOKENS
    elif family == "mixtral":
        model = t.MixtralForCausalLM(t.MixtralConfig(**_EXPERTS))
    elif family == "gpt_oss":
        model = t.GptOssForCausalLM(t.GptOssConfig(**_EXPERTS, head_dim=16))
    else:
        sides = {f"{side}_{what}": size for side in ("encoder", "decoder")
                 for what, size in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 96))}  # fmt: skip
        ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
        lengths = {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16}
        model = t.WhisperForConditionalGeneration(t.WhisperConfig(vocab_size=96, d_model=64, **sides, **lengths, **ids))
        inputs = {"input_features": torch.randn(1, 8, 32), "decoder_input_ids": TOKENS}
    return model.eval(), inputs


ENDS = {
    "gpt2": [],
    "bert": ["classifier.weight"],
    "llama": ["lm_head.weight"],
    "t5": [],
    "mixtral": ["lm_head.weight"],
    "gpt_oss": ["lm_head.weight"],
    "whisper": ["model.encoder.conv1.weight"],
}


@pytest.mark.parametrize("family", ENDS)
@pytest.mark.parametrize("order", ["registration", "execution"])
def test_ends_and_everything_else(family, order):
    model, inputs = small(family)
    options = {"example_input": inputs} if order == "execution" else {}
    plan = sao_prune.plan(model, 0.75, **options)
    assert not mentioned(model, plan)
    reasons = {layer.name: layer.reason for layer in plan.layers}
    assert [name for name, reason in reasons.items() if reason in ("first layer", "last layer")] == ENDS[family]
    rest = {reason for reason in reasons.values() if reason not in (None, "first layer", "last layer", "too small")}
    assert all(r.startswith(("tied to", "positional embedding", "embedding", "router", "bias")) for r in rest), rest


@pytest.mark.parametrize("family", ENDS)
def test_a_step_with_zeros_that_stay(family):
    model, inputs = small(family)
    report = sao_prune.apply(model, 0.75, seed=0)
    # What is not pruned are the embeddings, the ends and little else.
    assert report.sparsity == pytest.approx(0.75, abs=0.01)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1)
    model(**inputs).logits.square().mean().backward()
    optimizer.step()
    again = sao_prune.report(model)
    assert again.nnz == report.nnz
    before = model(**inputs).logits
    sao_prune.remove(model)
    assert torch.allclose(model(**inputs).logits, before, atol=1e-5)


def test_gpt2_is_orthogonal_in_its_own_orientation():
    model, _ = small("gpt2")
    sao_prune.apply(model, 0.75, seed=0)
    layer = model.transformer.h[0].mlp.c_fc
    assert layer.weight.shape == (64, 256)
    assert torch.allclose(torch.linalg.svdvals(layer.weight.detach()), torch.ones(64), atol=1e-5)
    assert layer.weight_mask.sum(0).unique().tolist() == [16.0]


def test_experts_are_named_in_the_report():
    model, _ = small("mixtral")
    report = sao_prune.apply(model, 0.75, seed=0)
    experts = [layer for layer in report.pruned if "experts" in layer.name]
    assert [layer.note for layer in experts] == ["4 matrices"] * 4
    assert experts[0].shape == (4, 192, 64)
    values = torch.linalg.svdvals(model.model.layers[0].mlp.experts.down_proj.detach())
    assert torch.allclose(values, torch.ones(4, 64), atol=1e-5)
