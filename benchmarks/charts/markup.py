"""HTML and SVG as trees of elements, so that every text is escaped and every tag closed."""

import re
from xml.etree.ElementTree import Element, tostring

__all__ = ["Child", "node", "render"]

Child = Element | str | None

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")  # no page may hold them


def node(tag: str, *children: Child, **attributes: object) -> Element:
    """An element.

    Args:
        tag: its name.
        children: elements and texts, in their order; None is left out.
        attributes: their underscores become hyphens, but for a last one, which keeps a name from being a keyword;
            None and False are left out.
    """
    named = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
    element = Element(
        tag, {name: _text(value) for name, value in named.items() if value is not None and value is not False}
    )
    last: Element | None = None
    for child in children:
        if isinstance(child, Element):
            element.append(child)
            last = child
        elif child and last is None:
            element.text = (element.text or "") + _text(child)
        elif child and last is not None:
            last.tail = (last.tail or "") + _text(child)
    return element


def _text(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def render(page: Element) -> str:
    """The text of a whole page."""
    return f"<!doctype html>\n{tostring(page, encoding='unicode', method='html')}\n"
