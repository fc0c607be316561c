"""How isometric: very deep networks, ECO convolutions, p-values over many draws, certified accuracy.

`python benchmarks/isometry.py` prints the numbers of docs/properties.md that are in no figure.
"""

from __future__ import annotations

import argparse
import warnings
from time import perf_counter

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import sao_prune
from sao_prune import SAO, analysis, figures
from sao_prune.models import LipConvNet
from sao_prune.nn import ECOConv2d, SkewConv2d

ALL = {"skip_first": False, "skip_last": False, "seed": 0}


def deep() -> None:
    """Networks of many layers with mirrored weights."""
    mlp: list[nn.Module] = [nn.Linear(16, 64, bias=False), nn.ReLU()]
    for _ in range(998):
        mlp += [nn.Linear(64, 64, bias=False), nn.ReLU()]
    mlp += [nn.Linear(64, 32, bias=False)]
    cnn: list[nn.Module] = [nn.Conv2d(4, 16, 3, padding=1, bias=False), nn.ReLU()]
    for _ in range(198):
        cnn += [nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.ReLU()]
    cnn += [nn.Conv2d(16, 8, 3, padding=1, bias=False)]
    for name, layers, x in (
        ("MLP, 1000 layers, 87.5 %", mlp, torch.randn(1, 16)),
        ("CNN, 200 layers, 75 %", cnn, torch.randn(1, 4, 6, 6)),
    ):
        for method in (SAO(nonlinearity="relu"), SAO()):
            net = nn.Sequential(*layers)
            sao_prune.apply(net, groups=8 if "MLP" in name else 4, method=method, **ALL)  # type: ignore[arg-type]
            s = analysis.jacobian_spectrum(net, x)
            sao_prune.remove(net)
            kind = "mirrored" if method.nonlinearity else "plain"
            print(f"{name}, ReLU, {kind}: singular values {s.smallest:.6g} .. {s.largest:.6g}")


def convolutions() -> None:
    """Singular values of single layers by their dense operators."""
    warnings.simplefilter("ignore")
    for k, stride, groups, n in ((3, 1, 1, 9), (3, 2, 4, 12), (4, 1, 2, 8), (3, 1, 2, 1), (3, 1, 1, 8), (3, 1, 4, 8)):
        layer = ECOConv2d(8, 8, k, stride, groups, seed=0)
        s = analysis.singular_values(layer, (8, n, n))
        state = "exact" if layer.exact_at(n) else "NOT exact"
        print(f"ECO k={k} stride={stride} groups={groups} on {n} x {n}: {s[-1]:.7f} .. {s[0]:.7f} ({state})")
    for n in (9, 8):
        net = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1))
        sao_prune.apply(net, groups=2, method=SAO(conv="eco"), **ALL)  # type: ignore[arg-type]
        s = analysis.singular_values(net[0], (8, n, n))
        print(f"ECO init only, 3 x 3, zero padding, {n} x {n}: {s[-1]:.4f} .. {s[0]:.4f}, mean {s.mean():.4f}")
    s = analysis.singular_values(SkewConv2d(8, 8, 3, seed=0).eval(), (8, 8, 8))
    print(f"SOC k=3 on 8 x 8, 12 terms: {s[-1]:.7f} .. {s[0]:.7f}")


def similarity(draws: int) -> None:
    """Table 4.1 over many draws: quantiles of the p-value."""
    found: dict[tuple[str, str], list[float]] = {}
    for seed in range(draws):
        for act, by_method in figures.layer_values(seed).items():
            for method, values in by_method.items():
                p = analysis.ks_test(by_method["dense"], values).pvalue
                found.setdefault((act, method), []).append(p)
    for (act, method), pvalues in found.items():
        if method != "dense":
            q = torch.tensor(pvalues, dtype=torch.float64).quantile(
                torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
            )
            print(f"{act}, {method}: p = {q[1]:.3g} ({q[0]:.3g} .. {q[2]:.3g})")


def images() -> tuple[Tensor, Tensor]:
    """Digits, 8 x 8, every pixel drawn 3 x 3; shuffled."""
    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x.repeat_interleave(3, 2).repeat_interleave(3, 3)[order], torch.tensor(data.target)[order]


def certificates(steps: int) -> None:
    """A small LipConvNet-5 on digits: accuracy, certified accuracy, accuracy under attack."""
    x, y = images()
    for groups in (1, 4):
        start = perf_counter()
        torch.manual_seed(0)
        model = LipConvNet(5, width=8, in_chans=1, groups=groups, seed=0)
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(steps):
            batch = torch.randint(1400, (64,))
            optimizer.zero_grad()
            nn.functional.cross_entropy(4 * model(x[batch]), y[batch]).backward()
            optimizer.step()
        for radius in (36 / 255, 0.5, 1.0):
            c = analysis.certified_accuracy(model, x[1400:], y[1400:], radius)
            attacked = analysis.pgd_l2(model, x[1400:], y[1400:], radius)
            right = model.eval()(attacked).argmax(1) == y[1400:]
            print(
                f"LipConvNet-5, width 8, {groups} blocks, radius {radius:.3f}: accuracy {100 * c.accuracy:.1f} %, "
                f"certified {100 * c.certified_accuracy:.1f} %, under attack {100 * right.double().mean():.1f} %, "
                f"certified and broken: {int((c.certified & ~right).sum())}"
            )
        print(f"  {perf_counter() - start:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=100, help="draws of table 4.1")
    parser.add_argument("--steps", type=int, default=100, help="training steps of the LipConvNet")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    deep()
    convolutions()
    similarity(options.draws)
    certificates(options.steps)


if __name__ == "__main__":
    main()
