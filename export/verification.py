"""Does an exported file find what its checkpoint finds? At sizes and batches that the export has not seen."""

import copy
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..engine.inference.predicting import Predicting
from ..engine.inference.predictor import Predictor
from ..engine.inference.result import Result
from ..engine.model.checkpoints import load_model
from ..engine.model.config import DetectionConfig
from ..engine.model.mask_rcnn import MaskRCNN
from ..engine.pictures.reading import expand, read
from ..engine.training.data import read_json
from ..engine.training.detection import Source, detect, sources
from ..engine.training.evaluate import evaluate
from .runtime import Runtime

__all__ = ["Check", "Tolerance", "Verification", "average_precision", "compare", "verify"]


@dataclass(frozen=True)
class Tolerance:
    """When two programs have found the same.

    Attributes:
        floor: detections of a lower score are left out.
        score: by how much scores may differ.
        iou: of the boxes, at least.
        mask_iou: of the masks, pasted into one box, at least, or no more than ``mask_pixels`` may differ.
        share: of the detections of both that need to have a partner.
        ap: by how much each average precision of COCO may fall on a data set, where one is given.
    """

    floor: float = 0.0
    score: float = 1e-3
    iou: float = 0.99
    mask_iou: float = 0.98
    mask_pixels: int = 2
    share: float = 1.0
    ap: float = 0.001


# Rounding to 16 and 8 bits moves scores and boxes; what is sure stays. Average precision is the judge of those.
TOLERANCES = {
    "float32": Tolerance(),
    "float16": Tolerance(floor=0.5, score=0.05, iou=0.9, mask_iou=0.9, share=0.97, ap=0.005),
    "int8": Tolerance(floor=0.5, score=0.3, iou=0.7, mask_iou=0.7, share=0.8, ap=0.03),
}

# A graph that resizes by Pillow's rule puts a pixel in a thousand on the next of 255 levels.
RESIZED = Tolerance(score=0.01, iou=0.97, mask_iou=0.95)


@dataclass(frozen=True)
class Check:
    """A line of the report: what was done, what came out, and whether that is right."""

    what: str
    outcome: str
    good: bool


@dataclass(frozen=True)
class Verification:
    """All the checks of a file.

    Attributes:
        path: the file.
        provider: what ran it.
        checks: one after the other.
        total: of the detections of all pictures.
    """

    path: Path
    provider: str
    checks: tuple[Check, ...]
    total: "Comparison"

    @property
    def good(self) -> bool:
        return all(check.good for check in self.checks)


def verify(
    path: str | Path,
    weights: MaskRCNN | str | Path,
    pictures: Any = None,
    *,
    data: tuple[str | Path, str | Path] | None = None,
    tolerance: Tolerance | None = None,
    device: str | None = "cpu",
    threads: int | None = None,
    backend: str = "onnxruntime",
    **options: Any,
) -> Verification:
    """Compare a file with the weights that it was made of.

    Args:
        path: the file.
        weights, options: what it was exported from.
        pictures: to compare on, in any form that :meth:`Predictor.predict` takes; by default scikit-image's portrait,
            where it is installed, in several crops. Noise and a picture without anything always come on top.
        data: a COCO annotation file and the folder of its pictures, to compare average precision on.
        tolerance: by default one that goes with the file's precision.
        device, threads, backend: as for :class:`Runtime`.

    Raises:
        ValueError: a file that trimask did not write, or weights of another model.
    """
    path = Path(path)
    runtime = Runtime(path, device=device, threads=threads, backend=backend, cache=False)
    about = runtime.about
    model = weights if isinstance(weights, MaskRCNN) else load_model(weights, **options)
    if model.config.class_names != about.config.class_names:
        raise ValueError(f"weights: expected classes {about.config.class_names}, got {model.config.class_names}")
    checks = list(_checked_by_onnx(path))
    reference = _reference(model, runtime)
    resize = about.config.input.resize
    resized = about.preprocess and resize.antialias and resize.quantize and about.precision == "float32"
    wanted = tolerance or (RESIZED if resized else TOLERANCES[about.precision])
    detection = about.config.detection
    found: list[Comparison] = []
    for batch in _batches(list(_pictures(pictures)), about.preprocess or (about.static or [3])[0] == 1):
        start = time.perf_counter()
        theirs = reference.predict(batch, batch_size=len(batch))
        middle = time.perf_counter()
        ours = runtime.predict(batch, batch_size=len(batch))
        spent = middle - start, time.perf_counter() - middle
        found.append(
            Comparison.total(
                compare(a, b, wanted, detection.score_threshold, detection.max_detections)
                for a, b in zip(ours, theirs, strict=True)
            )
        )
        checks.append(_check(found[-1], [picture.shape[:2] for picture in batch], spent, wanted.share))
    total = Comparison.total(found)
    if not total.matched + total.alone:
        checks.append(Check("detections", "none in any picture, so nothing has been compared: give others", False))
    if data is not None:
        checks += _average_precision(runtime, reference, *data, wanted.ap)
    return Verification(path, runtime.provider, tuple(checks), total)


