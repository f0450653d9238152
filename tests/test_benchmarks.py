"""The harness is honest: wrong results get no time, and missing peers are listed. No timing is asserted."""

import io
import json
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from trimask.benchmarks import __main__ as command
from trimask.benchmarks import (
    bench_gpu,
    bench_ops,
    check,
    device,
    gpu_boxes,
    gpu_pixels,
    gpu_roi,
    gpu_tests,
    harness,
    inputs,
    installed,
    machine,
    usage,
)
from trimask.benchmarks.comparison import NEEDS_A_GPU
from trimask.benchmarks.device import Bench, measure_ceilings
from trimask.benchmarks.gpu_tests import run_tests
from trimask.benchmarks.harness import Row, Samplers, WallClock, compare
from trimask.benchmarks.results import read_results, write_json
from trimask.benchmarks.table import report

ROOT = Path(__file__).resolve().parents[1]


def disagreement(expected: int, got: int) -> str:
    return "" if expected == got else f"{got} instead of {expected}"


def shown(rows: list[Row]) -> str:
    out = io.StringIO()
    Console(file=out, width=200).print(report(rows))
    return out.getvalue()


def line_of(name: str, rows: list[Row]) -> str:
    return next(line for line in shown(rows).splitlines() if line.startswith(name))


def test_a_wrong_implementation_is_called_wrong_and_never_timed() -> None:
    calls = []

    def wrong() -> int:
        calls.append("wrong")
        return 2

    def broken() -> int:
        raise RuntimeError("no kernel")

    functions = {"torchvision": lambda: 1, "trimask": lambda: 1, "wrong": wrong, "broken": broken, "absent": None}
    rows = {row.implementation: row for row in compare("op", "c", functions, disagreement, rounds=3, threads=1)}
    assert list(rows) == list(functions)
    assert [row.correct for row in rows.values()] == [True, True, False, False, None]
    assert [row.note for row in rows.values()] == ["", "", "2 instead of 1", "RuntimeError: no kernel", "not installed"]
    assert calls == ["wrong"]
    for name in ("wrong", "broken", "absent"):
        row = rows[name]
        assert (row.p20_ms, row.p50_ms, row.p80_ms, row.ratio_to_torchvision) == (None,) * 4
        assert ("WRONG" in line_of(name, [*rows.values()])) == (name != "absent")
    assert "not installed" in line_of("absent", [*rows.values()])
    for name in ("torchvision", "trimask"):
        row = rows[name]
        assert 0 < row.p20_ms <= row.p50_ms <= row.p80_ms
        assert row.ratio_to_torchvision > 0
        assert "WRONG" not in line_of(name, [*rows.values()])
    assert rows["torchvision"].ratio_to_torchvision == 1


def test_alone_it_is_timed_but_not_called_correct() -> None:
    absent, alone = compare("op", "c", {"torchvision": None, "trimask": lambda: 1}, disagreement, rounds=2, threads=1)
    assert absent.correct is alone.correct is None
    assert alone.note == "nothing to compare with"
    assert alone.p50_ms is not None
    assert alone.ratio_to_torchvision is None


def test_rounds_are_interleaved_and_threads_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "_SHORTEST_SAMPLE", 1e-12)  # one call a sample
    before = torch.get_num_threads()
    calls: list[str] = []
    threads = set()

    def named(name: str):
        def call() -> int:
            calls.append(name)
            threads.add(torch.get_num_threads())
            return 1

        return call

    rows = compare("op", "c", {n: named(n) for n in "abc"}, disagreement, rounds=4, threads=before + 1)
    assert "".join(calls) == "abc" + "abc" + "abc" + "bca" + "cab" + "abc"
    assert threads == {before + 1} == {row.threads for row in rows}
    assert torch.get_num_threads() == before


def test_copies_of_the_input_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "_SHORTEST_SAMPLE", 1e-12)  # one call a sample
    calls: list[int] = []
    copies = [lambda i=i: calls.append(i) for i in range(3)]
    compare("op", "c", {"trimask": copies}, disagreement, rounds=4, threads=1)
    assert calls == [0, 0, 1, 2, 0, 1]  # the check, the warm-up, four rounds


