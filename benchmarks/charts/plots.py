"""What charts are made of.

A plot is an SVG without a viewBox: across, places are percentages of its width, so that it fits a telephone and a
desktop while its text keeps its size; down, they are pixels. What is outside of the axes hangs over its edges.
"""

from collections.abc import Iterable, Mapping, Sequence
from xml.etree.ElementTree import Element

from .markup import Child, node
from .scales import Linear, LogScale, percent, short

__all__ = [
    "BAR",
    "axis",
    "captioned",
    "colour",
    "frame",
    "grid",
    "legend",
    "marker",
    "plot",
    "scrolling",
    "spread",
    "style_of",
]

BAR = 16  # pixels, the height of a bar
_COLOURS = 8  # of lines and points, in the style sheet as c0 ... c7; c0 is grey
_MARKERS = (
    "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0Z",
    "M-4,-4H4V4H-4Z",
    "M0,-5L5,4H-5Z",
    "M0,-5.5L5.5,0L0,5.5L-5.5,0Z",
    "M-5,-4H5L0,5Z",
    "M-5,-1.7H-1.7V-5H1.7V-1.7H5V1.7H1.7V5H-1.7V1.7H-5Z",
    "M-5,0L-1.5,-5H1.5L5,0L1.5,5H-1.5Z",
)


def style_of(names: Iterable[str]) -> dict[str, int]:
    """A colour and a marker for each implementation, the same in all charts: torchvision's is grey."""
    rest = [name for name in dict.fromkeys(names) if name != "torchvision"]
    rest.sort(key=lambda name: (not name.startswith("trimask"), name != "trimask"))  # ours have the first ones
    return {"torchvision": 0} | {name: i + 1 for i, name in enumerate(rest)}


def captioned(title: str, *parts: Child, class_: str = "") -> Element:
    """A figure with its caption."""
    return node("figure", node("figcaption", title), *parts, class_=class_, aria_label=title)


def plot(height: int, *parts: Child, **attributes: object) -> Element:
    """An SVG as wide as its place and so many pixels high."""
    hidden = {} if "role" in attributes else {"aria_hidden": "true"}  # the text beside it says the same
    return node("svg", *parts, width="100%", height=height, **hidden, **attributes)


def grid(ticks: Sequence[float], scale: LogScale | Linear, height: int, strong: float | None = None) -> list[Element]:
    """Lines down at the ticks, one of them strong."""
    return [
        node("line", class_="one" if tick == strong else "grid", x1=f"{at:.2f}%", x2=f"{at:.2f}%", y1=0, y2=height)
        for tick in ticks
        for at in [scale.at(tick)]
    ]


def axis(ticks: Sequence[float], scale: LogScale | Linear, name: str, shares: bool = False) -> Element:
    """The names of the ticks above a column of bars."""
    texts = [
        node("text", percent(x) if shares else short(x), x=f"{scale.at(x):.2f}%", y=12, text_anchor="middle")
        for x in ticks
    ]
    return node("div", node("span", name, class_="name"), plot(BAR, *texts), class_="row axis")


def frame(
    height: int,
    y_ticks: Sequence[float],
    up: LogScale,
    x_ticks: Sequence[float],
    across: LogScale,
    y_name: str,
    x_name: str,
) -> list[Element]:
    """Grid, ticks and names of both axes."""
    out = [node("text", y_name, x=-46, y=-10, class_="axis-name")]
    for tick in y_ticks:
        y = height * (1 - up.at(tick) / 100)
        out.append(node("line", class_="grid", x1=0, x2="100%", y1=f"{y:.1f}", y2=f"{y:.1f}"))
        out.append(node("text", short(tick), x=-8, y=f"{y + 4:.1f}", text_anchor="end"))
    for tick in x_ticks:
        x = f"{across.at(tick):.2f}%"
        out.append(node("line", class_="grid", x1=x, x2=x, y1=0, y2=height))
        out.append(node("text", short(tick), x=x, y=height + 17, text_anchor="middle"))
    out.append(node("text", x_name, x="50%", y=height + 36, text_anchor="middle", class_="axis-name"))
    return out


def spread(values: Sequence[float], scale: LogScale) -> list[float]:
    """Those that are far enough from each other to be named; the ends first."""
    chosen: list[float] = []
    for value in [values[0], values[-1], *values[1:-1]]:
        if all(abs(scale.at(value) - scale.at(other)) >= 15 for other in chosen):
            chosen.append(value)
    return sorted(chosen)


def marker(x: float, y: float, style: int, title: str) -> Element:
    """A point, across in percent and down in pixels, whose title shows on hovering."""
    path = node("path", node("title", title), d=_MARKERS[style % len(_MARKERS)])
    return node("svg", path, x=f"{x:.2f}%", y=f"{y:.1f}", width=1, height=1, class_="mark")


def colour(style: int) -> str:
    """The class of a style."""
    return f"c{(style - 1) % (_COLOURS - 1) + 1 if style else 0}"


def legend(styles: Mapping[str, int], *, lines: bool = False, markers: bool = False) -> Element:
    """What the colours and markers stand for, those of peers hollow where there are lines; squares for areas."""
    items = []
    for name, style in styles.items():
        path = _MARKERS[style % len(_MARKERS) if lines or markers else 1]
        line = node("line", x1=0, x2=22, y1=7, y2=7) if lines else None
        mark = node("svg", node("path", d=path), x=11, y=7, width=1, height=1, class_="mark")
        peer = " peer" if lines and not name.startswith("trimask") else ""
        kind = f"line {colour(style)}{peer}"
        swatch = node("svg", line, mark, width=22, height=14, class_=kind, aria_hidden="true")
        items.append(node("li", swatch, node("span", name)))
    return node("ul", *items, class_="legend")


def scrolling(table: Element, name: str) -> Element:
    """A table that may be wider than the screen; the keyboard scrolls it, too."""
    return node("div", table, class_="scroll", role="region", tabindex=0, aria_label=name)
