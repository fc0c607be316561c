"""The pages of the site: their code runs, their links lead somewhere, the public face is documented as a whole."""

import importlib
import re
from collections import Counter
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from posixpath import dirname, normpath

import pytest

import sao_prune

from .snippets import ROOT, extension, run

PAGES = ("checkpoints", "methods", "selection")
HEAVIER = ("deploy", "export", "index", "isometry", "moving", "properties", "start")
TUTORIALS = sorted(path.name for path in (ROOT / "docs" / "tutorials").glob("*.md"))
WRITTEN = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"))
    if path.name != "report.md"
)
# Named in a list for other modules of this package, not for users.
INTERNAL = {
    "analysis": set(),
    "nn": set(),
    "blocks": {"BlockModule", "Execution", "compact", "expand"},
}


@pytest.mark.parametrize("page", PAGES)
def test_pages_run(page, tmp_path, monkeypatch):
    pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    assert run(f"docs/{page}.md")


@pytest.mark.slow
@pytest.mark.parametrize("page", HEAVIER)
def test_heavier_pages_run(page, tmp_path, monkeypatch):
    for needed in ("timm", "onnxruntime"):
        pytest.importorskip(needed)
    monkeypatch.chdir(tmp_path)
    assert run(f"docs/{page}.md")


@pytest.mark.slow
@pytest.mark.parametrize("page", TUTORIALS)
def test_tutorials_run(page):
    for needed in ("timm", "sklearn", "onnxruntime"):
        pytest.importorskip(needed)
    text = (ROOT / "docs" / "tutorials" / page).read_text(encoding="utf-8")
    assert ":class: output" in extension("executed").executed(text, page)


def test_a_block_that_fails_is_shown():
    executed = extension("executed")
    with pytest.raises(executed.PageError, match=r"ZeroDivisionError.*\n1 / 0"):
        executed.executed("```python\n1 / 0\n```\n", "page")
    shown = executed.executed("```python\nx = 2\n```\n\n```py\nx = 3\n```\n\n```python\nprint(x)\n```\n", "page")
    assert shown.endswith("```python\nprint(x)\n```\n\n:::{code-block} text\n:class: output\n2\n:::\n\n")


@pytest.mark.parametrize("page", WRITTEN)
def test_links_lead_to_files(page):
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r"\]\(([^)\s#:]+)(?:#[^)\s]*)?\)", text) + re.findall(r'(?:src|srcset)="([^":]+)"', text)
    missing = [target for target in targets if not (ROOT / normpath(f"{dirname(page) or '.'}/{target}")).exists()]
    assert not missing


def test_links_and_figures_become_those_of_the_site():
    translated = extension("repository").translated
    page = translated(
        "[r](../benchmarks/RESULTS.md#a) [s](speed.md) `x`\n```sh\n[r](../benchmarks/RESULTS.md)\n```\n",
        "docs/a.md",
        "docs/a.md",
    )
    assert page == "[r](records/RESULTS.md#a) [s](speed.md) `x`\n```sh\n[r](../benchmarks/RESULTS.md)\n```\n"
    assert translated("[a](docs/architecture.md) [c](CHANGELOG.md)", "CONTRIBUTING.md", "docs/contributing.md") == (
        "[a](architecture.md) [c](changelog.md)"
    )


def test_the_public_face_is_documented():
    entries = [
        (module, entry)
        for path in (ROOT / "docs" / "api").glob("*.rst")
        for part in re.split(r"^\.\. currentmodule:: ", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        for module in [part.splitlines()[0]]
        for entry in re.findall(r"^\.\. auto\w+:: ([\w.]+)", part, re.MULTILINE)
    ]
    assert not [entry for entry, times in Counter(entries).items() if times > 1]
    named = {entry.rpartition(".")[2] for _, entry in entries}
    public = {*sao_prune.__all__} - {"prune"}
    for room, internal in INTERNAL.items():
        public |= {*importlib.import_module(f"sao_prune.{room}").__all__} - internal
    assert public - named == set()


def test_figures_of_the_front_page_are_those_of_the_records():
    if find_spec("matplotlib") is None:
        pytest.skip("matplotlib draws them")
    file = ROOT / "docs" / "figures" / "draw_front.py"
    spec = spec_from_file_location("draw_front", file)
    draw = module_from_spec(spec)
    spec.loader.exec_module(draw)
    drawn = (file.parent / "front.csv").read_text(encoding="utf-8").splitlines()
    assert drawn == [",".join(row) for row in draw.rows()], "run python docs/figures/draw_front.py"


def test_every_page_has_its_place_in_the_tree():
    tree = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^(?:[^<\n]*<)?([\w./-]+)>?$", tree, re.MULTILINE))
    pages = {
        path.relative_to(ROOT / "docs").with_suffix("").as_posix()
        for path in (*ROOT.glob("docs/*.md"), *ROOT.glob("docs/tutorials/*.md"))
    }
    assert pages - named == {"index"}
