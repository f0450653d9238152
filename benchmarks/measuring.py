"""A run: cases one after the other, each printed as soon as it is done, and all of them in one file."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .device import measure_ceilings
from .harness import WallClock
from .machine import environment
from .results import Row, write_json
from .table import report

__all__ = ["measure", "on_cpu"]

_SMALL = 64 << 20  # bytes of a copy in a quick run


def measure(groups: Iterable[list[Row]], facts: dict[str, Any], path: Path | None, console: Console) -> int:
    """Print the rows of each case.

    Args:
        groups: The rows of a case as soon as it is done.
        facts: What stands beside the rows in the file; the environment comes on top, and the groups may add to it.
        path: A result file, rewritten after each case, so that a run that is stopped leaves what it has.
        console: Where to print.

    Returns:
        Exit status: 1 if an implementation was wrong, else 0.
    """
    facts["environment"] = environment()
    rows: list[Row] = []
    for group in groups:
        console.print(report(group), "")
        rows += group
        if path:
            write_json(path, rows, facts)
    for name, value in facts["environment"].items():
        console.print(f"{name}: {value}", highlight=False, soft_wrap=True)
    if path:
        write_json(path, rows, facts)
    return int(any(row.correct is False for row in rows))


def on_cpu(groups: Iterable[list[Row]], threads: int, quick: bool, facts: dict[str, Any]) -> Iterator[list[Row]]:
    """The rows of each case on a CPU with their floors, by ceilings that are measured first and go into the facts."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ceilings = measure_ceilings(WallClock(), *[_SMALL] * quick)
    finally:
        torch.set_num_threads(before)
    facts["ceilings"] = asdict(ceilings)
    for rows in groups:
        yield [row.above_floor(ceilings.copy_bytes_per_s) for row in rows]
