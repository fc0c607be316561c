"""Small networks that read their weights in every way that a model may."""

import torch
from torch import nn
from torch.nn import functional as F


class ReadsWeights(nn.Module):
    """As attention modules of timm do: uses a child's weight without calling the child."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(16, 16, bias=False)
        self.proj = nn.Linear(16, 16)

    def forward(self, x):
        return self.proj(F.linear(x, self.qkv.weight))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.reader = ReadsWeights()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.lstm = nn.LSTM(16, 16, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = torch.tanh(self.conv(torch.tanh(self.stem(x))))
        x = self.grouped(x).flatten(2).mT
        x = self.reader(x)
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.lstm(x)[0].mean(1))


def image():
    return torch.randn(2, 3, 4, 4)


def masks_hold(model):
    for module in model.modules():
        for name in [n[:-5] for n in module._buffers if n.endswith("_mask")]:
            used, mask = getattr(module, name), getattr(module, f"{name}_mask")
            if bool((used[mask == 0] != 0).any()):
                return False
    return True


class ReadsDeeply(nn.Module):
    """Reads weights of modules that neither it nor their parent ever calls."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.block = nn.Sequential(nn.Sequential(nn.Linear(16, 16)))
        self.last = nn.Linear(16, 4)

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = F.linear(x, layer.weight, layer.bias)
        inner = self.block[0][0]
        x = inner(x) if self.training else F.linear(x, inner.weight, inner.bias)
        return self.last(inner(F.linear(x, inner.weight)))
