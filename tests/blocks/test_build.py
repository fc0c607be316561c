"""The kernels are built once for a machine, kept where only their user can write, and never needed."""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import sao_prune
from sao_prune.blocks import convert
from sao_prune.blocks.backends.cpu import build

from .cases import block_layers, needs_compiler


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """An empty cache of built kernels, and an empty folder for temporary files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    build.library.cache_clear()
    yield tmp_path / "cache" / "sao_prune"
    build.library.cache_clear()


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """A compiler that takes no time: it gives what has been compiled before."""
    build.library.cache_clear()
    found = build.library()
    assert found is not None
    compiler = tmp_path / "compiler"
    compiler.write_text(
        f'#!/bin/sh\nfor a; do [ "$last" = -o ] && cp {found._name} "$a"; last="$a"; done\necho quick 1.0\n'
    )
    compiler.chmod(0o700)
    monkeypatch.setenv("CC", str(compiler))


def _temporary() -> list[Path]:
    return list(Path(tempfile.gettempdir()).iterdir())


@needs_compiler
def test_the_kernels_are_built_once(quick, fresh, monkeypatch):
    assert build.library() is not None
    assert build.why_unavailable() is None
    (built,) = fresh.iterdir()
    assert not fresh.stat().st_mode & 0o077
    assert _temporary() == []
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("built again"))
    build.library.cache_clear()
    assert build.library() is not None
    assert list(fresh.iterdir()) == [built]


@needs_compiler
@pytest.mark.parametrize("kind", ["writable by others", "no folder"])
def test_a_folder_that_cannot_be_trusted(quick, fresh, kind):
    fresh.parent.mkdir()
    if kind == "no folder":
        fresh.write_text("a file")
    else:
        fresh.mkdir()
        os.chmod(fresh, 0o777)
    assert build.cache_folder() is None
    assert build.library() is not None
    assert not fresh.is_dir() or list(fresh.iterdir()) == []
    assert _temporary() == []


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.cache_folder() == tmp_path / "sao_prune"
    for relative in ("", "somewhere"):
        monkeypatch.setenv("XDG_CACHE_HOME", relative)
        monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
        assert build.cache_folder() == tmp_path / "home" / ".cache" / "sao_prune"

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert build.cache_folder() is None


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("SAO_PRUNE_NATIVE", "0", "SAO_PRUNE_NATIVE=0"),
        ("CC", "no-such-compiler", "no C compiler: no-such-compiler is not on the path"),
        ("CC", " ", "no C compiler: CC is empty is not on the path"),
        ("CC", "false", "false --version failed"),
        ("CC", "true -x", ""),
        ("CC", "gcc '", "No closing quotation"),
    ],
)
def test_why_there_are_no_kernels(fresh, monkeypatch, caplog, variable, value, reason):
    monkeypatch.setenv(variable, value)
    with caplog.at_level(logging.INFO, build.__name__):
        assert build.library() is None
    assert f"no native kernels: {reason}" in caplog.text
    assert reason in (build.why_unavailable() or "")
    assert not fresh.exists() or list(fresh.iterdir()) == []
    assert _temporary() == []


def test_one_warning_in_a_process(fresh, monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setattr(convert, "_warned", False)
    notes = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
            sao_prune.apply(model, groups=4, seed=0)
            notes.append(sao_prune.compact(model, example_input=torch.randn(2, 8)).note)
            assert not any(layer.execution.native for layer in block_layers(model))
    found = [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]
    assert len(found) == 1
    assert "no-such-compiler is not on the path" in found[0]
    assert all("no-such-compiler is not on the path" in note for note in notes)


def test_no_warning_where_they_are_switched_off(fresh, monkeypatch):
    monkeypatch.setenv("SAO_PRUNE_NATIVE", "0")
    monkeypatch.setattr(convert, "_warned", False)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    sao_prune.apply(model, groups=4, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert "SAO_PRUNE_NATIVE=0" in sao_prune.compact(model).note


@needs_compiler
def test_the_name_of_what_is_built_needs_no_processor_information(quick, fresh, monkeypatch):
    assert build.library() is not None
    (built,) = fresh.iterdir()
    opened = open

    def without(file, *args, **kwargs):
        if str(file) == "/proc/cpuinfo":
            raise FileNotFoundError(file)
        return opened(file, *args, **kwargs)

    monkeypatch.setattr("builtins.open", without)
    build.processor.cache_clear()
    try:
        build.processor()
        build.library.cache_clear()
        assert build.library() is not None
        assert list(fresh.iterdir()) == [built]
        monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-DANOTHER"))
        build.library.cache_clear()
        assert build.library() is not None
        assert len(list(fresh.iterdir())) == 2
    finally:
        build.processor.cache_clear()
