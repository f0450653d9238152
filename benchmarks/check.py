"""All that takes a GPU, in one go: the tests that need one, then the ops beside the peers; one file of results.

It is rewritten after each case, so that a run that is stopped leaves what it has.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from .bench_gpu import require
from .gpu_tests import Outcomes, run_tests
from .machine import environment
from .results import write_json, write_text

__all__ = ["Outcomes", "check"]

_ROOT = Path(__file__).resolve().parents[1]
_MOST_FOR_TESTS = 240.0  # seconds
_POLL = 0.5


def check(device: str, quick: bool, only: Sequence[str], path: Path | None, seconds: float) -> int:
    """Run the tests and the benchmarks.

    Args:
        device: "cuda", or "cpu" to try this where there is no GPU: the tests are skipped, the benchmarks run.
        quick: Small inputs, few rounds.
        only: "tests", and parts of the benchmarks.
        path: Where the results go; by default into `benchmarks/results`, named after the device.
        seconds: When this has passed, what still runs is ended.

    Returns:
        Exit status: 0, or 1 if a test failed, a result was wrong, or there was no time for all of it.

    Raises:
        ValueError: There is no such device.
    """
    require(device)
    deadline = time.monotonic() + seconds
    console = Console(highlight=False, markup=False, soft_wrap=True)
    results: dict[str, Any] = {"environment": environment()}
    for name, value in results["environment"].items():
        console.print(f"{name}: {value}")
    path = path or _ROOT / "benchmarks" / "results" / f"gpu-{_slug(results['environment']['gpu'] or device)}.json"

    results |= {"tests": None, "ceilings": None, "unfinished": [], "rows": []}
    with tempfile.TemporaryDirectory() as scratch:
        for part in only:
            if part == "tests":
                _test(Path(scratch), path, results, min(_MOST_FOR_TESTS, seconds / 2), console)
            else:
                _measure(part, device, quick, Path(scratch), path, results, deadline)
            _write(path, results)
    wrong = [row for row in results["rows"] if row["correct"] is False]
    for row in wrong:
        console.print(f"WRONG {row['subject']}: {row['case']}: {row['implementation']}: {row['note']}")
    for part in results["unfinished"]:
        console.print(f"UNFINISHED {part}")
    console.print(f"results: {path}")
    failed = results["tests"] and results["tests"]["failed"]
    return int(bool(failed or wrong or results["unfinished"]))


def _test(folder: Path, path: Path, results: dict[str, Any], seconds: float, console: Console) -> None:
    files = [file for file in sorted((_ROOT / "tests").glob("test_*.py")) if _needs_gpu(file)]
    console.print(f"\ntests: {', '.join(file.name for file in files)}")
    found = run_tests(files, folder, seconds, report=lambda so_far: console.print(f"tests: {so_far}"))
    results["tests"] = asdict(found)
    for name, reason in found.failures.items():
        console.print(f"FAILED {name}\n{reason}")
    if found.failures:
        logs = "\n".join(file.read_text(errors="replace") for file in sorted(folder.glob("*.log")))
        write_text(path.with_suffix(".log"), logs)
        console.print(f"what pytest printed: {path.with_suffix('.log')}")
    console.print(f"tests: {found}\n")
    if found.unfinished:
        results["unfinished"].append(f"tests: {found.unfinished} not run")


def _measure(
    part: str, device: str, quick: bool, folder: Path, path: Path, results: dict[str, Any], deadline: float
) -> None:
    """Run one part of the benchmarks in a process of its own, and take over its results as they come."""
    own = folder / f"{part}.json"
    command = [sys.executable, "-m", str(__package__), "gpu", "--device", device, "--only", part, "--json", str(own)]
    command += ["--minutes", f"{max(deadline - time.monotonic(), 0) / 60:.3f}"]
    before, seen, finished = results["rows"], 0, False
    process = subprocess.Popen([*command, *["--quick"] * quick])
    running = True
    while running:
        running = process.poll() is None
        if running and time.monotonic() > deadline:
            process.kill()
        if own.exists() and own.stat().st_mtime_ns != seen:
            seen = own.stat().st_mtime_ns
            found = json.loads(own.read_text())
            results |= {"ceilings": found["ceilings"], "rows": before + found["rows"]}
            finished = found["finished"]
            _write(path, results)
        time.sleep(_POLL * running)
    if not finished:
        late = " for lack of time" * (time.monotonic() > deadline)
        results["unfinished"].append(f"{part}: ended with {process.returncode}{late}")


def _needs_gpu(file: Path) -> bool:
    text = file.read_text()
    return "mark.gpu" in text or "BACKENDS" in text


def _write(path: Path, results: dict[str, Any]) -> None:
    write_json(path, results["rows"], results)


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
