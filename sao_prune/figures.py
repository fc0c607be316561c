"""The thesis's table 4.1 and figures 4.2 to 4.6, 4.9 and 4.25, recomputed: everything that needs no training."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from .algorithms import RG, Method, resolve
from .analysis import plot
from .analysis.graph import adjacency_eigenvalues, ramanujan_gap
from .analysis.reach import model_masks, reachability
from .analysis.similarity import ks_test
from .files import replacing
from .model import apply
from .seeds import named_generator
from .topology import ramanujan

SPARSITIES = (0.5, 0.75, 0.875, 0.9375, 0.96875, 0.984375)
WIDTHS = (128, 256, 512, 1024)
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda h: h,
    "tanh": torch.tanh,
    "ReLU": torch.relu,
    "SiLU": torch.nn.functional.silu,
}
# One layer of the thesis's section 4.1.2: 256 x 256 with two inputs an output is 99.2 % sparse.
_WIDTH, _GROUPS = 256, 128
_DEPTHS = (1, 2, 3, 4, 6, 8, 12, 49)


@dataclass(frozen=True)
class Written:
    """What `write_figures` wrote: the paths, and the p-values of table 4.1 by activation and method."""

    paths: tuple[Path, ...]
    table: dict[str, dict[str, float]]


def write_figures(folder: str | Path, seed: int = 0, progress: Callable[[str], object] = lambda name: None) -> Written:
    """Recompute the thesis's table and figures that need no training, in light and dark, with their numbers as CSV.

    Args:
        folder: where to; made if missing.
        seed: of every draw.
        progress: told the name of each figure before it is made.

    Example:
        >>> write_figures("docs/figures")  # doctest: +SKIP
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []

    def draw(name: str, make: Callable[..., Figure], *data: object, title: str) -> None:
        for theme in ("light", "dark"):
            paths.append(plot.save(make(*data, title=title, theme=theme), folder / f"{name}-{theme}.png"))

    progress("figure 4.2: Ramanujan gap")
    gaps = _layer_gaps(seed)
    draw("gap", plot.gap_against_sparsity, gaps, SPARSITIES, title="Ramanujan gap of one layer, by both definitions")
    paths.append(_write_gaps(folder / "gap.csv", gaps))
    progress("figure 4.3: eigenvalues")
    spectra = {f"{w} x {w}": adjacency_eigenvalues(_rg_mask(w, 64, seed)) for w in WIDTHS}
    draw(
        "eigenvalues",
        plot.eigenvalue_spectra,
        spectra,
        title="Eigenvalues of the adjacency matrix: SAO topology at 98.4375 % sparsity",
    )
    progress("figures 4.4 and 4.9: reachability")
    title = "Which inputs of the first layer\nreach which outputs of the N-th\n256 x 256 layers, 98.4375 % sparse"
    draw("reachability", plot.reachability_matrices, _layer_reach(seed), title=title)
    title = "MLP-50, 98.4375 % sparse: which inputs of L1 reach which outputs of the k-th layer of width 256"
    draw("reachability-mlp50", plot.reachability_matrices, _mlp50_reach(seed), title=title)
    progress("figures 4.5 and 4.6, table 4.1: singular values")
    values = layer_values(seed)
    for name, methods in (("isometry-sao", ("dense", "SAO")), ("isometry-others", ("dense", "RG", "LMP", "LRP"))):
        chosen = {act: {m: by[m] for m in methods} for act, by in values.items()}
        title = "Singular values of one layer's Jacobian, 256 x 256, 99.2 % sparse"
        draw(name, plot.singular_value_histograms, chosen, title=title)
    table = {act: {m: ks_test(by["dense"], v).pvalue for m, v in by.items()} for act, by in values.items()}
    paths.append(_write_table(folder / "table-4-1.csv", table))
    progress("figure 4.25: storage")
    densities = [d / 100 for d in range(1, 101)]
    title = "Numbers to store a 1024 x 1024 matrix"
    draw("storage", plot.storage_against_density, densities, storage_curves(densities), title=title)
    return Written(tuple(paths), table)


def _layer_gaps(seed: int) -> dict[str, dict[str, dict[int, list[float]]]]:
    """Figure 4.2: ``[definition][method][width]``, one gap a sparsity."""
    out: dict[str, dict[str, dict[int, list[float]]]] = {}
    for method, name in (("lmp", "LMP"), ("lrp", "LRP"), ("rg", "SAO, RG")):
        for width in WIDTHS:
            gaps = [ramanujan_gap(_mask(width, sparsity, method, seed)) for sparsity in SPARSITIES]
            for definition in ("distinct", "standard"):
                curves = out.setdefault(definition, {}).setdefault(name, {})
                curves[width] = [float(getattr(gap, definition)) for gap in gaps]
    return out


