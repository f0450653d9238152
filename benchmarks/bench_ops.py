"""The ops of `trimask.kernels` on a CPU against what they replace, on the inputs of `cases`.

An op of ours is named "trimask"; what runs on a GPU alone is listed. The plain reference of the tests, an element at a
time, takes part where that is a matter of seconds.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..kernels.cpu.masks import encode_runs
from ..kernels.paste_rule import PasteRule
from ..kernels.pasting import paste_masks
from ..kernels.reference import masks as reference_masks
from ..kernels.reference import roi_pooling as reference_pooling
from ..kernels.reference import suppression as reference_suppression
from ..kernels.rle import masks_to_rle
from ..kernels.roi_pooling import pyramid_roi_align, roi_align, roi_pool
from ..kernels.suppression import nms, segmented_nms
from . import cases
from .comparison import NEEDS_A_GPU, Comparison, Planned, affordable, bounded
from .harness import Row
from .inputs import STRIDES, dtype_name, pixels_under
from .installed import optional

__all__ = ["MINUTES", "plan", "run", "torchvision_paste"]

ops = optional("torchvision.ops")
roi_heads = optional("torchvision.models.detection.roi_heads")
coco = optional("pycocotools.mask")

MINUTES = 15.0
DEAR = 4.0  # seconds of a call of each
REFERENCE = "plain torch reference"
TRITON = "trimask, Triton"
TOO_SLOW = "left out: an element at a time"
MOST_OF_REFERENCE = {"RoIs x channels": 200, "boxes": 2000, "pixels": 20_000_000}
Make = Callable[[], Comparison]
RUN_CAPACITY = 8192  # runs of a mask: two a column of the widest one fit


def run(threads: int, quick: bool, minutes: float = MINUTES) -> Iterator[list[Row]]:
    """The rows of each case as soon as it is done; `quick` is small and shows that everything runs, no more."""

    def rows(make: Make) -> list[Row]:
        return make().rows(threads, quick)

    planned = [Planned(subject, name, cost, partial(rows, make)) for subject, name, cost, make in plan(quick)]
    planned.sort(key=lambda case: case.seconds > DEAR)  # if something is left out, let it be these
    yield from bounded(planned, threads, quick, 60 * minutes)


def plan(quick: bool) -> Iterator[tuple[str, str, float, Make]]:
    """Subject, name and cost in seconds of every case, and what makes its comparison."""
    for case in cases.roi_align_cases(quick):
        yield "roi_align", case.name, case.seconds, partial(_roi_align, case)
    for map_case in cases.map_cases(quick):
        yield "roi_pool" if map_case.maximum else "roi_align", map_case.name, map_case.seconds, partial(_map, map_case)
    for nms_case in cases.nms_cases(quick):
        yield "nms", nms_case.name, nms_case.seconds, partial(_nms, nms_case)
    for level_case in cases.level_cases(quick):
        yield "nms", level_case.name, level_case.seconds, partial(_levels, level_case)
    for detection_case in cases.detection_cases(quick):
        yield "nms", detection_case.name, detection_case.seconds, partial(_detections, detection_case)
    for subject, make in (("paste_masks", _paste), ("masks_to_rle", _run_lengths)):
        for mask_case in cases.mask_cases(quick):
            cost = mask_case.seconds if _fits(mask_case) else 0.05 * mask_case.seconds  # ours alone
            yield subject, mask_case.name, cost, partial(make, mask_case)


def _fits(case: cases.MaskCase) -> bool:
    """Whether there is memory for the peers' masks."""
    return not affordable(12 * case.pixels)


