"""The tests that need a GPU, in several processes at a time: most of their time is compilation.

A kernel that reads or writes where it must not breaks the device for the whole process, and one that never ends blocks
it. So each process writes down what it begins and how that ends, gives up when its device is lost, and is ended when a
test takes too long; another one goes on behind that test. In these processes this module is a plugin of pytest.
"""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

__all__ = ["Outcomes", "run_tests"]

_ROOT = Path(__file__).resolve().parents[1]
_LONGEST_TEST = 100.0  # seconds; compilation of some dozen variants is in it
_LONGEST_PAUSE = 120.0  # seconds before, between and after tests
_MOST_PROCESSES = 14
_POLL, _REPORT = 0.2, 15.0  # seconds
_LOST = 70  # exit status of a process whose device is lost
_LONGEST_REASON = 1500  # characters
_REPORTS = pytest.StashKey[list[pytest.TestReport]]()


@dataclass
class Outcomes:
    """How the tests went.

    Attributes:
        failures: The tests that failed, crashed or took too long, and why.
        unfinished: How many have not ended, for lack of time.
        seconds: All in all.
    """

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    unfinished: int = 0
    seconds: float = 0.0
    failures: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        counts = {name: getattr(self, name) for name in ("passed", "failed", "skipped", "unfinished")}
        return ", ".join(f"{count} {name}" for name, count in counts.items()) + f", in {self.seconds:.0f} s"


def run_tests(
    files: Sequence[Path | str],
    folder: Path,
    seconds: float,
    *,
    processes: int | None = None,
    longest_test: float = _LONGEST_TEST,
    report: Callable[[Outcomes], object] = lambda _: None,
) -> Outcomes:
    """Run the tests marked `gpu` of some files.

    Args:
        files: Of tests.
        folder: For the events and the output of each process, `*.log`.
        seconds: When this has passed, what still runs is ended.
        processes: How many at a time; by default one for each core but two, 14 at most.
        longest_test: Seconds after which a test is ended.
        report: Called now and then with what is known so far.
    """
    start = time.monotonic()
    count = processes or max(1, min(_MOST_PROCESSES, (os.cpu_count() or 1) - 2))
    command = [sys.executable, "-m", "pytest", "-p", __name__, "-p", "no:cacheprovider", "--tb=short", "-m", "gpu"]
    command.append("--continue-on-collection-errors")  # they are reported, and the other files run
    shards = [_Shard(folder / f"{i}", [*command, f"--shard={i}/{count}", *map(str, files)]) for i in range(count)]
    with ThreadPoolExecutor(count) as pool:
        running = [pool.submit(shard.run, start + seconds, longest_test) for shard in shards]
        while wait(running, timeout=_REPORT).not_done:
            report(_sum(shards, start))
    for done in running:
        done.result()  # raises what went wrong there
    return _sum(shards, start)


def _sum(shards: Sequence["_Shard"], start: float) -> Outcomes:
    found = Outcomes(seconds=round(time.monotonic() - start, 1))
    for shard in shards:
        counts = Counter(event["outcome"] for event in shard.tests().values())
        found.passed += counts["passed"]
        found.skipped += counts["skipped"]
        found.failures |= shard.failures()
        found.unfinished += shard.collected() - counts["passed"] - counts["failed"] - counts["skipped"]
    found.failed = len(found.failures)
    return found


