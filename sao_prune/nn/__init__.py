"""Layers that are more than a mask: orthogonal convolutions and the activation that keeps norms."""

from .convert import ConvertRecord, ConvertReport, convert_eco
from .eco import ECOConv2d, InexactConvolutionWarning
from .maxmin import MaxMin
from .skew import SkewConv2d

__all__ = [
    "ConvertRecord",
    "ConvertReport",
    "ECOConv2d",
    "InexactConvolutionWarning",
    "MaxMin",
    "SkewConv2d",
    "convert_eco",
]
