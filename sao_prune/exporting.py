"""Export of compact models to ONNX: checked, and told how large the file is and what is in it."""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from ._torch import is_draft, tree_leaves, tree_map, without_autocast
from .blocks import BlockLinear, BlockModule, Execution
from .blocks.calls import record_calls
from .blocks.epilogue import detach
from .blocks.folding import fold as fold_model
from .blocks.norm_folding import fold_norms
from .files import replacing
from .orthogonality import release
from .tables import Column, Line, TableReport

_INSTALL = "pip install 'sao-prune[onnx]'"
_LARGEST = 1 << 31
# Runs of each of two forms, and the share of the other's time with which one is taken for the faster.
_RUNS, _CLEARLY = 8, 0.95

Runtime = Literal["onnxruntime", "openvino"]


@dataclass(frozen=True)
class ExportReport(TableReport):
    """What `export_onnx` has written; prints as a table of the operators.

    Attributes:
        path: of the file.
        size: its bytes.
        nodes: how many nodes there are of each operator.
        layers: block layers in the model.
        folded: permutations that folding has moved into neighbouring layers.
        norms: batch norms that folding has made factors of the layers before them.
        error: largest difference of an output from the model's, relative to its largest value; ``None`` without
            onnxruntime.
        title: heading of the table.
    """

    path: Path
    size: int
    nodes: dict[str, int]
    layers: int
    folded: int
    norms: int
    error: float | None
    title: str = "exported"

    columns: ClassVar[tuple[Column, ...]] = (Column("operator"), Column("nodes", "right"))

    def lines(self) -> list[Line]:
        """One line an operator, the most frequent first."""
        return [Line((row["operator"], f"{row['nodes']:,}")) for row in self.rows()]

    def rows(self) -> list[dict[str, Any]]:
        """The operators and how many nodes there are of each."""
        return [{"operator": name, "nodes": count} for name, count in Counter(self.nodes).most_common()]

    def totals(self) -> dict[str, Any]:
        """The file, and what is in it beside nodes."""
        names = ("path", "size", "layers", "folded", "norms", "error")
        return {name: getattr(self, name) for name in names}

    def summary(self) -> str:
        """One line of totals."""
        checked = "not run (no onnxruntime)" if self.error is None else f"outputs within {self.error:.1e}"
        return (
            f"{self.path}: {self.size / 1e6:.1f} MB, {self.layers} block layers, {self.folded} permutations and "
            f"{self.norms} norms folded, {checked}; {sum(self.nodes.values())} nodes"
        )


@without_autocast()
def export_onnx(
    model: nn.Module,
    example_input: Any,
    path: str | os.PathLike[str],
    *,
    fold: bool = True,
    dynamic_batch: bool = True,
    runtime: Runtime = "onnxruntime",
) -> ExportReport:
    """Export a model to ONNX in eval mode, its block layers as batched products and grouped convolutions.

    The model itself stays as it is; what is held is exported with its present values. Strided permutations become
    reshape and transpose.

    Args:
        model: any module, on the CPU, such as a compact one.
        example_input: a tensor, or a tuple of them, as the model is called with; the first dimension is the batch.
        path: of the file to write; its folder has to exist.
        fold: move channel permutations into neighbouring layers (see `sao_prune.blocks.folding.fold`), and batch
            norms into the block layers before them.
        dynamic_batch: whether the exported model takes batches of any size.
        runtime: which one the form is chosen for. For ``"onnxruntime"`` linear layers of tokens are written in two
            ways, and that which runs the example faster here is kept; for ``"openvino"`` in one. Both run either.

    Returns:
        An `ExportReport`.

    Raises:
        ImportError: without the packages of the extra ``onnx``.
        TypeError: if the model is no module or the example is not made of tensors.
        ValueError: if the folder is missing, a layer is masked by what cannot be exported, torch cannot export the
            model, the exported model computes something else or cannot be run, or the runtime is another. Nothing is
            then written.

    Example:
        >>> import sao_prune, tempfile, pytest
        >>> _ = pytest.importorskip("onnxscript")
        >>> net = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))
        >>> _ = sao_prune.apply(net, groups=4, seed=0)
        >>> _ = sao_prune.compact(net)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = sao_prune.export_onnx(net, torch.randn(3, 16), f"{folder}/net.onnx")
        >>> report.layers, report.nodes["MatMul"]
        (2, 2)
    """
    target = _check(model, example_input, path)
    if runtime not in get_args(Runtime):
        raise ValueError(f"runtime must be one of {', '.join(get_args(Runtime))}, got {runtime!r}")
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    own = copy.deepcopy(model).eval()
    detach(own)
    release(own)
    layers = [m for m in own.modules() if isinstance(m, BlockModule)]
    for layer in layers:
        layer.run_as(Execution())
    calls = record_calls(own, layers, example_input)
    expected = calls.output
    with torch.no_grad():
        norms = fold_norms(own, example_input) if fold else 0
        folded = fold_model(own, example_input) if fold else 0
    shapes = None
    if dynamic_batch:
        batch = torch.export.Dim("batch", min=1)
        shapes = tuple(tree_map(lambda t: {0: batch}, given) for given in inputs)
        # A batch of one would be taken for a constant.
        inputs = tuple(tree_map(lambda t: torch.cat([t, t]) if len(t) == 1 else t, given) for given in inputs)
    size = sum(p.numel() * p.element_size() for p in own.state_dict().values())
    # A large file has its weights in another beside it, by name.
    with nullcontext(target) if size >= _LARGEST else replacing(target) as written:
        _write(own, inputs, shapes, written, size)
        difference = _error(written, example_input, expected)
        tokens = [m for m in layers if isinstance(m, BlockLinear) and id(m) in calls.inputs]
        tokens = [m for m in tokens if calls.inputs[id(m)].dim() > 2]
        if runtime == "onnxruntime" and tokens and difference is not None and size < _LARGEST:
            for layer in tokens:
                layer.register_forward_pre_hook(_channels_first)
            write = partial(_write, own, inputs, shapes, size=size)
            difference = _replaced(written, write, example_input, expected) or difference
        nodes = _nodes(written)
    return ExportReport(target, target.stat().st_size, nodes, len(layers), folded, norms, difference)


