"""What timm asks of every classifier of images, once for all networks of the experiments."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class ImageClassifier(nn.Module):
    """Features, one vector made of them, a linear classifier.

    A subclass registers its layers in the order of their execution, calls `add_head` last, and defines
    `forward_features`; also `pooled`, if its features are not one vector an image.

    Shape:
        ``(batch, in_chans, img_size, img_size)`` to ``(batch, num_classes)``.
    """

    num_classes: int
    num_features: int
    head_hidden_size: int
    head: nn.Module
    pretrained_cfg: dict[str, Any]

    def add_head(
        self, num_features: int, num_classes: int, image: tuple[int, int, int], first: str, hidden: int | None = None
    ) -> None:
        """The classifier, and the configuration that names the model's ends.

        Args:
            num_features: channels of what `forward_features` returns.
            num_classes: outputs; 0 for none.
            image: channels, height and width of the input.
            first: path of the layer that reads the image.
            hidden: length of what `pooled` returns, if it is not ``num_features``.

        Raises:
            ValueError: if ``num_classes`` is negative or no integer.
        """
        if not isinstance(num_classes, int) or isinstance(num_classes, bool) or num_classes < 0:
            raise ValueError(f"num_classes must be a positive integer, or 0 for no classifier, got {num_classes!r}")
        self.num_features = num_features
        self.head_hidden_size = num_features if hidden is None else hidden
        self.pretrained_cfg = {
            "input_size": image,
            "num_classes": num_classes,
            "first_conv": first,
            "classifier": "head",
        }
        self.reset_classifier(num_classes)

    def get_classifier(self) -> nn.Module:
        """The classifier, as timm asks for it."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier for ``num_classes`` classes; 0 leaves the features as they are (timm's convention)."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.head_hidden_size, num_classes) if num_classes > 0 else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        """Output of the last layer before the pooling."""
        raise NotImplementedError(f"{type(self).__name__} defines no forward_features")

    def pooled(self, features: Tensor) -> Tensor:
        """What the classifier sees, shape ``(batch, head_hidden_size)``."""
        return features

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of features, or what the classifier sees if ``pre_logits``."""
        x = self.pooled(x)
        return x if pre_logits else self.head(x)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def global_pool() -> nn.Sequential:
    """The mean over all positions, ``(batch, channels, height, width)`` to ``(batch, channels)``."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
