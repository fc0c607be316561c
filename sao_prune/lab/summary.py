"""What a run's results say: one row a method, read from the disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, stdev

from .choice import choose_lr, final_cells, selection_cells, spectrum_cell
from .errors import ResultsError
from .recipe import Arm, Recipe, load_recipe
from .results import Record, read_results


@dataclass(frozen=True)
class Row:
    """One arm of the comparison. Accuracies are fractions; ``seconds`` is the median training time of a run.

    Attributes:
        accuracies: of the finished final runs, in the order of the recipe's seeds.
        curves: accuracy over epochs of the same runs.
        spectrum: the measurement at initialisation, if it is there.
        notes: what a reader must know about this row.
    """

    arm: Arm
    lr: float | None
    sparsity: float | None
    parameters: int | None
    nonzero: int | None
    seconds: float | None
    accuracies: tuple[float, ...]
    curves: tuple[tuple[float, ...], ...]
    spectrum: Record | None
    notes: tuple[str, ...]

    @property
    def mean(self) -> float | None:
        """Mean accuracy over the seeds."""
        return fmean(self.accuracies) if self.accuracies else None

    @property
    def spread(self) -> float | None:
        """Sample standard deviation over the seeds; none below two seeds."""
        return stdev(self.accuracies) if len(self.accuracies) > 1 else None


@dataclass(frozen=True)
class Summary:
    """All rows of a recipe, how much of it is done, and what it was done with."""

    recipe: Recipe
    rows: tuple[Row, ...]
    done: int
    cells: int
    environments: tuple[str, ...]


def summarise(folder: Path, warn: Callable[[str], None]) -> Summary:
    """Read a run's folder; works at any time, also while the run goes on.

    Raises:
        ResultsError: if the folder holds no run, or none of its results belongs to the recipe that lies beside them.
        RecipeError: if the recipe in the folder is damaged.
    """
    path = folder / "results.jsonl"
    if not path.is_file() or not (folder / "recipe.yaml").is_file():
        raise ResultsError(f"{folder} holds no run (recipe.yaml and results.jsonl): make one with `sao-prune run`")
    recipe = load_recipe(folder / "recipe.yaml")
    records = read_results(path, warn)
    rows, used, cells = [], [], 0
    for arm in recipe.arms():
        lr = choose_lr(recipe, arm, records)
        choosing = [cell for group in selection_cells(recipe, arm).values() for cell in group]
        finals = [] if lr is None else final_cells(recipe, arm, lr)
        spectrum = spectrum_cell(recipe, arm)
        cells += len(choosing) + len(recipe.seeds) + 1
        used += [records[cell.key] for cell in [*choosing, *finals, spectrum] if cell.key in records]
        done = [records[cell.key]["result"] for cell in finals if cell.key in records]
        rows.append(_row(recipe, arm, lr, done, records.get(spectrum.key)))
    if not used:
        raise ResultsError(f"{path} has no result of the recipe beside it yet: let `sao-prune run` go on")
    environments = {_environment(record) for record in used}
    return Summary(recipe, tuple(rows), len(used), cells, tuple(sorted(environments)))


def _row(recipe: Recipe, arm: Arm, lr: float | None, done: list[Record], spectrum: Record | None) -> Row:
    first = done[0] if done else (spectrum or {}).get("result", {})
    diverged = sum(result["status"] != "ok" for result in done)
    notes = [first["note"]] if first.get("note") else []
    if diverged:
        notes.append(f"{diverged} of {len(done)} runs diverged")
    if 0 < len(done) < len(recipe.seeds):
        notes.append(f"{len(done)} of {len(recipe.seeds)} runs are done")
    if lr is not None and len(recipe.lr.grid) > 2 and lr in (min(recipe.lr.grid), max(recipe.lr.grid)):
        notes.append(f"the chosen lr, {lr:g}, is at the edge of the grid")
    return Row(
        arm=arm,
        lr=lr,
        sparsity=first.get("sparsity"),
        parameters=first.get("parameters"),
        nonzero=first.get("nonzero"),
        seconds=median(result["seconds"] for result in done) if done else None,
        accuracies=tuple(result["accuracy"] for result in done),
        curves=tuple(tuple(result["curve"]["accuracy"]) for result in done),
        spectrum=None if spectrum is None else spectrum["result"],
        notes=tuple(notes),
    )


def _environment(record: Record) -> str:
    made = record["environment"]
    return (
        f"sao_prune {made['sao_prune']}, torch {made['torch']}, Python {made['python']}, {made['device']}, "
        f"{made['threads']} threads"
    )
