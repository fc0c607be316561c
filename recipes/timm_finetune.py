"""Compress a timm model and fine-tune it with distillation from its dense self, through timm's own parts.

    python recipes/timm_finetune.py --model resnet18 --data my/images --method sao --output runs/sao.safetensors

The data is a folder with ``train`` and ``validation`` (one folder a class in each) or a data set that timm knows by
name, such as ``torch/cifar10``. What happens, in order:

1. The dense model is made, then trained for ``--teacher-epochs``. Without ``--pretrained`` (the default, which needs no
   network) it starts from random weights, with it its head is still random unless the classes are the weights' own: in
   both cases training gives it something to teach. ``--teacher FILE`` keeps it for other methods to learn from.
2. A copy is pruned. GMP, LMP, LRP and RG keep the values of the weights that stay; Project fits them, on
   ``--calibration`` training images, so that layers compute what they did. SAO and EOI put orthogonal ones there: of
   the dense model they keep the layers that are not pruned, and the rest reaches them by distillation alone.
3. The copy is trained for ``--epochs`` on ``(1 - w) * cross-entropy + w * distillation``, w being ``--distill-weight``.
4. The weights go to ``--output`` (for `sao_prune.load`), the results as JSON beside it and to standard output.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import timm
import timm.data
import timm.models
import timm.optim
import timm.scheduler
import timm.utils
import torch
from torch import nn
from torch.nn import functional as F

import sao_prune
from sao_prune import Distillation, Distiller
from sao_prune.algorithms import resolve

log = logging.getLogger("timm_finetune")
NEED_LABELS = ("snip", "grasp")
METHODS = [name for name in sao_prune.methods() if name not in NEED_LABELS]
SPLITS = {"train": ("train", "training"), "validation": ("validation", "val", "valid", "eval", "evaluation")}


def number(low: float, high: float = math.inf, kind: Callable[[str], float] = float) -> Callable[[str], float]:
    """A type for the command line: numbers from ``low`` to ``high``."""

    def convert(text: str) -> float:
        if not low <= (value := kind(text)) <= high:
            raise argparse.ArgumentTypeError(f"must be from {low} to {high}, got {text}")
        return value

    return convert


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked as far as it can be without model and data."""
    parser = argparse.ArgumentParser("timm_finetune", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--model", default="resnet18", help="any name that timm.create_model takes")
    add("--pretrained", action="store_true", help="start from timm's weights; needs a network or a filled cache")
    add("--method", default="sao", choices=METHODS, help="how to prune")
    add("--sparsity", type=number(0, 1), default=0.875, help="sparsity of the pruned layers")
    add("--calibration", type=number(2, kind=int), default=512, help="images that --method project fits values on")
    add("--execution", default="masked", choices=("masked", "compact"), help="how the sparse model runs")
    add("--data", required=True, help="image folder, or a name such as torch/cifar10")
    add("--data-dir", default="data", help="where a named data set lies")
    add("--download", action="store_true", help="fetch a named data set if it is missing")
    add("--num-classes", type=number(2, kind=int), help="for data sets that do not say")
    add("--image-size", type=number(1, kind=int), help="side of the square input; the model's own if left out")
    add("--in-chans", type=int, default=3, choices=(1, 3), help="1 for grey images, 3 for colour")
    add("--min-crop", type=number(0, 1), default=0.35, help="smallest share of an image that training sees")
    add("--epochs", type=number(1, kind=int), default=30, help="of the sparse model")
    add("--teacher-epochs", type=number(0, kind=int), help="of the dense model; as many as --epochs if left out")
    add("--teacher", type=Path, help="dense weights: read from this file if it exists, else written to it")
    add("--batch-size", type=number(1, kind=int), default=128, help="images a step")
    add("--opt", default="adamw", help="any name of timm.optim.list_optimizers()")
    add("--lr", type=number(0), default=1e-3, help="highest learning rate; one epoch of warm-up, then cosine")
    add("--weight-decay", type=number(0), default=0.05, help="of all parameters of two and more dimensions")
    add("--distill-weight", type=number(0, 1), default=0.5, help="0: labels alone, 1: teacher alone")
    add("--temperature", type=number(0.1), default=4.0, help="of both softmaxes in the distillation")
    add("--ema-decay", type=number(0, 1), default=0.0, help="average the weights; 0 does not")
    add("--amp", action="store_true", help="bfloat16 autocast")
    add("--workers", type=number(0, kind=int), default=4, help="processes that read images")
    add("--seed", type=int, default=0, help="of everything that is drawn")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute")
    add("--output", type=Path, required=True, help="*.safetensors; the JSON line goes to *.json beside it")
    args = parser.parse_args(arguments)
    args.teacher_epochs = args.epochs if args.teacher_epochs is None else args.teacher_epochs
    if args.output.suffix != ".safetensors":
        parser.error(f"--output must end in .safetensors, got {args.output}")
    if args.opt not in timm.optim.list_optimizers():
        parser.error(f"--opt {args.opt} is none of timm's: {', '.join(timm.optim.list_optimizers())}")
    if args.execution == "compact" and not resolve(args.method).structured:
        parser.error(
            f"--execution compact needs a method that prunes in blocks (sao, rg, project), got --method {args.method}"
        )
    untaught = not (args.pretrained or args.teacher_epochs or (args.teacher and args.teacher.is_file()))
    if untaught and args.distill_weight > 0:
        parser.error("a random dense model has nothing to teach: train it, read a --teacher, or --distill-weight 0")
    return args


def open_data(args: argparse.Namespace) -> tuple[Any, Any, int]:
    """Training set, test set and number of classes."""
    folder = Path(args.data)
    named = not folder.is_dir()
    if named and args.data.partition("/")[0] not in ("torch", "hfds", "hfids", "tfds", "wds"):
        fail(f"--data {args.data} is neither a folder nor a name such as torch/cifar10, hfds/NAME or tfds/NAME")
    if not named:
        for split, names in SPLITS.items():
            if not any((folder / name).is_dir() for name in names):
                fail(f"--data {folder} has no folder {split!r} (nor {', '.join(names[1:])}) with one folder a class")
    common = {"root": str(args.data_dir if named else folder), "batch_size": args.batch_size, "seed": args.seed}
    common |= {"download": args.download, "input_img_mode": "L" if args.in_chans == 1 else "RGB"}
    try:
        train, test = (
            timm.data.create_dataset(args.data if named else "", split=split, is_training=split == "train", **common)
            for split in SPLITS
        )
    except (AssertionError, ImportError, OSError, RuntimeError, ValueError) as error:
        fail(f"--data {args.data} cannot be opened: {error}" + ("; try --download" if named else ""))
    if named and args.data.startswith("torch/") and args.in_chans == 3 and getattr(train[0][0], "mode", "RGB") == "L":
        fail(f"--data {args.data} holds grey images: give --in-chans 1")
    known = class_names(train)
    if differing := set(known) ^ set(class_names(test)):
        fail(f"--data {args.data}: the classes of training and validation differ: {sorted(differing)}")
    classes = args.num_classes or len(known)
    if classes < 2:
        fail(f"--data {args.data}: {classes} classes found; give --num-classes if the data set does not say")
    return train, test, classes


def class_names(dataset: Any) -> list[str]:
    """The classes of a data set in the order of their labels, as far as it tells."""
    reader = getattr(dataset, "reader", None)
    return [str(name) for name in getattr(reader, "class_to_idx", None) or getattr(dataset, "classes", None) or ()]


def open_loaders(args: argparse.Namespace, model: nn.Module, train: Any, test: Any) -> tuple[Any, Any]:
    """timm's loaders, with the preprocessing that the model asks for."""
    config = timm.data.resolve_data_config(model=model)
    height, width = (args.image_size,) * 2 if args.image_size else config["input_size"][1:]
    common = {key: config[key] for key in ("interpolation", "mean", "std")}
    common |= {"input_size": (args.in_chans, height, width), "batch_size": args.batch_size, "num_workers": args.workers}
    # create_loader's own device is CUDA; workers that outlive an epoch would carry the draws of earlier trainings on.
    common |= {"persistent_workers": False, "device": torch.device(args.device), "pin_memory": "cuda" in args.device}
    augment = {"scale": (args.min_crop, 1.0), "color_jitter": None}
    loader = timm.data.create_loader(train, is_training=True, **augment, **common)
    if len(loader) == 0:
        fail(f"--batch-size {args.batch_size} is more than there are training images")
    return loader, timm.data.create_loader(test, crop_pct=config["crop_pct"], **common)


def create_dense(args: argparse.Namespace, classes: int) -> nn.Module:
    """The dense model, from timm's weights or random ones."""
    if not timm.is_model(args.model):
        fail(f"--model {args.model}: timm {timm.__version__} has no such architecture; timm.list_models() names them")
    options = {"num_classes": classes, "in_chans": args.in_chans}
    config = timm.models.get_pretrained_cfg(args.model)
    if args.image_size and getattr(config, "fixed_input_size", False):
        options["img_size"] = args.image_size
    if not args.pretrained:
        log.info(f"{args.model} starts from random weights: no network is used; --pretrained would fetch timm's")
        return timm.create_model(args.model, **options)
    try:
        return timm.create_model(args.model, pretrained=True, **options)
    except Exception as error:
        fail(
            f"--pretrained: no weights of {args.model} could be had, which takes a network or a filled cache; without "
            f"--pretrained the dense model is trained from random ones ({' '.join(str(error).split())[:160]})"
        )


def train(
    args: argparse.Namespace, model: nn.Module, loader: Any, epochs: int, teacher: nn.Module | None = None
) -> tuple[nn.Module, float]:
    """Train in place; the model (or the average of its weights) and the seconds it took."""
    timm.utils.random_seed(args.seed)  # so that every method sees the same batches, whatever happened before
    optimizer = timm.optim.create_optimizer_v2(model, opt=args.opt, lr=args.lr, weight_decay=args.weight_decay)
    warm_up = {"warmup_epochs": int(epochs > 1), "warmup_lr": args.lr / 100}
    steps = {"step_on_epochs": False, "updates_per_epoch": len(loader)}
    scheduler, _ = timm.scheduler.create_scheduler_v2(optimizer, num_epochs=epochs, **warm_up, **steps)
    average = timm.utils.ModelEmaV3(model, decay=args.ema_decay, use_warmup=True) if args.ema_decay else None
    options = Distillation(args.distill_weight, args.temperature)
    distiller = None if teacher is None else Distiller(model, teacher, options)
    start, step = time.perf_counter(), 0
    for epoch in range(epochs):
        model.train()
        losses = []
        for images, labels in loader:
            with torch.autocast(images.device.type, torch.bfloat16, enabled=args.amp):
                logits = model(images)
                loss = F.cross_entropy(logits, labels)
                loss = loss if distiller is None else distiller.loss(images, logits, loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            scheduler.step_update(step)
            if average is not None:
                average.update(model, step=step)
            losses.append(loss.detach())
        mean = float(torch.stack(losses).mean())
        log.info(f"{'dense' if teacher is None else 'sparse'} epoch {epoch + 1}/{epochs}: training loss {mean:.4f}")
        if not math.isfinite(mean):
            fail(f"the training loss became {mean}: try a smaller --lr than {args.lr}")
    return (model if average is None else average.module), time.perf_counter() - start


@torch.no_grad()
def evaluate(args: argparse.Namespace, model: nn.Module, loader: Any) -> float:
    """Share of right answers."""
    model.eval()
    right = []
    for images, labels in loader:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=args.amp):
            right += (model(images).argmax(1) == labels).tolist()
    return sum(right) / len(right)


def prepare_teacher(args: argparse.Namespace, dense: nn.Module, loader: Any) -> tuple[nn.Module, float]:
    """The dense model, trained or read, ready to teach."""
    seconds, file = 0.0, args.teacher
    if file and file.is_file():
        try:
            sao_prune.load(dense, file)
        except sao_prune.CheckpointError as error:
            fail(f"--teacher {file}: {error}")
    elif args.teacher_epochs:
        log.info(f"training the dense model for {args.teacher_epochs} epochs, so that it has something to teach")
        dense, seconds = train(args, dense, loader, args.teacher_epochs)
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            sao_prune.save(dense, file)
    return dense.eval().requires_grad_(False), seconds


def sparse_copy(args: argparse.Namespace, dense: nn.Module, loader: Any = None) -> nn.Module:
    """The dense model pruned; the seed decides what is drawn, and the loader's first images what Project fits."""
    student = copy.deepcopy(dense).requires_grad_(True)
    method = sao_prune.Project((images for images, _ in loader), samples=args.calibration) if loader else args.method
    sao_prune.apply(student, args.sparsity, method=method, seed=args.seed)
    if args.execution == "compact":
        sao_prune.compact(student)
    return student


def main(arguments: list[str] | None = None) -> None:
    """From the command line to the results."""
    args = parse(arguments)
    timm.utils.random_seed(args.seed)
    train_set, test_set, classes = open_data(args)
    dense = create_dense(args, classes).to(args.device)
    train_loader, test_loader = open_loaders(args, dense, train_set, test_set)
    project = args.method == "project"
    try:  # before hours of training show that it cannot be
        if project:  # which would fit values to a model that is not trained yet
            sao_prune.plan(dense, args.sparsity, method="project")
        else:
            sparse_copy(args, dense)
    except ValueError as error:
        fail(f"{args.model} cannot be pruned: {error}")
    dense, teacher_seconds = prepare_teacher(args, dense, train_loader)
    results = {"dense_accuracy": evaluate(args, dense, test_loader)}
    timm.utils.random_seed(args.seed)  # so that Project sees the same images whether the dense model was read or not
    student = sparse_copy(args, dense, train_loader if project else None)
    results["pruned_accuracy"] = evaluate(args, student, test_loader)
    student, seconds = train(args, student, train_loader, args.epochs, dense)
    results["accuracy"] = evaluate(args, student, test_loader)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    sao_prune.save(student, args.output)
    report = sao_prune.report(student)
    results |= {"sparsity": report.sparsity, "parameters": report.remaining, "dense_parameters": report.parameters}
    times = {"seconds": round(seconds, 1), "teacher_seconds": round(teacher_seconds, 1)}
    line = json.dumps({**vars(args), **results, **times}, default=str)
    args.output.with_suffix(".json").write_text(line + "\n")
    print(line)


def fail(text: str) -> NoReturn:
    """End with one line that says what is wrong."""
    raise SystemExit(f"timm_finetune: {text}")


if __name__ == "__main__":
    timm.utils.setup_default_logging()
    main()
