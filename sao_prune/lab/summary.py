"""What a run's results say: one row a method, read from the disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, median, stdev

from scipy import stats

from .errors import ResultsError
from .recipe import Configuration, Recipe, load_recipe
from .results import Record, read_results
from .robustness import score
from .trials import choose_lr, count_trials, final_trials, known_trials, selection_trials, spectrum_trial


@dataclass(frozen=True)
class Paired:
    """Accuracy minus another's, seed by seed: the mean difference, and the p-value of a paired two-sided t-test.

    Attributes:
        p: ``None`` where every seed differs by the same, so that there is nothing to test with.
    """

    difference: float
    p: float | None


@dataclass(frozen=True)
class Rate:
    """A learning rate that was tried, and what it reached on the held-out part of the training set.

    Attributes:
        accuracy: mean over the seeds that decide, as a fraction; ``None`` before all of them are done.
        diverged: how many of the trainings diverged.
    """

    lr: float
    accuracy: float | None
    diverged: int


@dataclass(frozen=True)
class Row:
    """One configuration of the comparison. Accuracies are fractions.

    Attributes:
        flops: multiply-adds of one image that meet a weight that is not zero; ``dense_flops`` without pruning.
        seconds, cpu_seconds: median training time of a run, the dense phase of a -T method included.
        execution: how the training ran: masked or compact.
        against_sao: the paired comparison with SAO on the same network at the same amount; none for SAO itself, or
            below two seeds in common.
        rates: those that ``lr`` was chosen from, beyond the grid too; empty where it leaves no choice.
        accuracies: of the finished final runs, in the order of the recipe's seeds; ``seeds`` are theirs.
        losses: of the same runs on the test set, nats; ``None`` where one is not finite.
        speeds: optimizer steps a second of the same runs, by the wall clock and by the processor's time over all
            threads; empty where a run did not record its steps.
        memory: bytes that a training step holds, by what they are of (`step_memory`); empty where no run recorded it.
        curves: accuracy over epochs of the same runs.
        spectrum: the measurement at initialisation, if it is there.
        robustness: fractions of the same runs by what was measured: ``clean``, ``PGD``, ``worst case``,
            ``certified 36``; empty where the recipe asks for none. ``robustness_against_sao`` are the paired
            comparisons.
        notes: what a reader must know about this row.
    """

    configuration: Configuration
    lr: float | None
    sparsity: float | None
    parameters: int | None
    nonzero: int | None
    flops: int | None
    dense_flops: int | None
    seconds: float | None
    cpu_seconds: float | None
    execution: str
    rates: tuple[Rate, ...]
    accuracies: tuple[float, ...]
    seeds: tuple[int, ...]
    curves: tuple[tuple[float, ...], ...]
    spectrum: Record | None
    notes: tuple[str, ...]
    losses: tuple[float | None, ...] = ()
    speeds: tuple[tuple[float, float], ...] = ()
    memory: Mapping[str, int] = field(default_factory=dict)
    against_sao: Paired | None = None
    robustness: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    robustness_against_sao: Mapping[str, Paired | None] = field(default_factory=dict)

    @property
    def by_seed(self) -> dict[int, float]:
        """Accuracies of the finished final runs by their seeds."""
        return dict(zip(self.seeds, self.accuracies))

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
    """All rows of a recipe, how much of it is done, and what it was done with.

    Attributes:
        recipe_text: the recipe as YAML.
        done, trials: finished trials, and those that the whole recipe has.
        seconds, cpu_seconds: of all trainings together, those that chose learning rates included.
        environments: a line for each set of versions and hardware.
        on_cpu: every training was done on processors, none on another device.
    """

    recipe: Recipe
    recipe_text: str
    rows: tuple[Row, ...]
    done: int
    trials: int
    seconds: float
    cpu_seconds: float
    environments: tuple[str, ...]
    on_cpu: bool

    @property
    def heading(self) -> str:
        """The comparison's title."""
        return " ".join((self.recipe.title or self.recipe.name).split())


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
    done = [
        trial.key
        for configuration in recipe.every_configuration()
        for trial in known_trials(configuration, records)
        if trial.key in records
    ]
    # Configurations of two cases may share a trial: it was worked once, and counts for each.
    used = [records[key] for key in dict.fromkeys(done)]
    if not used:
        raise ResultsError(f"{path} has no result of the recipe beside it yet: let `sao-prune run` go on")
    rows = [_row(configuration, records) for configuration in recipe.configurations()]
    return Summary(
        recipe=recipe,
        recipe_text=(folder / "recipe.yaml").read_text(encoding="utf-8"),
        rows=tuple(_compared(row, _sao_of(row, rows)) for row in rows),
        done=len(done),
        trials=sum(count_trials(configuration, records)[0] for configuration in recipe.every_configuration()),
        seconds=sum(record["result"].get("seconds", 0.0) for record in used),
        cpu_seconds=sum(record["result"].get("cpu_seconds", 0.0) for record in used),
        environments=tuple(sorted({_environment(record) for record in used})),
        on_cpu=all(record["environment"]["device"].startswith("cpu") for record in used),
    )


