"""Anyone's weights end to end: from decoded pictures to boolean masks on the host, in every program that runs them.

torchvision runs beside them where the weights mean in its architecture what they mean here; it gets its float tensors
ready made, on the device. All find the same objects before any of them is timed, by what float32 found where the
precision is lower. What cannot take part is a row too, which says why.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..engine.inference.predicting import Predicting
from ..engine.inference.predictor import Predictor
from ..engine.model.checkpoints import load_model
from ..engine.model.config import MaskRCNNConfig, MobileNetV2Config
from ..engine.model.mask_rcnn import MaskRCNN
from ..engine.model.presets import torchvision_v1
from ..engine.pictures.reading import read
from .compiling import compiled_peers, time_limit
from .device import Bench, precision
from .harness import Call, Row, WallClock, compare, optional
from .matching import AUTOCAST, BFLOAT16, EXACT, FLOAT16, Found, Tolerance, disagreement
from .networks import photographs, torchvision_twin

__all__ = ["BACKENDS", "Work", "run", "unlike_torchvision"]

BACKENDS = ("torch", "compiled", "onnxruntime", "openvino")
_OURS = {"torch": "trimask", **{name: f"trimask, {name}" for name in BACKENDS[1:]}}
_COMPILED_PEER = "torchvision, backbone compiled"
_TOLERANCES: dict[str, Tolerance | None] = {
    "float32": EXACT,
    "float16": FLOAT16,
    "bfloat16": BFLOAT16,
    "int8": AUTOCAST,
}
_ROUNDS, _QUICK_ROUNDS = 15, 7
_SECONDS, _QUICK_SECONDS = 60.0, 20.0  # for a case
_COMPILING = 300.0  # seconds at most
_PIECES = 256  # of what is compiled
_WARM_UP = 3  # calls of what is compiled: the shapes of the second one differ

Picture = NDArray[np.uint8]
Program = Callable[[Sequence[Picture]], Call]  # a call on those pictures, made ready
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


def run(work: Work, say: Say) -> Iterator[list[Row]]:
    """The rows of each size and batch as soon as they are measured; `say` hears what is being done."""
    with TemporaryDirectory() as folder, precision(tf32=False, tuned=False):
        programs, standard = _programs(work, Path(folder), say)
        for size, batch in product(work.sizes, work.batches):
            case = f"{Path(work.weights).stem}, {size[0]} x {size[1]}, batch {batch}"
            say(case)
            yield _rows(work, case, size, batch, programs, standard)


def _rows(
    work: Work,
    case: str,
    size: tuple[int, int],
    batch: int,
    programs: Mapping[str, Program | str],
    standard: Program | None,
) -> list[Row]:
    pictures = _pictures(work, size, batch)
    calls: dict[str, Call | None] = {}
    absent: dict[str, str] = {}
    for name, program in programs.items():
        try:
            if isinstance(program, str):
                raise _Absent(program)
            calls[name] = program(pictures)
        except _Absent as reason:
            absent[name] = str(reason)
    tolerance = _TOLERANCES[work.dtype]
    expected = standard(pictures)() if standard else None
    clock = WallClock(torch.device(work.where).type)
    rows = compare(
        "models",
        case,
        calls,
        partial(_differing, tolerance=tolerance),
        near=partial(_differing, tolerance=tolerance and AUTOCAST),
        expected=expected,
        rounds=_QUICK_ROUNDS if work.quick else _ROUNDS,
        seconds=_QUICK_SECONDS if work.quick else _SECONDS,
        threads=work.threads,
        clock=clock,
        dtype=work.dtype,
        variable={"batch": batch, "height": size[0], "width": size[1]},
    )
    by_name = {row.implementation: row for row in rows}
    for name, why in absent.items():
        by_name[name] = Row("models", case, name, clock.device, work.dtype, work.threads, note=why)
    if work.on_cpu and work.dtype != "float32":
        for name in ("torchvision", _COMPILED_PEER):
            if name in calls:
                by_name[name] = replace(by_name[name], note=f"in float32; {by_name[name].note}".rstrip("; "))
    return [by_name[name] for name in programs]


def _differing(expected: list[Found], found: list[Found], tolerance: Tolerance | None) -> str:
    """As `disagreement`, but pictures in which neither finds anything are the same."""
    if not any(len(one.scores) for one in (*expected, *found)):
        return ""
    return disagreement(expected, found, tolerance)


def _pictures(work: Work, size: tuple[int, int], batch: int) -> list[Picture]:
    if not work.pictures:
        return photographs(size, batch)
    from PIL import Image

    files = [work.pictures[i % len(work.pictures)] for i in range(batch)]
    return [np.array(Image.fromarray(read(file).array).resize(size[::-1])) for file in files]


def _programs(work: Work, folder: Path, say: Say) -> tuple[dict[str, Program | str], Program | None]:
    """Every program by the name of its row, or why there is none; and what shows what is right in lower precision."""
    exported = work.weights.endswith(".onnx")
    if exported:
        if work.options:
            raise ValueError(f"{work.weights}: expected no {', '.join(work.options)}, which the export has fixed")
        no_torch = "an exported file, which torch does not read"
        found: dict[str, Program | str] = {"torchvision": no_torch}
        found |= {_OURS[name]: no_torch for name in work.backends if name in ("torch", "compiled")}
        return found | _exported(work, Path(work.weights)), None
    say(f"loading {work.weights}")
    source = load_model(work.weights, **work.options)
    found = {"torchvision": _torchvision(work, source, compiled=False)}
    if "torch" in work.backends:
        found[_OURS["torch"]] = partial(_call, _predictor(work, source))
    if "compiled" in work.backends:
        found[_COMPILED_PEER] = _torchvision(work, source, compiled=True)
        found[_OURS["compiled"]] = "not measured: a quick run compiles nothing"
        if not work.quick:
            found[_OURS["compiled"]] = partial(_compiled, _predictor(work, source))
    if {"onnxruntime", "openvino"} & {*work.backends}:
        found |= _exported(work, _export(work, source, folder / "model.onnx", say))
    standard = None
    if work.dtype != "float32":
        standard = partial(_call, Predictor(source, device=work.where))
    return found, standard


def _predictor(work: Work, source: MaskRCNN) -> Predictor:
    return Predictor(source, device=work.where, dtype=getattr(torch, work.dtype))


def _call(predictor: Predicting, pictures: Sequence[Picture]) -> Call:
    def ours() -> list[Found]:
        results = predictor.predict(list(pictures), batch_size=len(pictures))
        return [Found(x.boxes, x.scores, x.labels, x.masks if x.has_masks else None) for x in results]

    return ours


def _compiled(predictor: Predictor, pictures: Sequence[Picture]) -> Call:
    """The trunk through torch.compile, as far as that takes it."""
    graph: Any = predictor.graph
    call = _call(predictor, pictures)
    if not isinstance(graph.backbone, torch._dynamo.OptimizedModule):  # the first pictures
        graph.backbone = torch.compile(graph.backbone)
    try:
        # A trunk that is compiled in pieces has one for each of its blocks; beyond the limit they run as they are.
        with time_limit(_COMPILING), torch._dynamo.config.patch(recompile_limit=_PIECES):
            for _ in range(_WARM_UP):
                call()
    except Exception as error:  # a compiler fails in many ways, and none of them is a wrong result
        torch._dynamo.reset()
        raise _Absent(f"torch.compile: {type(error).__name__}: {error}"[:300]) from None
    return call


def unlike_torchvision(config: MaskRCNNConfig) -> str:
    """The parts of a config that torchvision's models have otherwise, in words; "" where it can run the weights."""
    v1 = torchvision_v1(config.class_names, config.category_ids)
    resize, rpn, limits = config.input.resize, config.rpn, config.detection
    twin = replace(
        config,
        input=replace(
            v1.input, resize=replace(v1.input.resize, min_size=resize.min_size, max_size=resize.max_size)
        ),
        anchors=replace(v1.anchors, sizes=config.anchors.sizes, aspect_ratios=config.anchors.aspect_ratios),
        rpn=replace(v1.rpn, pre_nms=rpn.pre_nms, post_nms=rpn.post_nms),
        pool=v1.pool,
        detection=replace(
            v1.detection, score_threshold=limits.score_threshold, max_detections=limits.max_detections
        ),
        paste=v1.paste,
    )  # fmt: skip
    unlike = [one.name for one in fields(config) if getattr(config, one.name) != getattr(twin, one.name)]
    if not isinstance(config.backbone, MobileNetV2Config):
        unlike += ["anchors"] * (twin.anchors != v1.anchors) + ["backbone"] * config.backbone.stride_in_1x1
    if config.mask_head is None:
        unlike.append("mask_head")
    return ", ".join(dict.fromkeys(unlike))