def _roi_align(case: cases.RoIAlignCase) -> Comparison:
    planar, boxes, padded = case.features(), case.boxes(), case.padded
    last = [feature.to(memory_format=torch.channels_last) for feature in planar]
    # What a side may be off from float64: a coordinate, at float32's precision, and the dtype's rounding; twice that in
    # half precision, where both are.
    place = torch.finfo(torch.float32).eps * padded[1] / STRIDES[0]
    rounding = torch.finfo(case.dtype).eps * (case.dtype in (torch.float16, torch.bfloat16))
    largest = max(float(feature.abs().max()) for feature in planar)
    tolerance = (place if case.dtype.itemsize > 2 else 2 * (place + rounding)) * largest

    def trimask(features: list[Tensor]) -> Tensor:
        ratio, output = case.sampling_ratio, case.output
        return pyramid_roi_align(features, boxes[None], STRIDES, output, sampling_ratio=ratio, aligned=False)[0]

    pool = ops and ops.MultiScaleRoIAlign(["0", "1", "2", "3"], case.output, case.sampling_ratio)

    def torchvision(features: list[Tensor]) -> Tensor:
        levels = {str(level): feature for level, feature in enumerate(features)}
        found: Tensor = pool(levels, [boxes.to(case.dtype)], [padded])
        return found

    def reference() -> Tensor:
        output = (case.output, case.output)
        ratio = case.sampling_ratio
        exact = reference_pooling.pyramid_roi_align
        return exact(planar, boxes[None], STRIDES, output, sampling_ratio=ratio, aligned=False)[0]

    def off(expected: Tensor, got: Tensor) -> Tensor:
        return (expected.double() - got.double()).abs()

    def disagreement(expected: Tensor, got: Tensor) -> str:
        error = float(off(expected, got).max())
        return "" if error <= tolerance else f"off by {error:.1e}, more than {tolerance:.1e}"

    def near(expected: Tensor, got: Tensor) -> str:
        """In half precision torchvision's coordinates are off by up to half a pixel, which moves every value."""
        error = float(off(expected, got).mean())
        half = case.dtype.itemsize == 2
        return disagreement(expected, got) if not half else "" if error <= 0.1 else f"off by {error:.1e} on average"

    few = case.count * case.channels <= MOST_OF_REFERENCE["RoIs x channels"]
    exact = case.dtype.itemsize > 2  # torchvision is no standard in half precision: ours are held to each other
    ours = {
        "trimask, NCHW": lambda: trimask(planar),
        "trimask, channels_last": lambda: trimask(last),
    }
    theirs = {
        "torchvision": (lambda: torchvision(planar)) if ops else None,
        "torchvision, channels_last": (lambda: torchvision(last)) if ops else None,
    }
    implementations = {**theirs, **ours} if exact else {**ours, **theirs}
    if few:
        implementations[REFERENCE] = reference
    absent = {TRITON: NEEDS_A_GPU} | ({} if few else {REFERENCE: TOO_SLOW})
    names = {"count": "RoIs", "channels": "channels", "output": "pool"}
    variable = {names[case.varied]: float(getattr(case, case.varied))} if case.varied else None
    dtype = dtype_name(case.dtype)
    return Comparison(
        "roi_align",
        case.name,
        implementations,
        disagreement,
        near=near,
        dtype=dtype,
        absent=absent,
        least_bytes=(pixels_under(boxes[None], padded) + case.count * case.output**2)
        * case.channels
        * case.dtype.itemsize,
        operations=case.operations,
        variable=variable,
    )


def _map(case: cases.MapCase) -> Comparison:
    planar, boxes = case.feature(), torch.nn.functional.pad(case.boxes(), (1, 0))
    last = planar.to(memory_format=torch.channels_last)
    options = (case.output, 1 / case.stride) if case.maximum else (case.output, 1 / case.stride, 2)
    ours = roi_pool if case.maximum else roi_align
    theirs = ops and (ops.roi_pool if case.maximum else ops.roi_align)

    def disagreement(expected: Tensor, got: Tensor) -> str:
        error = float((expected - got).abs().max())
        return "" if error <= (0.0 if case.maximum else 1e-4) else f"off by {error:.1e}"

    return Comparison(
        "roi_pool" if case.maximum else "roi_align",
        case.name,
        {
            "torchvision": partial(theirs, planar, boxes, *options) if ops else None,
            "trimask, NCHW": partial(ours, planar, boxes, *options),
            "trimask, channels_last": partial(ours, last, boxes, *options),
        },
        disagreement,
        absent={TRITON: NEEDS_A_GPU},
    )


