"""Recipes: read right, refused with file, line and key, and trials that are told apart by what matters."""

from collections.abc import Callable
from pathlib import Path

import pytest

from sao_prune.lab.errors import RecipeError
from sao_prune.lab.recipe import find_recipe, load_recipe, read_recipe, shipped_recipes
from sao_prune.lab.trials import Trial

Micro = Callable[..., Path]


def test_shorthand_and_defaults(micro: Micro) -> None:
    recipe = load_recipe(micro(("methods: [dense, sao,", "methods: [dense, {name: sao, options: {variant: 2}},")))
    assert recipe.settings[0].data.name == "digits"
    assert recipe.settings[0].network.depth == (2,)
    assert recipe.settings[0].train.optimizer == "momentum"
    assert [m.title for m in recipe.settings[0].methods] == ["Dense", "SAO (variant 2)", "RG-S", "GMP-S"]


@pytest.mark.parametrize(
    ("change", "line", "said"),
    [
        (("epochs: 2", "epoch: 2"), 8, r"train\.epoch: unknown key 'epoch' \(did you mean 'epochs'\?\)"),
        (("epochs: 2", "epochs: 0"), 8, r"train\.epochs: must be at least 1, got 0"),
        (("epochs: 2", "epochs: two"), 8, r"train\.epochs: expected a whole number, got 'two'"),
        (("epochs: 2", "epochs: 2.5"), 8, "expected a whole number, got '2.5'"),
        (("epochs: 2", "epochs: true"), 8, "expected a whole number"),
        (("epochs: 2", "epochs: 2, epochs: 3"), 8, "given twice"),
        (("epochs: 2, ", ""), 8, "train: missing epochs"),
        (("data: digits", "data: digit"), 2, r"data\.name: unknown data set 'digit' \(did you mean 'digits'"),
        (("rg-s,", "rgs,"), 5, r"unknown value 'rgs' \(did you mean 'rg-s'"),
        (
            ("sao,", "{name: sao, options: {varient: 2}},"),
            5,
            r"unknown option of sao 'varient' \(did you mean 'variant'",
        ),
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
    assert load_recipe(micro(("0.01]", "1e-2]"))).settings[0].lr.grid == (0.1, 0.01)
    assert load_recipe(micro(("[0.1, 0.01]", "1"))).settings[0].lr.grid == (1.0,)


def test_dense_is_trained_once_whatever_the_amounts(micro: Micro) -> None:
    configurations = list(load_recipe(micro(("groups: 4", "groups: [2, 4]"))).configurations())
    assert [configuration.title for configuration in configurations if configuration.method.is_dense] == ["Dense"]
    assert [configuration.title for configuration in configurations if configuration.method.name == "sao"] == [
        "SAO, groups 2",
        "SAO, groups 4",
    ]


def test_keys_depend_on_what_the_result_depends_on_and_on_nothing_else(micro: Micro) -> None:
    def key(*changes: tuple[str, str], seed: int = 0, lr: float = 0.1) -> str:
        recipe = load_recipe(micro(*changes))
        configuration = next(
            configuration for configuration in recipe.configurations() if configuration.method.name == "sao"
        )
        return Trial("final", configuration, seed, lr).key

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
    assert len(shipped_recipes()) >= 16  # the demo, one for each of the fifteen experiments, and more
    for name, path in shipped_recipes().items():
        file = read_recipe(find_recipe(name))
        assert file.recipe.name == name == path.stem
        assert "smoke" in file.profiles
        for profile in file.profiles:
            assert load_recipe(path, profile).name == f"{name}-{profile}"


def test_a_profile_is_laid_over_the_recipe(micro: Micro, tmp_path: Path) -> None:
    profiles = "profiles: {quick: {data: {subset: 100}, train: {epochs: 1}, methods: [sao]}}\n"
    path = micro(("seeds: [0, 1]\n", f"seeds: [0, 1]\n{profiles}"))
    whole, quick = read_recipe(path), read_recipe(path, "quick")
    assert whole.profiles == ("quick",)
    (before,), (after,) = whole.recipe.settings, quick.recipe.settings
    assert (before.data.subset, before.train.epochs, len(before.methods)) == (None, 2, 4)
    assert (after.data.name, after.data.subset, after.train.epochs, after.train.batch_size) == ("digits", 100, 1, 256)
    assert [method.name for method in after.methods] == ["sao"]
    copy = tmp_path / "copy.yaml"
    copy.write_text(quick.text)
    assert read_recipe(copy).recipe == quick.recipe


def test_cases_share_the_rest(micro: Micro) -> None:
    cases = "cases:\n  - {label: a, network: {depth: 3}}\n  - {label: b, train: {epochs: 1}}\n"
    recipe = load_recipe(micro(("seeds: [0, 1]\n", f"seeds: [0, 1]\n{cases}"), ("methods: [dense,", "methods: [")))
    first, second = recipe.settings
    assert (first.network.depth, second.network.depth) == ((3,), (2,))
    assert (first.train.epochs, second.train.epochs) == (2, 1)
    assert [configuration.title for configuration in recipe.configurations()][:1] == ["SAO, a"]


def test_every_option_can_be_an_axis(micro: Micro) -> None:
    recipe = load_recipe(micro(("activation: tanh", "activation: [tanh, relu], skips: [false, true]")))
    titles = [configuration.title for configuration in recipe.configurations() if configuration.method.is_dense]
    assert titles == ["Dense, tanh, no skips", "Dense, tanh, skips", "Dense, relu, no skips", "Dense, relu, skips"]


def test_a_method_that_trains_first_brings_its_dense_network(micro: Micro) -> None:
    recipe = load_recipe(micro(("[dense, sao, rg-s, gmp-s]", "[sao, gmp-t]")))
    assert [configuration.title for configuration in recipe.configurations()] == ["SAO", "GMP-T"]
    assert [configuration.title for configuration in recipe.every_configuration()] == ["SAO", "GMP-T", "Dense"]
    listed = load_recipe(micro(("[dense, sao, rg-s, gmp-s]", "[{name: dense, label: Base}, gmp-t]")))
    assert [configuration.title for configuration in listed.every_configuration()] == ["Base", "GMP-T"]


@pytest.mark.parametrize(
    ("added", "said"),
    [
        ("cases: []", "expected a list of cases"),
        ("cases: [{network: {depth: 2}}, {gain: 1.1}]", "two cases have the same configurations"),
        ("cases: [{network: {dept: 2}}]", r"network\.dept: unknown key 'dept' \(did you mean 'depth'"),
        ("profiles: {quick: 3}", "expected keys and values, got '3'"),
    ],
)
def test_mistakes_in_cases_and_profiles(micro: Micro, added: str, said: str) -> None:
    path = micro(("seeds: [0, 1]\n", f"seeds: [0, 1]\n{added}\n"))
    with pytest.raises(RecipeError, match=said) as caught:
        load_recipe(path, "quick" if "quick" in added else None)
    assert str(caught.value).startswith(f"{path}:7: ")


def test_a_profile_that_is_not_there_names_those_that_are(micro: Micro) -> None:
    with pytest.raises(RecipeError, match="no profile 'quick'; it has none"):
        load_recipe(micro(), "quick")


def test_the_default_recipe_is_the_comparison_it_claims_to_be() -> None:
    recipe = load_recipe(find_recipe("digits"))
    assert recipe.settings[0].network.depth == (50,)
    assert recipe.settings[0].network.options == {"activation": "tanh"}
    assert recipe.settings[0].gain == 1.1
    assert recipe.settings[0].prune.groups == (64,)
    assert (recipe.settings[0].prune.skip_first, recipe.settings[0].prune.skip_last) == (False, True)
    assert [m.name for m in recipe.settings[0].methods] == ["dense", "sao", "rg-s", "rg-n", "gmp-s", "lmp-s", "lrp-s"]
    assert len(recipe.settings[0].seeds) >= 3


def test_a_recipe_that_is_nowhere_is_an_error_that_lists_the_shipped(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"neither a file nor one of digits"):
        find_recipe(str(tmp_path / "none.yaml"))


def test_the_documented_recipe_is_one(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
    path = tmp_path / "my.yaml"
    path.write_text(text.split("```yaml\n")[1].split("```")[0])
    small, warm = load_recipe(path).settings
    assert (small.network.width, warm.network.width) == ((32,), (64,))
    assert (small.train.schedule.warmup_epochs, warm.train.schedule.warmup_epochs) == (0, 2)
    assert load_recipe(path, "smoke").settings[0].data.subset is None


@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
def test_sequences_are_not_mixed(micro: Micro, mix: str) -> None:
    changes = ("data: digits", "data: {name: copying, length: 8}"), ("batch_size: 256", f"batch_size: 256, {mix}: 0.5")
    with pytest.raises(RecipeError, match=r"micro.*train: sequences cannot be mixed"):
        load_recipe(micro(*changes))