def _row(configuration: Configuration, records: Mapping[str, Record]) -> Row:
    lr, trials, spectrum = (
        choose_lr(configuration, records),
        final_trials(configuration, records) or [],
        spectrum_trial(configuration),
    )
    trials = [trial for trial in trials if trial.key in records]
    done = [records[trial.key]["result"] for trial in trials]
    measured = None if spectrum is None else records.get(spectrum.key, {}).get("result")
    first = done[0] if done else (measured or {})
    rates = tuple(_rates(configuration, records))
    starts = [records.get(trial.start.key, {}).get("result", {}) for trial in trials if trial.start is not None]

    def typical(key: str) -> float | None:
        times = [result[key] + (starts[i].get(key, 0.0) if starts else 0.0) for i, result in enumerate(done)]
        return median(times) if times else None

    return Row(
        configuration=configuration,
        lr=lr,
        sparsity=first.get("sparsity"),
        parameters=first.get("parameters"),
        nonzero=first.get("nonzero"),
        flops=first.get("flops"),
        dense_flops=first.get("dense_flops"),
        seconds=typical("seconds"),
        cpu_seconds=typical("cpu_seconds"),
        execution=first.get("execution", ""),
        rates=rates,
        accuracies=tuple(result["accuracy"] for result in done),
        seeds=tuple(trial.seed for trial in trials),
        curves=tuple(tuple(result["curve"]["accuracy"]) for result in done),
        spectrum=measured,
        notes=tuple(_notes(configuration, lr, [rate.lr for rate in rates], done, first)),
        losses=tuple(result["loss"] for result in done),
        speeds=tuple(_speeds(done)),
        # Equal for all seeds, which have equally many weights.
        memory=next((result["memory"] for result in done if "memory" in result), {}),
        robustness=_robustness(configuration, done),
    )


def _speeds(done: Sequence[Record]) -> Iterator[tuple[float, float]]:
    """Steps a second by both clocks, of every run or of none; the dense phase of a -T method is not among them."""
    if all(result.get("steps") and min(result["seconds"], result["cpu_seconds"]) > 0 for result in done):
        for result in done:
            yield result["steps"] / result["seconds"], result["steps"] / result["cpu_seconds"]


def _robustness(configuration: Configuration, done: Sequence[Record]) -> dict[str, tuple[float, ...]]:
    """What attacks leave and what is certified, by name."""
    spec = configuration.setting.robustness
    if spec is None or not done:
        return {}
    found = [result["robustness"] for result in done]
    keys = {"clean": "clean", "PGD": "pgd", "worst case": "worst"}
    measured = {name: tuple(each[key] for each in found) for name, key in keys.items()}
    for index, radius in enumerate(spec.radii):
        measured[f"certified {radius:g}"] = tuple(each["certified"][index] for each in found)
    return measured