def test_a_peer_need_not_take_everything_and_ours_must() -> None:
    def missing() -> int:
        raise NotImplementedError("no bfloat16")

    def too_large() -> int:
        raise torch.OutOfMemoryError("no memory")

    def stable() -> int:
        raise RuntimeError("\"kernel\" not implemented for 'BFloat16'")

    functions = {"peer": missing, "large": too_large, "other": stable}
    functions |= {f"trimask, {name}": function for name, function in functions.items()}
    rows = compare("op", "c", functions, disagreement, rounds=2, threads=1)
    assert [row.correct for row in rows] == [None] * 3 + [False] * 3
    assert rows[0].note == "NotImplementedError: no bfloat16"


def test_peers_may_be_nearly_right_and_ours_not() -> None:
    def near(expected: int, got: int) -> str:
        return "" if abs(expected - got) <= 1 else "far"

    functions = {"peer": lambda: 2, "far peer": lambda: 3, "trimask": lambda: 2, "trimask, exact": lambda: 1}
    rows = compare("op", "c", functions, disagreement, rounds=2, threads=1, expected=1, near=near)
    assert [row.correct for row in rows] == [True, False, False, True]
    assert [row.note for row in rows] == ["2 instead of 1", "3 instead of 1", "2 instead of 1", ""]
    assert [row.p50_ms is not None for row in rows] == [True, False, False, True]


def test_rounds_end_when_their_time_has_passed() -> None:
    class Clock(WallClock):
        def samplers(self, calls: Sequence[harness.Call]) -> Samplers:
            return Samplers(lambda: samples.append(1) or 1.0, {})

    for seconds, expected in ((0.0, 6), (60.0, 20)):
        samples: list[int] = []
        compare("op", "c", {"a": lambda: 1}, disagreement, rounds=20, threads=1, clock=Clock(), seconds=seconds)
        assert len(samples) == expected


def test_figures_of_a_gpu_come_from_its_clock() -> None:
    class Clock:
        device, bandwidth = "cuda", 1e12

        def samplers(self, calls: Sequence[harness.Call]) -> Samplers:
            return Samplers(lambda: 4e-3, {"warm_ms": lambda: 2e-3, "call_ms": lambda: 8e-3}, captured=len(calls) > 1)

    functions = {"trimask": [lambda: 1, lambda: 1], "trimask, packed": lambda: 1}
    least = {"trimask": 2_000_000_000, "trimask, packed": 1_000_000_000}
    both, packed = rows = compare(
        "op", "c", functions, disagreement, rounds=2, threads=1, clock=Clock(), least_bytes=least
    )
    assert (both.device, both.p50_ms, both.warm_ms, both.call_ms, both.captured) == ("cuda", 4.0, 2.0, 8.0, True)
    assert (both.least_bytes, both.floor_ms, both.times_floor) == (2_000_000_000, 2.0, 2.0)
    assert (packed.captured, packed.floor_ms, packed.times_floor) == (False, 1.0, 4.0)
    assert "x floor" in shown(rows)
    assert "not captured" in line_of("trimask, packed", rows)
    assert "not captured" not in line_of("trimask ", rows)


