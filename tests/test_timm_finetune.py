"""recipes/timm_finetune.py from the command line to the saved model, on scikit-learn's digits as an image folder."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sao_prune

timm = pytest.importorskip("timm")
pytest.importorskip("sklearn")

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "recipes" / "timm_finetune.py"
DOCS = (ROOT / "docs" / "timm.md").read_text()
SMALL = ["--model", "test_resnet", "--image-size", "32", "--in-chans", "1", "--device", "cpu"]
SMALL += ["--batch-size", "16", "--lr", "4e-3", "--workers", "0"]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("timm_finetune", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["timm_finetune"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["timm_finetune"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """The folder that the documentation's lines write, of another set."""
    folder = tmp_path_factory.mktemp("images")
    snippet = re.findall(r"```python\n(.*?)```", DOCS, flags=re.DOTALL)[-1]
    lines = snippet.replace('"fashion-mnist", subset=6000', '"digits", subset=320, test_subset=100')
    assert lines != snippet
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(compile(lines, "docs/timm.md", "exec"), {})
    return folder / "data" / "fashion"


@pytest.fixture(autouse=True)
def own_draws():
    """The script seeds the global generators, as scripts do."""
    with torch.random.fork_rng():
        yield


def run(script, images, output, *options):
    script.main([*SMALL, "--data", str(images), "--output", str(output), *options])
    return json.loads(output.with_suffix(".json").read_text())


def test_end_to_end(script, images, tmp_path, capsys, caplog):
    output, teacher = tmp_path / "runs" / "sao.safetensors", tmp_path / "runs" / "dense.safetensors"
    options = ["--teacher", str(teacher), "--epochs", "4", "--teacher-epochs", "4"]
    with caplog.at_level("INFO", "timm_finetune"):
        results = run(script, images, output, *options)
    assert "no network is used" in caplog.text
    assert "so that it has something to teach" in caplog.text
    assert results == json.loads(capsys.readouterr().out)
    assert results["dense_accuracy"] > 0.2
    assert results["accuracy"] > results["pruned_accuracy"]
    assert results["sparsity"] == 0.875

    model = timm.create_model("test_resnet", num_classes=10, in_chans=1)
    report = sao_prune.load(model, output)
    assert (results["parameters"], results["dense_parameters"]) == (report.remaining, report.parameters)
    args = script.parse([*SMALL, "--data", str(images), "--output", str(output)])
    train, test, classes = script.open_data(args)
    assert (len(train), len(test), classes) == (320, 100, 10)
    assert script.evaluate(args, model, script.open_loaders(args, model, train, test)[1]) == results["accuracy"]

    # With the dense model read instead of trained, the sparse one comes out the same to the last bit.
    again = run(script, images, tmp_path / "again.safetensors", *options)
    assert again["teacher_seconds"] == 0
    for key in ("dense_accuracy", "pruned_accuracy", "accuracy"):
        assert again[key] == results[key]
    first, second = (load_file(file) for file in (output, tmp_path / "again.safetensors"))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_compact_averaged_mixed_precision_and_a_transformer(script, images, tmp_path):
    options = ["--method", "rg", "--execution", "compact", "--ema-decay", "0.9", "--amp", "--epochs", "1"]
    model = ["--model", "test_vit", "--teacher-epochs", "0", "--distill-weight", "0", "--sparsity", "0.75"]
    results = run(script, images, tmp_path / "rg.safetensors", *options, *model)
    net = timm.create_model("test_vit", num_classes=10, in_chans=1, img_size=32)
    sao_prune.load(net, tmp_path / "rg.safetensors")
    assert sum(p.numel() for p in net.parameters()) == results["parameters"] < results["dense_parameters"] / 2


@pytest.mark.parametrize("method", ["gmp", "lmp", "lrp", "rg", "sao", "eoi", "synflow"])
def test_every_method_that_needs_no_data(script, method):
    assert method in script.METHODS
    options = ["--method", method, "--data", ".", "--output", "x.safetensors"]
    dense = timm.create_model("test_resnet", num_classes=10)
    if method != "synflow":
        sparse = script.sparse_copy(script.parse(options), dense)
        assert sao_prune.report(sparse).sparsity == pytest.approx(0.875, abs=2e-3)
    assert sao_prune.report(dense).sparsity == 0