class _Shard:
    """Every n-th test, in one process after another."""

    def __init__(self, path: Path, command: list[str]) -> None:
        self.log = path.with_suffix(".log")
        self.events = path.with_suffix(".jsonl")
        self.events.touch()
        self.command = [*command, f"--events={self.events}"]
        self.trouble = ""

    def run(self, deadline: float, longest_test: float) -> None:
        """All of its tests, or what there is time for."""
        while (now := time.monotonic()) < deadline:
            before = len(self.tests())
            status, why = self._process(deadline, longest_test)
            if status in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
                return
            late = time.monotonic() > deadline
            for test, event in self.tests().items():
                if event["outcome"] == "running":
                    _write(self.events, test=test, outcome="unfinished" if late else "failed", reason=why)
            # The next process would end as this one did, unless that was in a test.
            if len(self.tests()) == before and not (late and self.collected()):
                self.trouble = f"{why} outside of a test, after {time.monotonic() - now:.0f} s; see its output"
                return

    def _process(self, deadline: float, longest_test: float) -> tuple[int, str]:
        """Exit status of one process, and that in words."""
        with self.log.open("a") as log:
            process = subprocess.Popen(self.command, cwd=_ROOT, stdout=log, stderr=subprocess.STDOUT)
            moved, size = time.monotonic(), self.events.stat().st_size
            while process.poll() is None:
                time.sleep(_POLL)
                now = time.monotonic()
                if self.events.stat().st_size != size:
                    moved, size = now, self.events.stat().st_size
                in_a_test = any(event["outcome"] == "running" for event in self.tests().values())
                if now > min(deadline, moved + (longest_test if in_a_test else _LONGEST_PAUSE)):
                    process.kill()
                    return process.wait(), f"ended after {now - moved:.0f} s"
        lost = process.returncode == _LOST
        return process.returncode, "lost the device" if lost else f"the process ended with {process.returncode}"

    def _read(self) -> list[dict[str, Any]]:
        whole, _, _ = self.events.read_text().rpartition("\n")  # a line may be about to be written
        return [json.loads(line) for line in whole.splitlines()]

    def tests(self) -> dict[str, dict[str, Any]]:
        """The latest event of each test that was begun."""
        return {event["test"]: event for event in self._read() if "test" in event}

    def collected(self) -> int:
        return max((event["collected"] for event in self._read() if "collected" in event), default=0)

    def failures(self) -> dict[str, str]:
        wrong = {test: event["reason"] for test, event in self.tests().items() if event["outcome"] == "failed"}
        wrong |= {event["file"]: event["reason"] for event in self._read() if "file" in event}
        return wrong | ({f"process {self.log.stem}": self.trouble} if self.trouble else {})


def _write(path: Path, **event: Any) -> None:
    with path.open("a") as file:
        file.write(json.dumps(event) + "\n")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("trimask")
    group.addoption("--shard", help="I/N: every N-th test, from the I-th on")
    group.addoption("--events", type=Path, help="file for what begins and how it ends; what is in there is done")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Any:
    report = yield
    if report.failed:
        _write(collector.config.getoption("events"), file=report.nodeid, reason=_reason(report))
    return report


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """After the markers have chosen."""
    events = config.getoption("events")
    shard, count = map(int, config.getoption("shard").split("/"))
    own = sorted(items, key=lambda item: item.nodeid)[shard::count]
    _write(events, collected=len(own))
    done = {json.loads(line).get("test") for line in events.read_text().splitlines()}
    chosen = {item.nodeid for item in own} - done
    items[:] = [item for item in items if item.nodeid in chosen]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    report = yield
    item.stash.setdefault(_REPORTS, []).append(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Any:
    events = item.config.getoption("events")
    _write(events, test=item.nodeid, outcome="running")
    result = yield
    reports = item.stash[_REPORTS]  # of its set-up, itself, and what is torn down
    wrong = [report for report in reports if report.failed]
    outcome = "failed" if wrong else "skipped" if any(report.skipped for report in reports) else "passed"
    _write(events, test=item.nodeid, outcome=outcome, reason=_reason(wrong[0]) if wrong else "")
    if wrong and _is_lost():
        os._exit(_LOST)  # the end of the session would meet the same error
    return result


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    return str(report.longrepr)[-_LONGEST_REASON:]


def _is_lost() -> bool:
    """Whether nothing works on the device any more, after a kernel that touched what it must not."""
    torch = sys.modules.get("torch")
    try:
        if torch and torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
