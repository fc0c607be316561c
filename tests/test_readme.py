"""Every Python snippet of the README runs, in order, and every command it names exists."""

import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from sao_prune.cli import app

from .snippets import ROOT, blocks, run


def test_python_snippets_run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    assert len(blocks("README.md", "python")) >= 3
    run("README.md")
    assert "19 layers pruned, 2 kept dense" in capsys.readouterr().out


def test_it_stays_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 120


def test_commands_exist():
    help_text = subprocess.run(
        [sys.executable, "-c", "from sao_prune.cli import main; main()", "--help"], capture_output=True, text=True
    ).stdout
    lines = [line for block in blocks("README.md", "sh") for line in block.splitlines()]
    commands = {line.split()[1] for line in lines if line.startswith("sao-prune")}
    assert commands
    assert all(command in help_text for command in commands)
    makefile = (ROOT / "Makefile").read_text()
    targets = {line.split()[1] for line in lines if line.startswith("make ")}
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_plan_command_runs():
    pytest.importorskip("timm")
    done = CliRunner().invoke(app, ["plan", "resnet18", "--sparsity", "0.96875"])
    assert done.exit_code == 0
    assert "19 layers pruned, 2 kept dense" in done.output
