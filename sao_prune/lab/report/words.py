"""The sentences of a report, the same in all its forms."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..errors import RecipeError
from ..recipe import PruneSpec, Recipe, Setting, load_recipe, shipped_recipes
from ..summary import Summary


def caption(summary: Summary) -> str:
    """How the numbers came about."""
    settings = summary.recipe.settings
    epochs = several(f"{setting.train.epochs}" for setting in settings)
    data = several(setting.data.name for setting in settings)
    seeds = several(_seeds(setting.seeds) for setting in settings)
    before = " (a -T method trains as many more before it is pruned)" if _trained_first(summary) else ""
    if before and any(setting.train.further_epochs for setting in settings):
        further = several(f"{setting.train.further().epochs}" for setting in settings)
        before = f" (a -T method is pruned after these, and trains {further} more)"
    return (
        f"Accuracy on the test set of {data} after {epochs} epochs{before}: mean, standard deviation and range over "
        f"{seeds}; beside it the mean difference from SAO and the p-value of a paired t-test. Sparsity is that of the "
        "pruned layers, MACs are multiply-adds with a weight that is not zero as a share of the dense network's, time "
        "is that of one training (median, its dense phase included). For a seed every method has the same initial "
        f"dense weights, batches and order.{_attack(settings)}"
    )


def choice(summary: Summary) -> str:
    """How every method came to its learning rate."""
    settings = summary.recipe.settings
    rates = several(", ".join(f"{lr:g}" for lr in setting.lr.grid) for setting in settings)
    searched = [setting for setting in settings if len(setting.lr.grid) > 1]
    beyond = several(str(setting.lr.extend) for setting in searched if setting.lr.extend)
    if not searched:
        return f"Learning rate {rates} for every method, as the recipe says: none was chosen."
    part = several(f"{100 * setting.data.holdout:g} %" for setting in searched)
    seeds = several(_seeds(setting.lr.seeds) for setting in searched)
    criterion = several(chosen_by(setting) for setting in searched)
    return (
        f"Each row's learning rate is the one of {rates} with the best {criterion} on a held-out {part} of the "
        f"training set (mean over {seeds}), after a training on the rest that is otherwise the same. A rate that "
        "diverged comes last; ties go to the lower held-out loss. The test set has no part in the choice."
        + (f" Where the best was the lowest or highest rate, up to {beyond} beyond it were tried." if beyond else "")
        + (" A -T method's dense phase has the rate that dense chose." if _trained_first(summary) else "")
    )


def chosen_by(setting: Setting) -> str:
    """What learning rates are chosen by."""
    spec = setting.robustness
    if spec is None or spec.choose == "clean":
        return "accuracy"
    return "accuracy under PGD" if spec.choose == "robust" else f"accuracy certified at {spec.radii[0]:g}/255"


def _attack(settings: Sequence[Setting]) -> str:
    """How networks were attacked and certified, if they were."""
    specs = [setting.robustness for setting in settings if setting.robustness is not None]
    if not specs:
        return ""
    moved = several(f"{spec.eps:g}/255 in {spec.norm}" for spec in specs)
    effort = several(f"{spec.steps} steps from {_count(spec.restarts, 'random start')}" for spec in specs)
    search = several(str(spec.queries) for spec in specs)
    images = several("all" if spec.images is None else f"{spec.images:,}" for spec in specs)
    certified = (
        " Certified 36, say, are those of all test images whose answer is right and cannot change within 36/255 (l2), "
        "by the margin over the Lipschitz constant that was computed from the trained weights."
        if any(spec.radii for spec in specs)
        else ""
    )
    return (
        f" Under attack {images} of the test images (clean: as they are) move by up to {moved}, inside their range: "
        f"PGD has {effort}; in the worst case an image counts only if PGD, PGD on the margin and {search} queries of a "
        f"random search all fail.{certified}"
    )


def remarks(summary: Summary) -> list[str]:
    """What is unfinished, and the notes of the rows."""
    titles: dict[str, list[str]] = {}
    for row in summary.rows:
        for note in row.notes:
            titles.setdefault(note, []).append(row.configuration.title)
    return [*progress(summary), *(f"{note}: {'; '.join(of_note)}" for note, of_note in titles.items())]


def progress(summary: Summary) -> list[str]:
    """What is unfinished."""
    if summary.done == summary.trials:
        return []
    done = f"{summary.done} of {summary.trials} trials are done"
    return [f"unfinished: {done}; the command that began the run goes on with it"]


def command(recipe: Recipe) -> str:
    """What trains a recipe again: by its name if it is shipped as it is, else from the copy beside its results."""
    for name, path in shipped_recipes().items():
        profile = recipe.name.removeprefix(f"{name}-") if recipe.name.startswith(f"{name}-") else None
        if recipe.name != name and profile is None:
            continue
        try:
            if load_recipe(path, profile) == recipe:
                return f"sao-prune run {name}" + (f" --profile {profile}" if profile else "")
        except RecipeError:
            continue
    return "sao-prune run recipe.yaml"


def compute(summary: Summary) -> str:
    """What all trainings took."""
    return (
        f"All trainings together, those that chose learning rates included, took {_duration(summary.seconds)} "
        f"({_duration(summary.cpu_seconds)} of processor time)."
    )


def _duration(seconds: float) -> str:
    """A time in the unit that suits it.

    Example:
        >>> _duration(41.2), _duration(600), _duration(9000)
        ('41 s', '10.0 min', '2.5 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def several(values: Iterable[str]) -> str:
    """Each different value once."""
    return " / ".join(dict.fromkeys(values))


def facts(summary: Summary) -> list[tuple[str, str]]:
    """What was compared, in a few words a line."""
    settings = summary.recipe.settings
    trains = [setting.train for setting in settings]
    return [
        ("data set", several(setting.data.name for setting in settings)),
        ("network", several(setting.network.name for setting in settings)),
        ("pruned", several(_amounts(setting.prune) for setting in settings)),
        ("training", several(f"{spec.epochs} epochs of {spec.optimizer}, batch {spec.batch_size}" for spec in trains)),
        ("seeds", several(", ".join(map(str, setting.seeds)) for setting in settings)),
    ]


def _amounts(prune: PruneSpec) -> str:
    if prune.sparsity is not None:
        return ", ".join(f"{100 * value:.5g}" for value in prune.sparsity) + "\u00a0% removed"
    unit, values = ("degree", prune.degree) if prune.degree is not None else ("groups", prune.groups)
    return f"{unit} {', '.join(map(str, values or ()))}"


def _trained_first(summary: Summary) -> bool:
    return any(row.configuration.method.is_trained_first for row in summary.rows)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _seeds(seeds: Sequence[int]) -> str:
    return ("seed " if len(seeds) == 1 else "seeds ") + ", ".join(map(str, seeds))