def _pictures(source: Any) -> Iterator[NDArray[np.uint8]]:
    """The pictures to compare on, noise, and a blank one."""
    if source is not None:
        yield from (read(item).array for item in expand(source))
    else:
        try:
            from skimage.data import astronaut
        except ImportError:
            pass
        else:
            portrait = astronaut()
            yield from (portrait, portrait[:300, :420].copy(), portrait[:, 100:360].copy(), portrait[::2, ::2].copy())
    noise = np.random.default_rng(0).integers(0, 256, (9, 13, 3)).astype(np.uint8)
    yield noise.repeat(31, 0).repeat(29, 1)
    yield np.full((200, 310, 3), 114, np.uint8)


@dataclass(frozen=True)
class Comparison:
    """Of two results, the detections that count: how many have a partner, and how many have none or come before a
    better one; and the largest differences between partners, of boxes and of scores, and in pixels of a mask."""

    matched: int
    alone: int
    box: float
    score: float
    pixels: int

    @classmethod
    def total(cls, parts: Iterable["Comparison"]) -> "Comparison":
        matched, alone, *largest = zip(*([0, 0, 0.0, 0.0, 0], *map(astuple, parts)), strict=True)
        return cls(sum(matched), sum(alone), *map(max, largest))


def compare(ours: Result, theirs: Result, tolerance: Tolerance, threshold: float, capacity: int) -> Comparison:
    """Match detections one to one: as sets, since rows of nearly equal scores may change places.

    A detection without a partner does not count where rounding decides whether it is there at all: near the score
    threshold, the floor of the tolerance, or the last one of a result that is full.
    """
    cuts = [max(threshold, tolerance.floor)]
    cuts += [float(result.scores.min()) for result in (ours, theirs) if len(result) == capacity]
    iou = _iou(ours.boxes, theirs.boxes)
    gap = np.abs(ours.scores[:, None] - theirs.scores)  # [N, M]
    fits = (ours.labels[:, None] == theirs.labels) & (gap < tolerance.score) & (iou > tolerance.iou)
    masks = ours.masks if ours.has_masks and theirs.has_masks else None
    partners: dict[int, tuple[int, int]] = {}  # ours: theirs, and pixels
    for j in np.flatnonzero(theirs.scores >= tolerance.floor):
        for i in sorted(set(np.flatnonzero(fits[:, j])) - set(partners), key=lambda i: gap[i, j]):
            pixels: int | None = 0
            if masks is not None:  # in one box: rounding a corner to the next whole pixel moves a mask by a row
                other = replace(theirs[[j]], boxes=ours.boxes[[i]]).masks[0]
                pixels = _different(masks[i], other, tolerance)
            if pixels is not None:
                partners[int(i)] = int(j), pixels
                break
    taken = {j for j, _ in partners.values()}
    alone = [score for i, score in enumerate(ours.scores) if i not in partners]
    alone += [score for j, score in enumerate(theirs.scores) if j not in taken]
    sure = [x for x in alone if x >= tolerance.floor and all(abs(x - cut) >= tolerance.score for cut in cuts)]
    pairs = [(i, j) for i, (j, _) in partners.items()]
    return Comparison(
        matched=len(pairs),
        alone=len(sure) + int((np.diff(ours.scores) > 0).sum()),
        box=max((float(np.abs(ours.boxes[i] - theirs.boxes[j]).max()) for i, j in pairs), default=0.0),
        score=max((float(gap[i, j]) for i, j in pairs), default=0.0),
        pixels=max((pixels for _, pixels in partners.values()), default=0),
    )


