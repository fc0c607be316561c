"""The command line of deploy.py, and how its models are trained if nothing else is said."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from math import inf, nan
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Preset:
    """A model, and how it is trained if it has to be."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    size: int = 32
    epochs: int = 8
    further_epochs: int = 4
    lr: float = 2e-3
    further_lr: float = 1e-3
    samples: int = 512


PRESETS = {
    "resnet18": Preset("resnet18"),
    "vit_tiny": Preset("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8}, epochs=12, lr=1e-3, further_lr=5e-4),
    "mixer": Preset("sao_mixer_nano", {"img_size": 32}, epochs=12),
    "efficientnet_lite0": Preset("tf_efficientnet_lite0", size=224, epochs=0, further_lr=3e-4, samples=128),
}


TOPOLOGIES = {
    "clustered": "sets searched for every layer (clustered, the default)",
    "shared": "layers that feed each other share the sets of the channels between (shared)",
    "interleaved": "channels dealt in turn (interleaved)",
    "ramanujan": "drawn (ramanujan)",
}

# Options that say where things lie, and all that no trained model depends on or that its name tells.
PLACES = ("output", "dense", "data_dir", "download")
FREE = ("groups", "topology", "structured", "batches", "repeats", "threads", *PLACES)
LARGEST_SEED = 2**32 - 1


def number(kind: type, low: float, high: float = inf, above: bool = False) -> Callable[[str], Any]:
    """Reads a number of a kind from ``low`` (itself only if not ``above``) to ``high``."""
    name = "an integer" if kind is int else "a number"
    allowed = f"{name} {'above' if above else 'of at least'} {low:g}" + (f" and at most {high}" if high < inf else "")

    def read(text: str) -> Any:
        try:
            found = kind(text)
        except ValueError:
            found = nan
        if not low <= found <= high or (above and found == low) or found == inf:
            raise argparse.ArgumentTypeError(f"must be {allowed}, got {text!r}")
        return found

    return read


def parse(about: str | None, arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; what it leaves open comes from the preset. ``about`` is shown with the help."""
    parser = argparse.ArgumentParser("deploy", description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", choices=PRESETS)
    count, natural, positive = number(int, 1), number(int, 0), number(float, 0, above=True)
    add("--groups", type=number(int, 2), nargs="+", default=[8], help="blocks of every layer; one file each (8)")
    add("--topology", nargs="+", default=["clustered"], choices=TOPOLOGIES, help="; ".join(TOPOLOGIES.values()))
    add(
        "--structured",
        type=number(float, 0, 1, above=True),
        nargs="*",
        help="Torch-Pruning too, at these further shares",
    )
    add("--data", default="fashion-mnist", help="fashion-mnist, digits, cifar-10, .., folder:PATH")
    add("--data-dir", type=Path, default=Path("data"), help="where data lie")
    add("--download", action="store_true", help="fetch data that are missing")
    add(
        "--subset", type=natural, help="training images, or crops; 0 for all (Fashion-MNIST 12000, crops 768, else all)"
    )
    add("--test-subset", type=count, help="test images, or crops (all; crops 512)")
    add(
        "--dense",
        type=Path,
        help="dense weights: read from this file if it exists, else written to it; of several seeds each has its own, "
        "NAME-SEED before the ending",
    )
    for name, kind in (("epochs", natural), ("further-epochs", natural), ("samples", count)):
        add(f"--{name}", type=kind, help="of the preset if left out")
    for name in ("lr", "further-lr"):
        add(f"--{name}", type=positive, help="of the preset if left out")
    add("--batch-size", type=count, default=64)
    add(
        "--distill",
        type=number(float, 0, 1),
        default=0.5,
        help="the teacher's share of the loss, 0 to 1 (0.5; crops 1)",
    )
    add("--temperature", type=positive, default=4.0)
    add(
        "--seeds",
        type=number(int, 0, LARGEST_SEED),
        nargs="+",
        default=[0],
        help="of all that is drawn; several: a folder seed-N each, and a table of all (0)",
    )
    add("--batches", type=count, nargs="+", default=[1, 8], help="batch sizes that are timed")
    add("--repeats", type=natural, default=50, help="timed calls of each; 0 measures no time")
    add("--threads", type=count, default=torch.get_num_threads())
    add("--output", type=Path, required=True, help="folder for the files and results.json")
    add("--smoke", action="store_true", help="digits or few crops, one epoch: does it run?")
    args = parser.parse_args(arguments)
    if len(set(args.seeds)) < len(args.seeds):
        parser.error(f"--seeds: each seed once, got {' '.join(map(str, args.seeds))}")
    for one in (args, *per_seed(args)):
        if one.output.exists() and not one.output.is_dir():
            parser.error(f"--output is a folder, but {one.output} is a file")
        if one.dense and one.dense.exists() and not one.dense.is_file():
            parser.error(f"--dense is a file of weights, but {one.dense} is a folder")
    if args.structured is not None and find_spec("torch_pruning") is None:
        parser.error("--structured needs torch-pruning: pip install 'sao-prune[torch-pruning]'")
    preset = PRESETS[args.model]
    if args.model == "efficientnet_lite0":
        args.subset = args.subset or 768
        args.test_subset, args.distill, args.batch_size = args.test_subset or 512, 1.0, min(args.batch_size, 32)
    elif args.subset is None and args.data == "fashion-mnist":
        args.subset = 12000
    if args.smoke:
        few = {"subset": 8, "test_subset": 8} if args.model == "efficientnet_lite0" else {"subset": 256}
        vars(args).update(few, data="digits", epochs=1, further_epochs=1, samples=64, repeats=3, batch_size=32)
        args.batch_size = min(args.batch_size, args.subset)
    for name in ("epochs", "further_epochs", "lr", "further_lr", "samples"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(preset, name))
    return args


def per_seed(args: argparse.Namespace) -> list[argparse.Namespace]:
    """The command line of every seed: one ``seed`` for ``seeds``, and where there are several, places of its own."""
    found = []
    for seed in args.seeds:
        one = copy.copy(args)
        del one.seeds
        one.seed = seed
        if len(args.seeds) > 1:
            one.output = args.output / f"seed-{seed}"
            one.dense = args.dense and args.dense.with_stem(f"{args.dense.stem}-{seed}")
        found.append(one)
    return found


def trained_with(args: argparse.Namespace) -> dict[str, Any]:
    """What the models of one seed depend on, beside the dense weights and their names."""
    return {key: value for key, value in vars(args).items() if key not in FREE}
