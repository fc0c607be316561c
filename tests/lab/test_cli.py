"""The command: what it prints, and how it fails."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sao_prune import cli

Micro = Callable[..., Path]
FEW = (("[dense, sao, rg-s, gmp-s]", "[dense, lrp-s]"), ("[0.1, 0.01]", "0.1"))
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    """Run the command; returns exit code, standard output, standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["sao-prune", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capfd.readouterr()
        return int(caught.value.code or 0), out, err

    return run


def test_run_and_report(call: Call, micro: Micro, tmp_path: Path) -> None:
    status, out, err = call("run", micro(*FEW), "--out", tmp_path, "--device", "cpu")
    assert (status, err) == (0, "")
    assert "LRP-S: " in out
    assert "non-zero" in out
    status, again, err = call("report", tmp_path / "micro")
    assert (status, err) == (0, "")
    assert again.strip() in out
    status, compared, err = call("report", tmp_path / "micro", tmp_path / "micro")
    assert (status, err) == (0, "")
    assert "+0.00" in compared
    assert (tmp_path / "micro" / "comparison.html").is_file()
    status, _, err = call("report", tmp_path / "micro", tmp_path / "micro", "--out", __file__)
    assert (status, err) == (2, f"sao-prune: File exists: {__file__}\n")


def test_a_place_that_cannot_be_written_is_one_line(call: Call) -> None:
    status, _, err = call("figures", "--out", f"{__file__}/here")
    assert status == 2
    assert err.count("\n") == 1
    assert __file__ in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "nosuch"], "neither a file nor one of digits"),
        (["report", "nosuch"], "holds no run"),
        (["report", "nosuch", "nor-such"], "nosuch holds no run"),
        (["report", "a", "b", "c"], "or of two to compare them, got 3"),
        (["report", "a", "--out", "b"], "name the folders of two runs"),
        (["run", "--nosuch"], "--nosuch"),
        (["run", "digits", "--device", "quantum"], "device 'quantum' cannot be used"),
        (["frobnicate"], "frobnicate"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(call: Call, arguments: list[str], said: str) -> None:
    status, _, err = call(*arguments)
    assert status == 2
    assert said in err
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_a_mistake_in_a_recipe_names_file_line_and_key(call: Call, micro: Micro) -> None:
    path = micro(("epochs: 2", "epoch: 2"))
    status, _, err = call("run", path)
    assert status == 2
    assert err.startswith(f"sao-prune: {path}:8: train.epoch: unknown key 'epoch' (did you mean 'epochs'?)")


def test_missing_data_is_one_line(call: Call, micro: Micro, tmp_path: Path) -> None:
    status, _, err = call("run", micro(("data: digits", "data: mnist")), "--data-dir", tmp_path, "--out", tmp_path)
    assert status == 2
    assert err.count("\n") == 1
    assert "--download" in err


def test_an_interrupt_is_not_an_error_of_ours(call: Call, micro: Micro, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sao_prune.lab.sweep.run_recipe", interrupt)
    status, _, err = call("run", micro())
    assert status == 130
    assert "goes on from there" in err


def test_a_bug_is_not_hidden(micro: Micro, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr("sao_prune.lab.sweep.run_recipe", crash)
    monkeypatch.setattr("sys.argv", ["sao-prune", "run", str(micro())])
    with pytest.raises(ValueError, match="a bug"):
        cli.main()


def test_help(call: Call) -> None:
    assert call("--help")[0] == 0
    assert "identical conditions" in call("run", "--help")[1]


def test_a_run_says_what_it_does_before_it_imports_anything(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from sao_prune import cli\n"
        "from sao_prune.lab import display, server\n"
        "class Stop(Exception): pass\n"
        "told = []\n"
        "def stage(self, text):\n"
        "    told.append(text)\n"
        "def start():\n"
        "    print(told, [m for m in ('torch', 'timm', 'numpy') if m in sys.modules])\n"
        "    raise Stop\n"
        "display.PlainDisplay.stage, server.start_server = stage, start\n"
        "try:\n"
        "    cli.app(['run', 'digits', '--jobs', '2'], standalone_mode=False)\n"
        "except Stop:\n"
        "    pass\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "['importing torch'] []\n"