def test_methods_that_need_labels_are_not_offered(script):
    assert not {"snip", "grasp"} & set(script.METHODS)


@pytest.mark.slow
def test_project_keeps_what_the_dense_model_knows(script, images, tmp_path):
    teacher = ["--teacher", str(tmp_path / "dense.safetensors"), "--teacher-epochs", "4", "--epochs", "1"]
    options = ["--sparsity", "0.5", "--calibration", "64", "--execution", "compact", *teacher]
    results = {
        method: run(script, images, tmp_path / f"{method}.safetensors", "--method", method, *options)
        for method in ("project", "rg")
    }
    assert results["project"]["dense_accuracy"] == results["rg"]["dense_accuracy"] > 0.2
    assert results["project"]["pruned_accuracy"] > results["rg"]["pruned_accuracy"]
    model = timm.create_model("test_resnet", num_classes=10, in_chans=1)
    sao_prune.load(model, tmp_path / "project.safetensors")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "nowhere"], "neither a folder nor a name such as torch/cifar10"),
        (["--data", "torch/cifar10", "--data-dir", "nowhere"], "try --download"),
        (["--data", "DOCS"], "has no folder 'train'"),
        (["--model", "resnet_18"], "has no such architecture"),
        (["--batch-size", "1000"], "more than there are training images"),
        (["--teacher", "README"], "holds more than tensors and was not loaded"),
        (["--sparsity", "1"], "test_resnet cannot be pruned: sparsity"),
        (["--sparsity", "1.5"], "must be from 0 to 1, got 1.5"),
        (["--method", "magnitude"], "invalid choice: 'magnitude'"),
        (["--method", "gmp", "--execution", "compact"], "a method that prunes in blocks"),
        (["--teacher-epochs", "0"], "a random dense model has nothing to teach"),
        (["--opt", "sdg"], "none of timm's"),
        (["--output", "model.pt"], "must end in .safetensors"),
    ],
)
def test_bad_input_is_one_clear_error_before_any_training(
    script, images, tmp_path, capsys, monkeypatch, options, message
):
    monkeypatch.setattr(script, "train", None)
    stand_in = {"DOCS": str(ROOT / "docs"), "README": str(ROOT / "README.md")}
    options = [stand_in.get(option, option) for option in options]
    defaults = {"--data": str(images), "--output": str(tmp_path / "m.safetensors"), "--model": "test_resnet"}
    given = [part for key, value in defaults.items() if key not in options for part in (key, value)]
    with pytest.raises(SystemExit) as caught:
        script.main([*given, "--device", "cpu", *options])
    text = str(caught.value) if isinstance(caught.value.code, str) else capsys.readouterr().err
    assert message in text
    assert not list(tmp_path.iterdir())


def test_classes_that_differ_are_named(script, images, tmp_path):
    for split, names in (("train", "ab"), ("validation", "ac")):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            image = next((images / "train").rglob("*.png"))
            (tmp_path / split / name / "0.png").write_bytes(image.read_bytes())
    args = script.parse(["--data", str(tmp_path), "--output", "m.safetensors"])
    with pytest.raises(SystemExit, match=r"differ: \['b', 'c'\]"):
        script.open_data(args)


def test_pretrained_without_a_network_is_one_clear_error(script, tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    args = script.parse(["--model", "test_resnet", "--pretrained", "--data", ".", "--output", "m.safetensors"])
    with pytest.raises(SystemExit, match=r"no weights of test_resnet could be had.*without --pretrained") as caught:
        script.create_dense(args, 10)
    assert "\n" not in str(caught.value)


def test_documented_commands_are_understood(script):
    commands = re.findall(r"python recipes/timm_finetune\.py(.*)", DOCS)
    assert commands
    for command in commands:
        script.parse(command.replace("$method", "sao").split())


def test_a_loss_that_is_not_finite_ends_the_training(script, images, tmp_path):
    with pytest.raises(SystemExit, match="became nan: try a smaller --lr than 1e"):
        run(script, images, tmp_path / "m.safetensors", "--lr", "1e30", "--opt", "sgd", "--teacher-epochs", "1")
