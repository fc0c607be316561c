"""What one training is: the part of a recipe that every method shares."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import ClassVar, cast, get_args

from ...analysis.threat import Norm, Threat
from ...distillation import Distillation
from ..schema import rule


@dataclass(frozen=True)
class ScheduleSpec:
    """How the learning rate changes over the epochs, as timm's schedulers do it.

    Attributes:
        name: ``constant``; ``multistep``, times ``factor`` after as many epochs as each milestone says; ``cosine``,
            from the learning rate at the start of the first epoch to ``final_lr`` at the end of the last.
        warmup_epochs: so many first epochs climb in equal steps from a hundredth of the learning rate to all of it.
            They are among the ``epochs``, and do not shift milestones or cosine.

    Example:
        >>> ScheduleSpec("cosine", final_lr=1e-6, warmup_epochs=5).final_lr
        1e-06
    """

    shorthand: ClassVar[str] = "name"

    name: str = rule("constant", choices=("constant", "multistep", "cosine"))
    milestones: tuple[int, ...] | None = rule(None, ge=1)
    factor: float = rule(0.1, gt=0, lt=1)
    warmup_epochs: int = rule(0, ge=0)
    final_lr: float = rule(0.0, ge=0)

    def problem(self) -> tuple[str, str] | None:
        """Milestones belong to multistep, which needs them; a floor belongs to cosine."""
        if (self.name == "multistep") != (self.milestones is not None):
            return "milestones", "milestones go with the schedule multistep, and with no other"
        if self.milestones is not None and list(self.milestones) != sorted(set(self.milestones)):
            return "milestones", f"epochs in ascending order, got {list(self.milestones)}"
        if self.final_lr and self.name != "cosine":
            return "final_lr", "final_lr is where the schedule cosine ends; no other has one"
        return None


@dataclass(frozen=True)
class DistillSpec:
    """What a network that was pruned after a dense training learns from that dense one: see `Distillation`.

    Example:
        >>> DistillSpec(0.9, blocks=("layers.*",)).options()
        Distillation(weight=0.9, temperature=4.0, blocks=('layers.*',), block_weight=1.0, dim=-1)
    """

    shorthand: ClassVar[str] = "weight"

    weight: float = rule(0.5, ge=0, le=1)
    temperature: float = rule(4.0, gt=0)
    blocks: tuple[str, ...] = ()
    block_weight: float = rule(1.0, ge=0)

    def options(self) -> Distillation:
        """The library's options."""
        return Distillation(self.weight, self.temperature, self.blocks, self.block_weight)


@dataclass(frozen=True)
class AdversarialSpec:
    """An attacker who moves the images that a network learns from.

    Attributes:
        norm: by which it is measured how far, ``linf`` or ``l2``.
        eps: how far at most, in grey levels: 8 is what papers write as 8/255.
        steps: of the ascent for every batch; each costs about as much as a training step.
        step_size: in grey levels; 2.5 eps / steps if left out.

    Example:
        >>> AdversarialSpec("l2", eps=51).threat()
        Threat(norm='l2', eps=0.2, low=0.0, high=1.0)
    """

    norm: str = rule(choices=get_args(Norm))
    eps: float = rule(gt=0)
    steps: int = rule(7, ge=1)
    step_size: float | None = rule(None, gt=0)

    def threat(self) -> Threat:
        """What it may do to images in [0, 1]."""
        return Threat(cast(Norm, self.norm), self.eps / 255)


@dataclass(frozen=True)
class LossSpec:
    """What is minimised: cross-entropy, alone or with an eye on certificates (`CertifiedLoss`).

    Attributes:
        eps: of ``emma``: the radius that is to be certified, in grey levels.
        weight: of ``certificate``: how much the certified radius counts.
    """

    shorthand: ClassVar[str] = "name"

    name: str = rule("cross-entropy", choices=("cross-entropy", "emma", "certificate"))
    eps: float | None = rule(None, gt=0)
    weight: float | None = rule(None, gt=0)

    @property
    def is_certified(self) -> bool:
        """It needs the network's Lipschitz constants."""
        return self.name != "cross-entropy"

    def problem(self) -> tuple[str, str] | None:
        """Each loss has its own constant."""
        for key, name in (("eps", "emma"), ("weight", "certificate")):
            if (getattr(self, key) is not None) != (self.name == name):
                return key, f"{key} is what the loss {name} needs, and no other has"
        return None


