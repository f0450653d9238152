"""What goes to the terminal."""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from ..engine.inference.result import Result

__all__ = ["open_console", "print_result", "progress"]

Item = TypeVar("Item")


def open_console(stderr: bool = False) -> Console:
    """Paths and class names are printed as they are: brackets in them are no markup."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def print_result(console: Console, result: "Result", brief: str = "") -> None:
    height, width = result.size
    total = sum(result.timings.values())
    found = ", ".join(f"{count} {name}" for name, count in Counter(result.names).most_common()) or "nothing found"
    console.print(
        f"{brief}{result.path or 'picture'}  {width} x {height}  {found}  {total:.0f} ms",
        soft_wrap=True,
        highlight=False,
    )
    if brief:
        return
    table = Table("label", "score", "box x1 y1 x2 y2", "mask area", box=None, pad_edge=False)
    for row in result.table():
        area = "-" if row["mask_area"] is None else f"{row['mask_area']:,} px"
        table.add_row(row["label"], f"{row['score']:.3f}", "  ".join(f"{side:.0f}" for side in row["box"]), area)
    if len(result):
        console.print(table)
    stages = "  ".join(f"{stage} {spent:.1f}" for stage, spent in result.timings.items())
    console.print(f"ms per stage: {stages}", soft_wrap=True)


def progress(stream: Iterable[Item], total: int, what: str, *, alone: bool = False) -> Iterator[Item]:
    """The items of a stream, with a bar on stderr while a person looks on.

    Args:
        alone: nothing else is printed meanwhile, so that a terminal that gets the results too can show it.
    """
    if total < 2:
        yield from stream
        return
    # Never on the terminal that gets the results too, and never in their way when they go to a file.
    console = open_console(stderr=True)
    silent = not console.is_terminal or (sys.stdout.isatty() and not alone)
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False, disable=silent
    ) as bar:
        yield from bar.track(stream, total)
