"""The networks of the experiments, in timm's registry as soon as timm is imported."""

from .decoder import SaoDecoder, sao_decoder
from .lipconvnet import LipConvNet, sao_lipconvnet
from .mixer import SaoMixer, sao_mixer_nano
from .mlp import SaoMLP, sao_mlp, sao_mlp7
from .recurrent import SaoRecurrent, sao_recurrent
from .residual import SaoResNet, sao_resnet, sao_resnet18
from .resmlp import SaoResMLP, sao_resmlp
from .vanilla import VanillaCNN, sao_vanilla_cnn
from .vgg16 import SaoVGG, sao_vgg16

__all__ = [
    "LipConvNet",
    "SaoDecoder",
    "SaoMLP",
    "SaoMixer",
    "SaoRecurrent",
    "SaoResMLP",
    "SaoResNet",
    "SaoVGG",
    "VanillaCNN",
    "sao_decoder",
    "sao_lipconvnet",
    "sao_mixer_nano",
    "sao_mlp",
    "sao_mlp7",
    "sao_recurrent",
    "sao_resmlp",
    "sao_resnet",
    "sao_resnet18",
    "sao_vanilla_cnn",
    "sao_vgg16",
]