@dataclass(frozen=True)
class TrainSpec:
    """One training, for every method the same.

    Attributes:
        momentum: of ``momentum`` and ``nesterov``; ``betas`` are those of ``adam`` and ``adamw``.
        cutmix: the probability with which a batch is cut and mixed (alpha 1), 0 for none.
        mixup: the alpha of MixUp's Beta distribution, 0 for none; it takes the batches that CutMix leaves.
        clip: the largest norm of the gradient, 0 for no limit.
        ema: decay of the exponential moving average of the weights, which is then what is evaluated; 0 for none. Early
            on it is lower, ``1 - (1 + step) ** (-2/3)``, so that the average leaves the initial weights behind.
        amp: ``bf16`` runs the network under `torch.autocast`; the weights stay in float32.
        execution: ``masked``; ``compact``, wherever the masks are made of blocks; or ``auto``, compact where that is
            faster as well.
        scaling: ``supar`` divides the rate of every weight by its width and its density, relative to the dense network
            as the recipe says it, and scales initial weights that were drawn for the dense layer to their density; for
            Adam.
        move_every: optimizer steps between moves of methods that move (`sao_prune.Moves`).
        move_until: the share of the training after which nothing moves any more.
        further_epochs: epochs after pruning of methods that prune a trained network; as many as ``epochs`` if left out.
        distill: what these learn from that network, beside the labels.
        loss: what is minimised; the losses for certificates need a network whose Lipschitz constants are known.
        adversarial: learn from images that an attacker has moved; ``None`` for none.
        hold: blocks stay orthogonal through the training (`sao_prune.hold`).
        isometry_every: record layer isometry after every so many epochs, and at the start; 0 for never.

    Example:
        >>> TrainSpec(epochs=90, batch_size=128, schedule=ScheduleSpec("multistep", milestones=(30, 60))).optimizer
        'momentum'
    """

    epochs: int = rule(ge=1)
    batch_size: int = rule(ge=1)
    optimizer: str = rule("momentum", choices=("momentum", "nesterov", "adam", "adamw"))
    momentum: float = rule(0.9, ge=0, lt=1)
    betas: tuple[float, ...] = rule((0.9, 0.999), ge=0, lt=1)
    weight_decay: float = rule(0.0, ge=0)
    schedule: ScheduleSpec = ScheduleSpec()
    label_smoothing: float = rule(0.0, ge=0, lt=1)
    mixup: float = rule(0.0, ge=0)
    cutmix: float = rule(0.0, ge=0, le=1)
    clip: float = rule(0.0, ge=0)
    ema: float = rule(0.0, ge=0, lt=1)
    amp: str = rule("off", choices=("off", "bf16"))
    channels_last: bool = False
    compile: bool = False
    execution: str = rule("auto", choices=("masked", "compact", "auto"))
    scaling: str = rule("none", choices=("none", "supar"))
    move_every: int = rule(100, ge=1)
    move_until: float = rule(0.75, gt=0, le=1)
    isometry_every: int = rule(0, ge=0)
    further_epochs: int | None = rule(None, ge=1)
    distill: DistillSpec | None = None
    loss: LossSpec = LossSpec()
    adversarial: AdversarialSpec | None = None
    hold: bool = False

    def problem(self) -> tuple[str, str] | None:
        """Two betas; a scaling that is derived for Adam; what goes with holding and with certificates."""
        if self.scaling == "supar" and self.optimizer not in ("adam", "adamw"):
            return "scaling", f"supar is derived for adam and adamw, got {self.optimizer}"
        if len(self.betas) != 2:
            return "betas", f"Adam has two, e.g. [0.9, 0.999], got {len(self.betas)}"
        if self.hold and (self.execution == "compact" or self.scaling != "none"):
            return "hold", "held weights run masked, and their rates are not scaled: leave execution and scaling out"
        if self.loss.is_certified and (self.mixup or self.cutmix or self.compile or self.execution == "compact"):
            return "loss", f"{self.loss.name} needs whole labels and plain layers: no mixup, cutmix, compile, compact"
        return None

    def first(self) -> TrainSpec:
        """The training from initial weights."""
        return replace(self, further_epochs=None, distill=None)

    def further(self) -> TrainSpec:
        """The training of a network that was pruned after a first one."""
        return replace(self, epochs=self.further_epochs or self.epochs, further_epochs=None)

    def steps(self, images: int) -> int:
        """Optimizer steps on so many training images."""
        return ceil(images / self.batch_size) * self.epochs