def _iou(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    """[N, 4], [M, 4] -> [N, M]."""
    low, high = np.maximum(a[:, None, :2], b[:, :2]), np.minimum(a[:, None, 2:], b[:, 2:])
    shared = np.clip(high - low, 0, None).prod(-1)
    area = [(boxes[:, 2:] - boxes[:, :2]).prod(-1) for boxes in (a, b)]
    return shared / np.maximum(area[0][:, None] + area[1] - shared, np.float32(1e-12))


def _different(a: NDArray[np.bool_], b: NDArray[np.bool_], tolerance: Tolerance) -> int | None:
    """In how many pixels two masks differ; None where that is too many."""
    different = int(np.count_nonzero(a ^ b))
    if different <= tolerance.mask_pixels:
        return different
    union = int(np.count_nonzero(a | b))
    return different if 1 - different / union > tolerance.mask_iou else None


def _checked_by_onnx(path: Path) -> Iterator[Check]:
    import onnx

    try:
        model = onnx.load(path, load_external_data=False)
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # of several kinds, from C++ too
        yield Check("onnx checker, full", str(error).strip().splitlines()[0], False)
        return
    yield Check("onnx checker, full", f"{len(model.graph.node)} nodes, opset {model.opset_import[0].version}", True)
    domains = {node.domain for node in model.graph.node} | {entry.domain for entry in model.opset_import}
    foreign = sorted(domains - {"", "ai.onnx"})
    yield Check("operators", ", ".join(foreign) or "of the standard domain alone", not foreign and not model.functions)


def _reference(model: MaskRCNN, runtime: Runtime) -> Predicting:
    """The torch predictor with the file's config: thresholds, capacity and resize policy."""
    predictor = Predictor(model, device="cpu")
    predictor.config = runtime.config
    if runtime.about.static is None:
        return predictor
    # The batch of a file of fixed size has that size, which no predictor of torch gives it.
    reference = copy.copy(runtime)
    reference._backend = _Torch(predictor.graph, runtime.config.detection)
    return reference


@dataclass
class _Torch:
    """The model as a backend: the inputs and outputs of an exported file."""

    graph: MaskRCNN
    detection: DetectionConfig
    provider = "torch"

    @torch.inference_mode()
    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        sizes = (inputs[name] for name in ("image", "image_sizes", "original_sizes"))
        found = self.graph(*map(torch.from_numpy, sizes), detection=self.detection)
        outputs = {"num_detections": found.count, "boxes": found.boxes, "scores": found.scores, "labels": found.labels}
        if found.mask_logits is not None:
            outputs["masks"] = found.mask_logits.sigmoid()
        return {name: value.numpy() for name, value in outputs.items()}


def _batches(pictures: list[NDArray[np.uint8]], single: bool) -> Iterator[list[NDArray[np.uint8]]]:
    """Each picture on its own, then all of them in batches of three and two by turns, unless only one fits."""
    yield from ([picture] for picture in pictures)
    rest = [] if single else pictures
    for together in cycle((3, 2)):
        if not rest:
            return
        yield rest[:together]
        rest = rest[together:]


def average_precision(
    program: Predicting,
    content: Mapping[str, Any],
    pictures: Sequence[Source],
    kinds: Sequence[str] = ("bbox", "segm"),
) -> dict[str, float]:
    """COCO's AP of a program, by kind.

    Args:
        program: what predicts.
        content: of a COCO annotation file.
        pictures: of it.
        kinds: "bbox", "segm".

    Raises:
        ValueError: what :func:`evaluate` refuses.
        ImportError: pycocotools is missing.
    """
    known = {category["id"] for category in content["categories"]}
    found = [x for entries in detect(program.predict, pictures) for x in entries if x["category_id"] in known]
    figures = evaluate(found, content, kinds=kinds).summary
    return {kind: figures[f"{kind}_AP"] for kind in kinds}


def _average_precision(
    ours: Runtime, theirs: Predicting, annotations: str | Path, images: str | Path, limit: float
) -> Iterator[Check]:
    """Of both programs on the same pictures."""
    content = read_json(Path(annotations))
    pictures = sources(content, images)
    kinds = ["bbox"] if ours.about.masks == "none" else ["bbox", "segm"]
    before, after = (average_precision(program, content, pictures, kinds) for program in (theirs, ours))
    for kind in kinds:
        outcome = f"torch {before[kind]:.4f}, file {after[kind]:.4f}, {len(pictures)} pictures"
        yield Check(f"{kind} AP", outcome, after[kind] >= before[kind] - limit)


def _check(found: Comparison, sizes: list[tuple[int, ...]], spent: tuple[float, float], share: float) -> Check:
    return Check(
        "batch of " + ", ".join(f"{w}x{h}" for h, w in sizes),
        f"{found.matched} matched, {found.alone} not; boxes {found.box:.1e}, scores {found.score:.1e}, "
        f"masks {found.pixels} px; torch {spent[0]:.2f} s, file {spent[1]:.2f} s",
        found.matched >= share * (found.matched + found.alone),
    )