def _nms(case: cases.NMSCase) -> Comparison:
    boxes, scores = case.boxes(), case.scores()

    def segmented(function: Callable[..., tuple[Tensor, Tensor]]) -> Tensor:
        keep, found = function(boxes[None], scores[None], case.iou_threshold, case.kept or case.count)
        return keep[0, : found.item()]

    def torchvision() -> Tensor:
        return ops.nms(boxes, scores, case.iou_threshold)[: case.kept]

    def disagreement(expected: Tensor, got: Tensor) -> str:
        return "" if torch.equal(expected, got) else f"other indices: {len(got)} kept instead of {len(expected)}"

    few = case.count <= MOST_OF_REFERENCE["boxes"]
    whole = partial(nms, boxes, scores, case.iou_threshold)
    implementations: dict[str, Any] = {
        "torchvision": torchvision if ops else None,
        "trimask": whole if case.kept is None else partial(segmented, segmented_nms),
    }
    if few:
        implementations[REFERENCE] = partial(segmented, reference_suppression.segmented_nms)
    absent = {TRITON: NEEDS_A_GPU, "conch": NEEDS_A_GPU} | ({} if few else {REFERENCE: TOO_SLOW})
    name = f"{case.name}, {len(whole())} survive"
    variable = None if case.kept else {"boxes": float(case.count)}
    return Comparison("nms", name, implementations, disagreement, absent=absent, variable=variable)


def _same_sets(expected: list[Tensor], got: list[Tensor], allowed: float) -> str:
    """Of each segment the same boxes: equal scores may come in any order."""
    pairs = list(zip(expected, got, strict=True))
    wrong = sum(len(set(a.tolist()) ^ set(b.tolist())) for a, b in pairs)
    total = sum(len(a) for a, _ in pairs)
    return "" if wrong <= allowed * total else f"{wrong} of {total} boxes differ"


