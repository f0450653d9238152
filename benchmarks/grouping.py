"""Rows of results as a reader wants them: what stood side by side, who won, and what grows with the work."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from .harness import OURS
from .results import PEER, Row

__all__ = ["SideBySide", "Sweep", "beside", "is_ours", "missing", "peer_of", "side_by_side", "sweeps", "verdict"]

_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_BITS = {"float64": 53, "float32": 24, "tf32": 11, "float16": 11, "bfloat16": 8, "int8": 7}  # that a value has
_POINT = re.compile(r"(.*, )(\d+)( x \d+ x \d+.*)")  # "ResNet-50 FPN, 8 x 800 x 1344": a model, a batch, a size


@dataclass(frozen=True)
class SideBySide:
    """What was timed side by side: implementations of one case, each once.

    Attributes:
        dtype: of our first implementation; others may have another one.
        rows: where rounds were not shared with torchvision's, the ratio is that of the medians, without an interval.
    """

    subject: str
    case: str
    dtype: str
    rows: list[Row]

    @property
    def peer(self) -> Row | None:
        """torchvision's row, if it was timed."""
        return peer_of(self.rows)


@dataclass(frozen=True)
class Sweep:
    """Times of several implementations as one quantity grows.

    Attributes:
        title: the case, with "N" for what grows.
        variable: the quantity, such as "boxes".
        lines: by implementation, (value, p50 in ms), rising.
    """

    subject: str
    title: str
    dtype: str
    variable: str
    lines: dict[str, list[tuple[float, float]]]


def is_ours(row: Row) -> bool:
    """Whether it is an implementation of this package."""
    return row.implementation.startswith(OURS)


def peer_of(rows: Iterable[Row]) -> Row | None:
    """torchvision's row of a case, if it was timed."""
    return next((row for row in rows if row.implementation == PEER and row.p50_ms), None)


def beside(row: Row, peer: Row | None) -> str:
    """Of a ratio in lower precision: "beside float32" where torchvision computed with more bits, else ""."""
    if peer is None or not row.p50_ms:
        return ""
    own, theirs = _BITS.get(row.dtype), _BITS.get(peer.dtype)
    return f"beside {peer.dtype}" if own and theirs and own < theirs else ""


def missing(rows: Iterable[Row]) -> Counter[tuple[str, str]]:
    """In how many cases each implementation has no time, by its name and the reason."""
    return Counter((row.implementation, row.note) for row in rows if verdict(row) == "missing")


def verdict(row: Row) -> str:
    """What became of an implementation.

    Returns:
        "wrong", "missing" (not installed, or not able), "untold" (nothing to compare its time with), "faster" or
        "slower" than torchvision, or "even" where the confidence interval of the ratio has 1 in it.
    """
    if row.correct is False:
        return "wrong"
    if row.p50_ms is None:
        return "missing"
    ratio, low, high = row.ratio_to_torchvision, row.ratio_low, row.ratio_high
    if ratio is None:
        return "untold"
    if ratio == 1 or (low is not None and high is not None and low <= 1 <= high):
        return "even"
    return "faster" if ratio > 1 else "slower"


def side_by_side(rows: Iterable[Row]) -> list[SideBySide]:
    """Neighbours of one subject and case, until an implementation comes again, as it does for the next dtype."""
    groups: list[list[Row]] = []
    for row in rows:
        last = groups[-1] if groups else []
        same = last and (last[0].subject, last[0].case) == (row.subject, row.case)
        if not same or any(other.implementation == row.implementation for other in last):
            groups.append([])
        groups[-1].append(row)
    return [
        SideBySide(
            group[0].subject,
            group[0].case,
            next((row.dtype for row in group if is_ours(row)), group[0].dtype),
            _with_ratios(group),
        )
        for group in groups
    ]


def _with_ratios(rows: list[Row]) -> list[Row]:
    peer = peer_of(rows)
    if peer is None or not peer.p50_ms:
        return rows
    return [
        replace(row, ratio_to_torchvision=peer.p50_ms / row.p50_ms)
        if row.p50_ms and row.ratio_to_torchvision is None
        else row
        for row in rows
    ]


def sweeps(found: Sequence[SideBySide]) -> list[Sweep]:
    """What was measured at two values of a quantity at least: the rows' `variable`, or the batch of a model's case."""
    groups: dict[tuple[str, ...], list[tuple[float, SideBySide]]] = defaultdict(list)
    for comparison in found:
        for name, value, rest in _variables(comparison):
            pattern = rest or _NUMBER.sub("#", comparison.case)
            groups[comparison.subject, comparison.dtype, name, pattern].append((value, comparison))
    out = []
    for (subject, dtype, name, _), members in groups.items():
        parts: dict[str, list[tuple[float, SideBySide]]] = defaultdict(list)
        for value, comparison in members:
            parts[_title(value, comparison, members)].append((value, comparison))
        for title, points in parts.items():
            if len({value for value, _ in points}) > 1 and (lines := _lines(points)):
                out.append(Sweep(subject, title, dtype, name, lines))
    return out


def _variables(comparison: SideBySide) -> list[tuple[str, float, str]]:
    """(name, value, what else was varied) of each quantity."""
    variable = next((row.variable for row in comparison.rows if row.variable), None)
    if not variable:
        point = _POINT.fullmatch(comparison.case) if comparison.subject == "models" else None
        return [("batch", float(point[2]), f"{point[1]}#{point[3]}")] if point else []
    if len(variable) == 1:
        return [(name, float(value), "") for name, value in variable.items()]
    fixed = _NUMBER.sub("#", comparison.case)
    return [
        (name, float(value), f"{fixed} {sorted((k, v) for k, v in variable.items() if k != name)}")
        for name, value in variable.items()
    ]


def _title(value: float, comparison: SideBySide, members: list[tuple[float, SideBySide]]) -> str:
    """The case with "N" for each number that follows from the quantity, such as how many boxes survive."""
    numbers = {id(other): _NUMBER.findall(other.case) for _, other in members}

    def follows(place: int) -> bool:
        at: dict[float, set[str]] = defaultdict(set)
        for one, other in members:
            at[one].add(numbers[id(other)][place])
        varies = len(set.union(*at.values())) > 1
        return varies and all(len(values) == 1 for values in at.values())

    places = iter(range(len(numbers[id(comparison)])))
    return _NUMBER.sub(lambda match: "N" if follows(next(places)) else match[0], comparison.case)


def _lines(points: list[tuple[float, SideBySide]]) -> dict[str, list[tuple[float, float]]]:
    lines: dict[str, dict[float, float]] = defaultdict(dict)
    for value, comparison in points:
        for row in comparison.rows:
            if row.p50_ms and row.correct is not False and value > 0:
                lines[row.implementation][value] = row.p50_ms
    return {name: sorted(line.items()) for name, line in lines.items()}
