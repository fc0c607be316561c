"""Project: from trained weights to blocks that do the same on calibration data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import isfinite
from numbers import Real
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from ..allocation import Allocation
from ..seeds import from_rank_zero
from ..topology import GENERATORS
from .base import Method, Stage, choice, register
from .batches import Replayed
from .conversion import convert
from .draw import Draw, Values
from .saliency import check_count


@register
@dataclass(frozen=True, eq=False)
class Project(Method):
    """Blocks for a trained model: sets that keep most of its energy, values that keep what its layers compute.

    A single forward pass of the calibration data visits the layers in the order of their execution. Each is converted
    when all data have reached it, so its inputs come from the layers that are converted already. Beside it the whole
    model runs, and says what the layer should give. *Where*: balanced co-clustering of the input-weighted energy
    ``|W|^2 diag(S)`` with ``S`` the covariance of the inputs. *What*: least squares block by block,
    ``B = W_C + E[(y - W_C x_C) x_C^T] (S_CC + lambda I)^-1``, which on these data is never worse than the values kept.
    The target ``y`` is the layer's output in the whole model, for that one's inputs; where the output ends a residual
    branch, in sight of norms, dropout and layer scale, it also makes up for what the residual stream has lost up to
    there. So errors are corrected on the way instead of adding up. Biases take up the difference of the means, batch
    norms in the converted part new statistics, and a last linear layer that stays dense is fitted to the features that
    it gets now.

    Linear layers, convolutions (grouped too), attention, recurrent layers over all steps of a sequence (recurrent
    weights stay a hundred times nearer to the values kept, for what a step gets wrong comes back to it) and experts,
    each for the examples that come to it. What is used otherwise keeps its values on sets of its own energy, and the
    report says so: transposed convolutions, recurrent cells, weights that are standardised.

    Of no use to a model that is not trained: there `SAO` draws values that train.

    Attributes:
        inputs: calibration data, a few hundred examples without labels: a tensor, a mapping of keyword arguments, or an
            iterable of batches, each one of these or a tuple that begins with one. In a distributed run those of rank 0
            count.
        topology: ``"clustered"``; ``"ramanujan"`` or ``"interleaved"``, which do not look at the weight.
        values: ``"least_squares"``; ``"keep"``; ``"orthogonal"``, the polar factors of the least-squares blocks with
            one gain a matrix.
        ridge: added to the diagonal of the inputs' covariance, as a share of its mean; pulls towards the values kept.
        samples: examples that are read from ``inputs``. The pass holds all of them in both models, as two large batches
            would.
        rows: rows of inputs a layer takes of them, a random choice where there are more (tokens, image positions).
        correct: correct biases and take the statistics of batch norms anew.
        readout: fit the model's last layer anew, where it is linear and stays dense; the ridge for it is chosen by
            generalised cross-validation, and where examples are too few for it nothing changes.
        shared_sets: where one converted layer alone reads the outputs of another, through elementwise functions and
            batch norms, both get one partition of these channels, searched for both: between them no channel has to
            move when the model runs compact. Their blocks then are separate small networks, which fit worse.

    Raises:
        ValueError: for an option out of range.

    Example:
        >>> import torch, sao_prune
        >>> net = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(3)))
        >>> x = torch.randn(256, 16)
        >>> report = sao_prune.apply(net, groups=4, method=sao_prune.Project(inputs=x), seed=0)
        >>> fidelity = report.layers[1].fidelity
        >>> fidelity.error <= fidelity.error_kept
        True
    """

    name: ClassVar[str] = "project"

    inputs: Any = field(default=None, repr=False)
    topology: str = "clustered"
    values: Literal["least_squares", "keep", "orthogonal"] = "least_squares"
    ridge: float = 0.01
    samples: int = 512
    rows: int = 16384
    correct: bool = True
    readout: bool = True
    shared_sets: bool = False

    # The inputs may be tensors, whose equality is no single answer.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __post_init__(self) -> None:
        if isinstance(self.inputs, Iterator):
            # Asked for once, a generator has nothing left for the next pruning of a schedule.
            object.__setattr__(self, "inputs", Replayed(self.inputs))
        choice("topology", self.topology, ("clustered", *GENERATORS))
        choice("values", self.values, ("least_squares", "keep", "orthogonal"))
        check_count("samples", self.samples)
        check_count("rows", self.rows)
        if self.shared_sets and self.topology != "clustered":
            raise ValueError(f"shared_sets needs topology='clustered', got topology={self.topology!r}")
        if (
            isinstance(self.ridge, bool)
            or not isinstance(self.ridge, Real)
            or not self.ridge > 0
            or not isfinite(self.ridge)
        ):
            raise ValueError(f"ridge must be a positive finite number, got {self.ridge!r}")

    @property
    def origin(self) -> Values:
        """Kept, or solved for on the calibration data."""
        return "kept" if self.values == "keep" else "solved"

    @property
    def structured(self) -> bool:
        """Whether supports are block topologies."""
        return True

    def draw(self, allocations: Sequence[Allocation], weights: Sequence[Tensor], seed: int) -> list[Draw]:
        """Refused: weights alone do not tell what they are used for.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            "Project needs the whole model: use sao_prune.apply(model, method=sao_prune.Project(inputs=..))"
        )

    def draw_for(
        self, model: nn.Module, allocations: Sequence[Allocation], weights: Sequence[Tensor], seed: int
    ) -> list[Draw]:
        """Convert a copy of the model, layer by layer, and tell what came of it.

        Raises:
            TypeError: for data of a kind that `Project` does not take.
            ValueError: without data, for data that are not finite or on which the model does not run, or if the model
                cannot be copied.
        """
        return from_rank_zero(lambda: convert(self, model, allocations, seed))

    @property
    def gradual(self) -> bool:
        """Sets can be split on the way, inside those that there are."""
        return True

    def revise(self, model: nn.Module, stage: Stage, weights: Sequence[Tensor], seed: int) -> list[Draw]:
        """Split the sets that there are, and fit values on what the model computes now."""
        return convert(self, model, stage.allocations, seed, stage)
