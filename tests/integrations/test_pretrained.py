"""Folders that transformers' ``save_pretrained`` writes of pruned models."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

import sao_prune

transformers = pytest.importorskip("transformers", minversion="5.20")

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
}
CONFIGS = {
    "gpt2": lambda: transformers.GPT2Config(n_layer=1, n_head=4, n_embd=64, vocab_size=50),
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, num_local_experts=4),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, head_dim=16
    ),
}
TOKENS = {"input_ids": torch.arange(14).view(2, 7)}


def network(name: str, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()


def pruned(name: str, form: str) -> torch.nn.Module:
    model = network(name, 0)
    sao_prune.apply(model, groups=4, seed=0)
    if form == "compact":
        sao_prune.compact(model, example_input=TOKENS)
    if form == "permanent":
        sao_prune.remove(model)
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**TOKENS).logits


@pytest.mark.parametrize("form", ["masked", "compact", "permanent"])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_they_are_read_into_a_model_of_the_configuration(name: str, form: str, tmp_path: Path) -> None:
    model, fresh = pruned(name, form), network(name, 1)
    model.save_pretrained(tmp_path, save_original_format=False)
    sao_prune.load(fresh, tmp_path, example_input=TOKENS)
    assert torch.equal(logits(fresh), logits(model))


def test_from_pretrained_reads_what_is_dense_again(tmp_path: Path) -> None:
    model = pruned("mixtral", "permanent")
    model.save_pretrained(tmp_path)
    fresh = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(fresh), logits(model))


def test_the_trainer_saves_and_resumes_compact_experts(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model = pruned("mixtral", "compact")
    model.save_pretrained = functools.partial(model.save_pretrained, save_original_format=False)
    data = [{"input_ids": row, "labels": row} for row in TOKENS["input_ids"].repeat(4, 1)]

    def train(model: torch.nn.Module, steps: int, resume: bool) -> None:
        options = transformers.TrainingArguments(
            tmp_path, max_steps=steps, save_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True,
            disable_tqdm=True, lr_scheduler_type="constant",
        )  # fmt: skip
        transformers.Trainer(model, options, train_dataset=data).train(resume_from_checkpoint=resume)

    train(model, 1, resume=False)
    fresh = network("mixtral", 1)
    sao_prune.load(fresh, tmp_path / "checkpoint-1", example_input=TOKENS)
    assert torch.equal(logits(fresh), logits(model))
    train(model, 2, resume=True)
    assert (tmp_path / "checkpoint-2").is_dir()
    assert not torch.equal(logits(fresh), logits(model))
