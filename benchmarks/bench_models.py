"""End to end on a CPU: from a decoded photograph to boolean masks, beside torchvision with the same weights.

Both sides resize, detect, and threshold their pasted masks; torchvision gets its float tensor ready made. In float32
the detections must be the same set. bfloat16, where the processor computes with it, is a row of its own, whose note
says how far its scores are from float32's. First calls and memory are measured in a process for each.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..engine.inference.predictor import Predictor
from ..engine.model.checkpoints import load_model
from ..engine.model.mask_rcnn import MaskRCNN
from .device import has_bfloat16
from .fresh import in_its_own_process
from .harness import Row, WallClock, compare, optional
from .matching import BFLOAT16, Found, disagreement, summary
from .networks import random_resnet, torchvision_twin

__all__ = ["run"]

Picture = NDArray[np.uint8]
Call = Callable[[], list[Found]]
BF16 = "trimask, bfloat16"


@dataclass(frozen=True)
class Case:
    """A model and a picture.

    Attributes:
        model: "people", or a ResNet's depth.
        sample: one of scikit-image's.
        size: (height, width) that it is cut to, from its upper left corner; None for all of it.
        step: take every so many rows and columns.
    """

    name: str
    model: str
    sample: str
    size: tuple[int, int] | None = None
    step: int = 1
    max_detections: int = 100

    def arguments(self) -> tuple[Any, ...]:
        """For another process."""
        return (self.model, self.sample, self.size, self.step, self.max_detections)


CASES = (
    Case("people, MobileNetV2 FPN, 512 x 512 at 320", "people", "astronaut"),
    Case("ResNet-50 FPN, 400 x 600 at 800 x 1200, 100 detections", "50", "coffee"),
    Case("ResNet-50 FPN, 400 x 600 at 800 x 1200, 10 detections", "50", "coffee", max_detections=10),
    Case("ResNet-50 FPN, 360 x 599 at 800 x 1331, padded to 800 x 1344", "50", "coffee", size=(360, 599)),
)


def run(threads: int, quick: bool) -> Iterator[list[Row]]:
    """The bundled model and ResNet-50 FPN, on scikit-image's photographs of an astronaut and of a cup of coffee."""
    if optional("skimage.data") is None:
        raise ImportError("models: expected scikit-image, whose sample portrait is the input; pip install scikit-image")
    for case in (replace(CASES[0], step=2),) if quick else CASES:
        yield _rows(case, rounds=2 if quick else 15 if case.model == "people" else 7, threads=threads)


def _rows(case: Case, rounds: int, threads: int) -> list[Row]:
    arguments = case.arguments()
    makers: dict[str, tuple[str, Any]] = {"torchvision": ("torchvision_call", ()), "trimask": ("trimask_call", ())}
    if has_bfloat16():
        makers[BF16] = ("trimask_call", ("bfloat16",))
    calls = {name: globals()[maker](*arguments, *more) for name, (maker, more) in makers.items()}
    bfloat16 = calls.pop(BF16, None)
    rows = compare("models", case.name, calls, disagreement, rounds=rounds, threads=threads)
    if bfloat16:
        rows += _in_bfloat16(case, calls["trimask"], bfloat16, rounds, threads)
    for i, row in enumerate(rows):
        if row.p50_ms is not None and row.implementation in makers:
            maker, more = makers[row.implementation]
            fields = in_its_own_process(maker, *arguments, *more, threads=threads)
            notes = [row.note, fields.pop("note", "")]
            rows[i] = replace(row, **fields, note="; ".join(note for note in notes if note))
    return rows


def _in_bfloat16(case: Case, exact: Call, rounded: Call, rounds: int, threads: int) -> list[Row]:
    """Its row, with what rounding does to the detections, and float32 again, interleaved with it."""
    near = partial(disagreement, tolerance=BFLOAT16)
    calls = {"trimask": exact, BF16: rounded}
    _, row = compare(
        "models", case.name, calls, near, rounds=rounds, threads=threads, clock=WallClock(), dtype="bfloat16"
    )
    apart, share = summary(exact(), rounded())
    note = f"scores at most {apart:.4f} from float32's, {share:.0%} found again"
    return [replace(row, note="; ".join(filter(None, [row.note, note])))]


def _load(model: str, sample: str, size: tuple[int, int] | None, step: int) -> tuple[MaskRCNN, Picture]:
    picture = getattr(optional("skimage.data"), sample)()
    if size:
        picture = picture[: size[0], : size[1]]
    picture = np.ascontiguousarray(picture[::step, ::step])
    return load_model("people") if model == "people" else random_resnet(int(model)), picture


def trimask_call(
    model: str,
    sample: str,
    size: tuple[int, int] | None,
    step: int,
    max_detections: int,
    dtype: str = "float32",
) -> Call:
    """Our predictor, ready to be called."""
    source, picture = _load(model, sample, size, step)
    predictor = Predictor(source, device="cpu", dtype=getattr(torch, dtype), max_detections=max_detections)

    def ours() -> list[Found]:
        result = predictor.predict(picture)
        return [Found(result.boxes, result.scores, result.labels, result.masks)]

    return ours


def torchvision_call(
    model: str, sample: str, size: tuple[int, int] | None, step: int, max_detections: int
) -> Call | None:
    """torchvision's model with the same weights; None where it is not installed."""
    torchvision = optional("torchvision")
    if torchvision is None:
        return None
    source, picture = _load(model, sample, size, step)
    config = replace(source.config, detection=replace(source.config.detection, max_detections=max_detections))
    twin = torchvision_twin(torchvision, source, config)
    image = torch.from_numpy(picture).permute(2, 0, 1).float() / 255

    @torch.inference_mode()
    def theirs() -> list[Found]:
        (found,) = twin([image])
        masks = (found["masks"][:, 0] > 0.5).numpy()
        return [Found(found["boxes"].numpy(), found["scores"].numpy(), found["labels"].numpy() - 1, masks)]

    return theirs
