"""What the networks over sequences share: images read pixel by pixel, or tokens, and one classifier for both."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .classifier import ImageClassifier
from .options import check_choice, check_sizes

READING = ("pixels", "rows")


class SequenceClassifier(ImageClassifier):
    """A network over sequences: of the pixels or rows of an image, or of tokens.

    Of an image it reads one step after the other and answers once, after the last. Of tokens it answers at every step.
    A subclass defines `forward_sequence` and calls `read_images` or `read_tokens` first, `add_head` last.

    Shape:
        Images ``(batch, in_chans, img_size, img_size)`` to ``(batch, num_classes)``; tokens ``(batch, steps)``, int64,
        to ``(batch, num_classes, steps)``, as `torch.nn.functional.cross_entropy` takes them.
    """

    permutation: Tensor | None
    embedding: nn.Embedding | None

    def read_images(self, reading: str, permuted: bool, in_chans: int, img_size: int) -> tuple[int, int]:
        """Set up for images; returns steps and features a step.

        Args:
            reading: a ``pixels`` or a ``rows`` a step.
            permuted: steps in a fixed random order, the same for every network of this size, so that neighbours in the
                image lie far apart in time (Le et al., 2015, https://arxiv.org/abs/1504.00941).

        Raises:
            ValueError: for an unknown reading or a size below one.
        """
        check_choice("reading", reading, READING)
        check_sizes(in_chans=in_chans, img_size=img_size)
        self.embedding = None
        self._by_rows = reading == "rows"
        steps, features = (img_size, in_chans * img_size) if self._by_rows else (img_size**2, in_chans)
        fixed = torch.randperm(steps, generator=torch.Generator().manual_seed(0)) if permuted else None
        self.register_buffer("permutation", fixed, persistent=False)
        return steps, features

    def read_tokens(self, tokens: int, width: int) -> None:
        """Set up for ``tokens`` different tokens, each a trainable vector of ``width``."""
        check_sizes(tokens=tokens)
        self.embedding = nn.Embedding(tokens, width)
        # Vectors of length one: torch's own, as long as the root of the width, drive the tanh of a recurrence into
        # saturation at every step, and what it remembered is gone.
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        self.register_buffer("permutation", None)

    def steps_of(self, x: Tensor) -> Tensor:
        """Images or tokens as ``(batch, steps, features)``."""
        if self.embedding is not None:
            return self.embedding(x)  # type: ignore[no-any-return]
        batch, channels, height, width = x.shape
        steps = (
            x.transpose(1, 2).reshape(batch, height, channels * width)
            if self._by_rows
            else x.reshape(batch, channels, height * width).transpose(1, 2)
        )
        return steps if self.permutation is None else steps[:, self.permutation]

    def forward_sequence(self, steps: Tensor) -> Tensor:
        """``(batch, steps, features)`` to ``(batch, steps, width)``; no step may see a later one."""
        raise NotImplementedError(f"{type(self).__name__} defines no forward_sequence")

    def forward_features(self, x: Tensor) -> Tensor:
        """What the last layer makes of every step, shape ``(batch, steps, width)``."""
        return self.forward_sequence(self.steps_of(x))

    def pooled(self, features: Tensor) -> Tensor:
        """The last step's, shape ``(batch, width)``, of images; every step's of tokens."""
        return features[:, -1] if self.embedding is None else features

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of features, or what the classifier sees if ``pre_logits``."""
        logits = super().forward_head(x, pre_logits)
        return logits if pre_logits or self.embedding is None else logits.transpose(1, 2)