def _torchvision(work: Work, source: MaskRCNN, compiled: bool) -> Program | str:
    torchvision = optional("torchvision")
    if torchvision is None:
        return "not installed"
    if unlike := unlike_torchvision(source.config):
        return f"has no such model: {unlike} of another kind"
    if compiled and work.quick:
        return "not measured: a quick run compiles nothing"
    try:
        twin: Any = torchvision_twin(torchvision, source, source.config)
    except (ValueError, RuntimeError, StopIteration, AssertionError) as error:
        return f"has no such model: {error}"[:300]
    twin.to(work.where)
    return partial(_compiled_peer if compiled else _their_call, work, twin)


def _their_call(work: Work, twin: Any, pictures: Sequence[Picture]) -> Call:
    images = [torch.from_numpy(x).permute(2, 0, 1).float().to(work.where) / 255 for x in pictures]
    lower = work.dtype != "float32" and not work.on_cpu  # in lower precision they run by autocast on a GPU alone

    @torch.inference_mode()
    def theirs() -> list[Found]:
        with torch.autocast(torch.device(work.where).type, getattr(torch, work.dtype), enabled=lower):
            found = twin(images)
        return [
            Found(
                one["boxes"].float().cpu().numpy(),
                one["scores"].float().cpu().numpy(),
                one["labels"].cpu().numpy() - 1,  # label 0 is the background
                (one["masks"][:, 0] > 0.5).cpu().numpy(),
            )
            for one in found
        ]

    return theirs