def _layer_reach(seed: int) -> dict[str, dict[str, Tensor]]:
    """Figure 4.4: reachability after 1, 3 and 5 layers of width 256; with the interleaved topology, ours, beside it."""
    out: dict[str, dict[str, Tensor]] = {}
    methods = {"LMP": resolve("lmp"), "SAO, RG": RG(topology_sharing="none"), "interleaved": RG(topology="interleaved")}
    for name, method in methods.items():
        net = _chain([256] * 6, seed)
        _prune_all(net, method, seed)
        out[name] = {f"N = {n}": reachability(net, 0, n - 1) for n in (1, 3, 5)}
    return out


def _mlp50_reach(seed: int) -> dict[str, dict[str, Tensor]]:
    """Figure 4.9: reachability along the 49 layers of width 256 of MLP-50, all pruned together by GMP or RG."""
    out: dict[str, dict[str, Tensor]] = {}
    for method, name in ((resolve("gmp"), "GMP-S"), (RG(topology_sharing="none"), "SAO, RG")):
        net = _chain([1024, 512, *[256] * 50], seed)
        _prune_all(net, method, seed)
        masks = model_masks(net)[2:]
        out[name] = {"L1" if n == 1 else f"L1 to L{n}": reachability(masks, 0, n - 1) for n in _DEPTHS}
    return out


def layer_values(seed: int) -> dict[str, dict[str, Tensor]]:
    """Figures 4.5, 4.6 and table 4.1: singular values of ``diag(phi'(h)) W``, ``h = W x``, for a normal ``x``."""
    dense = _orthogonal(_WIDTH, _WIDTH, seed)
    weights = {"dense": dense}
    for name in ("SAO", "RG", "LMP", "LRP"):
        layer = _layer(dense)
        apply(layer, groups=_GROUPS, method=name.lower(), seed=seed, skip_first=False, skip_last=False)
        weights[name] = layer.weight.detach()
    x = torch.randn(_WIDTH, generator=named_generator(seed, "figures", "x"))
    out: dict[str, dict[str, Tensor]] = {}
    for act, function in ACTIVATIONS.items():
        out[act] = {}
        for name, weight in weights.items():
            derivative = torch.func.vmap(torch.func.grad(function))(weight @ x)
            out[act][name] = torch.linalg.svdvals((derivative[:, None] * weight).double())
    return out


def storage_curves(densities: Iterable[float], rows: int = 1024, cols: int = 1024) -> dict[str, list[float]]:
    """Figure 4.25: numbers stored as a share of ``rows * cols``, by CSR and by a block topology's format."""
    counts = [d * rows * cols for d in densities]
    return {
        "CSR: 2 nnz + rows + 1": [(2 * n + rows + 1) / (rows * cols) for n in counts],
        "block topology: nnz + cols + 1": [(n + cols + 1) / (rows * cols) for n in counts],
    }


def _orthogonal(rows: int, cols: int, seed: int) -> Tensor:
    weight = torch.empty(rows, cols)
    return nn.init.orthogonal_(weight, generator=named_generator(seed, "figures", rows, cols))


def _chain(widths: list[int], seed: int) -> nn.Sequential:
    """Linear layers, each orthogonal and each drawn anew."""
    layers = []
    for index, (fan_in, fan_out) in enumerate(pairwise(widths)):
        layer = nn.Linear(fan_in, fan_out, bias=False)
        nn.init.orthogonal_(layer.weight, generator=named_generator(seed, "figures", index))
        layers.append(layer)
    return nn.Sequential(*layers)


def _prune_all(net: nn.Module, method: Method, seed: int) -> None:
    apply(net, sparsity=0.984375, method=method, seed=seed, skip_first=False, skip_last=False)


def _mask(width: int, sparsity: float, method: str, seed: int) -> Tensor:
    layer = _layer(_orthogonal(width, width, seed))
    apply(layer, sparsity=sparsity, method=method, seed=seed, skip_first=False, skip_last=False)
    return model_masks(layer)[0]


def _layer(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data.copy_(weight)
    return layer


def _rg_mask(width: int, groups: int, seed: int) -> Tensor:
    return ramanujan(width, width, groups, named_generator(seed, "figures", width)).mask()


def _write_gaps(path: Path, gaps: dict[str, dict[str, dict[int, list[float]]]]) -> Path:
    with replacing(path) as scratch, scratch.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["definition", "method", "width", *(f"{100 * s:g} %" for s in SPARSITIES)])
        for definition, by_method in gaps.items():
            for method, widths in by_method.items():
                for width, values in widths.items():
                    writer.writerow([definition, method, width, *(f"{v:.4f}" for v in values)])
    return path


def _write_table(path: Path, table: dict[str, dict[str, float]]) -> Path:
    with replacing(path) as scratch, scratch.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["activation", *next(iter(table.values()))])
        for act, by_method in table.items():
            writer.writerow([act, *(f"{p:.3g}" for p in by_method.values())])
    return path
