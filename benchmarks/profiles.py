"""Where the time of a compact model goes: the share of every operation, by torch's profiler.

python benchmarks/profiles.py vit_small_patch16_224 train
"""

from __future__ import annotations

import argparse

import timm
import torch
from models import MODELS, SPARSITY, _way
from torch.profiler import ProfilerActivity, profile

import sao_prune


def main() -> None:
    """Tune one model, run it five times under the profiler and print what takes over 2 %."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("mode", choices=("train", "infer"))
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    batch = MODELS[options.model][0]
    x, labels = torch.randn(batch, 3, 224, 224), torch.randint(1000, (batch,))
    model = timm.create_model(options.model)
    sao_prune.apply(model, sparsity=SPARSITY, method=sao_prune.SAO(topology="interleaved"), seed=0)
    sao_prune.compact(model, example_input=x, tune=options.mode)
    run = _way(model, x, labels, options.mode)
    for _ in range(2):
        run()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(5):
            run()
    events = sorted(found.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    print(f"{options.model}, {options.mode}: {total / 5e3:.0f} ms")
    for event in events:
        share = event.self_cpu_time_total / total
        if share > 0.02:
            print(f"  {share:6.1%}  {event.key}")


if __name__ == "__main__":
    main()
