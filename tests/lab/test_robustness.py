"""Adversarial training, losses for certificates, held layers, and what the laboratory measures of them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import sao_prune
from sao_prune import analysis
from sao_prune.lab.data import Dataset, load_dataset
from sao_prune.lab.errors import LabError, RecipeError
from sao_prune.lab.recipe import load_recipe
from sao_prune.lab.report.attacked import attacked_fields
from sao_prune.lab.report.pages import markdown_text
from sao_prune.lab.robustness import RobustnessSpec, measure
from sao_prune.lab.summary import summarise
from sao_prune.lab.sweep import RunOptions, run_recipe
from sao_prune.lab.training import TrainSpec, train
from sao_prune.lab.training.certified import CertifiedLoss
from sao_prune.lab.training.pixels import OnPixels
from sao_prune.lab.training.spec import AdversarialSpec, LossSpec
from sao_prune.lab.trials import Trial
from sao_prune.models import LipConvNet

Micro = Callable[..., Path]

ATTACK = "lr: {grid: [0.1, 0.01]}\nrobustness: {norm: linf, eps: 8, steps: 2, queries: 3, images: 40}"
LIPSCHITZ = """\
name: lipschitz
data: {name: digits, size: 24, subset: 100, test_subset: 50}
network: {name: sao_lipconvnet, depth: 5, width: 4, options: {held: false}}
init: default
prune: {groups: 2}
methods: [{name: sao, options: {conv: eco}}, rg-s]
seeds: [0, 1]
lr: {grid: [0.1]}
train: {epochs: 1, batch_size: 32, hold: true, loss: {name: emma, eps: 36}}
robustness: {norm: l2, eps: 36, steps: 3, queries: 5, images: 20, radii: [36, 72], choose: certified}
"""


@pytest.fixture
def blobs() -> Dataset:
    """Two classes of 4 x 4 images, one bright and one dark."""
    generator, y = torch.Generator().manual_seed(0), torch.arange(60) % 2
    grey = 128 + 40 * (2 * y - 1).reshape(-1, 1, 1, 1) + 20 * torch.randn(60, 1, 4, 4, generator=generator)
    x = grey.clamp(0, 255).byte()
    return Dataset("blobs", ("a", "b"), x[:40], y[:40], x[40:], y[40:])


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_network_learns_from_images_that_were_moved_so_far_and_no_further(blobs: Dataset, norm: str) -> None:
    plain = TrainSpec(epochs=1, batch_size=40)
    spec = replace(plain, adversarial=AdversarialSpec(norm, eps=30, steps=3))
    seen, histories = [], []
    for each in (plain, spec, spec):
        model = network()
        model.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()) if m.training else None)
        histories.append(train(model, blobs, each, 0.1, 0))
    before, moved, again = (OnPixels(network(), blobs).pixels(x) for x in seen)
    assert torch.equal(moved, again)
    far = (moved - before).flatten(1) * 255
    reached = far.abs().amax(1) if norm == "linf" else far.norm(dim=1)
    assert 20 < reached.min() <= reached.max() <= 30.01
    assert 0 <= moved.min() <= moved.max() <= 1
    assert histories[0].train_loss[0] < histories[1].train_loss[0] == histories[2].train_loss[0]


def test_losses_for_certificates_by_hand() -> None:
    x = torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1)
    data = Dataset("two", ("a", "b"), x, torch.tensor([0, 1]), x, torch.tensor([0, 1]))
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    model[1].weight.data = torch.tensor([[1.0], [-1.0]])
    # Standardised images are twice as far apart, and rows differ by 2: a unit moves the difference of logits by 4.
    logits, labels = torch.tensor([[0.8, 0.0], [0.0, 0.02], [1.0, 0.0]]), torch.tensor([0, 1, 1])
    emma = CertifiedLoss(LossSpec("emma", eps=25.5), model, data)
    # The wrong logit rises by 4 eps; by what makes them equal, if that is less; by a hundredth of it at least.
    risen = torch.tensor([[0.8, 0.4], [0.02, 0.02], [1.004, 0.0]])
    expected = nn.functional.cross_entropy(risen, labels, reduction="sum")
    assert emma(logits, labels).item() == pytest.approx(float(expected), rel=1e-5)
    certificate = CertifiedLoss(LossSpec("certificate", weight=0.5), model, data)
    plain = nn.functional.cross_entropy(logits, labels, reduction="sum")
    assert certificate(logits, labels).item() == pytest.approx(float(plain) - 0.5 * (0.2 + 0.005), rel=1e-5)


def test_blocks_stay_orthogonal_through_a_training_and_are_plain_parameters_after_it(blobs: Dataset) -> None:
    model = network()
    sao_prune.apply(model, groups=4, seed=0)
    before = model[3].weight.detach().clone()
    spec = TrainSpec(epochs=2, batch_size=8, hold=True, adversarial=AdversarialSpec("linf", eps=8, steps=1))
    history = train(model, blobs, spec, 0.1, 0)
    assert history.execution == "masked, 1 weights held"
    assert isinstance(model[3].weight_orig, nn.Parameter)
    assert (torch.linalg.svdvals(model[3].weight.detach()) - 1).abs().max() < 1e-5
    assert (model[3].weight - before).abs().max() > 0.01
    with pytest.raises(LabError, match="nothing to hold"):
        train(network(), blobs, TrainSpec(epochs=1, batch_size=8, hold=True), 0.1, 0)


@pytest.mark.parametrize("loss", [LossSpec("emma", eps=36), LossSpec("certificate", weight=0.5)])
def test_no_certified_image_of_a_sparse_network_breaks(loss: LossSpec) -> None:
    data = load_dataset("digits").holdout(0.1)
    model = nn.Sequential(nn.Flatten(), *(nn.Linear(1024 if i == 0 else 64, 64) for i in range(2)), nn.Linear(64, 10))
    sao_prune.apply(model, groups=4, skip_first=False, seed=0)
    train(model, data, TrainSpec(epochs=2, batch_size=64, loss=loss), 0.01, 0)
    pixels, network = data.test_x / 255, OnPixels(model, data)
    constants = network.lipschitz * analysis.margin_constants(model)
    logits = network(pixels)
    radii = analysis.certified_radii(logits.detach(), data.test_y, constants)
    assert (radii >= analysis.certified_radii(logits, data.test_y, float(constants.max()) / 2**0.5) * 0.999).all()
    radius = float(radii.median())
    assert radius > 0
    found = analysis.worst_case(network, pixels, data.test_y, analysis.Threat("l2", radius), queries=20)
    assert found.right[radii > radius].all()


def test_what_is_measured_of_a_network(blobs: Dataset) -> None:
    model = network()
    train(model, blobs, TrainSpec(epochs=5, batch_size=8), 0.1, 0)
    spec = RobustnessSpec("l2", eps=150, steps=5, queries=10, images=10, radii=(20, 30))
    whole, quick = (measure(model, blobs, spec, seed=0, whole=whole) for whole in (True, False))
    assert whole == measure(model, blobs, spec, seed=0, whole=True)
    assert "worst" not in quick
    assert {key: value for key, value in whole.items() if key != "worst"} == quick
    assert 1 == whole["clean"] > whole["pgd"] >= whole["worst"] >= 0
    assert whole["certified"] == [1, 0]
    assert whole["broken"] == 0
    # A unit of the image is 255 grey levels.
    assert whole["lipschitz"] == pytest.approx(255 / blobs.std[0] * float(analysis.lipschitz_bound(model)))
    with torch.no_grad():
        model[1].weight.fill_(torch.nan)
    assert measure(model, blobs, spec, seed=0, whole=True)["certified"] == [0, 0]


@pytest.mark.slow
def test_a_run_attacks_certifies_and_says_so(tmp_path: Path, display: object) -> None:
    path = tmp_path / "lipschitz.yaml"
    path.write_text(LIPSCHITZ)
    folder = run_recipe(path, RunOptions(out=tmp_path), display)
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    results = [line["result"] for line in lines if line["cell"]["kind"] == "final"]
    assert len(results) == 4
    for result in results:
        found = result["robustness"]
        assert 1 >= found["clean"] >= found["pgd"] >= found["worst"] >= 0
        assert found["certified"] == sorted(found["certified"], reverse=True)
        assert found["broken"] == 0
        assert result["execution"] == "masked, 3 weights held"
    summary = summarise(folder, pytest.fail)
    sao, rg = summary.rows
    assert list(sao.robustness) == ["clean", "PGD", "worst case", "certified 36", "certified 72"]
    assert list(rg.robustness_against_sao) == list(sao.robustness)
    text = markdown_text(summary, [])
    assert "### Under attack" in text
    assert "move by up to 36/255 in l2" in text
    assert list(attacked_fields(summary.rows))[4:7] == ["worst_case_mean", "worst_case_sd", "certified_36_mean"]


@pytest.mark.slow
def test_rates_are_chosen_by_what_the_recipe_says(micro: Micro, display: object, tmp_path: Path) -> None:
    path = micro(("lr: {grid: [0.1, 0.01]}", ATTACK), ("dense, sao, rg-s, gmp-s", "sao"))
    folder = run_recipe(path, RunOptions(out=tmp_path / "out"), display)
    summary = summarise(folder, pytest.fail)
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    held_out = {line["cell"]["lr"]: line["result"]["robustness"] for line in lines if line["cell"]["kind"] == "select"}
    assert all("worst" not in found for found in held_out.values())
    assert {rate.lr: rate.accuracy for rate in summary.rows[0].rates} == {
        lr: found["pgd"] for lr, found in held_out.items()
    }
    assert "held-out accuracy under PGD %" in markdown_text(summary, [])


def test_a_key_changes_with_the_attack_and_only_where_there_is_one(micro: Micro) -> None:
    def key(*changes: tuple[str, str]) -> str:
        configuration = next(load_recipe(micro(*changes)).configurations())
        return Trial("final", configuration, 0, 0.1).key

    lr, train = "lr: {grid: [0.1, 0.01]}", "epochs: 2"
    different = [
        key((lr, ATTACK)),
        key((lr, ATTACK.replace("eps: 8", "eps: 4"))),
        key((train, "epochs: 2, adversarial: {norm: l2, eps: 36}")),
        key((train, "epochs: 2, loss: {name: emma, eps: 36}")),
    ]
    assert len({key(), *different}) == 1 + len(different)
    assert key((train, "epochs: 2, loss: cross-entropy, hold: false")) == key()


@pytest.mark.parametrize(
    ("change", "line", "said"),
    [
        (("epochs: 2", "epochs: 2, adversarial: {norm: l1, eps: 8}"), 8, "unknown value 'l1'"),
        (("epochs: 2", "epochs: 2, adversarial: {norm: linf, eps: 0}"), 8, r"adversarial\.eps: must be above 0, got 0"),
        (("epochs: 2", "epochs: 2, adversarial: {norm: linf}"), 8, "missing eps"),
        (("epochs: 2", "epochs: 2, loss: emma"), 8, r"train\.loss\.eps: eps is what the loss emma needs"),
        (("epochs: 2", "epochs: 2, loss: {name: emma, eps: 8, weight: 1}"), 8, "weight is what the loss certificate"),
        (("epochs: 2", "epochs: 2, mixup: 0.2, loss: {name: emma, eps: 8}"), 8, r"train\.loss: emma needs whole"),
        (("epochs: 2", "epochs: 2, hold: true"), 8, "hold keeps blocks orthogonal, and GMP-S has none"),
        (("epochs: 2", "epochs: 2, hold: true, execution: compact"), 8, r"train\.hold: held weights run masked"),
        (("lr:", "robustness: {norm: l2, eps: 8, choose: certified}\nlr:"), 7, r"robustness\.choose: .* needs radii"),
        (("lr:", "robustness: {norm: l2, eps: 8, radii: [-1]}\nlr:"), 7, r"robustness\.radii: must be above 0"),
    ],
)
def test_mistakes_are_told_with_file_line_and_key(micro: Micro, change: tuple[str, str], line: int, said: str) -> None:
    path = micro(change)
    with pytest.raises(RecipeError, match=said) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path}:{line}: ")


def test_certificates_of_a_network_without_bounds_are_refused_before_anything_is_trained(
    micro: Micro, display: object, tmp_path: Path
) -> None:
    change = ("lr:", "robustness: {norm: l2, eps: 8, radii: [36]}\nlr:")
    with pytest.raises(LabError, match=r"radii: .* is no chain"):
        run_recipe(micro(change), RunOptions(out=tmp_path / "out"), display)


def test_a_network_in_which_nothing_can_be_held_is_refused_before_anything_is_trained(
    micro: Micro, display: object, tmp_path: Path
) -> None:
    changes = [("sao_mlp, depth: 2, width: 64, options: {activation: tanh}", "sao_resnet, depth: 8"), (", gmp-s", "")]
    path = micro(*changes, ("epochs: 2", "epochs: 2, hold: true"))
    with pytest.raises(LabError, match="hold: SaoResNet has no layer but its classifier"):
        run_recipe(path, RunOptions(out=tmp_path / "out"), display)


def test_sequences_are_not_attacked(tmp_path: Path) -> None:
    path = tmp_path / "copying.yaml"
    path.write_text(
        "name: copying\ndata: {name: copying, length: 5}\nnetwork: sao_recurrent\nprune: {groups: 2}\nmethods: [sao]\n"
        "lr: {grid: [0.1]}\ntrain: {epochs: 1, batch_size: 8}\nrobustness: {norm: l2, eps: 8}\n"
    )
    with pytest.raises(RecipeError, match=r":2: data: attacks and certificates are for images"):
        load_recipe(path)


def test_lipconvnet_says_of_which_layers_it_is_a_chain() -> None:
    model = LipConvNet(5, width=4, in_chans=1, seed=0)
    # Orthonormal rows after orthogonal layers.
    off = ~torch.eye(10, dtype=torch.bool)
    assert analysis.margin_constants(model)[off] == pytest.approx(2**0.5, rel=1e-5)