def test_what_takes_longer_in_a_graph_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock and a graph of its own; a GPU is needed for real ones."""

    def event(name: str, microseconds: float) -> Any:
        return SimpleNamespace(name=name, time_range=SimpleNamespace(elapsed_us=lambda: microseconds))

    class Graph:
        def replay(self) -> None: ...

    one_by_one = [event("gemm", 2000.0), event("Memset (Device)", 100.0), event("Memset (Device)", 150.0)]
    at_once = [event("gemm", 2100.0), event("Memset (Device)", 90_000.0)]
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: nullcontext())
    monkeypatch.setattr(usage, "_on_device", lambda call: at_once if call.__name__ == "replay" else one_by_one)
    assert usage.slower_in_a_graph(lambda: None) == (
        "in the graph Memset (Device) 90.00 ms, one by one 0.25; gemm 2.10 ms, one by one 2.00"
    )


def test_the_interval_of_a_median_covers_it_as_often_as_it_says() -> None:
    assert harness.interval([1.0, 2.0, 3.0, 4.0, 5.0]) == (None, None)  # misses it once in 16
    assert harness.interval([6.0, 1.0, 2.0, 5.0, 4.0, 3.0]) == (1.0, 6.0)
    assert harness.interval([float(i) for i in range(1, 10)]) == (2.0, 8.0)  # as in the tables of the sign test
    assert harness.interval([float(i) for i in range(1, 32)]) == (10.0, 22.0)
    rng = random.Random(0)
    for count in (6, 9, 15, 31):
        bounds = [harness.interval([rng.expovariate(1) for _ in range(count)]) for _ in range(2000)]
        missed = sum(not low <= math.log(2) <= high for low, high in bounds)
        assert missed / 2000 < 0.07, count


def test_a_ratio_comes_with_its_interval_and_what_was_achieved() -> None:
    class Clock:
        device, bandwidth = "cpu", 1e9

        def samplers(self, calls: Sequence[harness.Call]) -> Samplers:
            times = [6.0, 1.0, 2.0, 4.0, 3.0, 5.0] if calls[0]() else [0.5] * 6
            return Samplers(iter(times).__next__, {})

    functions = {"torchvision": lambda: [1], "trimask": list, "absent": None}
    rows = compare(
        "op", "c", functions, lambda a, b: "", rounds=6, threads=1, clock=Clock(), least_bytes=10**9,
        operations={"trimask": 10**12}, variable={"boxes": 7},
    )  # fmt: skip
    theirs, ours, absent = rows
    assert (ours.ratio_to_torchvision, ours.ratio_low, ours.ratio_high) == (7.0, 2.0, 12.0)
    assert (theirs.ratio_to_torchvision, theirs.ratio_low, theirs.ratio_high) == (1.0, 1.0, 1.0)
    assert (absent.ratio_low, absent.least_bytes, absent.floor_ms) == (None, None, None)
    assert [row.variable for row in rows] == [{"boxes": 7}] * 3
    assert (ours.bytes_per_s, ours.flops, theirs.flops, ours.floor_ms) == (2e9, 2e12, None, 1000)
    for header in ("95 %", "GB/s", "TFLOP/s"):
        assert header in shown(rows)
    assert "2 .. 12" in line_of("trimask", rows)
    assert ".." not in line_of("torchvision", rows)
    few = compare("op", "c", functions, lambda a, b: "", rounds=5, threads=1, clock=Clock())
    assert few[1].ratio_to_torchvision is not None
    assert few[1].ratio_low is few[1].ratio_high is None
    assert "95 %" not in shown(few)


def test_the_quick_ops_run_and_agree() -> None:
    groups = list(bench_ops.run(1, quick=True))
    assert {row.subject for rows in groups for row in rows} == {
        "roi_align",
        "roi_pool",
        "nms",
        "paste_masks",
        "masks_to_rle",
    }
    for rows in groups:
        ours = [row for row in rows if row.implementation.startswith("trimask") and row.note != NEEDS_A_GPU]
        assert ours
        assert all(row.p50_ms is not None and row.correct is not False for row in ours), shown(rows)
        for row in rows:
            unmeasured = row.note in ("not installed", NEEDS_A_GPU) or row.note.startswith("left out: ")
            assert row.correct or unmeasured, shown(rows)


def test_peers_that_are_missing_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ops", "roi_heads", "coco"):
        monkeypatch.setattr(bench_ops, name, None)
    for rows in bench_ops.run(1, quick=True):
        notes = {row.implementation: row.note for row in rows}
        assert notes["torchvision"] == "not installed"
    assert notes["pycocotools, dense masks"] == "not installed"


def test_the_command_prints_a_table_and_writes_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.setenv(variable, "1")  # the command sets them: give them back
    rows = compare("op", "c", {"torchvision": lambda: 1, "trimask": lambda: 1}, disagreement, rounds=2, threads=1)
    monkeypatch.setattr(bench_ops, "run", lambda threads, quick: iter([rows]))
    target = tmp_path / "new" / "results.json"
    assert command.main(["ops", "--threads", "1", "--quick", "--json", str(target)]) == 0
    printed = capsys.readouterr().out
    assert "op: c (cpu, float32, 1 threads)" in printed
    assert "trimask" in printed
    written = json.loads(target.read_text())
    assert list(written) == ["schema", "environment", "ceilings", "rows"]
    assert written["rows"] == [asdict(row) for row in rows]
    assert list(written["rows"][0]) == [field.name for field in fields(Row)]
    assert read_results(target).rows == rows
    assert min(written["ceilings"]["matrix_flops_per_s"]["float32"], written["ceilings"]["copy_bytes_per_s"]) > 0
    facts = written["environment"]
    assert torch.__version__.startswith(facts["versions"]["torch"].partition("+")[0])
    assert facts["cores"] > 0
    assert facts["machine"]
    assert facts["commit"] is None or len(facts["commit"].removesuffix("-dirty")) == 40
    assert list(tmp_path.rglob("*")) == [target.parent, target]

    wrong = compare("op", "c", {"torchvision": lambda: 1, "trimask": lambda: 2}, disagreement, rounds=2, threads=1)
    monkeypatch.setattr(bench_ops, "run", lambda threads, quick: iter([rows, wrong]))
    assert command.main(["ops"]) == 1
    assert "WRONG" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        command.main(["ops", "--threads", "0"])
    assert stopped.value.code == 2


def test_a_failed_write_leaves_the_old_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "results.json"
    target.write_text("old")

    def full_disk(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="disk full"):
        write_json(target, [], {"environment": {}})
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


def test_no_commit_outside_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_ROOT", tmp_path)
    assert machine.environment()["commit"] is None


def test_what_cannot_be_imported_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    assert installed.optional("pycocotools.no_such_module") is None
    assert installed.optional("json") is json


def test_the_quick_gpu_cases_run_and_agree() -> None:
    """On a CPU, where they are good for nothing else."""
    clock, ceilings = bench_gpu.start("cpu", quick=True)
    assert clock.bandwidth == ceilings.copy_bytes_per_s > 0
    assert min(ceilings.fill_bytes_per_s, ceilings.launch_ms) > 0
    groups = list(bench_gpu.run(clock, True, [part for part in command.PARTS if part not in ("models", "compiled")]))
    names = [(rows[0].subject, rows[0].case, rows[0].dtype) for rows in groups]
    assert len(set(names)) == len(names)
    assert {name for name, _, _ in names} == {
        "epilogue",
        "masks_to_rle",
        "nms",
        "paste_masks",
        "preprocess",
        "proposals",
        "roi_align",
        "roi_align_backward",
        "roi_pool",
        "training",
        "turning",
    }
    assert {*command.PARTS, *command.PRECISIONS} == set(bench_gpu.SUBJECTS)
    for rows in groups:
        ours = [row for row in rows if row.implementation.startswith("trimask")]
        # Without Triton there is nothing of ours that turns maps, and one way to do what follows a convolution.
        assert len(ours) >= {"epilogue": 1, "training": 1, "turning": 0}.get(rows[0].subject, 2)
        assert all(row.correct and row.p50_ms is not None for row in ours), shown(rows)
        assert not any(row.correct is False for row in rows), shown(rows)
        if rows[0].subject in ("roi_align_backward", "paste_masks", "preprocess"):
            assert all(row.times_floor and row.times_floor > 0 for row in rows)


def test_gpu_cases_without_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, names in ((gpu_roi, ["ops"]), (gpu_boxes, ["ops", "conch"]), (gpu_pixels, ["roi_heads", "coco"])):
        for name in names:
            monkeypatch.setattr(module, name, None)
    bench = Bench(WallClock(), quick=True)
    parts = ("roi", "boxes", "pixels", "gradients")
    cases = [next(iter(bench_gpu.SUBJECTS[part](True))) for part in parts]
    for rows in (case(bench) for case in cases):
        notes = {row.implementation: row.note for row in rows}
        assert notes["torchvision"] == "not installed"
        assert all(row.correct for row in rows if row.implementation.startswith("trimask")), shown(rows)


def test_a_case_that_cannot_be_set_up_is_wrong_and_the_next_one_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(bench: Bench) -> list[Row]:
        raise RuntimeError("no such kernel")

    def fine(bench: Bench) -> list[Row]:
        return bench.compare("op", "fine", {"trimask": lambda: 1}, disagreement)

    monkeypatch.setitem(bench_gpu.SUBJECTS, "roi", lambda quick: [broken, fine])
    (wrong,), (right,) = bench_gpu.run(WallClock(), True, ["roi"])
    assert (wrong.correct, wrong.case, wrong.note) == (False, "broken", "RuntimeError: no such kernel")
    assert right.p50_ms is not None


def test_bytes_that_must_move() -> None:
    """A box of 8 x 4 pixels of P2 reads those and their neighbours; one beside it adds what is new."""
    box = [16.0, 32.0, 48.0, 48.0]  # on P2: x from 4 to 12, y from 8 to 12; samples lie within half a pixel of that
    assert inputs.pixels_under(torch.tensor([[box]]), (160, 192)) == (13 - 3) * (13 - 7)
    assert inputs.pixels_under(torch.tensor([[box, box]]), (160, 192)) == (13 - 3) * (13 - 7)
    assert inputs.pixels_under(torch.tensor([[box], [box]]), (160, 192)) == 2 * (13 - 3) * (13 - 7)
    assert inputs.pixels_under(torch.tensor([[[0.0, 0.0, 192.0, 160.0]]]), (160, 192)) == 20 * 24  # all of P3


def test_copies_are_as_many_as_no_cache_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: SimpleNamespace(L2_cache_size=60))
    assert [device.copies(size) for size in (400, 100, 50, 12, 11)] == [1, 2, 4, 15, 1]


def test_ceilings_are_of_the_size_asked_for() -> None:
    class Clock(WallClock):
        def samplers(self, calls: Sequence[harness.Call]) -> Samplers:
            return Samplers(lambda: 0.5, {})

    found = measure_ceilings(Clock(), 4000)
    assert (found.copy_bytes_per_s, found.fill_bytes_per_s, found.launch_ms) == (16_000, 8_000, 500)
    assert found.matrix_flops_per_s["float32"] == 2 * 256**3 / 0.5
    assert ("bfloat16" in found.matrix_flops_per_s) == device.has_bfloat16()


@pytest.mark.gpu
def test_a_device_is_timed_by_its_own_clock() -> None:
    clock, ceilings = bench_gpu.start("cuda", quick=True)
    x = torch.ones(1 << 24, device="cuda")
    with clock.stream():
        ours, waiting = compare(
            "op",
            "c",
            {"trimask": [lambda: x + 1, lambda: x + 2], "trimask, waiting": lambda: (x.sum().item(), x + 1)[1]},
            lambda a, b: "" if torch.equal(a, b) else "differs",
            rounds=3,
            threads=1,
            clock=clock,
            least_bytes=2 * x.nbytes,
        )
    assert (ours.captured, waiting.captured) == (True, False)
    assert ours.correct
    assert waiting.correct
    assert 0 < ceilings.launch_ms < ours.warm_ms < 1000 * ceilings.launch_ms
    assert 0.2 < ours.times_floor < 5
    assert ours.call_ms > 0


@pytest.mark.gpu
def test_a_call_that_cannot_be_captured_leaves_the_device_usable() -> None:
    clock, _ = bench_gpu.start("cuda", quick=True)
    with clock.stream():
        assert device.waits(lambda: torch.ones(3, device="cuda").nonzero())
        assert not device.waits(lambda: torch.ones(3, device="cuda") + 1)
        graph = device._capture([lambda: torch.ones(3, device="cuda") + 1], 2)
    assert graph is not None
    graph()
    torch.cuda.synchronize()


SYNTHETIC = """
import os, time, pytest
pytestmark = pytest.mark.gpu
@pytest.fixture
def broken():
    yield
    raise RuntimeError("torn")
