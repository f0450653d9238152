"""The harness is honest: wrong results get no time, and missing peers are listed. No timing is asserted."""

import io
import json
import sys
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch
from rich.console import Console

from trimask.benchmarks import __main__ as command
from trimask.benchmarks import bench_ops, harness
from trimask.benchmarks.harness import Row, compare, report, write_json


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


def test_the_quick_ops_run_and_agree() -> None:
    groups = list(bench_ops.run(1, quick=True))
    assert {row.subject for rows in groups for row in rows} == {"roi_align", "nms", "paste_masks", "masks_to_rle"}
    for rows in groups:
        ours = [row for row in rows if row.implementation.startswith("trimask")]
        assert ours
        assert all(row.p50_ms is not None and row.correct is not False for row in ours), shown(rows)
        for row in rows:
            assert row.correct or row.note in ("not installed", "nothing to compare with"), shown(rows)


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
    assert set(written) == {"environment", "rows"}
    assert written["rows"] == [asdict(row) for row in rows]
    assert list(written["rows"][0]) == [field.name for field in fields(Row)]
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

    monkeypatch.setattr(harness.os, "replace", full_disk)
    with pytest.raises(OSError, match="disk full"):
        write_json(target, [])
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


def test_no_commit_outside_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "_ROOT", tmp_path)
    assert harness.environment()["commit"] is None


def test_what_cannot_be_imported_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    assert harness.optional("pycocotools.no_such_module") is None
    assert harness.optional("json") is json
