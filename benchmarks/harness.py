"""Side-by-side timing: outputs are compared first, then every implementation runs once a round, in turn.

Interleaving lets a busy machine slow all of them alike, and a ratio is the median of the ratios within the rounds.
What disagrees is never timed; what is not installed is listed.
"""

import importlib
import importlib.metadata
import json
import math
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..engine.model.files import write_whole

__all__ = ["Row", "compare", "environment", "optional", "report", "write_json"]

_PEER = "torchvision"
_SHORTEST_SAMPLE = 2e-3  # seconds; what is shorter is called several times in a row for one sample
_ROOT = Path(__file__).resolve().parents[1]
_PACKAGES = ("torch", "torchvision", "triton", "numpy", "pycocotools")

Implementations = Mapping[str, Callable[[], Any] | None]


@dataclass(frozen=True)
class Row:
    """One implementation in one case.

    Attributes:
        p20_ms: A fifth of the samples took less; None where nothing was timed. Likewise `p50_ms` and `p80_ms`.
        correct: Whether the output agreed; None where there was none, or nothing to compare it with.
        ratio_to_torchvision: How many times as fast as torchvision; None where that was not timed beside it.
        note: "not installed", "nothing to compare with", what differed, or what was raised.
    """

    subject: str
    case: str
    implementation: str
    device: str
    dtype: str
    threads: int
    p20_ms: float | None
    p50_ms: float | None
    p80_ms: float | None
    correct: bool | None
    ratio_to_torchvision: float | None
    note: str = ""


def compare(
    subject: str,
    case: str,
    implementations: Implementations,
    disagreement: Callable[[Any, Any], str],
    *,
    rounds: int,
    threads: int,
    device: str = "cpu",
    dtype: str = "float32",
) -> list[Row]:
    """Check, then time, several implementations of one thing.

    Args:
        subject: What is measured, such as "nms".
        case: On what, such as "1000 boxes".
        implementations: Functions without arguments, by name; None for what is not installed. The output of the first
            that runs is what the others are held against.
        disagreement: Of that output and another one: how they differ, in words, or "" where they agree.
        rounds: How many samples of each, at least 2.
        threads: What torch may use. The BLAS of numpy reads its number from the environment, once: see `__main__`.
        device: Where it runs; work on "cuda" is waited for.
        dtype: For the row.

    Returns:
        A row for each implementation, in the order given.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        verdicts = _verdicts(implementations, disagreement)
        timed = {n: f for n, f in implementations.items() if f is not None and verdicts[n][0] is not False}
        samples = _interleave(timed, rounds, device)
    finally:
        torch.set_num_threads(before)
    rows = []
    for name, (correct, note) in verdicts.items():
        figures: list[float | None] = [None] * 4
        if own := samples.get(name):
            deciles = statistics.quantiles(own, n=10, method="inclusive")
            figures[:3] = [1e3 * deciles[i] for i in (1, 4, 7)]
            if peer := samples.get(_PEER):
                figures[3] = statistics.median(p / o for p, o in zip(peer, own, strict=True))
        p20, p50, p80, ratio = figures
        rows.append(Row(subject, case, name, device, dtype, threads, p20, p50, p80, correct, ratio, note))
    return rows


def _verdicts(
    implementations: Implementations, disagreement: Callable[[Any, Any], str]
) -> dict[str, tuple[bool | None, str]]:
    """Whether each is correct, and the note to its row."""
    verdicts: dict[str, tuple[bool | None, str]] = {}
    outputs: list[Any] = []
    for name, function in implementations.items():
        note = ""
        if function is None:
            verdicts[name] = None, "not installed"
            continue
        try:
            outputs.append(function())
            if len(outputs) > 1:
                note = disagreement(outputs[0], outputs[-1])
        except Exception as error:
            note = f"{type(error).__name__}: {error}"
        verdicts[name] = not note, note
    if len(outputs) == 1:
        unchecked = next(name for name, (correct, _) in verdicts.items() if correct)
        verdicts[unchecked] = None, "nothing to compare with"
    return verdicts


def _interleave(functions: Mapping[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds a call, one sample of each function a round; each round begins with another one."""

    def sample(function: Callable[[], Any], calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            function()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / calls

    # The call that was checked and this one are the warm-up.
    calls = {name: math.ceil(_SHORTEST_SAMPLE / sample(function, 1)) for name, function in functions.items()}
    samples: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for _ in range(rounds):
        for name in names:
            samples[name].append(sample(functions[name], calls[name]))
        names = names[1:] + names[:1]
    return samples


def optional(module: str) -> Any:
    """The module, or None where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def environment() -> dict[str, Any]:
    """What a reader needs to judge the figures: machine, load, versions, commit, time."""
    information = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", information.read_text()) if information.is_file() else None
    return {
        "machine": model[1] if model else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in _PACKAGES},
        "commit": _commit(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout, with "-dirty" where its files differ from it; None outside of one."""
    command = ["git", f"--git-dir={_ROOT / '.git'}", f"--work-tree={_ROOT}", "describe", "--always", "--abbrev=40"]
    try:
        found = subprocess.run([*command, "--dirty", "--exclude=*"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def report(rows: list[Row]) -> Group:
    """The rows of one case for a terminal."""
    first = rows[0]
    out = Table("", "p20 ms", "p50 ms", "p80 ms", f"x {_PEER}", "", box=None, pad_edge=False)
    for column in out.columns[1:5]:
        column.justify = "right"
    for row in rows:
        figures = (row.p20_ms, row.p50_ms, row.p80_ms, row.ratio_to_torchvision)
        cells = ["-" if x is None else f"{x:.3g}" if x < 1000 else f"{x:.0f}" for x in figures]
        out.add_row(row.implementation, *(["WRONG"] * 4 if row.correct is False else cells), row.note)
    return Group(Text(f"{first.subject}: {first.case} ({first.device}, {first.dtype}, {first.threads} threads)"), out)


def write_json(path: Path, rows: Iterable[Row]) -> None:
    """Write `{"environment": {...}, "rows": [...]}`, whole or not at all."""
    text = json.dumps({"environment": environment(), "rows": [asdict(row) for row in rows]}, indent=1, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: file.write(f"{text}\n".encode()))
