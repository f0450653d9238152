"""Result files: what is in them, writing one whole, and reading one that is told to be one.

``{"schema": 1, "environment": {...}, "ceilings": {...} or null, ..., "rows": [...]}``. A field that is added later is
null in older files; the number changes only where a reader of the old one would go wrong.
"""

import json
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..engine.model.files import write_whole

__all__ = ["PEER", "SCHEMA", "Results", "Row", "read_results", "write_json", "write_text"]

SCHEMA = 1
PEER = "torchvision"  # whose time ratios are of


@dataclass(frozen=True)
class Row:
    """One implementation in one case.

    Attributes:
        p20_ms: A fifth of the samples took less; None where nothing was timed. Likewise `p50_ms` and `p80_ms`.
        rounds: How many samples those are of; None where nothing was timed.
        correct: Whether the output agreed; None where there was none, or nothing to compare it with.
        ratio_to_torchvision: How many times as fast as torchvision, the median of the ratios within the rounds; None
            where that was not timed beside it.
        ratio_low: Lower bound of that median, with `ratio_high` a confidence interval of 95 % (`harness.interval`);
            None where there were too few rounds for one.
        note: "not installed", "nothing to compare with", what differed, or what was raised.
        variable: What a sweep varies, such as ``{"boxes": 1000}`` or ``{"batch": 4}``.
        warm_ms: On a GPU, the median where every call has the same input, which a cache may hold.
        call_ms: On a GPU, of what is captured, the median from the host's side, call by call: what Python and the
            launches cost where it is more than the work.
        captured: On a GPU, whether the call runs in a CUDA graph, which shows that it never waits for the device.
        least_bytes: What must move between the device and its memory at least: inputs that are read and outputs.
        floor_ms: How long that takes at the measured bandwidth of a copy, ``least_bytes / bandwidth``.
        times_floor: ``p50_ms / floor_ms``; 1 / times_floor is the share of that bandwidth which was achieved.
        operations: Floating-point operations that must be done at least, two for each multiply-add.
        first_ms: Of a model in a process of its own, the first call after it was loaded.
        peak_bytes: Memory at most: on a GPU what torch allocated during a call beside weights and inputs; on a CPU
            what was resident of a process of its own.
        launches: On a GPU, kernels for each picture, copies and fills not counted.
        stages_ms: Medians of the parts of a call, in their order, launched kernel by kernel.
        box_ap: COCO's average precision on a data set that was given, of boxes; `mask_ap` of masks.
    """

    subject: str
    case: str
    implementation: str
    device: str
    dtype: str
    threads: int
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    correct: bool | None = None
    ratio_to_torchvision: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    note: str = ""
    rounds: int | None = None
    variable: dict[str, float] | None = None
    warm_ms: float | None = None
    call_ms: float | None = None
    captured: bool | None = None
    least_bytes: int | None = None
    floor_ms: float | None = None
    times_floor: float | None = None
    operations: int | None = None
    first_ms: float | None = None
    peak_bytes: int | None = None
    launches: float | None = None
    stages_ms: dict[str, float] | None = None
    box_ap: float | None = None
    mask_ap: float | None = None

    def noted(self, *notes: str, **fields: Any) -> "Row":
        """The row with more in its note, and other fields."""
        return replace(self, **fields, note="; ".join(filter(None, [self.note, *notes])))

    def above_floor(self, bandwidth: float | None) -> "Row":
        """The row with its floor, where it was timed and the bytes and the bandwidth (of a copy) are known."""
        if self.p50_ms is None or not self.least_bytes or not bandwidth:
            return self
        floor = 1e3 * self.least_bytes / bandwidth
        return replace(self, floor_ms=floor, times_floor=self.p50_ms / floor)

    @property
    def bytes_per_s(self) -> float | None:
        """Achieved: `least_bytes` in `p50_ms`."""
        return 1e3 * self.least_bytes / self.p50_ms if self.least_bytes and self.p50_ms else None

    @property
    def flops(self) -> float | None:
        """Achieved operations a second: `operations` in `p50_ms`."""
        return 1e3 * self.operations / self.p50_ms if self.operations and self.p50_ms else None


