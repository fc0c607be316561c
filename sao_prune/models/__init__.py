"""The networks of the experiments, registered with timm where timm is installed."""

from .mlp import SaoMLP, sao_mlp, sao_mlp7

__all__ = ["SaoMLP", "sao_mlp", "sao_mlp7"]
