"""The benchmarks of exported files and the suite are honest: what differs gets no time. No timing is asserted."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from trimask.benchmarks import bench_export
from trimask.benchmarks.bench_export import KINDS
from trimask.benchmarks.matching import Found
from trimask.benchmarks.results import Row

SCORES = np.array([0.9, 0.6], np.float32)
BOXES = np.array([[10, 10, 60, 90], [100, 20, 150, 80]], np.float32)
FILES = {"": "float32.onnx", "full": "full.onnx", "half": "float16.onnx"}


class Answering:
    """A predictor that finds two objects, somewhat moved and less sure of them."""

    def __init__(self, shift: float = 0, lower: float = 0) -> None:
        self.found = SimpleNamespace(
            boxes=BOXES + np.float32(shift),
            scores=SCORES - np.float32(lower),
            labels=np.zeros(2, np.int64),
            has_masks=False,
        )

    def predict(self, pictures: list[Any], batch_size: int) -> list[SimpleNamespace]:
        return [self.found] * len(pictures)


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Row]]:
    """Rows by implementation, where the runtimes answer as told."""
    files: dict[str, Any] = {kind: tmp_path / name for kind, name in FILES.items()}
    for file in files.values():
        file.write_bytes(bytes(2_000_000))

    def measured(answers: dict[str, Answering], missing: str = "", **more: Any) -> dict[str, Row]:
        monkeypatch.setattr(
            bench_export, "_export", lambda *_: files | dict.fromkeys(("int8", "int8, full"), "left out: why")
        )
        monkeypatch.setattr(bench_export, "optional", lambda name: None if name == missing else object())
        monkeypatch.setattr(bench_export, "in_its_own_process", lambda *_, **__: {"first_ms": 7.0})
        monkeypatch.setattr(bench_export, "Predictor", lambda *_, **__: Answering())
        theirs = None if missing == "torchvision" else lambda: [Found(BOXES, SCORES, np.zeros(2, np.int64), None)]
        monkeypatch.setattr(bench_export, "torchvision_call", lambda *_: theirs)

        def opened(file: str, backend: str, dtype: str, device: None, threads: int) -> Answering:
            kinds = {(kind.backend, kind.dtype, FILES.get(kind.export)): name for name, kind in KINDS.items()}
            return answers.get(kinds[backend, dtype, Path(file).name], Answering())

        monkeypatch.setattr(bench_export, "open_runtime", opened)
        (found,) = bench_export.run(1, quick=True, **more)
        return {row.implementation: row for row in found}

    return measured


def test_every_runtime_has_a_row_with_its_precision(rows: Callable[..., dict[str, Row]]) -> None:
    found = rows({"ONNX Runtime, float16": Answering(lower=0.01)})
    assert set(found) == {"torchvision", "trimask", *KINDS}
    assert {name: row.dtype for name, row in found.items()}["OpenVINO, bfloat16"] == "bfloat16"
    assert all(row.subject == "export" for row in found.values())
    half = found["ONNX Runtime, float16"]
    assert (half.dtype, half.correct) == ("float16", True)
    assert half.note == "file of 2.0 MB; scores at most 0.0100 from float32's, 100% found again"
    assert half.ratio_to_torchvision is not None
    assert (found["ONNX Runtime, int8"].note, found["ONNX Runtime, int8"].p50_ms) == ("left out: why", None)


def test_float32_that_finds_something_else_is_wrong(rows: Callable[..., dict[str, Row]]) -> None:
    found = rows({name: Answering(shift=4) for name in ("ONNX Runtime", "OpenVINO, bfloat16")})
    assert (found["ONNX Runtime"].correct, found["ONNX Runtime"].p50_ms) == (False, None)
    assert found["OpenVINO, bfloat16"].correct  # the same objects, somewhat moved
    assert rows({"OpenVINO": Answering(lower=0.1)})["OpenVINO"].correct is False


def test_a_runtime_that_is_missing_is_listed(rows: Callable[..., dict[str, Row]]) -> None:
    found = rows({}, missing="openvino")
    assert (found["OpenVINO"].note, found["OpenVINO"].correct) == ("not installed", None)
    assert found["ONNX Runtime"].correct
    assert rows({}, missing="torchvision")["torchvision"].note == "not installed"


def test_average_precision_is_measured_where_there_is_a_data_set(
    rows: Callable[..., dict[str, Row]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trimask.export import verification

    assert all(row.box_ap is None for row in rows({}).values())
    annotations = tmp_path / "instances.json"
    annotations.write_text('{"images": [], "categories": [], "annotations": []}')
    monkeypatch.setattr("trimask.engine.training.detection.sources", lambda content, images: [])
    monkeypatch.setattr(verification, "average_precision", lambda *_: {"bbox": 0.5, "segm": 0.25})
    found = rows({}, data=bench_export.Data(annotations, tmp_path))
    assert found["torchvision"].box_ap is None  # it finds the same
    assert {(row.box_ap, row.mask_ap) for name, row in found.items() if row.p50_ms and name != "torchvision"} == {
        (0.5, 0.25)
    }


def test_the_suite_has_every_subject() -> None:
    pytest.importorskip("pytest_benchmark")
    from trimask.benchmarks import suite

    subjects = {name.partition(":")[0] for name in suite.MAKERS}
    assert subjects == {"roi_align", "roi_pool", "nms", "paste_masks", "masks_to_rle", "models", "training"}
    assert any("trimask, Triton" in str(case.id) for case in suite._cases())


def test_plain_pytest_runs_the_tests_alone(pytestconfig: pytest.Config) -> None:
    assert pytestconfig.getini("testpaths") == ["tests"]
    assert "suite.py" in pytestconfig.getini("python_files")
