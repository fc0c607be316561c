"""Every Python snippet of the README runs, in order, and every command it names exists."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


def test_python_snippets_run(tmp_path, monkeypatch):
    pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdout", (tmp_path / "out.txt").open("w"))
    namespace: dict = {}
    snippets = blocks("python")
    assert len(snippets) >= 3
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), namespace)


def test_commands_exist():
    help_text = subprocess.run(
        [sys.executable, "-c", "from sao_prune.cli import main; main()", "--help"], capture_output=True, text=True
    ).stdout
    commands = {
        line.split()[1] for block in blocks("sh") for line in block.splitlines() if line.startswith("sao-prune")
    }
    assert commands
    assert all(command in help_text for command in commands)
    targets = {line.split()[1] for block in blocks("sh") for line in block.splitlines() if line.startswith("make ")}
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_plan_command_runs():
    if shutil.which("make") is None:
        pytest.skip("only checked where the development tools are")
    done = subprocess.run(
        [sys.executable, "-c", "from sao_prune.cli import main; main()", "plan", "resnet18", "--sparsity", "0.96875"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert "19 layers pruned, 2 kept dense" in done.stdout
