"""Anyone's weights end to end: from decoded pictures to boolean masks on the host, in every program that runs them.

torchvision, Detectron2 or MMDetection runs beside them where the weights mean in its architecture what they mean here;
torchvision gets its float tensors ready made, on the device. All find the same objects before any of them is timed, by
what float32 found where the precision is lower. The first call and, on a CPU, the memory are measured in a process for
each, except of what is compiled, whose first call takes minutes. What cannot take part is a row too, which says why.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..engine.inference.predictor import Predictor
from ..engine.model.checkpoints import load_model
from ..engine.model.files import is_exported
from ..engine.model.mask_rcnn import MaskRCNN
from .compiling import COMPILING, WARM_UP, compiled_backbone, time_limit
from .device import Bench, precision
from .fresh import in_its_own_process
from .harness import Call, Row, WallClock, compare
from .installed import optional
from .matching import AUTOCAST, BFLOAT16, EXACT, FLOAT16, INT8, Found, Tolerance, disagreement, nearness
from .peers import PEERS, peer
from .runtimes import detecting, open_runtime
from .samples import photographs
from .usage import usage

__all__ = ["BACKENDS", "Work", "run"]

BACKENDS = ("torch", "compiled", "onnxruntime", "openvino")
_OURS = {"torch": "trimask", **{name: f"trimask, {name}" for name in BACKENDS[1:]}}
_COMPILED_PEER = "torchvision, backbone compiled"
_TOLERANCES: dict[str, Tolerance | None] = {
    "float32": EXACT,
    "float16": FLOAT16,
    "bfloat16": BFLOAT16,
    "int8": INT8,
}
_ROUNDS, _QUICK_ROUNDS = 15, 7
_SECONDS, _QUICK_SECONDS = 60.0, 20.0  # for a case
_PIECES = 256  # of what is compiled

Picture = NDArray[np.uint8]
Make = Callable[[Sequence[Picture]], Call]  # a call on those pictures, made ready
Say = Callable[[str], None]


@dataclass(frozen=True)
class Work:
    """What is measured.

    Attributes:
        weights: A checkpoint, the name of a published model, or an exported .onnx file.
        sizes: (height, width) of the pictures; what the network makes of them is up to the model.
        batches: Numbers of pictures at a time.
        device: As torch names it; by default the GPU if there is one.
        dtype: Precision of weights and features; "int8" too, of an exported file.
        backends: Of `BACKENDS`, those to measure.
        pictures: Files to look at; by default samples of scikit-image's.
        threads: On the CPU.
        quick: Few rounds, and nothing is compiled.
        options: What the keys of a foreign checkpoint cannot say.
    """

    weights: str = "people"
    sizes: tuple[tuple[int, int], ...] = ((480, 640),)
    batches: tuple[int, ...] = (1,)
    device: str | None = None
    dtype: str = "float32"
    backends: tuple[str, ...] = BACKENDS
    pictures: tuple[Path, ...] = ()
    threads: int = 1
    quick: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def where(self) -> str:
        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def on_cpu(self) -> bool:
        return self.where.startswith("cpu")


class _Absent(Exception):
    """A program takes no part; says why."""


@dataclass(frozen=True)
class _Program:
    """What runs the weights.

    Attributes:
        make: A call on pictures.
        maker: What makes it in a process of its own: a function, as `fresh` takes it, and its first arguments; then
            come size, batch and pictures. Empty where that is not measured.
        by_torch: Whether torch runs it, which can tell its memory on a GPU.
    """

    make: Make
    maker: tuple[Any, ...] = ()
    by_torch: bool = True


_Programs = dict[str, _Program | str]  # by the name of the row; or why there is none


def run(work: Work, say: Say) -> Iterator[list[Row]]:
    """The rows of each size and batch as soon as they are measured; `say` hears what is being done."""
    with TemporaryDirectory() as folder, precision(tf32=False, tuned=False):
        programs, standard = _programs(work, Path(folder), say)
        for size, batch in product(work.sizes, work.batches):
            case = f"{Path(work.weights).name}, {size[0]} x {size[1]}, batch {batch}"
            say(case)
            yield _rows(work, case, size, batch, programs, standard)


def _rows(
    work: Work,
    case: str,
    size: tuple[int, int],
    batch: int,
    programs: Mapping[str, _Program | str],
    standard: Make | None,
) -> list[Row]:
    pictures = photographs(size, batch, work.pictures)
    calls: dict[str, Call] = {}
    absent: dict[str, str] = {}
    for name, program in programs.items():
        try:
            if isinstance(program, str):
                raise _Absent(program)
            calls[name] = program.make(pictures)
        except _Absent as reason:
            absent[name] = str(reason)
    tolerance = _TOLERANCES[work.dtype]
    clock = WallClock(torch.device(work.where).type)
    dtypes = dict.fromkeys(programs, work.dtype)
    if work.on_cpu:  # in lower precision peers run by autocast on a GPU alone
        dtypes |= dict.fromkeys((*PEERS, _COMPILED_PEER), "float32")
    expected = standard(pictures)() if standard else None
    rows = compare(
        "models",
        case,
        calls,
        partial(_differing, tolerance=tolerance),
        near=partial(_differing, tolerance=tolerance and AUTOCAST),
        lower={_OURS["openvino"]: partial(_differing, tolerance=AUTOCAST)} if work.dtype == "bfloat16" else {},
        expected=expected,
        rounds=_QUICK_ROUNDS if work.quick else _ROUNDS,
        seconds=_QUICK_SECONDS if work.quick else _SECONDS,
        threads=work.threads,
        clock=clock,
        dtype=dtypes,
        variable={"batch": batch, "height": size[0], "width": size[1]},
    )
    if expected:
        rows = [_nearness(row, expected, calls[row.implementation]) for row in rows]
    by_name = {row.implementation: _completed(row, work, size, batch, programs, calls) for row in rows}
    for name, why in absent.items():
        by_name[name] = Row("models", case, name, clock.device, dtypes[name], work.threads, note=why)
    return [by_name[name] for name in programs]


def _nearness(row: Row, expected: list[Found], call: Call) -> Row:
    """The row with how near its detections are to float32's, where it was timed in lower precision."""
    if row.p50_ms is None or row.dtype == "float32":
        return row
    return row.noted(nearness(expected, call()))


