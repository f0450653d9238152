"""The rows of a case as a table for a terminal."""

from collections.abc import Callable, Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

from .grouping import beside, peer_of
from .results import PEER, Row

__all__ = ["report"]

_COLUMNS: dict[str, Callable[[Row], float | None]] = {
    "p20 ms": lambda row: row.p20_ms,
    "p50 ms": lambda row: row.p50_ms,
    "p80 ms": lambda row: row.p80_ms,
    f"x {PEER}": lambda row: row.ratio_to_torchvision,
}
_MORE: dict[str, Callable[[Row], float | None]] = {  # where there is something to show
    "warm ms": lambda row: row.warm_ms,
    "call ms": lambda row: row.call_ms,
    "x floor": lambda row: row.times_floor,
    "GB/s": lambda row: row.bytes_per_s and row.bytes_per_s / 1e9,
    "TFLOP/s": lambda row: row.flops and row.flops / 1e12,
    "first ms": lambda row: row.first_ms,
    "peak MB": lambda row: row.peak_bytes and row.peak_bytes / 1e6,
    "launches": lambda row: row.launches,
    "box AP": lambda row: row.box_ap,
    "mask AP": lambda row: row.mask_ap,
}


def report(rows: Sequence[Row]) -> Group:
    """The rows of one case."""
    first, peer = rows[0], peer_of(rows)
    columns = _COLUMNS | {header: of for header, of in _MORE.items() if any(of(row) for row in rows)}
    headers = list(columns)
    if intervals := any(row.ratio_low is not None and row.implementation != PEER for row in rows):
        headers.insert(len(_COLUMNS), "95 %")
    out = Table("", *headers, "", box=None, pad_edge=False)
    for column in out.columns[1:-1]:
        column.justify = "right"
    for row in rows:
        cells = [_figure(of(row)) for of in columns.values()]
        if intervals:
            bounded = row.ratio_low is not None and row.implementation != PEER
            cells.insert(len(_COLUMNS), f"{_figure(row.ratio_low)} .. {_figure(row.ratio_high)}" if bounded else "-")
        stages = ", ".join(f"{stage} {spent:.3g}" for stage, spent in (row.stages_ms or {}).items())
        lower = f"{row.dtype} {other}" if (other := beside(row, peer)) else ""
        notes = [lower, row.note, "not captured" if row.captured is False else "", stages]
        wrong = ["WRONG"] * len(cells) if row.correct is False else cells
        out.add_row(row.implementation, *wrong, "; ".join(note for note in notes if note))
    return Group(Text(f"{first.subject}: {first.case} ({first.device}, {first.dtype}, {first.threads} threads)"), out)


def _figure(x: float | None) -> str:
    return "-" if x is None else f"{x:.3g}" if x < 1000 else f"{x:.0f}"
