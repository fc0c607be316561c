"""What a recipe says about its images or sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..schema import rule, unknown
from .augment import AUGMENTATIONS
from .names import dataset_names, is_sequences, name_problem


@dataclass(frozen=True)
class DataSpec:
    """Which images or sequences, how many, how large, and how they are varied while training.

    Attributes:
        name: one of `dataset_names`, ``torchvision/NAME``, ``timm/NAME``, ``folder:PATH`` or ``text:PATH``.
        holdout: share of every training class that learning rates are chosen on.
        size: side of the square images. Smaller ones of MNIST's, CIFAR's and CINIC's kind are padded with black; larger
            ones, and those of any other set, are resized.
        subset: so many training images, a fixed choice in which every class keeps its share; None for all.
        test_subset: the same for the test images.
        length: of sequences: steps of a window of text, or blank steps between reading and repeating of ``copying``.
        augment: any of ``crop`` (padding 4), ``flip`` and ``autoaugment`` (CIFAR-10's policy), applied in this order.

    Example:
        >>> DataSpec("cifar-10", size=36, augment=("crop", "flip")).problem()
        >>> DataSpec("cifar").problem()
        ('name', "unknown data set 'cifar' (did you mean 'cifar-10'?); ...
    """

    shorthand: ClassVar[str] = "name"

    name: str
    holdout: float = rule(0.2, gt=0, lt=1)
    size: int = rule(32, ge=8, le=512)
    subset: int | None = rule(None, ge=1)
    test_subset: int | None = rule(None, ge=1)
    augment: tuple[str, ...] = rule((), choices=AUGMENTATIONS)
    length: int | None = rule(None, ge=2, le=4096)

    def problem(self) -> tuple[str, str] | None:
        """A name that can be a data set's, and no augmentation twice."""
        if message := name_problem(self.name):
            return "name", message
        if is_sequences(self.name) != (self.length is not None):
            return "length", "length is what a set of sequences (copying, text:PATH) must have, and no other has"
        if self.augment and is_sequences(self.name):
            return "augment", f"nothing augments sequences, got {', '.join(self.augment)}"
        for choice in self.augment:
            if choice not in AUGMENTATIONS:
                return "augment", unknown("augmentation", choice, AUGMENTATIONS)
        if len(set(self.augment)) < len(self.augment):
            return "augment", "a value is given twice"
        return None


__all__ = ["DataSpec", "dataset_names"]
