"""Side-by-side timing: outputs are compared first, then every implementation runs once a round, in turn.

Interleaving lets a busy machine slow all of them alike, and a ratio is the median of the ratios within the rounds.
What disagrees is never timed; what is not installed is listed. What a call costs is up to a clock: `WallClock` here,
and `DeviceClock` for GPUs.
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
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from itertools import cycle
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..engine.model.files import write_whole

__all__ = [
    "Call",
    "Clock",
    "Disagreement",
    "Implementations",
    "Row",
    "Sampler",
    "Samplers",
    "WallClock",
    "compare",
    "environment",
    "failed",
    "optional",
    "report",
    "write_json",
    "write_text",
]

OURS = "trimask"  # how the names of our implementations begin
_PEER = "torchvision"
_SHORTEST_SAMPLE = 2e-3  # seconds; what is shorter is called several times in a row for one sample
_FEWEST_ROUNDS = 3  # however long they take
_LONGEST_NOTE = 500  # characters
_MAIN = "main"
_ROOT = Path(__file__).resolve().parents[1]
_PACKAGES = ("torch", "torchvision", "triton", "numpy", "pycocotools", "conch-triton-kernels")

Call = Callable[[], Any]
Implementations = Mapping[str, Call | Sequence[Call] | None]
Sampler = Callable[[], float]  # takes one sample: seconds a call
Disagreement = Callable[[Any, Any], str]
_Key = TypeVar("_Key", bound=Hashable)


@dataclass(frozen=True)
class Row:
    """One implementation in one case.

    Attributes:
        p20_ms: A fifth of the samples took less; None where nothing was timed. Likewise `p50_ms` and `p80_ms`.
        correct: Whether the output agreed; None where there was none, or nothing to compare it with.
        ratio_to_torchvision: How many times as fast as torchvision; None where that was not timed beside it.
        note: "not installed", "nothing to compare with", what differed, or what was raised.
        warm_ms: On a GPU, the median where every call has the same input, which a cache may hold.
        call_ms: On a GPU, the median from the host's side, call by call: what Python and the launches cost where it
            is more than the work.
        captured: On a GPU, whether the call runs in a CUDA graph, which shows that it never waits for the device.
        least_bytes: What must move between the device and its memory at least: inputs that are read and outputs.
        floor_ms: How long that takes at the measured bandwidth of a copy, ``least_bytes / bandwidth``.
        times_floor: ``p50_ms / floor_ms``; 1 / times_floor is the share of that bandwidth which was achieved.
        first_ms: Of a model in a process of its own, the first call after it was loaded.
        peak_bytes: Memory at most: on a GPU what torch allocated during a call beside weights and inputs; on a CPU
            what was resident of a process of its own.
        launches: On a GPU, kernels for each picture, copies and fills not counted.
        stages_ms: Medians of the parts of a call, in their order, launched kernel by kernel.
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
    note: str = ""
    warm_ms: float | None = None
    call_ms: float | None = None
    captured: bool | None = None
    least_bytes: int | None = None
    floor_ms: float | None = None
    times_floor: float | None = None
    first_ms: float | None = None
    peak_bytes: int | None = None
    launches: float | None = None
    stages_ms: dict[str, float] | None = None


@dataclass(frozen=True)
class Samplers:
    """How one implementation is timed.

    Attributes:
        main: What p20, p50 and p80 are of.
        more: Further samplers, by the field of `Row` that takes their median.
        captured: See `Row`.
    """

    main: Sampler
    more: Mapping[str, Sampler]
    captured: bool | None = None


class Clock(Protocol):
    """Where calls run, and how they are timed.

    Attributes:
        device: For the rows.
        bandwidth: Bytes a second of a large copy on it, read and written; None where it was not measured.
    """

    device: str
    bandwidth: float | None

    def samplers(self, calls: Sequence[Call]) -> Samplers:
        """How to time a function, given as calls that do the same to copies of the input."""
        ...


class WallClock:
    """Time as the host sees it; copies of the input take turns."""

    def __init__(self, device: str = "cpu", bandwidth: float | None = None) -> None:
        self.device, self.bandwidth = device, bandwidth

    def samplers(self, calls: Sequence[Call]) -> Samplers:
        turn = cycle(calls)

        def sample(count: int) -> float:
            start = time.perf_counter()
            for _ in range(count):
                next(turn)()
            return (time.perf_counter() - start) / count

        # The call that was checked and this one are the warm-up.
        count = math.ceil(_SHORTEST_SAMPLE / sample(1))
        return Samplers(lambda: sample(count), {})


