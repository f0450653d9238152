"""How near kernels come to what the machine can do: the roofline, and the bandwidth of those without operations."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any
from xml.etree.ElementTree import Element

from ..grouping import is_ours
from ..results import Row
from .markup import Child, node
from .plots import BAR, axis, captioned, colour, frame, grid, legend, marker, plot, scrolling
from .scales import Linear, LogScale, around, figure, per_second, percent, ticks_within

__all__ = ["Kernel", "bandwidth", "kernels", "roofline"]

_HEIGHT = 320  # pixels of the plot
_APART = 14  # pixels between two lines of text


@dataclass(frozen=True)
class Kernel:
    """What an implementation did of the work that its case needs at least, beside the ceilings of the machine.

    Attributes:
        bytes_per_s: `least_bytes` over p50.
        flops_per_s: `operations` over p50; None where they say nothing.
        intensity: operations for each of those bytes.
        peak: operations a second at best in its dtype; None where that was not measured.
    """

    row: Row
    bytes_per_s: float
    flops_per_s: float | None
    intensity: float | None
    peak: float | None

    def share(self, copy_bytes_per_s: float) -> float:
        """Of what the bandwidth and the arithmetic allow; above 1 where a cache helps."""
        best = self.bytes_per_s / copy_bytes_per_s
        return max(best, self.flops_per_s / self.peak) if self.flops_per_s and self.peak else best


def kernels(rows: Iterable[Row], ceilings: Mapping[str, Any]) -> list[Kernel]:
    """Those whose bytes are known and whose result was right."""
    peaks = ceilings.get("matrix_flops_per_s") or {}
    return [
        Kernel(
            row, moved, row.flops, row.operations / row.least_bytes if row.operations else None, peaks.get(row.dtype)
        )
        for row in rows
        if row.correct is not False and row.least_bytes and (moved := row.bytes_per_s)
    ]


def roofline(found: Sequence[Kernel], ceilings: Mapping[str, Any]) -> Element | None:
    """A point for each kernel whose operations are known; the roofs are what was measured in the same run."""
    points = [(kernel, kernel.intensity, kernel.flops_per_s) for kernel in found]
    known = [(kernel, x, y) for kernel, x, y in points if x and y]
    copy, peaks = ceilings.get("copy_bytes_per_s"), ceilings.get("matrix_flops_per_s") or {}
    if not known or not copy:
        return None
    ridges = [peak / copy for peak in peaks.values()]
    across = around([*(x for _, x, _ in known), *ridges], 100, padding=1.5)
    heights = [*(y for _, _, y in known), *peaks.values()]
    up = around([*heights, min(min(heights), copy * across.low)], 100)
    drawing = plot(_HEIGHT, role="img", aria_label="Roofline: operations a second over operations a byte")
    drawing.extend(frame(_HEIGHT, up.ticks(7), up, across.ticks(6), across, "FLOP/s", "FLOP a byte that must move"))
    drawing.append(_roofs(copy, peaks, across, up))
    subjects = {subject: i + 1 for i, subject in enumerate(dict.fromkeys(kernel.row.subject for kernel, _, _ in known))}
    for kernel, x, y in known:
        row = kernel.row
        text = f"{row.subject}, {row.case}, {row.implementation}, {row.dtype}: {per_second(y, 'FLOP')}"
        mark = marker(across.at(x), _HEIGHT * (1 - up.at(y) / 100), subjects[row.subject], text)
        drawing.append(node("g", mark, class_=colour(subjects[row.subject]) + ("" if is_ours(row) else " peer")))
    listed = node("details", node("summary", f"the {len(known)} points"), _points([one for one, _, _ in known], copy))
    note = node("p", "filled: trimask; hollow: peers", class_="note")
    return captioned(
        "Roofline", node("div", drawing, class_="plot"), legend(subjects, markers=True), note, listed, class_="wide"
    )


def _points(found: Sequence[Kernel], copy: float) -> Element:
    names = ("kernel", "dtype", "FLOP a byte", "FLOP/s", "B/s", "share of its roof")
    head = node("thead", node("tr", *(node("th", name, scope="col") for name in names)))
    bodies = []
    for (subject, case), group in groupby(found, key=lambda kernel: (kernel.row.subject, kernel.row.case)):
        title = node("th", node("span", f"{subject}: {case}"), colspan=len(names), scope="colgroup", class_="case")
        bodies.append(node("tbody", node("tr", title), *(_point(kernel, copy) for kernel in group)))
    return scrolling(node("table", head, *bodies), "the points of the roofline")


def _point(kernel: Kernel, copy: float) -> Element:
    cells = (
        kernel.row.dtype,
        figure(kernel.intensity or 0),
        per_second(kernel.flops_per_s or 0, "FLOP"),
        per_second(kernel.bytes_per_s, "B"),
        percent(kernel.share(copy)),
    )
    return node("tr", node("th", kernel.row.implementation, scope="row"), *(node("td", text) for text in cells))


def _roofs(copy: float, peaks: Mapping[str, float], across: LogScale, up: LogScale) -> Element:
    """The slope of the bandwidth, and a ceiling for each dtype with its name above."""
    top = max([*peaks.values(), up.high * (not peaks)])
    start, end = max(across.low, up.low / copy), min(across.high, top / copy)
    group = node("g", _stroke(across, up, start, copy * start, end, copy * end), class_="roof")
    before = math.inf
    for dtype, peak in sorted(peaks.items(), key=lambda item: item[1]):
        height = _HEIGHT * (1 - up.at(peak) / 100)
        group.append(_stroke(across, up, min(max(peak / copy, across.low), across.high), peak, across.high, peak))
        before = min(height - 4, before - _APART)
        words = f"{dtype} {per_second(peak, 'FLOP')}"
        group.append(node("text", words, x="100%", y=f"{before:.1f}", text_anchor="end"))
    words = f"copy {per_second(copy, 'B')}"
    middle = math.sqrt(start * end)
    y = _HEIGHT * (1 - up.at(copy * middle) / 100)
    group.append(node("text", words, x=f"{across.at(middle):.2f}%", y=f"{y - 8:.1f}", text_anchor="end"))
    return group


def _stroke(across: LogScale, up: LogScale, x1: float, y1: float, x2: float, y2: float) -> Element:
    down = [f"{_HEIGHT * (1 - up.at(y) / 100):.1f}" for y in (y1, y2)]
    return node("line", x1=f"{across.at(x1):.2f}%", y1=down[0], x2=f"{across.at(x2):.2f}%", y2=down[1])


def bandwidth(subject: str, found: Sequence[Kernel], copy_bytes_per_s: float) -> Element:
    """Bars of the bytes that must move over the time that it took, against a copy's."""
    top = max([1.0, *(kernel.bytes_per_s / copy_bytes_per_s for kernel in found)])
    ticks = [0, 0.25, 0.5, 0.75, 1] if top <= 1.3 else [0, *(x for x in ticks_within(top / 20, top, 5))]
    scale = Linear(top)
    name = f"share of a copy's {per_second(copy_bytes_per_s, 'B')}"
    parts: list[Child] = [axis(ticks, scale, name, shares=True)]
    for (case, dtype), group in groupby(found, key=lambda kernel: (kernel.row.case, kernel.row.dtype)):
        parts.append(node("h4", case, node("small", f" {dtype}")))
        parts.append(node("ul", *(_bandwidth_row(kernel, copy_bytes_per_s, ticks, scale) for kernel in group)))
    return captioned(f"{subject}: bandwidth achieved", *parts, class_="bars")


def _bandwidth_row(kernel: Kernel, copy: float, ticks: Sequence[float], scale: Linear) -> Element:
    share = kernel.bytes_per_s / copy
    bar = plot(BAR, *grid(ticks, scale, BAR, strong=1.0))
    bar.append(node("rect", class_="bar", x=0, y=3, width=f"{scale.at(share):.2f}%", height=BAR - 6))
    return node(
        "li",
        node("span", kernel.row.implementation, class_="name"),
        bar,
        node("span", percent(share), class_="figure"),
        node("span", per_second(kernel.bytes_per_s, "B"), class_="time"),
        class_=f"row {'ours' if is_ours(kernel.row) else 'peer'}",
    )
