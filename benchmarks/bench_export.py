"""Exported files in the runtimes for CPUs, beside torch with the same weights: from photograph to boolean masks.

float32 must find the same objects, lower precision nearly the same; the note says how near, and how large the file is.
First calls and memory are measured in a process for each, that of a runtime without torch. Given a COCO data set, the
bundled model's average precision is measured in each.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from ..engine.inference.predicting import Predicting
from ..engine.inference.predictor import Predictor
from .comparison import Comparison, Planned, bounded
from .fresh import in_its_own_process
from .harness import Row
from .installed import optional
from .matching import AUTOCAST, EXACT, FLOAT16, INT8, Found, Tolerance, disagreement, nearness
from .networks import named
from .peers import peer
from .runtimes import detecting, open_runtime
from .samples import photographs

__all__ = ["CASES", "KINDS", "MINUTES", "QUICK", "Case", "Data", "Kind", "run"]

MINUTES = 20.0
CALIBRATION = 3  # photographs, where no others are given

Call = Callable[[], list[Found]]


@dataclass(frozen=True)
class Case:
    """A model ("people", or a ResNet's depth) and a picture of (height, width); seconds as in `Planned`."""

    name: str
    model: str
    size: tuple[int, int]
    seconds: float


class Kind(NamedTuple):
    """A file and how it is run.

    Attributes:
        export: which file: "" (float32, the host pastes the masks), "full" (the graph does), "half", "int8" or
            "int8, full".
        tolerance: what passes as the same objects.
    """

    backend: str
    dtype: str
    export: str = ""
    tolerance: Tolerance | None = EXACT


class Data(NamedTuple):
    """Pictures that the bundled model knows.

    Attributes:
        annotations: COCO annotation file to measure AP on; None to measure none.
        images: the folder of its pictures.
        calibration: pictures to calibrate 8 bits on, none of those that AP is measured on; by default samples.
    """

    annotations: Path | None = None
    images: Path | None = None
    calibration: Sequence[Path] = ()


KINDS = {
    "ONNX Runtime": Kind("onnxruntime", "float32"),
    "ONNX Runtime, full masks": Kind("onnxruntime", "float32", "full"),
    "ONNX Runtime, float16": Kind("onnxruntime", "float16", "half", FLOAT16),
    "ONNX Runtime, int8": Kind("onnxruntime", "int8", "int8", INT8),
    "ONNX Runtime, full masks, int8": Kind("onnxruntime", "int8", "int8, full", INT8),
    "OpenVINO": Kind("openvino", "float32"),
    "OpenVINO, full masks": Kind("openvino", "float32", "full"),
    "OpenVINO, bfloat16": Kind("openvino", "bfloat16", "", AUTOCAST),
    "OpenVINO, full masks, bfloat16": Kind("openvino", "bfloat16", "full", AUTOCAST),
}
CASES = (
    Case("people, MobileNetV2 FPN, 480 x 640", "people", (480, 640), 4.0),
    Case("ResNet-50 FPN, 800 x 1333", "50", (800, 1333), 55.0),
)
QUICK = Case("people, MobileNetV2 FPN, 240 x 320", "people", (240, 320), 3.5)


def run(threads: int, quick: bool, minutes: float = MINUTES, data: Data | None = None) -> Iterator[list[Row]]:
    """The bundled model, then ResNet-50."""
    for package in ("onnx", "onnxscript"):
        if optional(package) is None:
            raise ImportError(f"export: expected {package}, which writes the files; pip install {package}")
    chosen, data = (QUICK,) if quick else CASES, data or Data()
    planned = (
        Planned("export", case.name, case.seconds, partial(_rows, case, threads, quick, data), calls=10)
        for case in chosen
    )
    yield from bounded(planned, threads, quick, 60 * minutes)


def _rows(case: Case, threads: int, quick: bool, data: Data) -> list[Row]:
    pictures = photographs(case.size, 1)
    with TemporaryDirectory() as folder:
        files = _export(case, Path(folder), quick, data)
        predictors: dict[str, Predicting] = {"trimask": Predictor(named(case.model), device="cpu")}
        makers: dict[str, tuple[Any, ...]] = {
            "torchvision": ("bench_export.torchvision_call", case.model, case.size),
            "trimask": ("bench_export.trimask_call", case.model, case.size),
        }
        calls: dict[str, Call | None] = {
            "torchvision": torchvision_call(case.model, case.size),
            "trimask": detecting(predictors["trimask"], pictures),
        }
        absent: dict[str, str] = {}
        for name, kind in KINDS.items():
            file = files[kind.export]
            if optional(kind.backend) is None:
                absent[name] = "not installed"
            elif isinstance(file, str):
                absent[name] = file
            else:
                settings = (str(file), kind.backend, kind.dtype, None, threads)
                predictors[name] = open_runtime(*settings)
                makers[name] = ("runtimes.runtime_call", *settings, case.size, 1)
                calls[name] = detecting(predictors[name], pictures)
        one = Comparison(
            "export",
            case.name,
            calls,
            disagreement,
            lower={name: partial(disagreement, tolerance=kind.tolerance) for name, kind in KINDS.items()},
            dtype={
                "torchvision": "float32",
                "trimask": "float32",
                **{name: kind.dtype for name, kind in KINDS.items()},
            },
            absent=absent,
        )
        rounds, seconds = (15, 60.0) if case.model == "people" else (7, math.inf)
        rows = one.rows(threads, quick, rounds, seconds)
        for i, row in enumerate(rows):
            if row.p50_ms is not None:
                row = row.noted(*_notes(row, one, files))
                row = row if quick else _alone(row, makers[row.implementation], threads)
                rows[i] = _with_precision(row, case, predictors.get(row.implementation), data)
        return rows


def _notes(row: Row, one: Comparison, files: dict[str, Path | str]) -> Iterator[str]:
    """How large the file is, and how near its detections are."""
    kind = KINDS.get(row.implementation)
    if kind:
        yield f"file of {Path(files[kind.export]).stat().st_size / 1e6:.1f} MB"
        exact, rounded = one.implementations["trimask"], one.implementations[row.implementation]
        if kind.tolerance is not None and callable(exact) and callable(rounded):
            yield nearness(exact(), rounded())


def _alone(row: Row, maker: tuple[Any, ...], threads: int) -> Row:
    """The row with its first call and memory, in a process of its own."""
    fields = in_its_own_process(*maker, threads=threads)
    return row.noted(fields.pop("note", ""), **fields)


def _with_precision(row: Row, case: Case, predictor: Predicting | None, data: Data) -> Row:
    """The row with its AP, where there is a data set and the weights have been trained."""
    if data.annotations is None or data.images is None or predictor is None or case.model != "people":
        return row
    from ..engine.training.data import read_json
    from ..engine.training.detection import sources
    from ..export.verification import average_precision

    content = read_json(data.annotations)
    found = average_precision(predictor, content, sources(content, data.images))
    return replace(row, box_ap=found["bbox"], mask_ap=found["segm"])


def _export(case: Case, folder: Path, quick: bool, data: Data) -> dict[str, Path | str]:
    """A file of each kind, or why there is none."""
    from ..export.onnx import to_onnx

    model = named(case.model)
    options: dict[str, dict[str, Any]] = {"": {}, "full": {"masks": "full"}, "half": {"half": True}}
    files: dict[str, Path | str] = {
        name: to_onnx(model, folder / f"{name or 'float32'}.onnx", **more).path for name, more in options.items()
    }
    known = case.model == "people" and data.calibration
    pictures = list(data.calibration) if known else photographs(case.size, CALIBRATION)
    for name, masks in (("int8", "roi"), ("int8, full", "full")):
        files[name] = "left out: a quick run calibrates nothing"
        if not quick:
            files[name] = to_onnx(model, folder / f"{name}.onnx", int8=pictures, masks=masks).path
    return files


def trimask_call(model: str, size: Sequence[int]) -> Call:
    """Torch, with our ops."""
    return detecting(Predictor(named(model), device="cpu"), photographs((size[0], size[1]), 1))


def torchvision_call(model: str, size: Sequence[int]) -> Call | None:
    """torchvision's model; None where it is not installed."""
    theirs = peer("torchvision")
    if theirs is None:
        return None
    call: Call = theirs.detecting(theirs.twin(named(model)), photographs((size[0], size[1]), 1))
    return call
