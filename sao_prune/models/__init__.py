"""The networks of the experiments, registered with timm where timm is installed."""

from .lipconvnet import LipConvNet, sao_lipconvnet
from .mlp import SaoMLP, sao_mlp, sao_mlp7

__all__ = ["LipConvNet", "SaoMLP", "sao_lipconvnet", "sao_mlp", "sao_mlp7"]
