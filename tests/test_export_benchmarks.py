"""The benchmarks of exported files and the suite are honest: what differs gets no time. No timing is asserted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trimask.benchmarks import bench_export
from trimask.benchmarks.bench_export import KINDS, Ran
from trimask.benchmarks.matching import Found
from trimask.benchmarks.results import Row

SCORES = np.array([0.9, 0.6], np.float32)
BOXES = np.array([[10, 10, 60, 90], [100, 20, 150, 80]], np.float32)


def ran(name: str = "", shift: float = 0, lower: float = 0) -> Callable[..., Callable[[], Ran]]:
    """A maker of calls that find two objects, somewhat moved and surer of them."""
    tolerance = KINDS[name].tolerance if name in KINDS else None
    found = Found(BOXES + np.float32(shift), SCORES - np.float32(lower), np.zeros(2, np.int64), None)
    return lambda *_: lambda: Ran([found], tolerance)


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Row]]:
    """Rows by implementation, where the runtimes answer as told."""
    file = tmp_path / "model.onnx"
    file.write_bytes(bytes(2_000_000))

    def measured(answers: dict[str, Callable[..., Any]], missing: str = "") -> dict[str, Row]:
        monkeypatch.setattr(bench_export, "_export", lambda *_: {"": file, "half": file, "int8": "left out: why"})
        monkeypatch.setattr(bench_export, "optional", lambda name: None if name == missing else object())
        monkeypatch.setattr(bench_export, "in_its_own_process", lambda *_, **__: {"first_ms": 7.0})
        for maker in ("trimask_call", "torchvision_call"):
            monkeypatch.setattr(bench_export, maker, ran())

        def answer(model: str, size: tuple[int, int], path: str, name: str, threads: int) -> Callable[[], Ran]:
            return answers.get(name, ran(name))()

        monkeypatch.setattr(bench_export, "runtime_call", answer)
        (found,) = bench_export.run(1, quick=True)
        return {row.implementation: row for row in found}

    return measured


def test_every_runtime_has_a_row_with_its_precision(rows: Callable[..., dict[str, Row]]) -> None:
    found = rows({"ONNX Runtime, float16": ran("ONNX Runtime, float16", lower=0.01)})
    assert set(found) == {"torchvision", "trimask", *KINDS}
    assert {name: row.dtype for name, row in found.items()}["OpenVINO, bfloat16"] == "bfloat16"
    assert all(row.subject == "export" for row in found.values())
    half = found["ONNX Runtime, float16"]
    assert (half.dtype, half.correct) == ("float16", True)
    assert half.note == "2.0 MB; scores at most 0.0100 from float32's, 100% found again"
    assert (found["ONNX Runtime, int8"].note, found["ONNX Runtime, int8"].p50_ms) == ("left out: why", None)


def test_float32_that_finds_something_else_is_wrong(rows: Callable[..., dict[str, Row]]) -> None:
    found = rows({name: ran(name, shift=4) for name in ("ONNX Runtime", "OpenVINO, bfloat16")})
    assert (found["ONNX Runtime"].correct, found["ONNX Runtime"].p50_ms) == (False, None)
    assert found["OpenVINO, bfloat16"].correct  # the same objects, somewhat moved
    assert rows({"OpenVINO": ran("OpenVINO", lower=0.1)})["OpenVINO"].correct is False


def test_a_runtime_that_is_missing_is_listed(rows: Callable[..., dict[str, Row]]) -> None:
    found = rows({}, missing="openvino")
    assert (found["OpenVINO"].note, found["OpenVINO"].correct) == ("not installed", None)
    assert found["ONNX Runtime"].correct
    assert rows({}, missing="torchvision")["torchvision"].note == "not installed"


def test_the_suite_has_every_subject() -> None:
    pytest.importorskip("pytest_benchmark")
    from trimask.benchmarks import suite

    subjects = {name.partition(":")[0] for name in suite.MAKERS}
    assert subjects == {"roi_align", "nms", "paste_masks", "masks_to_rle", "models", "training"}
    assert any("trimask, Triton" in str(case.id) for case in suite._cases())


def test_plain_pytest_runs_the_tests_alone(pytestconfig: pytest.Config) -> None:
    assert pytestconfig.getini("testpaths") == ["tests"]
    assert "suite.py" in pytestconfig.getini("python_files")
