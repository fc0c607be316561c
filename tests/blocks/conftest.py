"""Timings of one test, or of the user's own runs, decide nothing in another."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def no_timings_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAO_PRUNE_TUNING_CACHE", "0")
