"""Recipes: read right, refused with file, line and key, and cells that are told apart by what matters."""

from collections.abc import Callable
from pathlib import Path

import pytest

from sao_prune.lab.errors import RecipeError
from sao_prune.lab.recipe import find_recipe, load_recipe, shipped_recipes

Micro = Callable[..., Path]


def test_shorthand_and_defaults(micro: Micro) -> None:
    recipe = load_recipe(micro(("methods: [dense, sao,", "methods: [dense, {name: sao, options: {variant: 2}},")))
    assert recipe.data.name == "digits"
    assert recipe.network.depth == (2,)
    assert recipe.train.optimizer == "momentum"
    assert [m.title for m in recipe.methods] == ["Dense", "SAO (variant 2)", "RG-S", "GMP-S"]


@pytest.mark.parametrize(
    ("change", "line", "said"),
    [
        (("epochs: 2", "epoch: 2"), 8, r"train\.epoch: unknown key 'epoch'; did you mean 'epochs'\?"),
        (("epochs: 2", "epochs: 0"), 8, r"train\.epochs: must be at least 1, got 0"),
        (("epochs: 2", "epochs: two"), 8, r"train\.epochs: expected a whole number, got 'two'"),
        (("epochs: 2", "epochs: 2.5"), 8, "expected a whole number, got '2.5'"),
        (("epochs: 2", "epochs: true"), 8, "expected a whole number"),
        (("epochs: 2", "epochs: 2, epochs: 3"), 8, "given twice"),
        (("epochs: 2, ", ""), 8, "train: missing epochs"),
        (("data: digits", "data: digit"), 2, r"data\.name: unknown value 'digit'; did you mean 'digits'"),
        (("rg-s,", "rgs,"), 5, r"unknown value 'rgs'; did you mean 'rg-s'"),
        (("sao,", "{name: sao, options: {varient: 2}},"), 5, "unknown option of sao 'varient'; did you mean 'variant'"),
        (("sao,", "{name: sao, options: {variant: 9}},"), 5, "9"),
        (("sao,", "sao, sao,"), 5, "two methods have the same label"),
        (("groups: 4", "groups: 4, degree: 2"), 4, "give one of sparsity, degree and groups"),
        (("groups: 4", "sparsity: 1.0"), 4, "must be below 1, got 1.0"),
        (("groups: 4", "sparsity: .nan"), 4, "expected a number"),
        (("groups: 4", "groups: []"), 4, "an empty list"),
        (("[0, 1]", "[0, 0]"), 6, "a seed is given twice"),
        (("[0.1, 0.01]", "[0.1, -1]"), 7, "must be above 0"),
        (("[0.1, 0.01]", "{a: 1}"), 7, r"lr\.grid: expected a number, got keys and values"),
        (("name: micro", "name: a/b"), 1, "it names a folder"),
        (("epochs: 2", "epochs: 2, schedule: multistep"), 8, "milestones go with"),
        (("epochs: 2", "epochs: 2, schedule: {name: cosine, milestones: [1]}"), 8, "milestones go with"),
        (("train: {", "train: ["), 8, "not YAML"),
        (("name: micro", "name: !!python/object/apply:os.getcwd []"), 1, "expected text"),
    ],
)
def test_mistakes_are_told_with_file_line_and_key(micro: Micro, change: tuple[str, str], line: int, said: str) -> None:
    path = micro(change)
    with pytest.raises(RecipeError, match=said) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just text", "a: &x [*x]", "\x00", "? [a]: b"])
def test_what_is_no_recipe_at_all_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"odd\.yaml") as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)


def test_numbers_as_people_write_them(micro: Micro) -> None:
    assert load_recipe(micro(("0.01]", "1e-2]"))).lr.grid == (0.1, 0.01)
    assert load_recipe(micro(("[0.1, 0.01]", "1"))).lr.grid == (1.0,)


def test_dense_is_trained_once_whatever_the_amounts(micro: Micro) -> None:
    arms = list(load_recipe(micro(("groups: 4", "groups: [2, 4]"))).arms())
    assert [arm.title for arm in arms if arm.method.is_dense] == ["Dense"]
    assert [arm.title for arm in arms if arm.method.name == "sao"] == ["SAO, groups 2", "SAO, groups 4"]


def test_keys_depend_on_what_the_result_depends_on_and_on_nothing_else(micro: Micro) -> None:
    def key(*changes: tuple[str, str], seed: int = 0, lr: float = 0.1) -> str:
        recipe = load_recipe(micro(*changes))
        arm = next(arm for arm in recipe.arms() if arm.method.name == "sao")
        return arm.cell("final", seed, lr=lr, train=recipe.train).key

    base = key()
    assert key(("name: micro", "name: other")) == base
    assert key(("sao,", "{name: sao, label: Ours},")) == base
    assert key(("seeds: [0, 1]", "seeds: [0, 1, 2]")) == base
    assert key(("grid: [0.1, 0.01]", "grid: [0.1]")) == base
    different = [
        key(seed=1),
        key(lr=0.2),
        key(("epochs: 2", "epochs: 3")),
        key(("batch_size: 256", "batch_size: 128")),
        key(("groups: 4", "groups: 8")),
        key(("tanh", "relu")),
        key(("depth: 2", "depth: 3")),
        key(("skip_first: false", "skip_first: true")),
        key(("seeds:", "gain: 1.1\nseeds:")),
        key(("sao,", "{name: sao, options: {variant: 3}},")),
    ]
    assert len({base, *different}) == 1 + len(different)


def test_shipped_recipes_are_sound_and_found_by_name() -> None:
    assert {"digits", "mlp_n_fashion"} <= set(shipped_recipes())
    for name, path in shipped_recipes().items():
        assert load_recipe(find_recipe(name)).name == name == path.stem


def test_the_default_recipe_is_the_comparison_it_claims_to_be() -> None:
    recipe = load_recipe(find_recipe("digits"))
    assert recipe.network.depth == (50,)
    assert recipe.network.options == {"activation": "tanh"}
    assert recipe.gain == 1.1
    assert recipe.prune.groups == (64,)
    assert (recipe.prune.skip_first, recipe.prune.skip_last) == (False, True)
    assert [m.name for m in recipe.methods] == ["dense", "sao", "rg-s", "rg-n", "gmp-s", "lmp-s", "lrp-s"]
    assert len(recipe.seeds) >= 3


def test_a_recipe_that_is_nowhere_is_an_error_that_lists_the_shipped(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"neither a file nor one of digits"):
        find_recipe(str(tmp_path / "none.yaml"))
