"""The command ``sao-prune``."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

app = typer.Typer(
    name="sao-prune",
    help="Sparse orthogonal networks: plan them, train them under identical conditions, compare.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

USER_ERROR = 2
INTERRUPTED = 130


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="A timm or torchvision name; timm/NAME or torchvision/NAME to choose.")],
    sparsity: Annotated[float | None, typer.Option(help="Sparsity of the pruned layers, in [0, 1).")] = None,
    degree: Annotated[float | None, typer.Option(help="Edges of a node on a layer's smaller side.")] = None,
    groups: Annotated[int | None, typer.Option(help="Blocks of a layer.")] = None,
    method: Annotated[str, typer.Option(help="A name from sao_prune.methods().")] = "sao",
    fit: Annotated[str, typer.Option(help="nearest, regular or exact.")] = "nearest",
    distribution: Annotated[str, typer.Option(help="uniform or erk.")] = "uniform",
    exclude: Annotated[
        list[str] | None, typer.Option(help="Glob pattern of layers to leave dense; repeatable.")
    ] = None,
) -> None:
    """Show what would be pruned in an architecture, layer by layer; needs no memory for its weights."""
    from .lab.planning import plan_by_name

    options = {"degree": degree, "groups": groups, "fit": fit, "distribution": distribution, "exclude": exclude or ()}
    result, warning = plan_by_name(model, sparsity, method, options)  # type: ignore[arg-type]
    console = Console()
    console.print(result.table())
    if warning:
        Console(stderr=True).print(f"[yellow]warning:[/] {warning}", highlight=False)


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="A recipe's file, or the name of a shipped one.")] = "digits",
    out: Annotated[Path, typer.Option(help="Folder for the run's own folder.")] = Path("runs"),
    data_dir: Annotated[Path, typer.Option(help="Folder with data sets.")] = Path("data"),
    download: Annotated[bool, typer.Option("--download", help="Fetch a missing data set into --data-dir.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, .. [default: CUDA where there is one]")] = None,
    profile: Annotated[str | None, typer.Option(help="One of the recipe's profiles, e.g. smoke or fashion.")] = None,
    jobs: Annotated[int, typer.Option(help="Trainings at a time on this machine.")] = 1,
    ray: Annotated[str | None, typer.Option(help="Train on a Ray cluster: its address, or auto.")] = None,
    cpus: Annotated[float, typer.Option(help="Of the cluster, for one training.")] = 1,
    gpus: Annotated[float, typer.Option(help="Of the cluster, for one training (may be a fraction).")] = 0,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write event files into the run's folder.")
    ] = False,
) -> None:
    """Train every method of a recipe under identical conditions; goes on where an earlier run stopped."""
    _need_laboratory()
    from .lab.display import make_display
    from .lab.launch import is_first, processes
    from .lab.server import start_server

    first = is_first()
    console = Console(quiet=not first)
    try:
        with make_display(console) as display:
            display.stage("importing torch")
            if jobs > 1 and ray is None and processes() == 1:
                # It imports the same in the meantime.
                start_server()
            from .lab.data import DataSource
            from .lab.recipe import find_recipe
            from .lab.sweep import RunOptions, run_recipe

            path = find_recipe(recipe)
            options = RunOptions(out, DataSource(data_dir, download), device, jobs, ray, cpus, gpus, tensorboard)
            folder = run_recipe(path, options, display, profile)
    except KeyboardInterrupt:
        if first:
            print("interrupted: finished trials are on the disk, the same command goes on from there", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    if first:
        _show(folder, console)


@app.command()
def report(
    folders: Annotated[
        list[Path] | None, typer.Argument(help="The folder of a run; of two to compare them. [default: runs/digits]")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for a comparison [default: that of the second run]")] = None,
) -> None:
    """The page report.html, tables and figures of a run, finished or not; or the comparison of a second run with it."""
    _need_laboratory()
    from .lab.errors import LabError

    given = folders or [Path("runs/digits")]
    if len(given) > 2:
        raise LabError(f"report takes the folder of one run, or of two to compare them, got {len(given)}")
    if len(given) == 2:
        _show_comparison(given[0], given[1], out or given[1], Console())
    elif out is not None:
        raise LabError("--out is for a comparison: name the folders of two runs")
    else:
        _show(given[0], Console())


@app.command()
def zoo(
    pattern: Annotated[str, typer.Option("--filter", help="Glob pattern on the names of architectures.")] = "*",
    sparsity: Annotated[float, typer.Option(help="Sparsity of the pruned layers, in [0, 1).")] = 0.96875,
    run: Annotated[
        bool, typer.Option("--run", help="Also train, copy, bake, save and load one of each family.")
    ] = False,
    jobs: Annotated[int, typer.Option(help="Processes at a time; with --run each may need 8 GiB.")] = 1,
    library: Annotated[
        list[str] | None,
        typer.Option(help="timm, torchvision or transformers; repeatable [default: timm and torchvision]"),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="File for all records.")] = None,
    output: Annotated[Path | None, typer.Option(help="File for the result as a page of markdown.")] = None,
) -> None:
    """Plan every architecture of a library on the meta device, small ones of transformers; exit code 1 if any fails."""
    from .lab.display import make_display
    from .lab.zoo import VisitOptions, print_zoo, visit, write_json, write_markdown

    console = Console()
    options = VisitOptions(pattern, sparsity, run, jobs, *([tuple(library)] if library else []))  # type: ignore[arg-type]
    with make_display(console) as display:
        found = visit(options, display)
    print_zoo(found, console)
    if json:
        write_json(found, json)
    if output:
        write_markdown(found, output)
    if found.failures:
        raise typer.Exit(1)


@app.command()
def figures(
    out: Annotated[Path, typer.Option(help="Folder for the figures and their numbers.")] = Path("docs/figures"),
    seed: Annotated[int, typer.Option(help="Of every draw.")] = 0,
) -> None:
    """Redraw the thesis's table and figures that need no training, light and dark, with their numbers as CSV."""
    _need_laboratory()
    from .figures import write_figures

    console = Console()
    written = write_figures(out, seed, lambda name: console.print(name, highlight=False))
    console.print(f"{len(written.paths)} files: {out}", markup=False, soft_wrap=True, highlight=False)


