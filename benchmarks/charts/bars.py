"""Bars: how many times as fast, and how the stages share a call."""

from collections.abc import Sequence
from xml.etree.ElementTree import Element

from ..comparisons import Comparison, Values, is_ours, verdict
from .markup import Child, node
from .plots import BAR, axis, captioned, colour, grid, legend, plot
from .scales import Linear, LogScale, around, figure, milliseconds, ticks_within

__all__ = ["ratios", "stages"]

_WORDS = {"faster": "faster", "slower": "▼ slower", "even": "no difference", "wrong": "WRONG", "missing": "no time"}


def ratios(subject: str, found: Sequence[Comparison]) -> Element:
    """Bars from 1 to each ratio, on one logarithmic axis for all cases of the subject."""
    rows = [row for comparison in found for row in comparison.rows if row["p50_ms"] and row["ratio_to_torchvision"]]
    ends = [row[name] for row in rows for name in ("ratio_to_torchvision", "ratio_low", "ratio_high") if row[name]]
    scale = around([0.5, 2.0, *ends])
    parts: list[Child] = [axis(scale.ticks(), scale, "times as fast as torchvision; slower left of 1, faster right")]
    for comparison in found:
        parts.append(_case(comparison))
        parts.append(node("ul", *(_ratio_row(row, comparison, scale) for row in _contenders(comparison))))
    return captioned(f"{subject}: times as fast as torchvision", *parts, class_="bars")


def _contenders(comparison: Comparison) -> list[Values]:
    """All but the torchvision that the others are held against, where there is another."""
    others = [row for row in comparison.rows if row is not comparison.peer]
    return others or comparison.rows


def _case(comparison: Comparison) -> Element:
    peer = comparison.peer
    own = f"torchvision {milliseconds(peer['p50_ms'])}" if peer else "torchvision was not timed"
    return node("h4", comparison.case, node("small", f" {' · '.join(filter(None, [comparison.dtype, own]))}"))


def _ratio_row(row: Values, comparison: Comparison, scale: LogScale) -> Element:
    outcome, ratio = verdict(row), row["ratio_to_torchvision"]
    drawn = ratio if row["p50_ms"] and outcome != "wrong" else None
    bar = plot(BAR, *grid(scale.ticks(), scale, BAR, strong=1.0))
    if drawn:
        left, right = sorted((scale.at(1), scale.at(drawn)))
        bar.append(node("rect", class_="bar", x=f"{left:.2f}%", y=3, width=f"{right - left:.2f}%", height=BAR - 6))
        if row["ratio_low"] and row["ratio_high"]:
            bar.append(_whisker(scale.at(row["ratio_low"]), scale.at(row["ratio_high"])))
    number = f"{drawn:.2f}x" if drawn and drawn < 9.95 else f"{drawn:.0f}x" if drawn else ""
    word = _WORDS.get(outcome, "") if is_ours(row) or outcome in ("wrong", "missing") else ""
    dtype = row["dtype"] if row["dtype"] != comparison.dtype and row["dtype"] not in row["implementation"] else ""
    notes = [dtype, _interval(row), row["note"], "not captured in a graph" if row["captured"] is False else ""]
    return node(
        "li",
        node("span", row["implementation"], class_="name"),
        bar,
        node("span", " ".join(filter(None, [number, word])), class_="figure"),
        node("span", milliseconds(row["p50_ms"]) if row["p50_ms"] else "", class_="time"),
        node("span", "; ".join(filter(None, notes)), class_="note") if any(notes) else None,
        class_=f"row {outcome} {'ours' if is_ours(row) else 'peer'}",
    )


def _interval(row: Values) -> str:
    low, high = row["ratio_low"], row["ratio_high"]
    return f"95 % within {low:.3g}x to {high:.3g}x" if low is not None and high is not None else ""


def _whisker(low: float, high: float) -> Element:
    middle = BAR / 2
    caps = [
        node("line", x1=f"{x:.2f}%", x2=f"{x:.2f}%", y1=middle - 4, y2=middle + 4)
        for x in (min(low, high), max(low, high))
    ]
    return node("g", node("line", x1=f"{low:.2f}%", x2=f"{high:.2f}%", y1=middle, y2=middle), *caps, class_="whisker")


def stages(rows: Sequence[Values]) -> Element:
    """Stacked bars of the stages of a call, all on one axis of milliseconds."""
    names = {name: i + 1 for i, name in enumerate(dict.fromkeys(name for row in rows for name in row["stages_ms"]))}
    top = max(sum(row["stages_ms"].values()) for row in rows)
    scale = Linear(top)
    ticks = [0.0, *_round_steps(top)]
    parts: list[Child] = [legend(names, squares=True), axis(ticks, scale, "ms a call, launched kernel by kernel")]
    for row in rows:
        total, at = sum(row["stages_ms"].values()), 0.0
        bar = plot(BAR, *grid(ticks, scale, BAR))
        for name, spent in row["stages_ms"].items():
            title = node("title", f"{name} {milliseconds(spent)}")
            place = {"x": f"{scale.at(at):.2f}%", "width": f"{scale.at(spent):.2f}%"}
            bar.append(node("rect", title, class_=colour(names[name]), y=1, height=BAR - 2, **place))
            at += spent
        words = ", ".join(f"{name} {figure(ms)} ({ms / total:.0%})" for name, ms in row["stages_ms"].items() if total)
        parts.append(node("h4", row["case"], node("small", f" {row['dtype']}")))
        item = node(
            "li",
            node("span", row["implementation"], class_="name"),
            bar,
            node("span", milliseconds(total), class_="figure"),
            node("span", class_="time"),
            node("span", words, class_="note"),
            class_="row stacked",
        )
        parts.append(node("ul", item))
    return captioned("Stages of a call", *parts, class_="bars")


def _round_steps(top: float) -> list[float]:
    """Four or so equal steps up to `top`."""
    step = next((s for s in ticks_within(top / 100, top, 99) if top / s <= 5), top)
    return [step * i for i in range(1, int(top / step) + 1)] if step else []
