"""The report: a page that stands alone, texts that stay texts, and figures that show what was compared."""

import dataclasses
import io
import json
import math
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from sao_prune.lab.methods import METHODS, MethodSpec
from sao_prune.lab.recipe import load_recipe
from sao_prune.lab.report import costs, print_report, write_report
from sao_prune.lab.report.chart import MOST_PANELS
from sao_prune.lab.report.costs import cost_chart
from sao_prune.lab.report.curves import accuracy_chart, spectrum_chart
from sao_prune.lab.report.drawing import DARK, LIGHT, styles
from sao_prune.lab.report.names import full_name
from sao_prune.lab.report.pages import style_sheet
from sao_prune.lab.report.table import groups
from sao_prune.lab.report.versus import depth_chart, sparsity_chart
from sao_prune.lab.report.words import command
from sao_prune.lab.summary import summarise
from sao_prune.lab.trials import Trial, known_trials

PLAIN = """\
name: plain
data: {name: digits, holdout: 0.25}
network: {name: sao_mlp, depth: 3}
prune: {groups: 4}
methods: [dense, sao, gmp-t]
seeds: [0, 1]
lr: {grid: [0.1, 0.03, 0.01]}
train: {epochs: 3, batch_size: 64}
"""
AMOUNTS = PLAIN.replace("{groups: 4}", "{sparsity: [0.5, 0.75, 0.875]}").replace("depth: 3", "depth: [3, 6]")
DEPTHS = PLAIN.replace("depth: 3", "depth: [2, 4, 8]")
CASES = PLAIN + "cases:\n  - {label: few <i>, train: {epochs: 2}}\n  - {label: many, prune: {groups: [2, 8]}}\n"
HOSTILE = PLAIN + "title: '<script>alert(1)</script> & $x_1$ \"q\" | `*`'\n"

VOID = {"meta", "br", "link"}
Ran = Callable[..., Path]


@pytest.fixture
def ran(tmp_path: Path) -> Ran:
    """A run's folder with made-up results; accuracies are ``level`` of the trial, or a law of its own."""

    def make(text: str, keep: int | None = None, level: Callable[[Trial], float] | None = None) -> Path:
        return made_up(tmp_path, text, keep, level)

    return make


def made_up(folder: Path, text: str, keep: int | None = None, level: Callable[[Trial], float] | None = None) -> Path:
    """Write a run's recipe and its results, of which the first ``keep`` remain."""
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(text)
    recipe, records = load_recipe(folder / "recipe.yaml"), {}
    while missing := [
        trial
        for configuration in recipe.every_configuration()
        for trial in known_trials(configuration, records)
        if trial.key not in records
    ]:
        records |= {trial.key: record(trial, level or accuracy) for trial in missing}
    lines = [json.dumps(made) for made in records.values()]
    (folder / "results.jsonl").write_text("\n".join(lines[:keep]) + "\n")
    return folder


def accuracy(trial: Trial) -> float:
    """Best at lr 0.03; SAO above the others."""
    bonus = {"dense": 0.05, "sao": 0.02}.get(trial.configuration.method.name, 0.0)
    return 0.8 + bonus - 0.01 * abs(math.log(trial.lr / 0.03)) + 0.001 * trial.seed


def record(trial: Trial, level: Callable[[Trial], float]) -> dict:
    prune = trial.configuration.prune
    sparsity = prune.get("sparsity", 1 - 1 / prune.get("groups", 1))
    result = {"sparsity": sparsity, "parameters": 100, "nonzero": 50, "flops": 40, "dense_flops": 80, "note": ""}
    if trial.kind == "spectrum":
        values = {"depth": [1, 2], "mean": [1.0, 0.5], "smallest": [0.5, 0.0], "largest": [2.0, None]}
        result |= {**values, "directions": 64}
    else:
        reached = level(trial)
        curve = [reached * epoch / trial.steps for epoch in range(1, trial.steps + 1)]
        result |= {"status": "ok", "accuracy": reached, "loss": 1.0, "seconds": 10.0, "cpu_seconds": 20.0}
        result |= {"execution": "compact", "curve": {"accuracy": curve}}
    made = {"sao_prune": "1", "torch": "2", "python": "3", "device": "cpu: none", "threads": 1}
    return {"key": trial.key, "cell": trial.content(), "result": result, "environment": made}


