"""Exported files in the runtimes for CPUs, beside torch with the same weights: from photograph to boolean masks.

float32 must find the same objects, lower precision nearly the same; the note says how near. Sizes on disk are in the
notes too. First calls and memory are measured in a process for each, into which the benchmark loads torch: the runtimes
by themselves take a few hundred megabytes less.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from ..engine.inference.predictor import Predictor
from ..engine.model.checkpoints import load_model
from .comparison import Comparison, Planned, bounded
from .fresh import in_its_own_process
from .harness import Row, optional
from .matching import AUTOCAST, EXACT, FLOAT16, Found, Tolerance, disagreement, summary
from .networks import photographs, random_resnet, torchvision_twin

__all__ = ["CASES", "MINUTES", "QUICK", "Case", "run"]

MINUTES = 15.0
CALIBRATION = 3  # pictures


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
        options: of `to_onnx`; "int8" stands for photographs to calibrate on.
        tolerance: what passes as the same objects.
    """

    backend: str
    dtype: str
    options: tuple[str, ...] = ()
    tolerance: Tolerance | None = EXACT


KINDS = {
    "ONNX Runtime": Kind("onnxruntime", "float32"),
    "ONNX Runtime, float16": Kind("onnxruntime", "float16", ("half",), FLOAT16),
    "ONNX Runtime, int8": Kind("onnxruntime", "int8", ("int8",), AUTOCAST),
    "OpenVINO": Kind("openvino", "float32"),
    "OpenVINO, bfloat16": Kind("openvino", "bfloat16", (), AUTOCAST),
}
CASES = (
    Case("people, MobileNetV2 FPN, 480 x 640", "people", (480, 640), 2.5),
    Case("ResNet-50 FPN, 800 x 1333", "50", (800, 1333), 40.0),
)
QUICK = Case("people, MobileNetV2 FPN, 240 x 320", "people", (240, 320), 2.5)


class Ran(NamedTuple):
    """What was found in the picture, and how near that must be."""

    found: list[Found]
    tolerance: Tolerance | None


def run(threads: int, quick: bool, minutes: float = MINUTES) -> Iterator[list[Row]]:
    """The bundled model, then ResNet-50."""
    for package in ("onnx", "onnxscript"):
        if optional(package) is None:
            raise ImportError(f"export: expected {package}, which writes the files; pip install 'trimask[onnx]'")
    chosen = (QUICK,) if quick else CASES
    planned = (Planned("export", case.name, case.seconds, partial(_rows, case, threads, quick)) for case in chosen)
    yield from bounded(planned, threads, quick, 60 * minutes)


def _rows(case: Case, threads: int, quick: bool) -> list[Row]:
    with TemporaryDirectory() as folder:
        files = _export(case, Path(folder), quick)
        makers: dict[str, tuple[str, tuple[Any, ...]]] = {
            "torchvision": ("torchvision_call", ()),
            "trimask": ("trimask_call", ()),
        }
        absent: dict[str, str] = {}
        for name, kind in KINDS.items():
            file = files["".join(kind.options)]
            if optional(kind.backend) is None:
                absent[name] = "not installed"
            elif isinstance(file, str):
                absent[name] = file
            else:
                makers[name] = ("runtime_call", (str(file), name, threads))
        calls = {
            name: globals()[maker](case.model, case.size, *more)
            for name, (maker, more) in makers.items()
            if name != "torchvision" or optional("torchvision")
        }
        if optional("torchvision") is None:
            absent["torchvision"] = "not installed"
        rounds, seconds = (15, 30.0) if case.model == "people" else (7, math.inf)
        rows = Comparison("export", case.name, calls, _disagreement, absent=absent).rows(
            threads, quick, rounds, seconds
        )
        return [_completed(row, case, makers, calls, threads, quick) for row in rows]


def _completed(
    row: Row,
    case: Case,
    makers: dict[str, tuple[str, tuple[Any, ...]]],
    calls: dict[str, Callable[[], Ran]],
    threads: int,
    quick: bool,
) -> Row:
    """The row with its precision, how near its detections are, the first call and the memory."""
    kind = KINDS.get(row.implementation)
    row = replace(row, dtype=kind.dtype if kind else "float32")
    if row.p50_ms is None:
        return row
    notes = [row.note]
    maker, more = makers[row.implementation]
    if kind:
        notes.append(f"{Path(more[0]).stat().st_size / 1e6:.1f} MB")
        if kind.tolerance is not None:
            apart, share = summary(calls["trimask"]().found, calls[row.implementation]().found)
            notes.append(f"scores at most {apart:.4f} from float32's, {share:.0%} found again")
    if not quick:
        fields = in_its_own_process(f"bench_export.{maker}", case.model, case.size, *more, threads=threads)
        notes.append(fields.pop("note", ""))
        row = replace(row, **fields)
    return replace(row, note="; ".join(filter(None, notes)))


def _disagreement(expected: Ran, got: Ran) -> str:
    return disagreement(expected.found, got.found, got.tolerance)


def _export(case: Case, folder: Path, quick: bool) -> dict[str, Path | str]:
    """A file of each kind, or why there is none."""
    from ..export.onnx import to_onnx

    model = _model(case.model)
    files: dict[str, Path | str] = {"": to_onnx(model, folder / "float32.onnx").path}
    files["half"] = to_onnx(model, folder / "float16.onnx", half=True).path
    files["int8"] = "left out: a quick run calibrates nothing"
    if not quick:
        pictures = photographs(case.size, CALIBRATION)
        files["int8"] = to_onnx(model, folder / "int8.onnx", int8=pictures).path
    return files


def _model(name: str) -> Any:
    return load_model("people") if name == "people" else random_resnet(int(name))


def _picture(size: tuple[int, int]) -> Any:
    """An astronaut, where scikit-image is there."""
    return photographs((size[0], size[1]), 2)[1]


def _found(predictor: Any, size: tuple[int, int], tolerance: Tolerance | None) -> Callable[[], Ran]:
    picture = _picture(size)

    def call() -> Ran:
        result = predictor.predict(picture)
        return Ran([Found(result.boxes, result.scores, result.labels, result.masks)], tolerance)

    return call


def trimask_call(model: str, size: tuple[int, int]) -> Callable[[], Ran]:
    """Torch, with our ops."""
    return _found(Predictor(_model(model), device="cpu"), size, EXACT)


def torchvision_call(model: str, size: tuple[int, int]) -> Callable[[], Ran]:
    """torchvision's model."""
    from .bench_models import _tensors, _theirs

    source = _model(model)
    call = partial(
        _theirs, _tensors([_picture(size)]), torchvision_twin(optional("torchvision"), source, source.config)
    )
    return lambda: Ran(call(), EXACT)


def runtime_call(model: str, size: tuple[int, int], file: str, name: str, threads: int) -> Callable[[], Ran]:
    """A runtime with an exported file."""
    from ..export.runtime import Runtime

    kind = KINDS[name]
    dtype = "bfloat16" if kind.dtype == "bfloat16" else "float32"  # else the file has its own precision
    runtime = Runtime(file, device=None, threads=threads, backend=kind.backend, dtype=dtype, cache=False)
    return _found(runtime, size, kind.tolerance)
