"""Files of results as a reader wants them: what was compared with what, who won, and what grows with the work."""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Comparison", "Results", "Sweep", "Values", "comparisons", "is_ours", "read_results", "sweeps", "verdict"]

Values = dict[str, Any]  # of a row, by the names of the fields of `harness.Row`

# What older files need not have.
_FIELDS = (
    "subject",
    "case",
    "implementation",
    "device",
    "dtype",
    "threads",
    "p20_ms",
    "p50_ms",
    "p80_ms",
    "correct",
    "ratio_to_torchvision",
    "ratio_low",
    "ratio_high",
    "note",
    "warm_ms",
    "call_ms",
    "captured",
    "least_bytes",
    "operations",
    "floor_ms",
    "times_floor",
    "first_ms",
    "peak_bytes",
    "launches",
    "stages_ms",
    "variable",
)
_NEEDED = ("subject", "case", "implementation")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_POINT = re.compile(r"(.*, )(\d+)( x \d+ x \d+.*)")  # "ResNet-50 FPN, 8 x 800 x 1344": a model, a batch, a size


@dataclass(frozen=True)
class Results:
    """A file of results; every row has every field."""

    path: Path
    environment: Values
    ceilings: Values
    rows: list[Values]
    unfinished: list[str]


@dataclass(frozen=True)
class Comparison:
    """What was timed side by side: implementations of one case, each once.

    Attributes:
        dtype: of our implementation; a peer may have another one.
    """

    subject: str
    case: str
    dtype: str
    rows: list[Values]

    @property
    def peer(self) -> Values | None:
        """torchvision's row, if it was timed."""
        found = (row for row in self.rows if row["implementation"] == "torchvision" and row["p50_ms"])
        return next(found, None)


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


def read_results(path: Path) -> Results:
    """Read a file that the benchmarks wrote.

    Raises:
        ValueError: it is none; the file and what was expected are named.
    """
    found = _load(path)
    rows = found["rows"]
    for i, row in enumerate(rows):
        if not isinstance(row, dict) or any(not isinstance(row.get(name), str) for name in _NEEDED):
            raise ValueError(f"{path}: row {i}: expected the texts {', '.join(_NEEDED)}, got {str(row)[:200]}")
    return Results(
        path,
        found.get("environment") or {},
        found.get("ceilings") or {},
        [{**dict.fromkeys(_FIELDS), "dtype": "", "note": "", **row} for row in rows],
        list(found.get("unfinished") or []),
    )


def _load(path: Path) -> Values:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected a JSON file of results, got {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("rows"), list):
        raise ValueError(f"{path}: expected {{'environment': ..., 'rows': [...]}}, got {str(found)[:200]}")
    return found


def is_ours(row: Values) -> bool:
    return bool(row["implementation"].startswith("trimask"))


def verdict(row: Values) -> str:
    """What became of an implementation.

    Returns:
        "wrong", "missing" (not installed, or not able), "untold" (nothing to compare its time with), "faster" or
        "slower" than torchvision, or "even" where the confidence interval of the ratio has 1 in it.
    """
    if row["correct"] is False:
        return "wrong"
    if row["p50_ms"] is None:
        return "missing"
    ratio, low, high = row["ratio_to_torchvision"], row["ratio_low"], row["ratio_high"]
    if ratio is None:
        return "untold"
    if ratio == 1 or (low is not None and high is not None and low <= 1 <= high):
        return "even"
    return "faster" if ratio > 1 else "slower"


def comparisons(rows: Iterable[Values]) -> list[Comparison]:
    """Neighbours of one subject and case, until an implementation comes again, as it does for the next dtype."""
    groups: list[list[Values]] = []
    for row in rows:
        last = groups[-1] if groups else []
        same = last and (last[0]["subject"], last[0]["case"]) == (row["subject"], row["case"])
        if not same or any(other["implementation"] == row["implementation"] for other in last):
            groups.append([])
        groups[-1].append(row)
    return [
        Comparison(
            group[0]["subject"],
            group[0]["case"],
            next((row["dtype"] for row in group if is_ours(row)), group[0]["dtype"]),
            group,
        )
        for group in groups
    ]


def sweeps(found: Sequence[Comparison]) -> list[Sweep]:
    """What was measured at two values of a quantity at least: the rows' `variable`, or the batch of a model's case."""
    groups: dict[tuple[str, ...], list[tuple[float, Comparison]]] = defaultdict(list)
    for comparison in found:
        for name, value, rest in _variables(comparison):
            pattern = rest or _NUMBER.sub("#", comparison.case)
            groups[comparison.subject, comparison.dtype, name, pattern].append((value, comparison))
    out = []
    for (subject, dtype, name, _), members in groups.items():
        parts: dict[str, list[tuple[float, Comparison]]] = defaultdict(list)
        for value, comparison in members:
            parts[_title(value, comparison, members)].append((value, comparison))
        for title, points in parts.items():
            if len({value for value, _ in points}) > 1 and (lines := _lines(points)):
                out.append(Sweep(subject, title, dtype, name, lines))
    return out


def _variables(comparison: Comparison) -> list[tuple[str, float, str]]:
    """(name, value, what else was varied) of each quantity."""
    variable = next((row["variable"] for row in comparison.rows if row["variable"]), None)
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


def _title(value: float, comparison: Comparison, members: list[tuple[float, Comparison]]) -> str:
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


def _lines(points: list[tuple[float, Comparison]]) -> dict[str, list[tuple[float, float]]]:
    lines: dict[str, dict[float, float]] = defaultdict(dict)
    for value, comparison in points:
        for row in comparison.rows:
            if row["p50_ms"] and row["correct"] is not False and value > 0:
                lines[row["implementation"]][value] = row["p50_ms"]
    return {name: sorted(line.items()) for name, line in lines.items()}
