"""The two diagrams of the site, as SVG for light and dark: `python docs/figures/draw_diagrams.py`.

house-*.svg: the packages in the order in which they may import; topology-*.svg: one block topology, drawn three ways.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

import torch

from sao_prune.topology import BlockTopology, interleaved, ramanujan

HERE = Path(__file__).parent
LOOKS = {
    "light": {
        "ink": "#1a1a1a",
        "soft": "#5b6470",
        "line": "#c3cad3",
        "room": "#eef4f9",
        "main": "#d6e8f5",
        "accent": "#0072B2",
        "blocks": ("#0072B2", "#D55E00", "#009E73", "#B0679A"),
    },
    "dark": {
        "ink": "#e8e8e8",
        "soft": "#a3adb8",
        "line": "#47515c",
        "room": "#1c242c",
        "main": "#1f3547",
        "accent": "#56B4E9",
        "blocks": ("#56B4E9", "#FF8A3D", "#2FCB9E", "#E79CC5"),
    },
}
FLOOR = (
    ("discovery", "where", "in any model"),
    ("allocation", "how much", "layer by layer"),
    ("topology", "which edges", "blocks and masks"),
    ("weights", "what values", "orthogonal blocks"),
    ("algorithms", "methods", "SAO, RG, Project"),
    ("prune", "hooks", "as torch has them"),
    ("blocks", "run them fast", "on any machine"),
    ("model", "the verbs", "plan, apply, .."),
)
UPPER = (
    ("analysis", "spectra, reachability"),
    ("nn", "orthogonal convolutions"),
    ("models", "the thesis's networks"),
    ("integrations", "Lightning, transformers"),
)
FONT = 'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif"'
MONO = 'font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, DejaVu Sans Mono, monospace"'


def text(x: float, y: float, words: str, colour: str, size: float, *, bold: bool = False, mono: bool = False) -> str:
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text x="{x:g}" y="{y:g}" fill="{colour}" font-size="{size:g}" text-anchor="middle"{weight} '
        f"{MONO if mono else FONT}>{escape(words)}</text>"
    )


def room(x: float, y: float, width: float, height: float, look: dict, fill: str) -> str:
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" fill="{look[fill]}" '
        f'stroke="{look["line"]}"/>'
    )


def document(width: float, height: float, label: str, parts: list[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" role="img" aria-label="{escape(label)}">\n' + "\n".join(parts) + "\n</svg>\n"
    )


def house(look: dict) -> str:
    """Command and laboratory under the roof, instruments above, the way of a model on the floor."""
    width, wide, gap = 1000.0, 113.0, 10.0
    left = (width - 8 * wide - 7 * gap) / 2
    ink, soft, accent = look["ink"], look["soft"], look["accent"]
    parts = [
        f'<path d="M {left:g} 132 L 500 14 L {width - left:g} 132 Z" fill="{look["room"]}" stroke="{look["line"]}"/>'
    ]
    parts += [text(500, 62, "cli", accent, 15, bold=True, mono=True), text(500, 80, "the command", soft, 12)]
    parts += [
        text(500, 104, "lab", accent, 15, bold=True, mono=True),
        text(500, 122, "recipes, data, training, reports", soft, 12),
    ]
    span = (width - 2 * left - 3 * gap) / 4
    for index, (name, what) in enumerate(UPPER):
        x = left + index * (span + gap)
        parts += [room(x, 144, span, 56, look, "room"), text(x + span / 2, 168, name, accent, 14, bold=True, mono=True)]
        parts.append(text(x + span / 2, 187, what, soft, 12))
    for index, (name, role, what) in enumerate(FLOOR):
        x = left + index * (wide + gap)
        middle = x + wide / 2
        parts += [room(x, 212, wide, 92, look, "main"), text(middle, 238, name, accent, 14, bold=True, mono=True)]
        parts += [text(middle, 262, role, ink, 13, bold=True), text(middle, 284, what, soft, 10.5)]
        if index:
            parts.append(text(x - gap / 2, 263, "›", soft, 18))
    parts.append(
        text(
            500,
            330,
            "data flows from left to right; a module imports only what stands to its left or below it",
            soft,
            13,
        )
    )
    return document(width, 344, "The packages of sao_prune as a house", parts)


def topologies(look: dict) -> str:
    """Twelve inputs and outputs in four blocks."""
    side, cells, cell = 12, 12, 20.0
    drawn = ramanujan(side, side, 4, torch.Generator().manual_seed(4))
    dealt = interleaved(side, side, 4)
    ordered = BlockTopology(torch.arange(side) // 3, torch.arange(side) // 3)
    parts = []
    panels = (("ramanujan: drawn", drawn), ("interleaved: dealt in turn", dealt), ("either, sorted by sets", ordered))
    for panel, (title, topology) in enumerate(panels):
        x0 = 24 + panel * (cells * cell + 56)
        parts.append(text(x0 + cells * cell / 2, 22, title, look["ink"], 15, bold=True))
        for row, row_set in enumerate(topology.row_set.tolist()):
            for column, col_set in enumerate(topology.col_set.tolist()):
                fill = look["blocks"][row_set] if row_set == col_set else look["room"]
                parts.append(
                    f'<rect x="{x0 + column * cell:g}" y="{36 + row * cell:g}" width="{cell - 2:g}" '
                    f'height="{cell - 2:g}" rx="3" fill="{fill}"/>'
                )
        parts.append(text(x0 + cells * cell / 2, 36 + cells * cell + 20, "inputs", look["soft"], 13))
    return document(24 + 3 * (cells * cell + 56) - 32, 36 + cells * cell + 32, "Masks of a block topology", parts)


def main() -> None:
    for theme, look in LOOKS.items():
        (HERE / f"house-{theme}.svg").write_text(house(look), encoding="utf-8")
        (HERE / f"topology-{theme}.svg").write_text(topologies(look), encoding="utf-8")


if __name__ == "__main__":
    main()
