"""Threads on processors of their own."""

import os

import pytest

from sao_prune.lab.processors import apart, staying

linux = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="processors cannot be chosen")


@linux
def test_a_thread_stays_and_is_let_go(monkeypatch):
    before = os.sched_getaffinity(0)
    one = min(before)
    found = []

    def fails():
        with staying([one, one + 1]):
            found.append(os.sched_getaffinity(0))
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert found == [{one}]
    with staying([]):
        assert os.sched_getaffinity(0) == before
    assert os.sched_getaffinity(0) == before
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5, 2, 7})
    assert [apart(n) for n in (1, 2, 3, 4)] == [[], [2, 5], [2, 5, 7], []]


def test_where_processors_cannot_be_chosen_nothing_is(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert apart(2) == []