def compare(
    subject: str,
    case: str,
    implementations: Implementations,
    disagreement: Disagreement,
    *,
    rounds: int,
    threads: int,
    clock: Clock | None = None,
    dtype: str = "float32",
    expected: Any = None,
    near: Disagreement | None = None,
    least_bytes: int | Mapping[str, int] | None = None,
    seconds: float = math.inf,
) -> list[Row]:
    """Check, then time, several implementations of one thing.

    Args:
        subject: What is measured, such as "nms".
        case: On what, such as "1000 boxes".
        implementations: Functions without arguments, by name, or for each a list of them that do the same to copies of
            the input; None for what is not installed. The output of the first that runs is what the others are held
            against. Names of our own begin with "trimask".
        disagreement: Of that output and another one: how they differ, in words, or "" where they agree.
        rounds: How many samples of each, at least 2.
        threads: What torch may use. The BLAS of numpy reads its number from the environment, once: see `__main__`.
        clock: Where and how they are timed; by default on the CPU, as the host sees it.
        dtype: For the row.
        expected: What all are held against instead of the first one's output.
        near: Like `disagreement`, what peers are held to where their arithmetic is known to be less exact. How they
            differ is still in their notes.
        least_bytes: See `Row`; by name where implementations differ.
        seconds: When this has passed there are fewer rounds, 3 at least.

    Returns:
        A row for each implementation, in the order given.
    """
    clock = clock or WallClock()
    calls = {name: [call] if callable(call) else call for name, call in implementations.items()}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        verdicts = _verdicts(calls, disagreement, near or disagreement, expected)
        timed = {name: clock.samplers(calls[name] or []) for name, verdict in verdicts.items() if verdict.timed}
        samplers = {(name, _MAIN): found.main for name, found in timed.items()}
        samplers |= {(name, field): one for name, found in timed.items() for field, one in found.more.items()}
        samples = _interleave(samplers, rounds, seconds)
    finally:
        torch.set_num_threads(before)
    rows = []
    for name, verdict in verdicts.items():
        row = Row(subject, case, name, clock.device, dtype, threads, correct=verdict.correct, note=verdict.note)
        if own := samples.get((name, _MAIN)):
            deciles = statistics.quantiles(own, n=10, method="inclusive")
            p20, p50, p80 = (1e3 * deciles[i] for i in (1, 4, 7))
            more: dict[str, Any] = {field: 1e3 * statistics.median(samples[name, field]) for field in timed[name].more}
            row = replace(row, p20_ms=p20, p50_ms=p50, p80_ms=p80, captured=timed[name].captured, **more)
            if peer := samples.get((_PEER, _MAIN)):
                ratio = statistics.median(p / o for p, o in zip(peer, own, strict=True))
                row = replace(row, ratio_to_torchvision=ratio)
            least = least_bytes.get(name) if isinstance(least_bytes, Mapping) else least_bytes
            if least and clock.bandwidth:
                floor = 1e3 * least / clock.bandwidth
                row = replace(row, least_bytes=least, floor_ms=floor, times_floor=p50 / floor)
        rows.append(row)
    return rows


@dataclass(frozen=True)
class _Verdict:
    correct: bool | None
    note: str = ""
    timed: bool = True


def _verdicts(
    calls: Mapping[str, Sequence[Call] | None], disagreement: Disagreement, near: Disagreement, expected: Any
) -> dict[str, _Verdict]:
    verdicts: dict[str, _Verdict] = {}
    standard = None  # whose output is what is expected, where nothing else was given
    outputs = 0
    for name, functions in calls.items():
        if functions is None:
            verdicts[name] = _Verdict(None, "not installed", timed=False)
            continue
        ours = name.startswith(OURS)
        try:
            output = functions[0]()
            outputs += 1
            if expected is None:
                expected, standard = output, name
                verdicts[name] = _Verdict(True)
            else:
                note = disagreement(expected, output)
                accepted = not note or not (ours or near(expected, output))
                verdicts[name] = _Verdict(accepted, note, timed=accepted)
        except Exception as error:
            # A peer need not take every dtype and size; torch and its extensions say so in several ways.
            limit = isinstance(error, (NotImplementedError, torch.OutOfMemoryError)) or "not implemented" in str(error)
            verdicts[name] = _Verdict(None if limit and not ours else False, _in_words(error), timed=False)
    if standard and outputs == 1:
        verdicts[standard] = _Verdict(None, "nothing to compare with")
    return verdicts


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:_LONGEST_NOTE]


