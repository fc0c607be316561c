"""Choosing each method's learning rate from the recipe's grid."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

from .recipe import Arm, Cell, Recipe
from .results import Record


def selection_cells(recipe: Recipe, arm: Arm) -> dict[float, list[Cell]]:
    """The trainings that decide between learning rates, by rate; none where the grid leaves no choice."""
    if len(recipe.lr.grid) == 1:
        return {}
    return {
        lr: [
            arm.cell("select", seed, lr=lr, train=recipe.train, holdout=recipe.data.holdout) for seed in recipe.lr.seeds
        ]
        for lr in recipe.lr.grid
    }


def choose_lr(recipe: Recipe, arm: Arm, records: Mapping[str, Record]) -> float | None:
    """The learning rate with the best mean accuracy on the held-out part of the training set.

    A rate with a diverged run comes after every rate without one. Ties go to the lower held-out loss, then to the
    smaller rate. ``None`` if a training that decides is missing.
    """
    cells = selection_cells(recipe, arm)
    if not cells:
        return recipe.lr.grid[0]
    ranks = {}
    for lr, group in cells.items():
        if any(cell.key not in records for cell in group):
            return None
        results = [records[cell.key]["result"] for cell in group]
        ranks[lr] = (
            -sum(r["status"] != "ok" for r in results),
            fmean(r["accuracy"] for r in results),
            -fmean(float("inf") if r["loss"] is None else r["loss"] for r in results),
            -lr,
        )
    return max(ranks, key=lambda lr: ranks[lr])


def final_cells(recipe: Recipe, arm: Arm, lr: float) -> list[Cell]:
    """The trainings that the table reports, one a seed, at the chosen learning rate."""
    return [arm.cell("final", seed, lr=lr, train=recipe.train) for seed in recipe.seeds]


def spectrum_cell(recipe: Recipe, arm: Arm) -> Cell:
    """The measurement at initialisation, for the first seed."""
    return arm.cell("spectrum", recipe.seeds[0])
