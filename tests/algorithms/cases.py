"""Small networks and data for the saliency methods, and the masks that they get."""

import copy
from itertools import pairwise

import torch
from torch import nn

import sao_prune

ALL = {"skip_first": False, "skip_last": False}


def mlp(*widths, act=nn.Identity, bias=True):
    layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b, bias=bias), act())]
    return nn.Sequential(*layers[:-1])


def digits(n=24, width=6, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, width, generator=generator), torch.arange(n) % classes


def masks(model):
    return [m.weight_mask for m in model.modules() if hasattr(m, "weight_mask")]


def pruned(model, method, sparsity=0.5, **options):
    model = copy.deepcopy(model)
    sao_prune.apply(model, sparsity=sparsity, method=method, **{"seed": 0, **ALL, **options})
    return masks(model)
