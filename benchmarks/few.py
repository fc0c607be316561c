"""Few rows at a time: a linear layer for one to sixteen rows, and a decoder that writes token after token.

python benchmarks/few.py    # two threads, idle cores; the decoder is transformers' Llama, drawn at random
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
from timing import race
from torch import Tensor, nn

import sao_prune

LAYERS = ((1024, 1024, 8), (1024, 1024, 32), (4096, 1024, 8), (4096, 4096, 8), (4096, 4096, 32))
ROWS = (1, 4, 16)
GROUPS = (4, 8, 32)
TOKENS = 24


def _run(model: nn.Module, x: Tensor) -> Callable[[], object]:
    def run() -> Tensor:
        with torch.no_grad():
            result: Tensor = model(x)
            return result

    return run


def layers(repeats: int) -> None:
    """A table of microseconds, dense / blocks."""
    print("| layer | " + " | ".join(f"{rows} row{'s' * (rows > 1)}" for rows in ROWS) + " |")
    print("|---|" + "---:|" * len(ROWS))
    for m, n, groups in LAYERS:
        dense = nn.Linear(n, m)
        blocks = copy.deepcopy(dense)
        sao_prune.prune.sao(blocks, groups=groups, seed=0)
        sao_prune.compact(blocks)
        cells = []
        for rows in ROWS:
            x = torch.randn(rows, n)
            times = race({"dense": _run(dense, x), "blocks": _run(blocks, x)}, repeats)
            cells.append(f"{1e6 * times.median('dense'):.0f} / {1e6 * times.median('blocks'):.0f}")
        print(f"| {n} to {m}, {groups} blocks | " + " | ".join(cells) + " |", flush=True)


def decoder(repeats: int) -> None:
    """A table of milliseconds a token, and for a prompt of 256 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=4000,
    )
    dense = LlamaForCausalLM(config).eval()
    prompt, long = torch.randint(4000, (1, 16)), torch.randint(4000, (1, 256))
    models = {"dense": dense}
    for groups in GROUPS:
        models[f"{groups} blocks"] = copy.deepcopy(dense)
        sao_prune.apply(models[f"{groups} blocks"], groups=groups, seed=0)
        sao_prune.compact(models[f"{groups} blocks"], example_input={"input_ids": prompt})

    def write(model: nn.Module) -> Callable[[], object]:
        options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
        return lambda: model.generate(prompt, **options)  # type: ignore[operator]

    tokens = race({name: write(model) for name, model in models.items()}, repeats, warm_up=1)
    prompts = race({name: _run(model, long) for name, model in models.items()}, repeats, warm_up=1)
    print("\n| Llama, 8 layers of 1024 and 2816 | ms a token | ms for a prompt of 256 |\n|---|---:|---:|")
    for name in models:
        print(f"| {name} | {1e3 * tokens.median(name) / TOKENS:.2f} | {1e3 * prompts.median(name):.1f} |")


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=51)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    layers(options.repeats)
    decoder(max(3, options.repeats // 10))


if __name__ == "__main__":
    main()
