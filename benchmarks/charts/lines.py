"""Lines: how the time grows with the work."""

from collections.abc import Mapping
from itertools import pairwise
from xml.etree.ElementTree import Element

from ..grouping import Sweep
from .markup import node
from .plots import captioned, colour, frame, legend, marker, plot, spread
from .scales import LogScale, around, milliseconds, short

__all__ = ["growth"]

_HEIGHT = 190  # pixels of a plot


def growth(sweep: Sweep, styles: Mapping[str, int]) -> Element:
    """Lines of p50 over what grows, both logarithmic."""
    values = sorted({x for line in sweep.lines.values() for x, _ in line})
    across = LogScale(values[0] / 1.08, values[-1] * 1.08)
    up = around([y for line in sweep.lines.values() for _, y in line], 4)
    drawing = plot(_HEIGHT, role="img", aria_label=f"{sweep.title}: milliseconds a call over {sweep.variable}")
    drawing.extend(frame(_HEIGHT, up.ticks(6), up, spread(values, across), across, "ms a call", sweep.variable))
    for name, line in sweep.lines.items():
        places = [(across.at(x), _HEIGHT * (1 - up.at(y) / 100)) for x, y in line]
        kind = colour(styles[name]) + ("" if name.startswith("trimask") else " peer")
        strokes = [
            node("line", x1=f"{a[0]:.2f}%", y1=f"{a[1]:.1f}", x2=f"{b[0]:.2f}%", y2=f"{b[1]:.1f}")
            for a, b in pairwise(places)
        ]
        marks = [
            marker(x, y, styles[name], f"{name}: {short(value)} {sweep.variable}, {milliseconds(spent)}")
            for (x, y), (value, spent) in zip(places, line, strict=True)
        ]
        drawing.append(node("g", *strokes, *marks, class_=f"line {kind}"))
    title = f"{sweep.title}{f', {sweep.dtype}' if sweep.dtype else ''}"
    return captioned(
        title, node("div", drawing, class_="plot"), legend({name: styles[name] for name in sweep.lines}, lines=True)
    )
