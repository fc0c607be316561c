"""A visit to the zoo, as the command ``sao-prune zoo`` makes it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import chain

from ...allocation import Budget
from ..display import Display
from .architecture import KNOWN, LIBRARIES, Library, ZooError, architectures
from .plans import ZooPlan, plan_zoo
from .report import Zoo
from .runs import is_large, representatives, run_zoo
from .trial import ZooRun


@dataclass(frozen=True)
class VisitOptions:
    """What to look at.

    Attributes:
        pattern: glob pattern on the names of architectures.
        sparsity: as requested, in [0, 1).
        run: also put some of them to work.
        libraries: of which libraries.
        jobs: processes at a time; with ``run`` each may need 8 GiB, and a larger model runs alone.

    Raises:
        ZooError: if the pattern is empty, ``jobs`` is not positive or ``sparsity`` is out of range.
    """

    pattern: str = "*"
    sparsity: float = 0.96875
    run: bool = False
    jobs: int = 1
    libraries: tuple[Library, ...] = LIBRARIES

    def __post_init__(self) -> None:
        if not self.pattern:
            raise ZooError("the filter is empty; give a glob pattern such as 'resnet*'")
        if not set(self.libraries) <= set(KNOWN) or not self.libraries:
            raise ZooError(f"the zoo knows {', '.join(KNOWN)}, got {', '.join(self.libraries) or 'no library'}")
        if self.jobs < 1:
            raise ZooError(f"jobs must be at least 1, got {self.jobs}")
        try:
            Budget(self.sparsity)
        except ValueError as error:
            raise ZooError(str(error)) from None

    @property
    def command(self) -> str:
        """The command line with these options."""
        others = self.libraries if self.libraries != LIBRARIES else ()
        given = [
            *(f"--library {library}" for library in others),
            f"--filter '{self.pattern}'" * (self.pattern != "*"),
            f"--sparsity {self.sparsity}" * (self.sparsity != VisitOptions.sparsity),
            "--run" * self.run,
            f"--jobs {self.jobs}" * (self.jobs != 1),
        ]
        return " ".join(["sao-prune zoo", *filter(None, given)])


def visit(options: VisitOptions, display: Display) -> Zoo:
    """Plan every architecture that matches, and with ``options.run`` put the representatives to work.

    Raises:
        ZooError: if no architecture matches, or timm or torchvision is missing.
    """
    start = time.perf_counter()
    chosen = architectures(options.pattern, options.libraries)
    display.start(len(chosen), 0)
    plans: list[ZooPlan] = []
    for plan in plan_zoo(chosen, options.sparsity, jobs=options.jobs):
        plans.append(plan)
        _step(display, "plan", plan)
    plans.sort(key=lambda plan: plan.architecture)
    left_out = tuple(plan for plan in plans if plan.left_out)
    plans = [plan for plan in plans if not plan.left_out]
    runs: list[ZooRun] = []
    if options.run:
        workers = representatives(plans)
        display.start(len(chosen) + len(workers), len(chosen))
        large = {plan.architecture for plan in plans if is_large(plan)}
        together, alone = [w for w in workers if w not in large], [w for w in workers if w in large]
        for run in chain(
            run_zoo(together, options.sparsity, jobs=options.jobs), run_zoo(alone, options.sparsity, timeout=3600)
        ):
            runs.append(run)
            _step(display, "run", run)
    runs.sort(key=lambda run: run.architecture)
    return Zoo(tuple(plans), tuple(runs), options.sparsity, options.command, time.perf_counter() - start, left_out)


def _step(display: Display, stage: str, record: ZooPlan | ZooRun) -> None:
    name = f"{record.architecture.library} {record.architecture.name}"
    display.step(stage, name)
    failure = record.failure if isinstance(record, ZooPlan) else record.error
    if failure:
        display.note(f"{stage} {name}: {failure}")