def _rates(configuration: Configuration, records: Mapping[str, Record]) -> Iterator[Rate]:
    """What each rate reached so far, those beyond the grid included."""
    choosing = selection_trials(configuration, records)
    if choosing is None:
        choosing = {lr: [] for lr in configuration.setting.lr.grid}
    for lr, trials in choosing.items():
        done = [records[trial.key]["result"] for trial in trials if trial.key in records]
        whole = bool(done) and len(done) == len(trials)
        mean = fmean(score(result, configuration.setting.robustness) for result in done) if whole else None
        yield Rate(lr, mean, sum(result["status"] != "ok" for result in done))


def _notes(
    configuration: Configuration, lr: float | None, rates: Sequence[float], done: list[Record], first: Record
) -> Iterator[str]:
    if first.get("note"):
        yield first["note"]
    diverged = sum(result["status"] != "ok" for result in done)
    if diverged:
        yield f"{diverged} of {len(done)} runs diverged"
    broken = sum(result.get("robustness", {}).get("broken", 0) for result in done)
    if broken:
        yield f"{broken} certified images were broken by an attack: the certificates do not hold"
    if 0 < len(done) < len(configuration.setting.seeds):
        yield f"{len(done)} of {len(configuration.setting.seeds)} runs are done"
    if lr is not None and len(rates) > 2 and lr in (min(rates), max(rates)):
        yield f"the chosen lr, {lr:g}, is at the edge of the grid"


def _sao_of(row: Row, rows: Sequence[Row]) -> Row | None:
    """The first SAO row of the same network and amount; none for itself, and for dense where there are several."""
    configuration = row.configuration
    same = [
        other
        for other in rows
        if other.configuration.method.name == "sao"
        and other.configuration.setting == configuration.setting
        and other.configuration.options == configuration.options
        and (configuration.method.is_dense or other.configuration.prune == configuration.prune)
    ]
    amounts = len(configuration.setting.prune.grid())
    if not same or same[0] is row or (configuration.method.is_dense and amounts > 1):
        return None
    return same[0]


def _compared(row: Row, sao: Row | None) -> Row:
    """The row with its comparisons."""
    if sao is None:
        return row
    robustness = {
        name: paired(dict(zip(row.seeds, values)), dict(zip(sao.seeds, sao.robustness[name])))
        for name, values in row.robustness.items()
        if name in sao.robustness
    }
    return replace(row, against_sao=paired(row.by_seed, sao.by_seed), robustness_against_sao=robustness)


def paired(mine: Mapping[int, float], theirs: Mapping[int, float]) -> Paired | None:
    """The comparison over the seeds that both have; none below two.

    Args:
        mine, theirs: accuracies by seed.

    Example:
        >>> found = paired({0: 0.9, 1: 0.8, 2: 0.7}, {0: 0.8, 1: 0.75})
        >>> round(found.difference, 4), round(found.p, 3)
        (0.075, 0.205)
    """
    common = [seed for seed in mine if seed in theirs]
    if len(common) < 2:
        return None
    differences = [mine[seed] - theirs[seed] for seed in common]
    constant = max(differences) - min(differences) < 1e-12
    p = None if constant else float(stats.ttest_1samp(differences, 0.0).pvalue)
    return Paired(fmean(differences), p)


def _environment(record: Record) -> str:
    made = dict(record["environment"])
    threads, processes = _count(made.pop("threads"), "thread"), made.pop("processes", 1)
    said = [f"sao_prune {made.pop('sao_prune')}", f"torch {made.pop('torch')}", f"Python {made.pop('python')}"]
    said += [made.pop("device"), threads + (f" in each of {processes} processes" if processes > 1 else "")]
    return ", ".join([*said, *(f"{key} {value}" for key, value in made.items())])


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
