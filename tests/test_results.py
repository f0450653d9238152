"""A result file is read as it was written, and anything else is refused with the place where it goes wrong."""

import json
from pathlib import Path
from typing import Any

import pytest

from trimask.benchmarks.results import Row, read_results, write_json

ROOT = Path(__file__).resolve().parents[1]
ROW = {"subject": "nms", "case": "10 boxes", "implementation": "trimask", "device": "cpu", "dtype": "float32"}
GOOD = {"schema": 1, "environment": {}, "ceilings": None, "rows": [ROW | {"threads": 1}]}


def row(**changes: Any) -> dict[str, Any]:
    return GOOD | {"rows": [ROW | {"threads": 1}, ROW | {"threads": 1} | changes]}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    rows = [
        Row("nms", "10 boxes", "trimask", "cpu", "float32", 1, 1.0, 2.0, 3.0, True, 1.5, 1.25, 2.0, variable={"n": 1}),
        Row("nms", "10 boxes", "absent", "cpu", "float32", 1, note="not installed"),
    ]
    file = tmp_path / "results.json"
    write_json(file, rows, {"environment": {"machine": "m"}, "ceilings": {"launch_ms": 1.0}, "finished": True})
    found = read_results(file)
    assert found.rows == rows
    assert (found.environment, found.ceilings, found.more) == (
        {"machine": "m"},
        {"launch_ms": 1.0},
        {"finished": True},
    )


def test_the_committed_files_are_what_the_schema_says() -> None:
    files = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    assert len(files) >= 2
    for file in files:
        assert read_results(file).rows, file


def test_a_field_that_an_older_file_lacks_is_null(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_text(json.dumps(GOOD))
    assert read_results(file).rows == [Row("nms", "10 boxes", "trimask", "cpu", "float32", 1)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "expected an object, got []"),
        ({"rows": []}, "schema: expected 1, got null; it is older than that: measure again"),
        (GOOD | {"schema": 2}, "schema: expected 1, got 2"),
        (GOOD | {"schema": True}, "schema: expected 1, got true"),
        (GOOD | {"environment": None}, "environment: expected an object, got null"),
        (GOOD | {"rows": {}}, "rows: expected a list, got {}"),
        (GOOD | {"ceilings": 3}, "ceilings: expected an object or null, got 3"),
        (GOOD | {"rows": [7]}, "row 1: expected an object, got 7"),
        (GOOD | {"rows": [ROW]}, "row 1 (nms: 10 boxes: trimask): threads: expected a whole number, got nothing"),
        (row(threads=True), "row 2 (nms: 10 boxes: trimask): threads: expected a whole number, got true"),
        (row(threads=1.5), "threads: expected a whole number, got 1.5"),
        (row(device=None), "device: expected text, got null"),
        (row(p50_ms="fast"), 'p50_ms: expected a number or null, got "fast"'),
        (row(p50_ms=float("nan")), "p50_ms: expected a number or null, got NaN"),
        (row(correct=1), "correct: expected true or false or null, got 1"),
        (row(stages_ms={"nms": "x"}), 'stages_ms: expected an object of numbers or null, got {"nms": "x"}'),
        (row(speed=1), "expected the fields of schema 1, got 'speed'"),
        (row(p50_ms=1.0), "p20_ms, p50_ms, p80_ms: expected three rising positive numbers, got [None, 1.0, None]"),
        (row(p20_ms=2.0, p50_ms=1.0, p80_ms=3.0), "expected three rising positive numbers"),
        (row(p20_ms=0.0, p50_ms=1.0, p80_ms=3.0), "expected three rising positive numbers"),
        (row(p20_ms=1.0, p50_ms=2.0, p80_ms=3.0, correct=False), "expected null beside a wrong result, got 2"),
    ],
)
def test_anything_else_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError) as refused:
        read_results(file)
    assert str(file) in str(refused.value)
    assert message in str(refused.value)


def test_what_is_no_json_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    for content in (b"{", b"\xff\xfe\x00", b""):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="expected a result file of trimask, got no JSON"):
            read_results(file)