@dataclass(frozen=True)
class Results:
    """A file's content; `more` is what a kind of run adds, such as the outcome of tests."""

    environment: dict[str, Any]
    ceilings: dict[str, Any] | None
    rows: list[Row]
    more: dict[str, Any] = field(default_factory=dict)


def write_json(path: Path, rows: Iterable[Row | Mapping[str, Any]], facts: Mapping[str, Any]) -> None:
    """Write a result file, whole or not at all.

    Args:
        path: The file, in a folder that need not be there.
        rows: `Row`, or the same as read from JSON.
        facts: What stands beside the rows: the environment, at least.
    """
    content = {"schema": SCHEMA, **facts}
    content.setdefault("ceilings", None)
    content["rows"] = [asdict(row) if isinstance(row, Row) else dict(row) for row in rows]
    write_text(path, json.dumps(content, indent=1, allow_nan=False))


def write_text(path: Path, text: str) -> None:
    """Write a line of text, whole or not at all, in a folder that need not be there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: file.write(f"{text}\n".encode()))


def read_results(path: Path) -> Results:
    """Read a result file.

    Raises:
        ValueError: It is none, or of another schema: the file, the row and the field, what was expected and what came.
        OSError: It cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no text
        raise ValueError(f"{path}: expected a result file of trimask, got no JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object, got {_brief(content)}")
    schema = content.pop("schema", None)
    if schema != SCHEMA or isinstance(schema, bool):
        hint = "; it is older than that: measure again" if schema is None and "rows" in content else ""
        raise ValueError(f"{path}: schema: expected {SCHEMA}, got {_brief(schema)}{hint}")
    for name, kind, words in (("environment", dict, "an object"), ("rows", list, "a list")):
        if not isinstance(content.get(name), kind):
            raise ValueError(f"{path}: {name}: expected {words}, got {_brief(content.get(name))}")
    ceilings = content.pop("ceilings", None)
    if not isinstance(ceilings, dict | None):
        raise ValueError(f"{path}: ceilings: expected an object or null, got {_brief(ceilings)}")
    rows = [_row(f"{path}: row {i}", row) for i, row in enumerate(content.pop("rows"), start=1)]
    return Results(content.pop("environment"), ceilings, rows, content)


_KINDS = typing.get_type_hints(Row)
_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", dict: "an object of numbers"}


def _row(where: str, content: Any) -> Row:
    if not isinstance(content, dict):
        raise ValueError(f"{where}: expected an object, got {_brief(content)}")
    names = [content.get(name) for name in ("subject", "case", "implementation")]
    where += f" ({': '.join(map(str, names))})"
    for one in fields(Row):
        if one.name not in content and one.default is MISSING:
            raise ValueError(f"{where}: {one.name}: expected {_words(_KINDS[one.name])}, got nothing")
    for name, value in content.items():
        if name not in _KINDS:
            raise ValueError(f"{where}: expected the fields of schema {SCHEMA}, got {name!r}")
        if not _fits(value, _KINDS[name]):
            raise ValueError(f"{where}: {name}: expected {_words(_KINDS[name])}, got {_brief(value)}")
    row = Row(**content)
    quantiles = [row.p20_ms, row.p50_ms, row.p80_ms]
    known = [x for x in quantiles if x is not None]
    if len(known) not in (0, 3) or known != sorted(known) or min(known, default=1.0) <= 0:
        raise ValueError(f"{where}: p20_ms, p50_ms, p80_ms: expected three rising positive numbers, got {quantiles}")
    if known and row.correct is False:
        raise ValueError(f"{where}: p50_ms: expected null beside a wrong result, got {row.p50_ms:g}")
    return row


def _fits(value: Any, kind: Any) -> bool:
    if isinstance(kind, types.UnionType):
        return any(_fits(value, part) for part in typing.get_args(kind))
    if typing.get_origin(kind) is dict:
        return isinstance(value, dict) and all(_fits(number, float) for number in value.values())
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def _words(kind: Any) -> str:
    if isinstance(kind, types.UnionType):
        return " or ".join(_words(part) for part in typing.get_args(kind))
    return "null" if kind is types.NoneType else _WORDS[typing.get_origin(kind) or kind]


def _brief(value: Any) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else f"{text[:57]}..."
