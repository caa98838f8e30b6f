"""HTML and SVG, built of elements: whatever is not an element is escaped, so that foreign strings stay text."""

from __future__ import annotations

from html import escape

_EMPTY = frozenset({"circle", "line", "link", "meta", "path", "rect"})  # elements without an end tag


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def element(tag: str, *children: object, **attributes: object) -> Html:
    r"""One element. Children that are no `Html` are escaped; attributes always are, and left out if None.

    Args:
        tag: its name.
        children: what is in it.
        attributes: `_` is written `-`, and dropped at the end, for names that Python reserves.

    >>> str(element("b", "<i>\u202e", class_="x", data_n=1))
    '<b class="x" data-n="1">&lt;i&gt;\\u202e</b>'
    """
    given = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items() if value is not None}
    head = tag + "".join(f' {name}="{_text(value)}"' for name, value in given.items())
    return Html(f"<{head}/>" if tag in _EMPTY else f"<{head}>{joined(*children)}</{tag}>")


def joined(*parts: object) -> Html:
    """Parts after each other, escaped where they are no `Html`."""
    return Html("".join(part if isinstance(part, Html) else _text(part) for part in parts))


def _text(value: object) -> str:
    raw = str(value)
    if not raw.isprintable():  # control characters and marks that turn the order of text around
        raw = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in raw)
    return escape(raw)
