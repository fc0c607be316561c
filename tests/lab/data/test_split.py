"""Splits and subsets: every class keeps its share."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sao_prune.lab.data import stratified_split, stratified_subset
from sao_prune.lab.errors import DataError

COUNTS = st.lists(st.integers(4, 40), min_size=1, max_size=5)


def labels_of(counts: list[int]) -> torch.Tensor:
    labels = torch.cat([torch.full((n,), i) for i, n in enumerate(counts)])
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]


@settings(max_examples=40, deadline=None)
@given(counts=COUNTS, fraction=st.floats(0.2, 0.8), seed=st.integers(0, 999))
def test_a_split_is_a_partition_with_the_same_share_of_every_class(
    counts: list[int], fraction: float, seed: int
) -> None:
    labels = labels_of(counts)
    kept, held = stratified_split(labels, fraction, seed)
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(len(labels)))
    assert labels[held].bincount().tolist() == [round(fraction * n) for n in counts]
    assert torch.equal(held, stratified_split(labels, fraction, seed)[1])


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0, 0.01])
def test_a_split_that_empties_a_class_is_refused(fraction: float) -> None:
    with pytest.raises(DataError, match=r"held-out fraction|too few"):
        stratified_split(torch.tensor([0, 0, 1, 1]), fraction, 0)


@settings(max_examples=60, deadline=None)
@given(counts=COUNTS, share=st.floats(0, 1), seed=st.integers(0, 999))
def test_a_subset_has_the_size_asked_for_and_every_class_its_share(counts: list[int], share: float, seed: int) -> None:
    labels = labels_of(counts)
    size = max(len(counts), round(share * len(labels)))
    chosen = stratified_subset(labels, size, seed)
    assert len(chosen.unique()) == size
    assert torch.equal(chosen, chosen.sort().values)
    for got, n in zip(labels[chosen].bincount(minlength=len(counts)).tolist(), counts):
        assert 1 <= got <= n
        assert abs(got - size * n / len(labels)) < len(counts)


@settings(max_examples=30, deadline=None)
@given(counts=COUNTS, seed=st.integers(0, 999))
def test_subsets_grow_into_each_other(counts: list[int], seed: int) -> None:
    labels = labels_of(counts)
    before: set[int] = set()
    for size in range(len(counts), len(labels) + 1):
        now = set(stratified_subset(labels, size, seed).tolist())
        assert before < now
        before = now


@pytest.mark.parametrize("count", [0, 1, 5])
def test_a_subset_that_cannot_be_is_refused(count: int) -> None:
    with pytest.raises(DataError, match="ask for 2 to 4"):
        stratified_subset(torch.tensor([0, 0, 1, 1]), count, 0)
