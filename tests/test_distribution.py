"""The wheel, in an environment with nothing but its required dependencies."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import PackageNotFoundError, distribution, requires
from pathlib import Path

import pytest

from .snippets import ROOT

pytestmark = pytest.mark.slow


def required(name: str, found: dict) -> dict:
    """The distributions that one needs, without extras."""
    for requirement in requires(name) or []:
        needed = re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0].lower())
        if "extra ==" not in requirement and needed not in found:
            try:
                found[needed] = distribution(needed)
            except PackageNotFoundError:  # for another system
                continue
            required(needed, found)
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with wheel and sdist."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--outdir", folder, ROOT], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def python(built, tmp_path_factory):
    """A Python that finds the wheel and what it requires, and nothing else."""
    folder = tmp_path_factory.mktemp("clean")
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    for needed in required("sao-prune", {}).values():
        tops = {file.parts[0] for file in needed.files or [] if file.parts[0] not in ("..", "__pycache__")}
        for top in tops:
            link = folder / top
            if not link.exists():
                link.symlink_to(Path(needed.locate_file(top)).resolve())
    environment = {**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "200"}

    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-S", *arguments]  # without site-packages
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder.parent)

    return run


def test_wheel_and_sdist_hold_what_they_must(built):
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    recipes = {path.name for path in (ROOT / "recipes").glob("*.yaml")}
    assert {f"sao_prune/lab/recipes/{name}" for name in recipes} <= names
    package = ROOT / "sao_prune"
    files = {p.relative_to(ROOT).as_posix() for p in package.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert any(name.endswith(".c") for name in files)
    assert files <= names
    assert not [name for name in names if name.startswith(("tests/", "docs/", "benchmarks/"))]
    with tarfile.open(sdist) as archive:
        top, shipped = sdist.name.removesuffix(".tar.gz"), set(archive.getnames())
    assert {f"{top}/{name}" for name in ("README.md", "LICENSE", "pyproject.toml", "recipes/digits.yaml")} <= shipped


def test_twine_accepts_them(built):
    pytest.importorskip("twine")
    done = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *built.iterdir()], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_it_applies_and_compacts_without_extras(python):
    code = (
        "import torch, sao_prune\n"
        "net = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4)))\n"
        "sao_prune.apply(net, groups=8, seed=0)\n"
        "x = torch.randn(2, 64)\n"
        "y = net(x)\n"
        "sao_prune.compact(net, example_input=x)\n"
        "print(torch.allclose(net(x), y, atol=1e-5), sao_prune.__file__)"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("True")
    assert str(ROOT) not in done.stdout


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        (("plan", "resnet18", "--sparsity", "0.9"), "vision"),
        (("zoo", "--filter", "resnet18"), "vision"),
        (("run", "digits"), "lab"),
        (("report", "runs/digits"), "lab"),
        (("figures",), "lab"),
    ],
)
def test_commands_name_the_extra_that_is_missing(python, command, extra):
    done = python("-m", "sao_prune", *command)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert f"pip install 'sao-prune[{extra}]'" in done.stderr


EXPORT = "import torch, sao_prune; sao_prune.export_onnx(torch.nn.Linear(4, 4), torch.ones(1, 4), 'm.onnx')"


@pytest.mark.parametrize(
    ("code", "extra"),
    [
        (EXPORT, "onnx"),
        ("import sao_prune.integrations.lightning", "integrations"),
        ("import sao_prune.integrations.transformers", "integrations"),
        ("from sao_prune.lab.data import DataSpec, load_dataset; load_dataset(DataSpec('digits'))", "lab"),
        ("import sao_prune.integrations.accelerate", "integrations"),
    ],
)
def test_functions_name_the_extra_that_is_missing(python, code, extra):
    done = python("-c", code)
    assert done.returncode == 1
    assert f"pip install 'sao-prune[{extra}]'" in done.stderr.strip().splitlines()[-1], done.stderr
