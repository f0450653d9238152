"""End to end on a CPU: from decoded photographs to boolean masks, beside torchvision with the same weights.

Weights that mean what Detectron2's or MMDetection's do stand beside those, where they are installed. Both sides resize,
detect, and threshold their pasted masks; torchvision gets its float tensors ready made. In float32 the detections must
be the same set. bfloat16, where the processor computes with it, runs in the same rounds; its note says how far its
scores are from float32's. First calls and memory are measured in a process for each.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..engine.inference.predictor import Predictor
from ..engine.model.mask_rcnn import MaskRCNN
from .comparison import NEEDS_A_GPU, Comparison, Planned, bounded
from .compiling import compiled_backbone
from .device import has_bfloat16
from .fresh import in_its_own_process
from .harness import Row
from .installed import optional
from .matching import BFLOAT16, Found, disagreement, nearness
from .networks import named, random_detectron2, random_mmdetection, random_resnet
from .peers import PEERS, peer
from .runtimes import detecting
from .samples import photographs

__all__ = ["CASES", "MINUTES", "QUICK", "Case", "comparison", "run"]

Picture = NDArray[np.uint8]
Call = Callable[[], list[Found]]
_NETWORKS: dict[str, Callable[..., MaskRCNN]] = {
    "torchvision": random_resnet,
    "Detectron2": random_detectron2,
    "MMDetection": random_mmdetection,
}
BF16, COMPILED = "trimask, bfloat16", "torchvision, backbone compiled"
MINUTES = 60.0
_CALLS = 10  # of each: checked, warmed up, timed seven times, and once in a process of its own


@dataclass(frozen=True)
class Case:
    """A model and pictures.

    Attributes:
        model: "people", or a ResNet's depth.
        peer: one of `PEERS`, whose models have the same weights.
        sample: one of scikit-image's; "" for as many photographs as the batch has, scaled to the size.
        size: (height, width) that a sample is cut to, from its upper left corner; None for all of it.
        step: take every so many rows and columns.
        batch: how many pictures go together.
        seconds: that one call of each takes together, on one thread, about.
        variable: what a sweep varies.
        compiled: whether torchvision runs compiled, too, which takes minutes to make.
    """

    name: str
    model: str
    sample: str = ""
    size: tuple[int, int] | None = None
    step: int = 1
    max_detections: int = 100
    batch: int = 1
    seconds: float = 1.0
    variable: Mapping[str, float] | None = None
    compiled: bool = False
    peer: str = "torchvision"

    def arguments(self) -> tuple[str, str, str, tuple[int, int] | None, int, int, int]:
        """For another process."""
        return (self.model, self.peer, self.sample, self.size, self.step, self.max_detections, self.batch)


def _sweep(name: str, model: str, size: tuple[int, int], batch: int, seconds: float, varied: str) -> Case:
    value = batch if varied == "batch" else size[0] * size[1]
    full = f"{name}, {batch} x {size[0]} x {size[1]}"
    return Case(full, model, size=size, batch=batch, seconds=seconds * batch, variable={varied: float(value)})


_PEOPLE, _R50, _R101 = "people, MobileNetV2 FPN", "ResNet-50 FPN", "ResNet-101 FPN"
CASES = (
    Case("people, MobileNetV2 FPN, 512 x 512 at 320", "people", "astronaut", compiled=True),
    Case("ResNet-50 FPN, 400 x 600 at 800 x 1200, 100 detections", "50", "coffee", seconds=15),
    *(_sweep(_PEOPLE, "people", size, 1, 1.0, "pixels") for size in ((240, 320), (480, 640), (1080, 1920))),
    *(_sweep(_PEOPLE, "people", (480, 640), batch, 0.8, "batch") for batch in (2, 4, 8)),
    Case("ResNet-50 FPN, 400 x 600 at 800 x 1200, 10 detections", "50", "coffee", max_detections=10, seconds=12),
    Case("ResNet-50 FPN, 360 x 599 at 800 x 1331, padded to 800 x 1344", "50", "coffee", size=(360, 599), seconds=15),
    *(
        Case(
            f"ResNet-50 FPN of {kind}'s kind, 360 x 599 at 800 x 1331",
            "50",
            "coffee",
            (360, 599),
            seconds=15,
            peer=kind,
        )
        for kind in ("Detectron2", "MMDetection")
    ),
    _sweep(_R101, "101", (800, 1333), 1, 20, "pixels"),
    *(_sweep(_R50, "50", size, 1, 15, "pixels") for size in ((480, 640), (800, 1333), (1080, 1920))),
    *(_sweep(_R50, "50", (480, 640), batch, 15, "batch") for batch in (2, 4, 8)),
)
QUICK = replace(CASES[0], name="people, MobileNetV2 FPN, 256 x 256 at 320", step=2, compiled=False)


def run(threads: int, quick: bool, minutes: float = MINUTES) -> Iterator[list[Row]]:
    """The bundled model and ResNets with FPN, on scikit-image's photographs; what there is no time for is named."""
    if optional("skimage.data") is None:
        raise ImportError("models: expected scikit-image, whose sample portrait is the input; pip install scikit-image")
    chosen = (QUICK,) if quick else CASES
    planned = (
        Planned("models", case.name, case.seconds, partial(_rows, case, threads, quick), calls=_CALLS)
        for case in chosen
    )
    yield from bounded(planned, threads, quick, 60 * minutes)


