"""A run: cases one after the other, each printed as soon as it is done, and all of them in one file."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from . import bench_gpu, bench_ops
from .harness import Clock, Row
from .machine import environment
from .results import write_json
from .table import report

__all__ = ["above_floors", "measure", "ops", "with_ceilings"]

_GPU_PARTS = ("roi", "boxes", "pixels")


def measure(
    groups: Iterable[list[Row]], facts: dict[str, Any], path: Path | None, console: Console
) -> tuple[list[Row], int]:
    """Print the rows of each case.

    Args:
        groups: The rows of a case as soon as it is done.
        facts: What stands beside the rows in the file; the environment comes on top, and the groups may add to it.
        path: A result file, rewritten after each case, so that a run that is stopped leaves what it has.
        console: Where to print.

    Returns:
        All rows, and the exit status: 1 if an implementation was wrong, else 0.
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
    return rows, int(any(row.correct is False for row in rows))


def with_ceilings(device: str, quick: bool, facts: dict[str, Any]) -> Clock:
    """A clock of the device that knows its bandwidth; all that was measured of it goes into the facts.

    On a CPU with as many threads as torch may use now.
    """
    clock, ceilings = bench_gpu.start(torch.device(device).type, quick)
    facts["ceilings"] = asdict(ceilings)
    return clock


def ops(clock: Clock, threads: int, quick: bool) -> Iterator[list[Row]]:
    """The ops on the clock's device, case by case."""
    if clock.device == "cuda":
        yield from bench_gpu.run(clock, quick, _GPU_PARTS)
    else:
        yield from above_floors(bench_ops.run(threads, quick), clock)


def above_floors(groups: Iterable[list[Row]], clock: Clock) -> Iterator[list[Row]]:
    """The rows with their floors, where the cases know how much must move but not how fast the device is."""
    for rows in groups:
        yield [row.above_floor(clock.bandwidth) for row in rows]