def _levels(case: cases.LevelCase) -> Comparison:
    seen = cases.recording(case.recorded)
    boxes, scores = seen.level_boxes, seen.level_scores
    there = (scores > -torch.inf).flatten()
    rows = torch.arange(len(there))[there]
    flat, flat_scores, level = boxes.flatten(0, 1)[there], scores.flatten()[there], rows // scores.shape[1]

    def segmented(function: Callable[..., tuple[Tensor, Tensor]]) -> list[Tensor]:
        options = {"score_threshold": -torch.inf}
        keep, found = function(boxes, scores, case.iou_threshold, scores.shape[1], **options)
        return [row[:n] for row, n in zip(keep, found.tolist(), strict=True)]

    def torchvision() -> Tensor:
        return ops.batched_nms(flat, flat_scores, level, case.iou_threshold)

    def by_level(found: Any) -> list[Tensor]:
        if isinstance(found, list):
            return found
        row = rows[found]
        return [row[row // scores.shape[1] == s] % scores.shape[1] for s in range(len(scores))]

    def disagreement(expected: Any, got: Any) -> str:
        return _same_sets(by_level(expected), by_level(got), 0)

    implementations = {
        "torchvision": torchvision if ops else None,
        "trimask": partial(segmented, segmented_nms),
        REFERENCE: partial(segmented, reference_suppression.segmented_nms),
    }
    absent = {TRITON: NEEDS_A_GPU, "conch": NEEDS_A_GPU}
    name = f"{case.name}, {int(there.sum())} anchors"
    return Comparison("nms", name, implementations, disagreement, absent=absent)


def _detections(case: cases.DetectionCase) -> Comparison:
    boxes, scores, labels = case.candidates()

    def segmented(function: Callable[..., tuple[Tensor, Tensor]]) -> list[Tensor]:
        limits = {"labels": labels[None], "score_threshold": case.score_threshold}
        keep, found = function(boxes[None], scores[None], case.iou_threshold, case.kept, **limits)
        return [keep[0, : found.item()]]

    def torchvision() -> list[Tensor]:
        above = (scores > case.score_threshold).nonzero()[:, 0]
        kept = ops.batched_nms(boxes[above], scores[above], labels[above], case.iou_threshold)
        return [above[kept[: case.kept]]]

    classes, above = int(labels.max()) + 1, int((scores > case.score_threshold).sum())
    few = len(scores) <= MOST_OF_REFERENCE["boxes"]
    implementations: dict[str, Any] = {
        "torchvision": torchvision if ops else None,
        "trimask": partial(segmented, segmented_nms),
    }
    if few:
        implementations[REFERENCE] = partial(segmented, reference_suppression.segmented_nms)
    absent = {TRITON: NEEDS_A_GPU} | ({} if few else {REFERENCE: TOO_SLOW})
    of = f" of {case.recorded}" if case.recorded else ""
    name = (
        f"detections{of}: {len(scores) // classes} proposals x {classes} classes, {above} above {case.score_threshold}"
    )
    return Comparison("nms", name, implementations, partial(_same_sets, allowed=0), absent=absent)


def torchvision_paste(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """torchvision's masks, bool [N, H, W], of probabilities [N, m, m] in boxes [N, 4] of a picture of (H, W)."""
    return roi_heads.paste_masks_in_image(masks[:, None], boxes, size)[:, 0] > 0.5


def _paste(case: cases.MaskCase) -> Comparison:
    masks, boxes, size = case.masks()

    def disagreement(expected: Tensor, got: Tensor) -> str:
        worst = max(int((a != b).sum()) for a, b in zip(expected, got, strict=True))
        # A pixel whose value is the threshold, but for rounding, may go either way.
        return "" if worst <= 2 else f"{worst} pixels of a mask differ"

    offers: dict[str, tuple[Any, str]] = {
        "torchvision": (
            partial(torchvision_paste, masks, boxes, size) if roi_heads else None,
            affordable(10 * case.pixels),  # in float32, twice while they are stacked
        ),
        "trimask": (partial(paste_masks, masks, boxes, size, rule=PasteRule.TORCHVISION), affordable(2 * case.pixels)),
        REFERENCE: (
            partial(reference_masks.paste_masks, masks, boxes, size, rule=PasteRule.TORCHVISION),
            "" if case.pixels <= MOST_OF_REFERENCE["pixels"] else TOO_SLOW,
        ),
        TRITON: (None, NEEDS_A_GPU),
    }
    return replace(_with_offers("paste_masks", case, case.name, offers, disagreement), least_bytes=case.pixels)


def _run_lengths(case: cases.MaskCase) -> Comparison:
    masks, boxes, size = case.masks()
    too_large = affordable(4 * case.pixels)
    dense = np.empty((0, *size), np.uint8)
    if not too_large:
        dense = paste_masks(masks, boxes, size, rule=PasteRule.TORCHVISION).byte().numpy()  # [N, H, W], rows first
    columns_first = np.asfortranarray(dense.transpose(1, 2, 0))  # [H, W, N], as pycocotools wants them

    def pycocotools() -> list[bytes]:
        return [coco.encode(np.asfortranarray(mask))["counts"] for mask in dense]

    def trimask() -> list[bytes]:
        runs, lengths = masks_to_rle(masks, boxes, size, rule=PasteRule.TORCHVISION, capacity=RUN_CAPACITY)
        return [encode_runs(row[:n]).encode() for row, n in zip(runs.numpy(), lengths.tolist(), strict=True)]

    def torchvision() -> list[bytes]:
        pasted = torchvision_paste(masks, boxes, size).permute(1, 2, 0).numpy()
        return [rle["counts"] for rle in coco.encode(pasted.astype("uint8", order="F"))]

    def disagreement(expected: list[bytes], got: list[bytes]) -> str:
        differing = sum(a != b for a, b in zip(expected, got, strict=True))
        return f"{differing} of {len(expected)} strings differ" if differing else ""

    def near(expected: list[bytes], got: list[bytes]) -> str:
        """torchvision's pixels on the threshold go either way."""
        for pair in zip(expected, got, strict=True):
            one, other = (coco.decode({"size": [*size], "counts": counts}) for counts in pair)
            if (worst := int((one != other).sum())) > 2:
                return f"{worst} pixels of a mask differ"
        return ""

    offers: dict[str, tuple[Any, str]] = {
        "pycocotools, dense masks": (pycocotools if coco else None, too_large),
        "pycocotools, columns first": (
            (lambda: [r["counts"] for r in coco.encode(columns_first)]) if coco else None,
            too_large,
        ),
        "torchvision": (torchvision if coco and roi_heads else None, affordable(12 * case.pixels)),
        "trimask": (trimask, ""),
        TRITON: (None, NEEDS_A_GPU),
    }
    name = f"{case.name}, to COCO strings; torchvision's by pycocotools"
    return replace(_with_offers("masks_to_rle", case, name, offers, disagreement), near=near)


def _with_offers(
    subject: str, case: cases.MaskCase, name: str, offers: dict[str, tuple[Any, str]], disagreement: Callable[..., str]
) -> Comparison:
    """Of implementations with reasons against them, or ""."""
    implementations = {offer: call for offer, (call, reason) in offers.items() if not reason}
    absent = {offer: reason for offer, (_, reason) in offers.items() if reason}
    values = {"": None, "count": {"masks": float(case.count)}, "size": {"pixels": float(case.size[0] * case.size[1])}}
    variable = values[case.varied]
    return Comparison(subject, name, implementations, disagreement, absent=absent, variable=variable)