@pytest.mark.parametrize("i", range(4))
def test_numbers(i): assert i != 2, "two"
def test_crash(): os.abort()
def test_endless(): time.sleep(1000)
def test_skipped(): pytest.skip("not here")
def test_teardown(broken): pass
def test_after(): pass
"""


def test_tests_that_crash_or_hang_do_not_stop_the_others(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: synthetic\n")
    (tmp_path / "test_it.py").write_text(SYNTHETIC)
    (tmp_path / "test_typo.py").write_text("import no_such_module\n")
    files = [tmp_path / "test_it.py", tmp_path / "test_typo.py"]
    found = run_tests(files, tmp_path, 300, processes=2, longest_test=3)
    assert (found.passed, found.failed, found.skipped, found.unfinished) == (4, 5, 1, 0)
    reasons = {name.rpartition("::")[2]: reason for name, reason in found.failures.items()}
    assert set(reasons) == {"test_numbers[2]", "test_crash", "test_endless", "test_teardown", "test_typo.py"}
    assert "two" in reasons["test_numbers[2]"]
    assert "torn" in reasons["test_teardown"]
    assert "the process ended with -6" in reasons["test_crash"]
    assert "ended after 3 s" in reasons["test_endless"]
    assert "no_such_module" in reasons["test_typo.py"]
    assert str(found).startswith("4 passed, 5 failed, 1 skipped, 0 unfinished, in ")


def test_tests_without_time_are_unfinished(tmp_path: Path) -> None:
    shard = gpu_tests._Shard(tmp_path / "0", [sys.executable, "-c", "import time; time.sleep(1000)"])
    for event in ({"collected": 3}, {"test": "a", "outcome": "passed"}, {"test": "b", "outcome": "running"}):
        gpu_tests._write(shard.events, **event)
    shard.run(time.monotonic() + 0.3, longest_test=100)
    found = gpu_tests._sum([shard], 0)
    assert (found.passed, found.failed, found.unfinished) == (1, 0, 2)

    broken = gpu_tests._Shard(tmp_path / "1", [sys.executable, "-c", "raise SystemExit(9)"])
    broken.run(time.monotonic() + 100, longest_test=100)
    assert "ended with 9 outside of a test" in broken.failures()["process 1"]


def test_the_check_runs_from_a_checkout_that_nobody_installed(tmp_path: Path) -> None:
    target = tmp_path / "results.json"
    script = [sys.executable, ROOT / "benchmarks" / "gpu_check.py", "--device", "cpu", "--quick", "--only", "boxes"]
    done = subprocess.run(
        [*script, "--json", target, "--commit", "abc"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "detections" in done.stdout
    written = json.loads(target.read_text())
    assert list(written) == ["schema", "environment", "tests", "ceilings", "unfinished", "rows"]
    assert written["environment"]["commit"] == "abc"
    assert written["ceilings"]["copy_bytes_per_s"] > 0
    assert (written["tests"], written["unfinished"]) == (None, [])
    assert {row["subject"] for row in written["rows"]} == {"nms", "proposals"}


def outcomes(**counts: Any) -> Any:
    return lambda files, *_, **__: check.Outcomes(**counts)


def test_the_check_fails_with_a_test_and_for_lack_of_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "results.json"
    monkeypatch.setattr(check, "run_tests", outcomes(passed=3))
    assert check.check("cpu", True, ["tests"], target, 60) == 0
    monkeypatch.setattr(check, "run_tests", outcomes(passed=2, failed=1, failures={"test_x": "wrong index"}))
    assert check.check("cpu", True, ["tests"], target, 60) == 1
    assert json.loads(target.read_text())["tests"]["failures"] == {"test_x": "wrong index"}
    assert target.with_suffix(".log").is_file()
    assert "FAILED test_x\nwrong index" in capsys.readouterr().out
    monkeypatch.setattr(check, "run_tests", outcomes(passed=2, unfinished=1))
    assert check.check("cpu", True, ["tests"], target, 60) == 1
    assert check.check("cpu", True, ["boxes"], target, 0) == 1
    assert "boxes: ended with -9 for lack of time" in json.loads(target.read_text())["unfinished"]


def test_the_check_takes_over_what_is_there_and_fails_if_it_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A process that dies leaves the rows that it wrote."""
    rows = compare("op", "c", {"a": lambda: 1, "trimask": lambda: 2}, disagreement, rounds=2, threads=1)

    class Process:
        returncode = 1

        def __init__(self, arguments: list[str]) -> None:
            part, own = arguments[arguments.index("--only") + 1], Path(arguments[arguments.index("--json") + 1])
            write_json(own, rows[: 1 + (part == "boxes")], {"ceilings": {"launch_ms": 1}, "finished": part == "boxes"})

        def poll(self) -> int:
            return self.returncode

    monkeypatch.setattr(check.subprocess, "Popen", Process)
    monkeypatch.setattr(check, "environment", lambda: {"gpu": "NVIDIA H200"})
    monkeypatch.setattr(check, "_ROOT", tmp_path)
    assert check.check("cpu", True, ["boxes"], tmp_path / "wrong.json", 60) == 1
    assert json.loads((tmp_path / "wrong.json").read_text())["unfinished"] == []
    assert check.check("cpu", True, ["boxes", "pixels"], None, 60) == 1
    written = json.loads((tmp_path / "benchmarks" / "results" / "gpu-nvidia-h200.json").read_text())
    assert [row["implementation"] for row in written["rows"]] == ["a", "trimask", "a"]
    assert written["ceilings"] == {"launch_ms": 1}
    assert written["unfinished"] == ["pixels: ended with 1"]
    printed = capsys.readouterr().out
    assert "WRONG op: c: trimask: 2 instead of 1" in printed
    assert "UNFINISHED pixels" in printed


def test_tests_that_need_a_gpu_are_found() -> None:
    names = {file.name for file in (ROOT / "tests").glob("test_*.py") if check._needs_gpu(file)}
    assert names >= {"test_gpu.py", "test_pasting.py"}
    assert "test_config.py" not in names


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
@pytest.mark.parametrize("subject", ["gpu", "check"])
def test_no_gpu_is_said_so(subject: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.setenv(variable, "1")  # the command sets them: give them back
    with pytest.raises(SystemExit) as stopped:
        command.main([subject])
    assert stopped.value.code == 2
    assert "device: expected a CUDA device, found none (torch 2." in capsys.readouterr().err


def test_a_commit_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMASK_COMMIT", "abc")
    assert machine.environment()["commit"] == "abc"
