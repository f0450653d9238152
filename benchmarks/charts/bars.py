"""Bars: how many times as fast, and how the stages share a call."""

from collections.abc import Sequence
from xml.etree.ElementTree import Element

from ..grouping import SideBySide, beside, is_ours, verdict
from ..results import Row
from .markup import Child, node
from .plots import BAR, axis, captioned, colour, grid, legend, plot
from .scales import Linear, LogScale, around, milliseconds, percent, times

__all__ = ["ratios", "stages"]

_WORDS = {"faster": "faster", "slower": "▼ slower", "even": "even", "wrong": "WRONG"}


def ratios(subject: str, found: Sequence[SideBySide]) -> Element:
    """Bars from 1 to each ratio, on one logarithmic axis for all cases of the subject."""
    rows = [row for comparison in found for row in comparison.rows if row.p50_ms and row.ratio_to_torchvision]
    ends = [end for row in rows for end in (row.ratio_to_torchvision, row.ratio_low, row.ratio_high) if end]
    scale = around([0.5, 2.0, *ends])
    name = "times as fast as torchvision: slower left of 1, faster right of it"
    if any(row.ratio_low for row in rows):
        name += "; whiskers: 95 % confidence"
    if any(beside(row, comparison.peer) for comparison in found for row in comparison.rows):
        name += "; pale: lower precision beside torchvision's"
    parts: list[Child] = [axis(scale.ticks(), scale, name) if rows else None]
    for comparison in found:
        contenders = _contenders(comparison)
        shown = (
            _ratio_row(row, comparison, scale if rows else None) for row in contenders if verdict(row) != "missing"
        )
        missing = "; ".join(_missing(row) for row in contenders if verdict(row) == "missing")
        parts += [_case(comparison), node("ul", *shown)]
        parts.append(node("p", f"no time: {missing}", class_="note") if missing else None)
    return captioned(f"{subject}: times as fast as torchvision", *parts, class_="bars")


def _contenders(comparison: SideBySide) -> list[Row]:
    """All but the torchvision that the others are held against, where there is another."""
    others = [row for row in comparison.rows if row is not comparison.peer]
    return others or comparison.rows


def _missing(row: Row) -> str:
    return f"{row.implementation} ({row.note})" if row.note else row.implementation


def _case(comparison: SideBySide) -> Element:
    peer = comparison.peer
    own = f"torchvision {milliseconds(peer.p50_ms)}" if peer else "torchvision was not timed"
    return node("h4", comparison.case, node("small", f" {' · '.join(filter(None, [comparison.dtype, own]))}"))


def _ratio_row(row: Row, comparison: SideBySide, scale: LogScale | None) -> Element:
    outcome, ratio = verdict(row), row.ratio_to_torchvision
    drawn = ratio if row.p50_ms and outcome != "wrong" else None
    number = times(drawn) if drawn else ""
    word = _WORDS.get(outcome, "") if is_ours(row) or outcome == "wrong" else ""
    lower = beside(row, comparison.peer)
    dtype = row.dtype if row.dtype != comparison.dtype and row.dtype not in row.implementation else ""
    precision = f"{row.dtype} {lower}" if lower else dtype
    notes = [precision, row.note, "not captured in a graph" if row.captured is False else ""]
    return node(
        "li",
        node("span", row.implementation, class_="name"),
        _bar(row, drawn, scale) if scale else node("span"),
        node("span", " ".join(filter(None, [number, word])), class_="figure"),
        node("span", milliseconds(row.p50_ms) if row.p50_ms else "", class_="time"),
        node("span", "; ".join(filter(None, notes)), class_="note") if any(notes) else None,
        class_=f"row {outcome} {'ours' if is_ours(row) else 'peer'}{' lower' if lower else ''}",
    )


def _bar(row: Row, ratio: float | None, scale: LogScale) -> Element:
    bar = plot(BAR, *grid(scale.ticks(), scale, BAR, strong=1.0))
    if ratio:
        left, right = sorted((scale.at(1), scale.at(ratio)))
        bar.append(node("rect", class_="bar", x=f"{left:.2f}%", y=3, width=f"{right - left:.2f}%", height=BAR - 6))
        if row.ratio_low and row.ratio_high:
            bar.append(_whisker(row.ratio_low, row.ratio_high, scale))
    return bar


def _whisker(low: float, high: float, scale: LogScale) -> Element:
    """The confidence interval of a ratio."""
    middle, places = BAR / 2, [f"{scale.at(x):.2f}%" for x in (low, high)]
    caps = (node("line", x1=x, x2=x, y1=middle - 4, y2=middle + 4) for x in places)
    span = node("line", x1=places[0], x2=places[1], y1=middle, y2=middle)
    return node("g", node("title", f"95 % within {low:.3g}x to {high:.3g}x"), span, *caps, class_="whisker")


def stages(rows: Sequence[Row]) -> Element:
    """Stacked bars of the shares that the stages have of a call."""
    staged = [(row, row.stages_ms) for row in rows if row.stages_ms]
    names = {name: i + 1 for i, name in enumerate(dict.fromkeys(name for _, parts in staged for name in parts))}
    scale, ticks = Linear(1.0), (0.0, 0.25, 0.5, 0.75, 1.0)
    parts: list[Child] = [legend(names), axis(ticks, scale, "share of a call, launched kernel by kernel", shares=True)]
    for row, spent_in in staged:
        total, at = sum(spent_in.values()) or 1.0, 0.0
        bar = plot(BAR, *grid(ticks, scale, BAR))
        for name, spent in spent_in.items():
            place = {"x": f"{scale.at(at / total):.2f}%", "width": f"{scale.at(spent / total):.2f}%"}
            title = node("title", f"{name} {milliseconds(spent)}")
            bar.append(node("rect", title, class_=colour(names[name]), y=1, height=BAR - 2, **place))
            at += spent
        words = (f"{name} {milliseconds(ms)} ({percent(ms / total)})" for name, ms in spent_in.items())
        item = node(
            "li",
            node("span", row.implementation, class_="name"),
            bar,
            node("span", milliseconds(at), class_="figure"),
            node("span", class_="time"),
            node("span", ", ".join(words), class_="note"),
            class_="row stacked",
        )
        parts += [node("h4", row.case, node("small", f" {row.dtype}")), node("ul", item)]
    return captioned("Stages of a call", *parts, class_="bars")