def _compiled_peer(work: Work, twin: Any, pictures: Sequence[Picture]) -> Call:
    bench = Bench(WallClock(), False, time.monotonic() + 2 * _COMPILING)
    _, call = next(compiled_peers(twin, lambda peer: _their_call(work, peer, pictures)(), bench))
    return call


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


def _exported(work: Work, file: Path | str) -> dict[str, Program | str]:
    found: dict[str, Program | str] = {}
    for name in ("onnxruntime", "openvino"):
        if name in work.backends:
            found[_OURS[name]] = _runtime(work, file, name)
    return found


def _runtime(work: Work, file: Path | str, name: str) -> Program | str:
    if optional(name) is None:
        return "not installed"
    if isinstance(file, str):
        return file
    if name == "openvino" and not work.on_cpu:
        return "not measured: runs on the CPU"
    if work.dtype == "bfloat16" and name == "onnxruntime":
        return "has no bfloat16"
    from ..export.runtime import Runtime

    dtype = work.dtype if work.dtype == "bfloat16" else "float32"  # a file has the precision it was exported in
    device = None if name == "openvino" else work.where
    runtime = Runtime(file, device=device, threads=work.threads, backend=name, dtype=dtype, cache=False)
    if not work.on_cpu and "CUDA" not in runtime.provider:
        return f"not measured: this one has {runtime.provider} alone"
    return partial(_call, runtime)
