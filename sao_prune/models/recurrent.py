"""Recurrent networks: tanh or ReLU RNN, GRU and LSTM over pixels or tokens (thesis, recommendation 2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .options import check_choice, check_sizes
from .registry import refuse_pretrained, register_model, without_timm_options
from .sequence import SequenceClassifier

CELLS = ("rnn", "rnn-relu", "gru", "lstm")


class SaoRecurrent(SequenceClassifier):
    """Recurrent layers over a sequence, a linear classifier on their last states.

    With an orthogonal recurrent matrix the linear part of a tanh RNN neither grows nor shrinks over any number of
    steps (Henaff et al., 2016, https://arxiv.org/abs/1602.06662; Arjovsky et al., 2016,
    https://arxiv.org/abs/1511.06464); SAO gives it one with blocks.

    Args:
        cell: ``rnn`` (tanh), ``rnn-relu``, ``gru`` or ``lstm`` (forget gates start at 1).
        depth: recurrent layers.
        width: states a layer.
        reading, permuted: see `SequenceClassifier.read_images`; not with ``tokens``.
        tokens: size of the vocabulary; None for images.

    Shape:
        As `SequenceClassifier`.

    Raises:
        ValueError: for an unknown cell or reading, or a size below one.

    Example:
        >>> import torch
        >>> SaoRecurrent("gru", width=8, img_size=4, in_chans=1)(torch.zeros(2, 1, 4, 4)).shape
        torch.Size([2, 10])
        >>> SaoRecurrent("rnn", width=8, tokens=5, num_classes=5)(torch.zeros(2, 7, dtype=torch.long)).shape
        torch.Size([2, 5, 7])
    """

    def __init__(
        self,
        cell: str = "rnn",
        depth: int = 1,
        width: int = 128,
        reading: str = "pixels",
        permuted: bool = False,
        tokens: int | None = None,
        num_classes: int = 10,
        in_chans: int = 1,
        img_size: int = 28,
    ) -> None:
        super().__init__()
        check_choice("cell", cell, CELLS)
        check_sizes(depth=depth, width=width)
        if tokens is None:
            _, features = self.read_images(reading, permuted, in_chans, img_size)
        else:
            self.read_tokens(tokens, width)
            features = width
        kind: Any = {"gru": nn.GRU, "lstm": nn.LSTM}.get(cell, nn.RNN)
        extra = {"nonlinearity": "relu"} if cell == "rnn-relu" else {}
        self.recurrence: nn.RNNBase = kind(features, width, depth, batch_first=True, **extra)
        if cell == "lstm":
            _remember(self.recurrence)
        first = "recurrence" if tokens is None else "embedding"
        self.add_head(width, num_classes, (in_chans, img_size, img_size), first)

    def forward_sequence(self, steps: Tensor) -> Tensor:
        """States of the last layer at every step."""
        return self.recurrence(steps)[0]  # type: ignore[no-any-return]


def _remember(lstm: nn.RNNBase) -> None:
    """Forget gates start open (Jozefowicz et al., 2015, https://proceedings.mlr.press/v37/jozefowicz15.html)."""
    with torch.no_grad():
        for name, bias in lstm.named_parameters():
            if name.startswith("bias_ih"):
                bias.zero_()[lstm.hidden_size : 2 * lstm.hidden_size] = 1.0
            elif name.startswith("bias_hh"):
                bias.zero_()


@register_model
def sao_recurrent(pretrained: bool = False, cell: str = "rnn", **options: Any) -> SaoRecurrent:
    """One recurrent layer of 128 states over the pixels of an image, or over tokens.

    Args:
        pretrained: refused, there are no weights.
        cell: of `SaoRecurrent`.
        **options: `SaoRecurrent`'s.

    Returns:
        The network, with the weights that torch draws.

    Raises:
        ValueError: if an option is refused or ``pretrained`` is asked for.

    Example:
        >>> sao_recurrent(cell="lstm", width=16).recurrence.weight_hh_l0.shape
        torch.Size([64, 16])
    """
    refuse_pretrained("sao_recurrent", pretrained)
    return SaoRecurrent(cell, **without_timm_options(options))