def _write(model: nn.Module, inputs: tuple[Any, ...], shapes: Any, path: Path, size: int) -> None:
    """Export what is given, ``size`` bytes of weights.

    Raises:
        ValueError: if torch cannot export it.
    """
    name = type(model).__name__
    try:
        program = torch.onnx.export(model, inputs, dynamo=True, dynamic_shapes=shapes, verbose=False)
    except Exception as error:
        hint = "; dynamic_batch=False may help" if shapes is not None else ""
        raise ValueError(f"torch.onnx cannot export {name}: {_first_line(error)}{hint}") from error
    assert program is not None
    if is_draft(program):
        raise ValueError(
            f"torch.onnx cannot export {name}: what its forward does depends on the values that it is given, and only "
            "what it does with the example could be written"
        )
    program.save(str(path), external_data=size >= _LARGEST)


def _channels_first(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Tokens as they lie in a mixing layer: rows of tokens are gathered several times as fast as channels."""
    return (args[0].mT.contiguous().mT, *args[1:]) if args and args[0].dim() > 2 else args


def _replaced(path: Path, write: Callable[[Path], None], example_input: Any, expected: Any) -> float | None:
    """Put what ``write`` writes in the place of a file if it runs faster; the difference of its outputs then."""
    with TemporaryDirectory() as folder:
        other = Path(folder) / "other.onnx"
        try:
            write(other)
            difference = _error(other, example_input, expected)
        except ValueError:
            return None  # what is there is right
        first, second = _seconds((path, other), example_input)
        if second >= first * _CLEARLY:
            return None
        copyfile(other, path)
        return difference


def _check(model: nn.Module, example_input: Any, path: str | os.PathLike[str]) -> Path:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    leaves = tree_leaves(example_input)
    named = isinstance(example_input, Mapping)
    if named or not leaves or not all(isinstance(t, Tensor) and t.dim() > 0 for t in leaves):
        raise TypeError("example_input must be a tensor or a tuple of tensors, the batch their first dimension")
    for package in ("onnx", "onnxscript"):
        try:
            import_module(package)
        except ImportError as error:
            raise ImportError(f"export to ONNX needs {package}: {_INSTALL}") from error
    target = Path(path)
    if not target.absolute().parent.is_dir():
        raise ValueError(f"{target.absolute().parent} is no folder: make it first")
    devices = {t.device.type for t in (*model.parameters(), *model.buffers())} - {"cpu"}
    if devices:
        raise ValueError(f"the model is on {', '.join(sorted(devices))}: export a copy on the CPU, model.cpu()")
    return target


def _first_line(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().split("\n")[0] or type(error).__name__


def _nodes(path: Path) -> dict[str, int]:
    model = import_module("onnx").load(str(path), load_external_data=False)
    return dict(Counter(node.op_type for node in model.graph.node))


def _error(path: Path, example_input: Any, expected: Any) -> float | None:
    """The largest relative difference of the file's outputs.

    Raises:
        ValueError: if it is more than rounding, or the file cannot be run.
    """
    try:
        import_module("onnxruntime")
    except ImportError:
        return None
    try:
        found = _call(path, example_input)()
    except Exception as error:
        # Errors of its own, and numpy's of types that it lacks; the CPU has no products in bfloat16.
        raise ValueError(
            f"ONNX Runtime cannot run the exported model, so that it cannot be checked: {_first_line(error)}; export a "
            "copy in float32, model.float()"
        ) from error
    wanted = [t for t in tree_leaves(expected) if isinstance(t, Tensor)]
    worst = 0.0
    for new, old in zip(found, wanted):
        scale = max(float(old.detach().abs().max()), 1e-30) if old.numel() else 1.0
        difference = float((torch.from_numpy(new).double() - old.double()).abs().max()) if old.numel() else 0.0
        worst = max(worst, difference / scale)
    if not worst <= 1e-3:
        raise ValueError(
            f"the exported model's outputs differ by {worst:.2g} of their largest value; nothing was written"
        )
    return worst


def _call(path: Path, example_input: Any) -> Callable[[], Any]:
    """A run of a file in ONNX Runtime."""
    session = import_module("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
    given = [t.detach().numpy() for t in tree_leaves(example_input)]
    names = [i.name for i in session.get_inputs()]
    return lambda: session.run(None, dict(zip(names, given)))


def _seconds(paths: Sequence[Path], example_input: Any) -> list[float]:
    """The fewest seconds of a run of each file, all in turn."""
    calls = [_call(path, example_input) for path in paths]
    least = [float("inf")] * len(calls)
    for _ in range(_RUNS):
        for index, call in enumerate(calls):
            start = perf_counter()
            call()
            least[index] = min(least[index], perf_counter() - start)
    return least
