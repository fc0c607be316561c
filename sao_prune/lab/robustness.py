"""How trained networks of a recipe stand up to attacks, and what can be certified about them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from ..analysis import Threat, certified_radii, lipschitz_bound, margin_constants, worst_case
from ..analysis.attacks import undisturbed
from ..analysis.threat import Norm
from .data import Dataset
from .data.split import stratified_subset
from .errors import LabError
from .schema import rule
from .training.pixels import GREY_LEVELS, OnPixels

_BATCH = 500


@dataclass(frozen=True)
class RobustnessSpec:
    """How trained networks are attacked, and at which radii they are certified; grey levels, so 8 is 8/255.

    Attributes:
        norm, eps: what the attacker may do.
        steps, restarts, queries: of the attacks, see `sao_prune.analysis.worst_case`.
        images: so many of the test images are attacked, every class with its share; ``None`` for all.
        radii: in l2, at which certified accuracy is measured on all test images; the network must be a chain of layers
            with known Lipschitz bounds.
        choose: what learning rates are chosen by: accuracy under `pgd` (``robust``), at the first radius
            (``certified``), or without attack (``clean``).
    """

    norm: str = rule(choices=get_args(Norm))
    eps: float = rule(gt=0)
    steps: int = rule(20, ge=1)
    restarts: int = rule(1, ge=1)
    queries: int = rule(200, ge=1)
    images: int | None = rule(None, ge=1)
    radii: tuple[float, ...] = rule((), gt=0)
    choose: str = rule("robust", choices=("clean", "robust", "certified"))

    def problem(self) -> tuple[str, str] | None:
        """What is chosen by is measured."""
        if self.choose == "certified" and not self.radii:
            return "choose", "choosing by certified accuracy needs radii"
        return None

    @property
    def threat(self) -> Threat:
        """What an attacker may do to images in [0, 1]."""
        return Threat(cast(Norm, self.norm), self.eps / GREY_LEVELS)


def check_bounds(model: nn.Module) -> None:
    """Find out whether certificates can be given for a network.

    Raises:
        LabError: if a bound is not known.
    """
    try:
        with torch.no_grad():
            margin_constants(model, iterations=1)
    except TypeError as error:
        raise LabError(f"radii: {error}") from error


def measure(model: nn.Module, data: Dataset, spec: RobustnessSpec, seed: int, whole: bool) -> dict[str, Any]:
    """Attack a trained network on the test set's images, and certify what can be.

    Args:
        model: takes standardised images; on the data's device.
        data: whose test images.
        spec: how.
        seed: of everything random.
        whole: with every attack, not only the first.

    Returns:
        Fractions by name: ``clean``, ``pgd``, ``worst`` (all attacks, if ``whole``) on the attacked images;
        ``certified``, one for every radius, on all; the bound ``lipschitz`` on what a unit (l2) of an image in [0, 1]
        moves logits by; and ``broken``, how many attacked images were certified beyond the attack and yet broken, which
        should be none.
    """
    network = OnPixels(model, data)
    x, y = _chosen(data, spec.images)
    clean, after, right = 0.0, dict[str, float](), []
    for images, labels in zip(x.split(_BATCH), y.split(_BATCH)):
        queries = spec.queries if whole else 0
        found = worst_case(
            network,
            images.float() / GREY_LEVELS,
            labels,
            spec.threat,
            steps=spec.steps,
            restarts=spec.restarts,
            queries=queries,
            seed=seed,
        )
        share = len(images) / len(x)
        clean += share * found.clean
        after = {name: after.get(name, 0.0) + share * value for name, value in found.after.items()}
        right.append(found.right)
    result: dict[str, Any] = {"clean": clean, "pgd": after["pgd"]}
    if whole:
        result["worst"] = float(torch.cat(right).double().mean())
    return result | (_certified(network, data, spec, x, y, torch.cat(right)) if spec.radii else {})


def score(result: Mapping[str, Any], spec: RobustnessSpec | None) -> float:
    """What learning rates are chosen by, a fraction."""
    if spec is None or spec.choose == "clean":
        return float(result["accuracy"])
    robustness = result["robustness"]
    return float(robustness["certified"][0] if spec.choose == "certified" else robustness["pgd"])


def _certified(
    network: OnPixels, data: Dataset, spec: RobustnessSpec, x: Tensor, y: Tensor, right: Tensor
) -> dict[str, Any]:
    """What concerns certificates."""
    # Layers must have seen an input once to say how they treat its size.
    radii = torch.cat([_logits(network, part) for part in data.test_x.split(_BATCH)])
    constants = network.lipschitz * margin_constants(network.model)
    certified = certified_radii(radii, data.test_y, constants)
    attacked = certified_radii(torch.cat([_logits(network, part) for part in x.split(_BATCH)]), y, constants)
    # In l2 the corner of a cube of half-width eps is this far away.
    reach = spec.threat.eps * (x[0].numel() ** 0.5 if spec.norm == "linf" else 1.0)
    return {
        "certified": [float((certified > radius / GREY_LEVELS).double().mean()) for radius in spec.radii],
        "broken": int(((attacked > reach) & ~right).sum()),
        "lipschitz": float(network.lipschitz * lipschitz_bound(network.model)),
    }


def _chosen(data: Dataset, count: int | None) -> tuple[Tensor, Tensor]:
    if count is None or count >= len(data.test_y):
        return data.test_x, data.test_y
    chosen = stratified_subset(data.test_y, count, seed=0)
    return data.test_x[chosen], data.test_y[chosen]


def _logits(network: OnPixels, images: Tensor) -> Tensor:
    with undisturbed(network), torch.no_grad():
        return network(images.float() / GREY_LEVELS)  # type: ignore[no-any-return]
