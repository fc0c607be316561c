"""Formulas drawn when the site is built, as SVG: they need no script, no font and no network."""

from __future__ import annotations

from html import escape
from typing import Any

import ziamath
from docutils import nodes
from sphinx.application import Sphinx

SIZE = 18.0
# Of the surrounding letters, which are seen smaller than the formula's.
EM = 16.0


def svg(latex: str, inline: bool) -> str:
    """The formula in the colour and size of the text around it."""
    drawn = ziamath.Latex(latex, size=SIZE, color="currentColor", inline=inline)
    root = drawn.svgxml()
    _, top, width, height = map(float, root.get("viewBox").split())
    root.set("width", f"{width / EM:.3f}em")
    root.set("height", f"{height / EM:.3f}em")
    if inline:
        root.set("style", f"vertical-align: {-(top + height) / EM:.3f}em")
    root.set("role", "img")
    root.set("aria-label", " ".join(latex.split()))
    return ziamath.zmath.ET.tostring(root, encoding="unicode")


def visit_inline(translator: Any, node: nodes.math) -> None:
    translator.body.append(f'<span class="formula">{svg(node.astext(), inline=True)}</span>')
    raise nodes.SkipNode


def visit_block(translator: Any, node: nodes.math_block) -> None:
    anchor = f' id="{escape(node["ids"][0])}"' if node.get("ids") else ""
    translator.body.append(f'<div class="formula"{anchor}>{svg(node.astext(), inline=False)}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    ziamath.config.svg2 = False
    app.add_html_math_renderer("svg", (visit_inline, None), (visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