class Page(HTMLParser):
    """Balanced elements, with the text of each; fails at anything that a browser would fetch or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[tuple[tuple[str, ...], str]] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("link", "iframe", "object", "embed", "img")
        for name, value in attrs:
            assert not name.startswith("on")
            assert name not in ("src", "srcset", "action")
            assert "http" not in (value or "")
            if name == "href":
                self.references.append(value)
            if name == "id":
                self.ids.append(value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((tuple(self.open), data))

    def all(self, tag: str) -> list[str]:
        return [text for path, text in self.texts if tag in path and text.strip()]


def page(folder: Path) -> Page:
    write_report(folder, pytest.fail)
    return Page((folder / "report.html").read_text())


@pytest.mark.parametrize("text", [PLAIN, CASES])
def test_the_page_stands_alone_and_names_every_configuration(ran: Ran, text: str) -> None:
    folder = ran(text)
    found = page(folder)
    assert len(set(found.ids)) == len(found.ids)
    assert {reference.removeprefix("#") for reference in found.references} <= set(found.ids)
    source = (folder / "report.html").read_text()
    assert "@import" not in source
    assert "http" not in source.split("<body>")[0]
    summary = summarise(folder, pytest.fail)
    headers = found.all("th")
    for group in groups(summary):
        for block in group.blocks:
            assert group.title in ["", *found.all("h3")]
            assert block.title in ["", *headers]
    for row in summary.rows:
        # Once in the results, once among the learning rates.
        assert headers.count(row.configuration.method.title) == 2 * sum(
            other.configuration.method == row.configuration.method for other in summary.rows
        )
    assert len(found.all("summary")) == 1
    assert folder.joinpath("recipe.yaml").read_text() in found.all("pre")


def test_methods_are_named_in_full_where_the_pointer_rests(ran: Ran) -> None:
    folder = ran(PLAIN.replace("dense, sao, gmp-t", "sao, gmp-t"))
    write_report(folder, pytest.fail)
    source = (folder / "report.html").read_text()
    full = "Global magnitude pruning of trained weights"
    assert source.count(f'<th scope="row"><abbr title="{full}">GMP-T</abbr>') == 2
    # In every panel: multiply-adds, time, bytes (each with bars), and the curve for a broad page and a slim one.
    assert source.count(f"<title>GMP-T: {full}</title>") == 3 * 4 + 2
    assert f"- GMP-T: {full}\n" in (folder / "report.md").read_text()


def test_no_two_methods_have_the_same_full_name() -> None:
    named = [full_name(MethodSpec(name)) for name in METHODS]
    assert len(set(named)) == len(named)
    assert not set(named) & {method.label for method in METHODS.values()}


def test_accuracy_against_multiply_adds_seconds_and_bytes(ran: Ran) -> None:
    summary = summarise(ran(AMOUNTS), pytest.fail)
    assert cost_chart(dataclasses.replace(summary, rows=summary.rows[:1])) is None
    chart = cost_chart(summary)
    labels = ["multiply-adds of one image", "processor time of one training", "bytes of the parameters"]
    assert [(panel.title, panel.label) for panel in chart.panels] == [
        (n, at) for n in ("N = 3", "N = 6") for at in labels
    ]
    by_method = {
        line.method: [panel.lines[i] for panel in chart.panels[:3]] for i, line in enumerate(chart.panels[0].lines)
    }
    spent = {method: [round(10 ** line.x[0]) for line in lines] for method, lines in by_method.items()}
    assert spent == {"Dense": [40, 20, 200], "SAO": [40, 20, 200], "GMP-T": [40, 40, 200]}
    assert [len(line.x) for line in by_method["SAO"]] == [3, 3, 3]
    assert by_method["SAO"][0].y == pytest.approx((82.05,) * 3)
    assert all(low <= high for panel in chart.panels for low, high in zip(panel.ticks, panel.ticks[1:]))


@pytest.mark.parametrize(
    ("low", "high", "told"),
    [
        (20e6, 60e9, ["100 M", "1 G", "10 G"]),
        (20e6, 60e6, ["20 M", "30 M", "40 M", "50 M", "60 M"]),
        (123456, 123456, ["123 k"]),
    ],
)
def test_ticks_of_a_cost_are_round_where_there_is_room(low: float, high: float, told: list[str]) -> None:
    ticks = costs._ticks(
        [math.log10(low), math.log10(high)], costs._Cost("", lambda row: 0, costs._NUMBERS, costs._count)
    )
    assert [text.replace("\u00a0", " ") for _, text in ticks] == told


def test_a_users_text_stays_text(ran: Ran) -> None:
    folder = ran(HOSTILE)
    found = page(folder)
    title = '<script>alert(1)</script> & $x_1$ "q" | `*`'
    assert [text for path, text in found.texts if path[-2:] == ("head", "title")] == found.all("h1") == [title]
    assert "\\<script>" in (folder / "report.md").read_text().splitlines()[0]


def test_every_rate_is_shown_and_the_chosen_one_stands_out(ran: Ran) -> None:
    folder = ran(PLAIN)
    found = page(folder)
    assert "85.00" in found.all("strong")
    assert "82.00" in found.all("strong")
    assert "83.90" in found.all("td")
    text = (folder / "report.md").read_text()
    assert "| held-out accuracy % | lr 0.1 | lr 0.03 | lr 0.01 |" in text
    assert "| Dense | 83.80 | **85.00** | 83.90 |" in text
    assert "held-out 25 % of the training set (mean over seed 0)" in text


def test_the_best_pruned_row_is_emphasised_and_ties_are_shared(ran: Ran) -> None:
    (group,) = groups(summarise(ran(PLAIN), pytest.fail))
    assert [row.configuration.method.name for row in group.blocks[0].best()] == ["sao"]
    (group,) = groups(summarise(ran(PLAIN, level=lambda trial: 0.5), pytest.fail))
    assert group.blocks[0].best() == []
    ties = PLAIN.replace("gmp-t]", "rg-s, gmp-t]")
    (group,) = groups(
        summarise(ran(ties, level=lambda trial: 0.5 - 0.1 * trial.configuration.method.is_trained_first), pytest.fail)
    )
    assert [row.configuration.method.name for row in group.blocks[0].best()] == ["sao", "rg-s"]


@pytest.mark.parametrize("keep", [1, 9])
def test_an_unfinished_run_has_a_page_that_says_so(ran: Ran, keep: int) -> None:
    found = page(ran(AMOUNTS, keep))
    (told,) = [text for text in found.all("p") if text.startswith("unfinished")]
    assert f"{keep} of " in told


def test_accuracy_against_sparsity(ran: Ran) -> None:
    folder = ran(AMOUNTS)
    summary = write_report(folder, pytest.fail)
    chart = sparsity_chart(summary)
    assert [panel.title for panel in chart.panels] == ["N = 3", "N = 6"]
    dense, sao, _ = chart.panels[0].lines
    assert (dense.form, dense.y) == ("level", pytest.approx((85.05,)))
    assert sao.x == (1, 2, 3)
    assert sao.y == pytest.approx((82.05,) * 3)
    assert (sao.low, sao.high) == (pytest.approx((82.0,) * 3), pytest.approx((82.1,) * 3))
    assert chart.ticks == ((1, "50"), (2, "75"), (3, "87.5"))
    assert depth_chart(summary) is None
    assert all(
        (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in ("sparsity", "cost", "jacobian")
    )
    assert not (folder / "depth.png").exists()
    assert "sparsity" in Page((folder / "report.html").read_text()).ids


@pytest.mark.slow
def test_accuracy_against_depth_takes_the_place_of_an_older_figure(ran: Ran) -> None:
    folder = ran(DEPTHS)
    (folder / "sparsity.png").write_bytes(b"of an earlier report")
    summary = write_report(folder, pytest.fail)
    (panel,) = depth_chart(summary).panels
    assert [line.x for line in panel.lines] == [(1, 2, 3)] * 3
    assert (folder / "depth.png").exists()
    assert not (folder / "sparsity.png").exists()


def test_depths_that_were_trained_differently_are_not_joined(ran: Ran) -> None:
    cases = PLAIN + "cases:\n  - {label: a, network: {depth: 2}}\n  - {label: b, network: {depth: 4}%s}\n"
    assert depth_chart(summarise(ran(cases % ""), pytest.fail)) is not None
    assert depth_chart(summarise(ran(cases % ", train: {epochs: 9}"), pytest.fail)) is None


def test_a_jacobian_panel_holds_all_methods_and_says_along_which_directions(ran: Ran) -> None:
    chart = spectrum_chart(summarise(ran(AMOUNTS), pytest.fail))
    assert len(chart.panels) == 6
    assert all([line.method for line in panel.lines] == ["Dense", "SAO"] for panel in chart.panels)
    assert "random subspace of 64 dimensions" in chart.caption
    assert math.isnan(chart.panels[0].lines[0].high[1])


def test_too_many_panels_are_left_out_and_said_so(ran: Ran) -> None:
    many = AMOUNTS.replace("depth: [3, 6]", f"depth: [{', '.join(map(str, range(1, 14)))}]")
    chart = accuracy_chart(summarise(ran(many), pytest.fail))
    assert len(chart.panels) == 13 <= MOST_PANELS
    assert all("87.5 %" in panel.title for panel in chart.panels)
    assert "only the last amount" in chart.caption


def test_long_curves_are_thinned_to_their_last_epoch_and_said_so(ran: Ran) -> None:
    chart = accuracy_chart(summarise(ran(PLAIN.replace("epochs: 3", "epochs: 250")), pytest.fail))
    assert chart.panels[0].lines[0].x[:2] == (1, 4)
    assert chart.panels[0].lines[0].x[-1] == 250
    assert "after every 3 epochs" in chart.caption


def test_a_method_has_one_style_and_no_two_share_it() -> None:
    titles = [f"m{i}" for i in range(30)]
    given = styles([("Dense", True), *((title, False) for title in titles), ("m0", False)])
    assert given["Dense"] == 0
    assert sorted(given.values()) == list(range(31))


def test_the_report_is_the_same_each_time(ran: Ran) -> None:
    folder = ran(PLAIN)
    write_report(folder, pytest.fail)
    before = (folder / "report.html").read_bytes()
    write_report(folder, pytest.fail)
    assert (folder / "report.html").read_bytes() == before


def test_the_terminal_shows_all_methods_in_80_columns(ran: Ran) -> None:
    summary = summarise(ran(AMOUNTS), pytest.fail)
    console = Console(width=80, color_system=None)
    with console.capture() as captured:
        print_report(summary, console)
    lines = captured.get().splitlines()
    assert max(map(len, (line for line in lines if not line.startswith("- ")))) <= 80
    assert sum(line.strip() == "87.5 %" for line in lines) == 2
    assert sum(line.split()[:3] == ["GMP-T", "87.500", "80.05"] for line in lines) == 2


def test_a_shipped_recipe_is_run_again_by_its_name(ran: Ran) -> None:
    from sao_prune.lab.recipe import read_recipe, shipped_recipes

    shipped = read_recipe(shipped_recipes()["mlp7"], "laptop")
    assert command(shipped.recipe) == "sao-prune run mlp7 --profile laptop"
    assert command(summarise(ran(PLAIN), pytest.fail).recipe) == "sao-prune run recipe.yaml"


def colours(scheme: str) -> dict[str, str]:
    """The variables of the page in one colour scheme."""
    found: dict[str, str] = {}
    for part in style_sheet().split(":root")[1:]:
        body = part[part.index("{") + 1 : part.index("}")]
        pairs = dict(item.split(":", 1) for item in body.split(";") if item.strip().startswith("--"))
        dark = list({key.strip(): value.strip() for key, value in pairs.items()}.items())
        declared = dict(dark)
        is_dark = declared.get("--ink", declared.get("--ground")) in (DARK["ink"], "#14171c")
        if is_dark == (scheme == "dark"):
            found |= declared
    return found


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    dim, bright = sorted((luminance(a), luminance(b)))
    return (bright + 0.05) / (dim + 0.05)


def text_pairs() -> Iterator[tuple[str, str, float]]:
    for ink in ("--ink", "--soft", "--accent"):
        yield ink, "--ground", 4.5
        yield ink, "--raised", 4.5
    yield "--warn", "--warn-ground", 4.5
    for index in range(1, 9):
        yield f"--c{index}", "--ground", 3.0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_of_text_and_lines(scheme: str) -> None:
    given = colours(scheme)
    assert given["--ink"] == (DARK if scheme == "dark" else LIGHT)["ink"]
    for front, back, least in text_pairs():
        assert contrast(given[front], given[back]) >= least, (front, back)


def test_loss_speed_and_memory_where_steps_were_recorded(ran: Ran) -> None:
    folder = ran(PLAIN)
    assert "steps / s" not in markdown(folder)
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    for line in lines:
        if line["cell"]["kind"] != "spectrum":
            line["result"] |= {"steps": 30, "loss": 1.0 + line["cell"]["seed"]}
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = markdown(folder)
    assert "| method | test loss, nats | steps / s | steps / CPU s | weights kB |" in text
    assert "| SAO | 1.500 ± 0.707 | 3.0 | 1.5 | 0.2 |" in text
    row = dict(zip(*((folder / "results.csv").read_text().split("\n")[at].split(",") for at in (0, 2))))
    assert (float(row["loss_mean"]), float(row["steps_per_second_median"])) == (1.5, 3.0)
    assert row["step_bytes"] == row["step_saved_bytes"] == ""
    # A run of an older version that was gone on with: some rows know their memory, the others do not.
    for line in lines:
        if line["cell"]["method"]["name"] == "sao" and line["cell"]["kind"] == "final":
            line["result"]["memory"] = {"weights": 4e6, "gradients": 1e6, "optimizer": 2e6, "saved": 500e3}
    lines[-1]["result"]["loss"] = None
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = markdown(folder)
    assert "| steps / CPU s | weights kB | step kB | saved kB |" in text
    assert "| SAO | 1.500 ± 0.707 | 3.0 | 1.5 | 0.2 | 7,500 | 500 |" in text
    assert "| Dense | 1.500 ± 0.707 | 3.0 | 1.5 | 0.2 | - | - |" in text
    row = dict(zip(*((folder / "results.csv").read_text().split("\n")[at].split(",") for at in (0, 2))))
    assert (float(row["step_bytes"]), float(row["step_saved_bytes"])) == (7.5e6, 5e5)
    assert "| GMP-T | - | 3.0 | 1.5 | 0.2 | - | - |" in text
    for width, head in ((80, "steps / s weights kB"), (132, "steps / s steps / CPU s weights kB")):
        console = Console(width=width, record=True, file=io.StringIO())
        print_report(summarise(folder, pytest.fail), console)
        words = " ".join(console.export_text().split())
        assert f" method test loss, nats {head} step kB saved kB " in words


def test_residual_blocks_where_they_were_measured(ran: Ran) -> None:
    folder = ran(PLAIN.replace("[dense, sao, gmp-t]", "[sao, sao-iso]"))
    assert "residual blocks at initialisation" not in markdown(folder)
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    named = [("a", "exact", [0.5, 3.0], [1, 1.00001]), ("b", "near", [0.2, 2.0], [0.0, 1]), ("c", "near", None, [1, 1])]
    whole = ("", "near", [0.25, 1.5], [0.5, 1])
    measured = [dict(zip(("name", "status", "before", "after"), each)) for each in (*named, whole)]
    for line in lines:
        if line["cell"]["kind"] == "spectrum" and line["cell"]["method"]["name"] == "sao-iso":
            line["result"]["residuals"] = measured
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = markdown(folder)
    assert "| residual blocks at initialisation | how many | singular values before | after |" in text
    assert "| SAO isometric, exact | 1 | 0.5000 – 3.0000 | 1.0000 – 1.0000 |" in text
    assert "| SAO isometric, near | 2 | - | 0.0000 – 1.0000 |" in text
    assert "| SAO isometric, whole network |  | 0.2500 – 1.5000 | 0.5000 – 1.0000 |" in text
    assert "SAO, exact" not in text


def markdown(folder: Path) -> str:
    """The report, written anew."""
    write_report(folder, pytest.fail)
    return (folder / "report.md").read_text()
