"""The budget and its shares."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sao_prune.allocation import Allocation, Budget, allocate
from sao_prune.discovery import PrunableWeight

MLP = [
    PrunableWeight(f"l{i}", "weight", "Linear", shape) for i, shape in enumerate([(512, 1024), (256, 512), (256, 256)])
]
NET = [
    PrunableWeight("a", "weight", "Conv2d", (64, 32, 3, 3)),
    PrunableWeight("b", "weight", "Conv2d", (130, 64, 3, 3)),
    PrunableWeight("c", "weight", "Conv2d", (256, 96, 1, 1)),
    PrunableWeight("d", "weight", "Linear", (300, 256)),
    PrunableWeight("e", "weight", "Conv2d", (256, 32, 3, 3), parts=8),
]


def groups(weights, **budget):
    return [a.groups for a in allocate(weights, Budget(**budget)) if isinstance(a, Allocation)]


def density(allocations):
    kept = sum(
        a.edges * a.weight.parts * (a.weight.numel // (a.weight.parts * a.weight.matrix[0] * a.weight.matrix[1]))
        for a in allocations
    )
    return kept / sum(a.weight.numel for a in allocations)


@pytest.mark.parametrize(("sparsity", "expected"), [(0, 1), (0.5, 2), (0.75, 4), (0.96875, 32), (0.984375, 64)])
def test_the_thesis_sparsities_are_group_counts(sparsity, expected):
    assert groups(MLP, sparsity=sparsity) == [expected] * 3


def test_degree_is_on_the_smaller_sides_nodes():
    assert groups(MLP, degree=16) == [64, 32, 16]


def test_mapping_by_pattern_first_match_counts_and_the_rest_is_left_alone():
    items = allocate(MLP, Budget(sparsity={"l0": 0.5, "l[01]": 0.75}))
    assert [getattr(i, "groups", None) for i in items] == [2, 4, None]
    assert items[2].reason == "no pattern of the budget matches it"


def test_mappings_of_different_units_go_together():
    assert groups(MLP, sparsity={"l0": 0.5}, groups={"l1": 8}, degree={"l2": 4}) == [2, 8, 64]


def test_nearest_and_regular_fit():
    odd = [PrunableWeight("x", "weight", "Linear", (100, 60))]
    assert groups(odd, sparsity=0.9) == [10]
    assert groups(odd, sparsity=0.86) == [7]
    assert groups(odd, sparsity=0.86, fit="regular") == [10]


@pytest.mark.parametrize("distribution", ["uniform", "erk"])
@pytest.mark.parametrize("sparsity", [0.5, 0.77, 0.9, 0.95])
def test_exact_meets_the_overall_budget(distribution, sparsity):
    allocations = allocate(NET, Budget(sparsity=sparsity, fit="exact", distribution=distribution))
    assert density(allocations) == pytest.approx(1 - sparsity, rel=0.005)


@given(st.floats(0.05, 0.97))
@settings(deadline=None, max_examples=25)
def test_exact_meets_any_budget(sparsity):
    allocations = allocate(NET, Budget(sparsity=sparsity, fit="exact"))
    assert density(allocations) == pytest.approx(1 - sparsity, rel=0.005)


def test_erk_keeps_more_of_small_layers_and_never_more_than_all():
    allocations = allocate(NET, Budget(sparsity=0.8, distribution="erk"))
    assert all(0 < a.density <= 1 for a in allocations)
    asked = sum(a.density * a.weight.numel for a in allocations) / sum(a.weight.numel for a in allocations)
    assert asked == pytest.approx(0.2, rel=1e-6)
    assert allocations[3].density < allocations[2].density


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "say how sparse"),
        ({"sparsity": 1.0}, "share in"),
        ({"sparsity": 90}, "did you mean 0.9"),
        ({"sparsity": -0.1}, "share in"),
        ({"sparsity": float("nan")}, "finite number"),
        ({"sparsity": True}, "finite number"),
        ({"sparsity": "0.5"}, "finite number"),
        ({"degree": 0.5}, "at least 1"),
        ({"groups": 2.5}, "whole number"),
        ({"groups": 0}, "at least 1"),
        ({"sparsity": 0.5, "groups": 2}, "give one of"),
        ({"sparsity": 0.5, "fit": "best"}, "nearest, regular, exact"),
        ({"groups": 2, "distribution": "erk"}, "single number for sparsity"),
    ],
)
def test_bad_budgets(options, message):
    with pytest.raises(ValueError, match=message):
        Budget(**options)


def test_a_pattern_without_a_match_names_the_layers():
    with pytest.raises(ValueError, match=r"'q\*' matches none of the 3 layers: l0, l1, l2"):
        allocate(MLP, Budget(sparsity={"q*": 0.5}))