def comparison(case: Case) -> Comparison:
    """The peer and ours, which is held to float32's detections in bfloat16 too."""
    arguments = case.arguments()
    calls: dict[str, Call | None] = {case.peer: peer_call(*arguments), "trimask": trimask_call(*arguments)}
    if has_bfloat16():
        calls[BF16] = trimask_call(*arguments, "bfloat16")
    absent = {"trimask, Triton": NEEDS_A_GPU}
    for name in (name for name in PEERS if name != case.peer):
        absent[name] = "left out: other weights" if peer(name) else "not installed"
    if not calls.get("torchvision"):
        absent[COMPILED] = absent.get("torchvision", "not installed")
    elif case.compiled:
        calls[COMPILED] = _compiled_call(*arguments)
    else:
        absent[COMPILED] = "left out: minutes of compiling"
    return Comparison(
        "models",
        case.name,
        calls,
        disagreement,
        lower={BF16: partial(disagreement, tolerance=BFLOAT16)},
        dtype=dict.fromkeys((*calls, *absent), "float32") | {BF16: "bfloat16"},
        absent=absent,
        variable=case.variable,
    )


def _rows(case: Case, threads: int, quick: bool) -> list[Row]:
    rounds, seconds = (15, 10.0) if case.model == "people" else (7, math.inf)
    one = comparison(case)
    return [_completed(row, case, one, threads) for row in one.rows(threads, quick, rounds, seconds)]


def _completed(row: Row, case: Case, one: Comparison, threads: int) -> Row:
    """The row with how near its detections are to float32's, and with what a process of its own shows."""
    makers: dict[str, tuple[str, ...]] = {
        case.peer: ("bench_models.peer_call",),
        "trimask": ("bench_models.trimask_call",),
        BF16: ("bench_models.trimask_call", "bfloat16"),
    }
    if row.p50_ms is None or row.implementation not in makers:
        return row
    notes = []
    if row.implementation == BF16:
        exact, rounded = one.implementations["trimask"], one.implementations[BF16]
        assert callable(exact)
        assert callable(rounded)
        notes.append(nearness(exact(), rounded()))
    maker, *more = makers[row.implementation]
    fields = in_its_own_process(maker, *case.arguments(), *more, threads=threads)
    notes.append(fields.pop("note", ""))
    return row.noted(*notes, **fields)


def _model(model: str, kind: str) -> MaskRCNN:
    return named(model, _NETWORKS[kind])


def _pictures(sample: str, size: tuple[int, int] | None, step: int, batch: int) -> list[Picture]:
    if not sample:
        assert size is not None
        return photographs((size[0], size[1]), batch)
    picture = getattr(optional("skimage.data"), sample)()
    if size:
        picture = picture[: size[0], : size[1]]
    return [np.ascontiguousarray(picture[::step, ::step])] * batch


def trimask_call(
    model: str,
    kind: str,
    sample: str,
    size: tuple[int, int] | None,
    step: int,
    max_detections: int,
    batch: int,
    dtype: str = "float32",
) -> Call:
    """Our predictor, ready to be called."""
    predictor = Predictor(_model(model, kind), device="cpu", dtype=getattr(torch, dtype), max_detections=max_detections)
    return detecting(predictor, _pictures(sample, size, step, batch))


def peer_call(
    model: str, kind: str, sample: str, size: tuple[int, int] | None, step: int, max_detections: int, batch: int
) -> Call | None:
    """The peer's model with the same weights; None where it is not installed."""
    theirs = peer(kind)
    if theirs is None:
        return None
    call: Call = theirs.detecting(_twin(theirs, model, kind, max_detections), _pictures(sample, size, step, batch))
    return call


def _compiled_call(
    model: str, kind: str, sample: str, size: tuple[int, int] | None, step: int, max_detections: int, batch: int
) -> Call:
    """The same with its trunk through torch's compiler; a call that says so where that failed."""
    theirs = peer(kind)
    make = partial(theirs.detecting, pictures=_pictures(sample, size, step, batch))
    return compiled_backbone(_twin(theirs, model, kind, max_detections), make)


def _twin(theirs: Any, model: str, kind: str, max_detections: int) -> Any:
    source = _model(model, kind)
    source.config = replace(source.config, detection=replace(source.config.detection, max_detections=max_detections))
    return theirs.twin(source)