def _interleave(samplers: Mapping[_Key, Sampler], rounds: int, seconds: float) -> dict[_Key, list[float]]:
    """One sample of each a round; each round begins with another one."""
    samples: dict[_Key, list[float]] = {key: [] for key in samplers}
    keys = list(samplers)
    start = time.perf_counter()
    for done in range(rounds):
        if done >= _FEWEST_ROUNDS and time.perf_counter() - start > seconds:
            break
        for key in keys:
            samples[key].append(samplers[key]())
        keys = keys[1:] + keys[:1]
    return samples


def failed(subject: str, case: str, clock: Clock, error: Exception) -> Row:
    """The row of a case that could not even be set up."""
    return Row(subject, case, OURS, clock.device, "", torch.get_num_threads(), correct=False, note=_in_words(error))


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
        **_gpu(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in _PACKAGES},
        "commit": _commit(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _gpu() -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {"gpu": None}
    properties = torch.cuda.get_device_properties()
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "gpu": properties.name,
        "gpu_architecture": f"{properties.major}.{properties.minor}",
        "gpu_memory_bytes": properties.total_memory,
        "gpu_l2_bytes": properties.L2_cache_size,
        "multiprocessors": properties.multi_processor_count,
        "driver": (_output(query) or "").partition("\n")[0] or None,
        "cuda": torch.version.cuda,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout, with "-dirty" where its files differ from it; None outside of one.

    The environment variable ``TRIMASK_COMMIT`` says it for a copy that is no checkout.
    """
    if named := os.environ.get("TRIMASK_COMMIT"):
        return named
    command = ["git", f"--git-dir={_ROOT / '.git'}", f"--work-tree={_ROOT}", "describe", "--always", "--abbrev=40"]
    return _output([*command, "--dirty", "--exclude=*"])


def _output(command: Sequence[str]) -> str | None:
    """What a program prints; None where it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def report(rows: list[Row]) -> Group:
    """The rows of one case for a terminal."""
    first = rows[0]
    columns = {"p20 ms": "p20_ms", "p50 ms": "p50_ms", "p80 ms": "p80_ms", f"x {_PEER}": "ratio_to_torchvision"}
    more = {
        "warm ms": "warm_ms",
        "call ms": "call_ms",
        "x floor": "times_floor",
        "first ms": "first_ms",
        "peak bytes": "peak_bytes",
        "launches": "launches",
    }
    columns |= {header: field for header, field in more.items() if any(getattr(row, field) for row in rows)}
    out = Table("", *columns, "", box=None, pad_edge=False)
    for column in out.columns[1:-1]:
        column.justify = "right"
    for row in rows:
        figures = [getattr(row, field) for field in columns.values()]
        cells = ["-" if x is None else f"{x:.3g}" if x < 1000 or x > 1e6 else f"{x:.0f}" for x in figures]
        stages = ", ".join(f"{stage} {spent:.3g}" for stage, spent in (row.stages_ms or {}).items())
        notes = [row.note, "not captured" if row.captured is False else "", stages]
        wrong = ["WRONG"] * len(cells) if row.correct is False else cells
        out.add_row(row.implementation, *wrong, "; ".join(note for note in notes if note))
    return Group(Text(f"{first.subject}: {first.case} ({first.device}, {first.dtype}, {first.threads} threads)"), out)


def write_json(path: Path, rows: Iterable[Row], facts: Mapping[str, Any] | None = None) -> None:
    """Write `{"environment": {...}, ..., "rows": [...]}`, whole or not at all; `facts` by default the environment."""
    content = {**(facts or {"environment": environment()}), "rows": [asdict(row) for row in rows]}
    write_text(path, json.dumps(content, indent=1, allow_nan=False))


def write_text(path: Path, text: str) -> None:
    """Write a line of text, whole or not at all, in a folder that need not be there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: file.write(f"{text}\n".encode()))
