"""Layers that are more than a mask: orthogonal convolutions and the activation that keeps norms."""

from .eco import ECOConv2d, InexactConvolutionWarning
from .maxmin import MaxMin
from .skew import SkewConv2d

__all__ = ["ECOConv2d", "InexactConvolutionWarning", "MaxMin", "SkewConv2d"]
