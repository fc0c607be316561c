"""HTML put together so that no text can be taken for markup."""

from __future__ import annotations

from html import escape

# Elements that have no end.
_VOID = ("meta", "link", "br")


class Markup(str):
    """Text that is HTML already; all other text is escaped."""

    __slots__ = ()


def element(tag: str, *children: str, **attributes: str | None) -> Markup:
    """One element; attributes that are ``None`` are left out, and ``class_`` stands for ``class``.

    Example:
        >>> element("p", "a < b", element("b", "c"), class_="note")
        '<p class="note">a &lt; b<b>c</b></p>'
    """
    given = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    said = "".join(f' {key}="{escape(value)}"' for key, value in given.items())
    if tag in _VOID:
        return Markup(f"<{tag}{said}>")
    return Markup(f"<{tag}{said}>{join(*children)}</{tag}>")


def join(*children: str) -> Markup:
    """Texts and elements one after the other."""
    return Markup("".join(child if isinstance(child, Markup) else escape(child) for child in children))