def _completed(
    row: Row,
    work: Work,
    size: tuple[int, int],
    batch: int,
    programs: Mapping[str, _Program | str],
    calls: Mapping[str, Call],
) -> Row:
    """The row with its first call and memory, where it was timed."""
    program = programs[row.implementation]
    if row.p50_ms is None or isinstance(program, str):
        return row
    found: dict[str, Any] = {}
    if not work.on_cpu and program.by_torch:
        with torch.cuda.device(work.where):
            found = usage(Bench(WallClock(row.device), work.quick), calls[row.implementation], batch)
    if program.maker:
        files = [str(picture) for picture in work.pictures]
        alone = in_its_own_process(*program.maker, size, batch, files, threads=work.threads)
        if not work.on_cpu:
            alone.pop("peak_bytes", None)  # of the host
        found |= alone
    return row.noted(found.pop("note", ""), **found)


def _differing(expected: list[Found], found: list[Found], tolerance: Tolerance | None) -> str:
    """As `disagreement`, but pictures in which neither finds anything are the same."""
    if not any(len(one.scores) for one in (*expected, *found)):
        return ""
    return disagreement(expected, found, tolerance)


def _programs(work: Work, folder: Path, say: Say) -> tuple[_Programs, Make | None]:
    """Every program, and what shows what is right in lower precision."""
    exported = is_exported(work.weights)
    if exported:
        if work.options:
            raise ValueError(f"{work.weights}: expected no {', '.join(work.options)}, which the export has fixed")
        no_torch = "an exported file, which torch does not read"
        found: _Programs = dict.fromkeys(PEERS, no_torch)
        found |= {_OURS[name]: no_torch for name in work.backends if name in ("torch", "compiled")}
        return found | _exported(work, Path(work.weights)), None
    say(f"loading {work.weights}")
    source = load_model(work.weights, **work.options)
    found = {name: _peer(work, source, name) for name in PEERS}
    if "torch" in work.backends:
        found[_OURS["torch"]] = _Program(partial(detecting, _predictor(work, source)), _alone("trimask_call", work))
    if "compiled" in work.backends:
        found[_COMPILED_PEER] = _peer(work, source, "torchvision", compiled=True)
        found[_OURS["compiled"]] = "not measured: a quick run compiles nothing"
        if not work.quick:
            found[_OURS["compiled"]] = _Program(partial(_compiled, _predictor(work, source)))
    if {"onnxruntime", "openvino"} & {*work.backends}:
        found |= _exported(work, _export(work, source, folder / "model.onnx", say))
    standard = None
    if work.dtype != "float32":
        standard = partial(detecting, Predictor(source, device=work.where))
    return found, standard