def main() -> NoReturn:
    """Run the command: 0 if all went well, 2 after an error of the user's, told in one line, 130 if interrupted."""
    try:
        status = app(standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(INTERRUPTED)
    except Exception as error:
        from .lab.errors import FollowerError, LabError
        from .lab.launch import is_first_of_machine

        # Wrong usage of the command line: typer brings its own copy of click's errors, which have this method.
        usage = getattr(error, "format_message", None)
        if isinstance(error, OSError) and error.filename is not None:
            # A folder that is none, or in which this user may not write.
            error = LabError(f"{error.strerror}: {error.filename}")
        if usage is None and not isinstance(error, LabError):
            raise
        # Processes that train together run into the same error together: one of them tells.
        if is_first_of_machine() or isinstance(error, FollowerError):
            print(f"sao-prune: {' '.join(str(usage() if usage else error).split())}", file=sys.stderr)
        sys.exit(USER_ERROR)
    sys.exit(status if isinstance(status, int) else 0)


def _show(folder: Path, console: Console) -> None:
    from .lab.report import print_report, write_report

    summary = write_report(folder, lambda text: console.print(text, markup=False, soft_wrap=True))
    print_report(summary, console)
    console.print(f"report, table and figures: {folder}", markup=False, soft_wrap=True, highlight=False)


def _show_comparison(a: Path, b: Path, out: Path, console: Console) -> None:
    from .lab.report import print_comparison, write_comparison

    found = write_comparison(a, b, out, lambda text: console.print(text, markup=False, soft_wrap=True))
    print_comparison(found, console)
    console.print(f"comparison: {out / 'comparison.html'}", markup=False, soft_wrap=True, highlight=False)


def _need_laboratory() -> None:
    """The laboratory's own dependencies, asked for before any work.

    Raises:
        LabError: naming what is missing and how to get it.
    """
    from .lab.errors import LabError

    needed = {"timm": "timm", "yaml": "PyYAML", "matplotlib": "matplotlib", "jinja2": "Jinja2", "filelock": "filelock"}
    missing = [name for module, name in needed.items() if find_spec(module) is None]
    if missing:
        raise LabError(f"the laboratory needs {', '.join(missing)}: pip install 'sao-prune[lab]'")