def _predictor(work: Work, source: MaskRCNN) -> Predictor:
    return Predictor(source, device=work.where, dtype=getattr(torch, work.dtype))


def _alone(maker: str, work: Work, *first: str) -> tuple[Any, ...]:
    return f"bench_weights.{maker}", *first, work.weights, work.where, work.dtype, dict(work.options)


def trimask_call(
    weights: str,
    device: str,
    dtype: str,
    options: Mapping[str, Any],
    size: Sequence[int],
    batch: int,
    pictures: Sequence[str],
) -> Call:
    """Our predictor by itself, for `fresh`."""
    work = Work(weights, device=device, dtype=dtype)
    predictor = _predictor(work, load_model(weights, **options))
    return detecting(predictor, photographs((size[0], size[1]), batch, pictures))


def peer_call(
    name: str,
    weights: str,
    device: str,
    dtype: str,
    options: Mapping[str, Any],
    size: Sequence[int],
    batch: int,
    pictures: Sequence[str],
) -> Call:
    """A peer's model by itself, for `fresh`."""
    program = _peer(Work(weights, device=device, dtype=dtype), load_model(weights, **options), name)
    assert isinstance(program, _Program)
    return program.make(photographs((size[0], size[1]), batch, pictures))


def _compiled(predictor: Predictor, pictures: Sequence[Picture]) -> Call:
    """The trunk through torch.compile, as far as that takes it."""
    graph: Any = predictor.graph
    call = detecting(predictor, pictures)
    if not isinstance(graph.backbone, torch._dynamo.OptimizedModule):  # the first pictures
        graph.backbone = torch.compile(graph.backbone)
    try:
        # A trunk that is compiled in pieces has one for each of its blocks; beyond the limit they run as they are.
        with time_limit(COMPILING), torch._dynamo.config.patch(recompile_limit=_PIECES):
            for _ in range(WARM_UP):
                call()
    except Exception as error:  # a compiler fails in many ways, and none of them is a wrong result
        torch._dynamo.reset()
        raise _Absent(f"torch.compile: {type(error).__name__}: {error}"[:300]) from None
    return call


def _peer(work: Work, source: MaskRCNN, name: str, compiled: bool = False) -> _Program | str:
    theirs = peer(name)
    if theirs is None:
        return "not installed"
    if unlike := theirs.unlike(source.config):
        return f"has no such model: {unlike} of another kind"
    if compiled and work.quick:
        return "not measured: a quick run compiles nothing"
    try:
        twin: Any = theirs.twin(source)
    except (ValueError, RuntimeError, AssertionError) as error:
        return f"has no such model: {error}"[:300]
    lower = None if work.dtype == "float32" or work.on_cpu else getattr(torch, work.dtype)  # by autocast on a GPU alone
    twin.to(work.where)
    make = partial(theirs.detecting, device=work.where, autocast=lower)
    if compiled:
        return _Program(lambda pictures: compiled_backbone(twin, partial(make, pictures=pictures)))
    return _Program(partial(make, twin), _alone("peer_call", work, name))


def _export(work: Work, source: MaskRCNN, path: Path, say: Say) -> Path | str:
    """The ONNX file of the weights, or why there is none."""
    try:
        from ..export.onnx import to_onnx
    except ImportError as error:
        return f"not exported: {error}"
    if work.dtype == "float16" and work.on_cpu:
        return "not measured: float16 on a CPU"
    say("exporting to ONNX")
    return to_onnx(source, path, half=work.dtype == "float16").path


def _exported(work: Work, file: Path | str) -> _Programs:
    found: _Programs = {}
    for name in ("onnxruntime", "openvino"):
        if name in work.backends:
            found[_OURS[name]] = _runtime(work, file, name)
    return found


def _runtime(work: Work, file: Path | str, name: str) -> _Program | str:
    if optional(name) is None:
        return "not installed"
    if isinstance(file, str):
        return file
    if name == "openvino" and not work.on_cpu:
        return "not measured: runs on the CPU"
    if work.dtype == "bfloat16" and name == "onnxruntime":
        return "has no bfloat16"
    if work.dtype == "int8" and name == "openvino":
        return "finds nothing in files of 8 bits"
    settings = (str(file), name, work.dtype, None if name == "openvino" else work.where, work.threads)
    runtime = open_runtime(*settings)
    if not work.on_cpu and "CUDA" not in runtime.provider:
        return f"not measured: this one has {runtime.provider} alone"
    return _Program(partial(detecting, runtime), ("runtimes.runtime_call", *settings), by_torch=False)
